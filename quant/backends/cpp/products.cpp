// Products of uint8 codes with int8 codes on AVX512-VNNI: convolutions, linear layers, attention.
//
//   out = x_scale * scale[o] * (sum q_w (q_x - zero_point)) * row + bias[o] + plus
//
// The sum is exact in int32, so that an output depends neither on the batch nor on the threads. int8
// codes lie in blocks of 16 outputs, and there four inputs of an output side by side, as one
// instruction wants them: (O / 16, taps, C / 4, 16, 4), filled up with zeros.

#include "products.h"

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <vector>

#include "codes.h"
#include "tiles.h"


#ifdef HAS_PRODUCTS

namespace {

constexpr long STRIP = 48;  // pixels that follow each other under the same weights
constexpr int WIDE = 4;     // registers of outputs of a tile

// The next tile of `left` pixels: as few tiles as possible, of nearly the same size.
long next_tile(long left, std::initializer_list<long> sizes) {
  const long most = *(sizes.end() - 1), tiles = (left + most - 1) / most;
  const long wanted = (left + tiles - 1) / tiles;
  long found = 1;
  for (long size : sizes) {
    if (size <= left) found = size;
    if (size >= wanted) break;
  }
  return found;
}

// A row of pixels under up to WIDE blocks of weights.
void strip(const Walk& walk, const uint8_t* x, const int8_t* w, const Finish& end, long first,
           long pixels, float* out, const float* plus, const float* rows) {
  const long blocks = std::min<long>(WIDE, (end.channels - first + LANES - 1) / LANES);
  for (long done = 0, count; done < pixels; done += count) {
    const bool wide = blocks > 2;
    count = wide ? next_tile(pixels - done, {WIDE_SIZES}) : next_tile(pixels - done, {NARROW_SIZES});
    const Tile run = wide ? wide_tile(count, blocks) : narrow_tile(count, blocks);
    run(walk, x + done * walk.pixel_step, w, end, first, out + done * end.channels,
        plus ? plus + done * end.plus_step : nullptr, rows ? rows + done : nullptr);
  }
}

// clamp(round(x), ..) of 16 values, minus the zero point.
inline __m512i centred(__m512 x, const Step& step) {
  const __m512 low = _mm512_set1_ps(static_cast<float>(-step.zero_point));
  const __m512 high = _mm512_set1_ps(static_cast<float>(step.top - step.zero_point));
  x = _mm512_mul_ps(x, _mm512_set1_ps(step.inverse));
  return _mm512_cvtps_epi32(_mm512_min_ps(_mm512_max_ps(x, low), high));
}

inline __mmask16 mask_of(long left) {
  return left >= LANES ? 0xffff : static_cast<__mmask16>((1 << std::max(left, 0L)) - 1);
}

// exp of values up to 0, to about one unit in the last place: x = n ln 2 + r, a polynomial for exp(r).
inline __m512 exponential(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-87.0f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fmadd_ps(n, _mm512_set1_ps(-0.693359375f), x);
  r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.0f / 5040);
  for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  return _mm512_scalef_ps(p, n);
}

float largest(const float* x, long count) {
  __m512 most = _mm512_set1_ps(x[0]);
  for (long i = 0; i < count; i += LANES) {
    const __mmask16 mask = mask_of(count - i);
    most = _mm512_mask_max_ps(most, mask, most, _mm512_maskz_loadu_ps(mask, x + i));
  }
  return _mm512_reduce_max_ps(most);
}

// out = exp(scale * (x - the largest x)); returns the sum.
float exponentials(const float* x, long count, float scale, float* out) {
  const __m512 top = _mm512_set1_ps(largest(x, count)), factor = _mm512_set1_ps(scale);
  __m512 total = _mm512_setzero_ps();
  for (long i = 0; i < count; i += LANES) {
    const __mmask16 mask = mask_of(count - i);
    const __m512 v = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, x + i), top);
    const __m512 e = exponential(_mm512_mul_ps(v, factor));
    total = _mm512_mask_add_ps(total, mask, total, e);
    _mm512_mask_storeu_ps(out + i, mask, e);
  }
  return _mm512_reduce_add_ps(total);
}

