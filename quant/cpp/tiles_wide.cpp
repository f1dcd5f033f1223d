#include "tiles.h"

#ifdef HAS_PRODUCTS

Tile wide_tile(long pixels, long registers) {
  using Pixels = std::make_index_sequence<SHORT>;
  return registers == 3 ? tile_of<3>(pixels, Pixels()) : tile_of<4>(pixels, Pixels());
}

#endif
