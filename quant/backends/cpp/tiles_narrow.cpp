#include "tiles.h"

#ifdef INSTRUCTION_SET

Tile narrow_tile(long pixels, long registers) {
  return registers == 1 ? tile_of<1, NARROW_SIZES>(pixels) : tile_of<2, NARROW_SIZES>(pixels);
}

#endif
