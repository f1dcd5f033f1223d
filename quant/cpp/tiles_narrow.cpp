#include "tiles.h"

#ifdef HAS_PRODUCTS

Tile narrow_tile(long pixels, long registers) {
  using Pixels = std::make_index_sequence<TALL>;
  return registers == 1 ? tile_of<1>(pixels, Pixels()) : tile_of<2>(pixels, Pixels());
}

#endif
