#include "amx.h"

#ifdef WITH_AMX
#include <sys/syscall.h>
#include <unistd.h>

namespace {

constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA

struct alignas(64) Configuration {  // as the processor reads it
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};  // of a row of each tile
  uint8_t rows[16] = {};
};

// The sums of M tiles of pixels and N blocks of outputs: tile 2 m + n. Codes are in 4 and 5, weights
// in 6 and 7.
template <int M, int N>
void multiply(const Walk& walk, long depth, const Pixels* tiles, const int8_t* w,
              int32_t (*sums)[PIXELS][BLOCK]) {
  _tile_zero(0);
  if (N > 1) _tile_zero(1);
  if (M > 1) _tile_zero(2);
  if (M > 1 && N > 1) _tile_zero(3);
  for (long r = 0; r < walk.rows; ++r) {
    const long row = r * walk.row_step;
    for (long k = row; k < row + 4 * walk.quads; k += 4 * depth, w += 4 * BLOCK * depth) {
      _tile_loadd(4, tiles[0].x + k, walk.pixel_step);
      _tile_loadd(6, w, 4 * BLOCK);
      _tile_dpbusd(0, 4, 6);
      if (N > 1) _tile_loadd(7, w + walk.block, 4 * BLOCK);
      if (N > 1) _tile_dpbusd(1, 4, 7);
      if (M > 1) _tile_loadd(5, tiles[1].x + k, walk.pixel_step);
      if (M > 1) _tile_dpbusd(2, 5, 6);
      if (M > 1 && N > 1) _tile_dpbusd(3, 5, 7);
    }
  }
  _tile_stored(0, sums[0], 4 * BLOCK);
  if (N > 1) _tile_stored(1, sums[1], 4 * BLOCK);
  if (M > 1) _tile_stored(2, sums[2], 4 * BLOCK);
  if (M > 1 && N > 1) _tile_stored(3, sums[3], 4 * BLOCK);
}

}  // namespace

bool amx_allowed() {
  static const bool allowed = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
  return allowed;
}

long amx_depth(long quads) {
  if (!amx_allowed()) return 0;
  for (long depth = 16; depth >= 8; --depth)
    if (quads % depth == 0) return depth;
  return 0;
}

Amx::Amx(long pixels, long depth) : depth(depth) {
  if (depth == 0) return;
  Configuration to;
  for (int tile = 0; tile < 8; ++tile) {
    const bool codes = tile == 4 || tile == 5;
    to.rows[tile] = static_cast<uint8_t>(tile < 6 ? pixels : depth);
    to.bytes[tile] = static_cast<uint16_t>(4 * (codes ? depth : BLOCK));
  }
  asm volatile("" : : "r"(&to) : "memory");  // GCC believes that only its first 8 bytes are read
  _tile_loadconfig(&to);
}

Amx::~Amx() {
  if (depth) _tile_release();
}

void Amx::run(const Walk& walk, const Pixels* tiles, long count, const int8_t* w, const Finish& end,
              long first) const {
  alignas(64) int32_t sums[4][PIXELS][BLOCK];
  const long blocks = end.channels - first > BLOCK ? 2 : 1;
  if (count == 2)
    (blocks == 2 ? multiply<2, 2> : multiply<2, 1>)(walk, depth, tiles, w, sums);
  else
    (blocks == 2 ? multiply<1, 2> : multiply<1, 1>)(walk, depth, tiles, w, sums);
  for (long n = 0; n < blocks; ++n) {
    const Outputs finish(end, first + n * BLOCK);
    for (long i = 0; i < count; ++i) {
      const Pixels& tile = tiles[i];
      for (long m = tile.start; m < tile.stop; ++m)
        finish(load_all(sums[2 * i + n][m]), tile.out + m * end.channels,
               tile.plus ? tile.plus + m * end.plus_step : nullptr,
               tile.rows ? tile.rows + m : nullptr);
    }
  }
}

#endif
