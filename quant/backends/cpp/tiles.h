// The innermost loops of the products: tiles of M pixels by N registers of outputs.
//
// VNNI multiplies four codes of uint8 with four of int8 and adds all of it to an int32, exactly.
// AVX2 adds the products in pairs, in int16. Sums of `depth` such pairs are made there before they
// go to int32, as many as fit 16 bits whatever the uint8 codes are. Weights of which not even one
// pair fits are two planes of 4 bits, 16 * first + second, whose sums meet in int32.

#pragma once

#include "products.h"

#ifdef INSTRUCTION_SET
#include <cstdint>
#include <cstring>
#include <initializer_list>

// Blocks of outputs of a tile, and pixels of a tile of up to two registers of outputs, and of a
// wider one: the sums fit the 32 (AVX-512) or 16 registers. Few sizes, since each is compiled.
#ifdef WITH_AVX512
constexpr int WIDE = 4;
#define NARROW_SIZES 1, 2, 4, 8, 12
#else
constexpr int WIDE = 1;
#define NARROW_SIZES 1, 2, 3, 4, 5, 6
#endif
#define WIDE_SIZES 1, 2, 4, 5, 6
constexpr long STRIP = 48;  // pixels that follow each other under the same weights

// The next tile of `left` pixels: as few tiles as possible, of nearly the same size.
inline long next_tile(long left, std::initializer_list<long> sizes) {
  const long most = *(sizes.end() - 1), tiles = (left + most - 1) / most;
  const long wanted = (left + tiles - 1) / tiles;
  long found = 1;
  for (long size : sizes) {
    if (size <= left) found = size;
    if (size >= wanted) break;
  }
  return found;
}

struct Walk {  // through the codes of one output, in bytes
  long rows, row_step, pixel_step;
  long quads;          // of a row, whose columns follow each other
  long planes, depth;  // see Weight
  long block;          // of the 16 outputs' weights, all planes
};

struct Finish {  // null pointers: no such term
  const int32_t* sums;
  const float *scale, *bias;
  float x_scale;
  int32_t zero_point;
  long channels;  // outputs, beside each other in out and plus
  long plus_step;  // values from one pixel's plus to the next
};

// Pixels that follow each other. plus, rows: null where there are none. Of those that are multiplied,
// the results from `start` to before `stop` are written.
struct Pixels {
  const uint8_t* x;
  float* out;
  const float *plus, *rows;
  long start, stop;
};

// From the sums of a register of outputs to what is written.
struct Outputs {
  long first;
  Mask mask;
  Ints shift;
  Floats scale, bias;

  Outputs(const Finish& end, long o) : first(o), mask(mask_of(end.channels - o)) {
    shift = mul(load(mask, end.sums + o), all(end.zero_point));
    scale = all(end.x_scale);
    bias = all(0.0f);
    if (end.scale) scale = mul(scale, load(mask, end.scale + o));
    if (end.bias) bias = load(mask, end.bias + o);
  }

  // out, plus: of a pixel; row: its factor. plus and row may be null.
  void operator()(Ints sum, float* out, const float* plus, const float* row) const {
    Floats y = mul(floats(sub(sum, shift)), scale);
    if (row) y = mul(y, all(*row));
    y = add(y, bias);
    if (plus) y = add(y, load(mask, plus + first));
    store(out + first, mask, y);
  }
};

inline Ints four_codes(const uint8_t* from) {
  int32_t four;
  std::memcpy(&four, from, 4);
  return all(four);
}

// Of register n of a tile's weights, from those of its first block.
inline long weight_offset(int n, long block) {
  return n / PER_BLOCK * block + n % PER_BLOCK * 4 * LANES;
}

#if defined(WITH_AVX512) || defined(WITH_VNNI)

template <int M, int N>
inline void add_products(const Walk& walk, const uint8_t* x, const int8_t* w, Ints (&sum)[M][N]) {
  for (long r = 0; r < walk.rows; ++r) {
    const uint8_t* p = x + r * walk.row_step;
    for (long q = 0; q < walk.quads; ++q, p += 4, w += 4 * BLOCK) {
      Ints weight[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) weight[n] = load_all(w + weight_offset(n, walk.block));
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const Ints code = four_codes(p + m * walk.pixel_step);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) sum[m][n] = add_four(sum[m][n], code, weight[n]);
      }
    }
  }
}

#else

template <int M, int N>
inline void add_products(const Walk& walk, const uint8_t* x, const int8_t* w, Ints (&sum)[M][N]) {
  for (long plane = 0; plane < walk.planes; ++plane) {
    const Ints factor = _mm256_set1_epi16(plane + 1 < walk.planes ? 16 : 1);
    for (long r = 0; r < walk.rows; ++r) {
      const uint8_t* p = x + r * walk.row_step;
      for (long q = 0; q < walk.quads; q += walk.depth) {
        Ints pairs[M][N];
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
          for (int n = 0; n < N; ++n) pairs[m][n] = _mm256_setzero_si256();
        const int8_t* end = w + 4 * BLOCK * std::min(walk.depth, walk.quads - q);
        for (; w != end; p += 4, w += 4 * BLOCK) {
          Ints weight[N];
#pragma GCC unroll 4
          for (int n = 0; n < N; ++n) weight[n] = load_all(w + weight_offset(n, walk.block));
#pragma GCC unroll 16
          for (int m = 0; m < M; ++m) {
            const Ints code = four_codes(p + m * walk.pixel_step);
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) {
              const Ints products = _mm256_maddubs_epi16(code, weight[n]);
              // By hand, since compilers take so many products first that the sums lose their place.
              asm volatile("vpaddw %1, %0, %0" : "+x"(pairs[m][n]) : "x"(products));
            }
          }
        }
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
          for (int n = 0; n < N; ++n)
            sum[m][n] = add(sum[m][n], _mm256_madd_epi16(pairs[m][n], factor));
      }
    }
  }
}

#endif

template <int M, int N>
void tile(const Walk& walk, const uint8_t* x, const int8_t* w, const Finish& end, long first,
          float* out, const float* plus, const float* rows) {
  Ints sum[M][N];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sum[m][n] = all(0);
  add_products<M, N>(walk, x, w, sum);
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) {
    const Outputs finish(end, first + n * LANES);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
      finish(sum[m][n], out + m * end.channels, plus ? plus + m * end.plus_step : nullptr,
             rows ? rows + m : nullptr);
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