// The codes of a row of the left operand, divided by `divisor`.
void quantize_row(const float* x, long count, const Step& step, float divisor, uint8_t* out) {
  const __m512i zero = _mm512_set1_epi32(step.zero_point);
  const __m512 by = _mm512_set1_ps(divisor);
  for (long i = 0; i < count; i += LANES) {
    __m512 v = _mm512_maskz_loadu_ps(mask_of(count - i), x + i);
    if (divisor != 1.0f) v = _mm512_div_ps(v, by);
    const __m512i q = _mm512_add_epi32(centred(v, step), zero);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm512_cvtepi32_epi8(q));
  }
}

// What the left operand is, and what its rows are divided by before they are quantized.
enum Rows : int32_t {
  AS_THEY_ARE = 0,
  RELATIVE = 1,          // by the row's largest value, which multiplies the result
  SOFTMAX = 2,           // scores, whose softmax is the operand
  SOFTMAX_RELATIVE = 3,  // both
};

// Returns the factor of the result's row. buffer: of the row's length.
float row_codes(const float* x, long count, const Step& step, int32_t kind, float score_scale,
                float* buffer, uint8_t* out) {
  if (kind == AS_THEY_ARE || kind == RELATIVE) {
    const float top = kind == RELATIVE ? largest(x, count) : 1.0f;
    quantize_row(x, count, step, top, out);
    return top;
  }
  const float total = exponentials(x, count, score_scale, buffer);
  quantize_row(buffer, count, step, kind == SOFTMAX ? total : 1.0f, out);
  return kind == SOFTMAX ? 1.0f : 1.0f / total;
}

// The right operand (inner, columns) as int8 in blocks, and the sums over its inner dimension. One
// of its two strides is 1.
void pack_right(const float* x, long inner_step, long column_step, long inner, long columns,
                const Step& step, int8_t* out, int32_t* sums) {
  const long quads = (inner + 3) / 4;
  const __m512i byte = _mm512_set1_epi32(255), ones = _mm512_set1_epi8(1);
  for (long c = 0; c < columns; c += LANES, out += quads * 4 * LANES, sums += LANES) {
    const long width = std::min(LANES, columns - c);
    __m512i total = _mm512_setzero_si512();
    if (inner_step == 1) {
      std::memset(out, 0, quads * 4 * LANES);
      for (long j = 0; j < width; ++j) {
        const float* row = x + (c + j) * column_step;
        for (long k = 0; k < inner; k += LANES) {
          const __m512i q = centred(_mm512_maskz_loadu_ps(mask_of(inner - k), row + k), step);
          const __mmask16 valid = mask_of(inner - k);
          const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_maskz_mov_epi32(valid, q));
          int32_t fours[4];
          std::memcpy(fours, &bytes, 16);
          for (long i = 0; i < std::min(4L, quads - k / 4); ++i)
            std::memcpy(out + ((k / 4 + i) * LANES + j) * 4, fours + i, 4);
        }
      }
    } else {
      const __mmask16 mask = mask_of(width);
      for (long k = 0; k < inner; k += 4) {
        __m512i four = _mm512_setzero_si512();
        for (long i = 0; i < std::min(4L, inner - k); ++i) {
          const float* row = x + (k + i) * inner_step + c;
          const __m512i q = centred(_mm512_maskz_loadu_ps(mask, row), step);
          const __m512i low = _mm512_and_si512(_mm512_maskz_mov_epi32(mask, q), byte);
          four = _mm512_or_si512(four, _mm512_sllv_epi32(low, _mm512_set1_epi32(8 * i)));
        }
        _mm512_storeu_si512(out + k * LANES, four);
      }
    }
    for (long q = 0; q < quads; ++q)
      total = _mm512_dpbusd_epi32(total, ones, _mm512_loadu_si512(out + q * 4 * LANES));
    _mm512_storeu_si512(sums, total);
  }
}

}  // namespace

