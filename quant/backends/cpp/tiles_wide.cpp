#include "tiles.h"

#if defined(INSTRUCTION_SET) && defined(WITH_AVX512)

Tile wide_tile(long pixels, long registers) {
  return registers == 3 ? tile_of<3, WIDE_SIZES>(pixels) : tile_of<4, WIDE_SIZES>(pixels);
}

#endif
