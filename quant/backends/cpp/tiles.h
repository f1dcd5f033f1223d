// The innermost loops of the products: tiles of M pixels by N registers of outputs.

#pragma once

#include "products.h"

#ifdef HAS_PRODUCTS
#include <immintrin.h>

#include <cstdint>
#include <cstring>

constexpr long LANES = 16;     // float or int32 values of a register
// Pixels of a tile of up to two registers of outputs, and of a wider one: the sums fit the 32
// registers. Few sizes, since each is compiled.
#define NARROW_SIZES 1, 2, 4, 8, 12
#define WIDE_SIZES 1, 2, 4, 5, 6

struct Walk {  // through the codes of one output, in bytes; block: of the 16 outputs' weights
  long rows, columns, row_step, column_step, pixel_step, quads, block;
};

struct Finish {  // null pointers: no such term
  const int32_t* sums;
  const float *scale, *bias;
  float x_scale;
  int32_t zero_point;
  long channels;  // outputs, beside each other in out and plus
  long plus_step;  // values from one pixel's plus to the next
};

template <int M, int N>
void tile(const Walk& walk, const uint8_t* x, const int8_t* w, const Finish& end, long first,
          float* out, const float* plus, const float* rows) {
  __m512i sum[M][N];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sum[m][n] = _mm512_setzero_si512();
  for (long r = 0; r < walk.rows; ++r) {
    for (long c = 0; c < walk.columns; ++c) {
      const uint8_t* p = x + r * walk.row_step + c * walk.column_step;
      for (long q = 0; q < walk.quads; ++q, p += 4, w += 4 * LANES) {
        __m512i weight[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) weight[n] = _mm512_loadu_si512(w + n * walk.block);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
          int32_t four;
          std::memcpy(&four, p + m * walk.pixel_step, 4);
          const __m512i code = _mm512_set1_epi32(four);
#pragma GCC unroll 4
          for (int n = 0; n < N; ++n) sum[m][n] = _mm512_dpbusd_epi32(sum[m][n], code, weight[n]);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) {
    const long o = first + n * LANES, left = end.channels - o;
    const __mmask16 mask = left >= LANES ? 0xffff : static_cast<__mmask16>((1 << left) - 1);
    const __m512i shift = _mm512_mullo_epi32(_mm512_maskz_loadu_epi32(mask, end.sums + o),
                                             _mm512_set1_epi32(end.zero_point));
    __m512 scale = _mm512_set1_ps(end.x_scale), bias = _mm512_setzero_ps();
    if (end.scale) scale = _mm512_mul_ps(scale, _mm512_maskz_loadu_ps(mask, end.scale + o));
    if (end.bias) bias = _mm512_maskz_loadu_ps(mask, end.bias + o);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(sum[m][n], shift)), scale);
      if (rows) y = _mm512_mul_ps(y, _mm512_set1_ps(rows[m]));
      y = _mm512_add_ps(y, bias);
      if (plus) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, plus + m * end.plus_step + o));
      _mm512_mask_storeu_ps(out + m * end.channels + o, mask, y);
    }
  }
}

using Tile = void (*)(const Walk&, const uint8_t*, const int8_t*, const Finish&, long, float*,
                      const float*, const float*);

template <int N, int... M>
Tile tile_of(long pixels) {
  Tile found = nullptr;
  ((pixels == M ? void(found = tile<M, N>) : void()), ...);
  return found;
}

// Each is compiled in a file of its own, at the same time. registers: 1 and 2, or 3 and 4.
Tile narrow_tile(long pixels, long registers);
Tile wide_tile(long pixels, long registers);

#endif