extern "C" int32_t has_products() { return 1; }

void convolution(const uint8_t* codes, const Weight& weight, const float* bias, const Plus& plus,
                 float* out, const Shape& of, float x_scale, int32_t zero_point, int32_t threads) {
  const long channels = of.channels;
  const Walk walk{of.rows,      of.columns,
                  of.width * channels, channels,
                  of.stride_x * channels, channels / 4,
                  of.rows * of.columns * channels * LANES};
  const Finish end{weight.sums, weight.scale, bias, x_scale, zero_point, of.outputs, plus.pixel};
  const long wide = WIDE * LANES;
  const long groups = (of.outputs + wide - 1) / wide, strips = (of.out_width + STRIP - 1) / STRIP;
  const long all = groups * of.batch * of.out_height * strips;
#pragma omp parallel for num_threads(threads) if (threads > 1 && all > 1) schedule(static)
  for (long i = 0; i < all; ++i) {
    const long left = i % strips * STRIP, y = i / strips % of.out_height;
    const long line = i / strips / of.out_height, b = line % of.batch, first = line / of.batch * wide;
    const long pixel = (b * of.out_height + y) * of.out_width + left;
    const uint8_t* x =
        codes + ((b * of.height + y * of.stride_y) * of.width + left * of.stride_x) * channels;
    const float* added = nullptr;
    if (plus.values)
      added = plus.values + b * plus.sample + (y * of.out_width + left) * plus.pixel;
    strip(walk, x, weight.codes + first / LANES * walk.block, end, first,
          std::min(STRIP, of.out_width - left), out + pixel * of.outputs, added, nullptr);
  }
}

// out (batch, rows, columns) = left (batch, rows, inner) @ right (batch, inner, columns).
extern "C" void matrix_product(const float* left, const float* right, float* out, const long* size,
                               float left_inverse, int32_t left_zero_point, int32_t left_top,
                               float right_inverse, int32_t right_zero_point, int32_t right_top,
                               float scale, int32_t kind, float score_scale, int32_t threads) {
  const long batch = size[0], rows = size[1], inner = size[2], columns = size[3];
  const long left_batch = size[4], left_row = size[5];
  const long right_batch = size[6], right_inner = size[7], right_column = size[8];
  const long quads = (inner + 3) / 4, blocks = (columns + LANES - 1) / LANES;
  const long pitch = (inner + LANES - 1) / LANES * LANES;
  const Step of_left{left_inverse, left_zero_point, left_top};
  const Step of_right{right_inverse, right_zero_point, right_top};
  const long block = blocks * quads * 4 * LANES, strips = (rows + STRIP - 1) / STRIP;
  std::vector<int8_t> packed(batch * block);
  std::vector<int32_t> sums(batch * blocks * LANES);
  const Walk walk{1, 1, 0, 0, pitch, quads, quads * 4 * LANES};
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::vector<uint8_t> codes(STRIP * pitch);
    std::vector<float> tops(STRIP), buffer(inner);
#pragma omp for schedule(static)
    for (long b = 0; b < batch; ++b)
      pack_right(right + b * right_batch, right_inner, right_column, inner, columns, of_right,
                 &packed[b * block], &sums[b * blocks * LANES]);
#pragma omp for schedule(static)
    for (long s = 0; s < batch * strips; ++s) {
      const long b = s / strips, r = s % strips * STRIP, count = std::min(STRIP, rows - r);
      const Finish end{&sums[b * blocks * LANES], nullptr, nullptr, scale, left_zero_point, columns, 0};
      for (long i = 0; i < count; ++i)
        tops[i] = row_codes(left + b * left_batch + (r + i) * left_row, inner, of_left, kind,
                            score_scale, buffer.data(), codes.data() + i * pitch);
      for (long first = 0; first < columns; first += WIDE * LANES)
        strip(walk, codes.data(), &packed[b * block] + first / LANES * walk.block, end, first,
              count, out + (b * rows + r) * columns, nullptr, tops.data());
    }
  }
}

#else

extern "C" int32_t has_products() { return 0; }

#endif
