// Quantization to uint8 codes, alone or with the GroupNorm and SiLU before it, in one pass over the
// memory; and the same in float32, where there are no codes.
//
// Inputs are float32 with the channels beside each other (channels_last); see compiled.py. Threads share
// rows of pixels, and channels for the norm's sums, whose order is the same however they are shared:
// bytes depend neither on the batch nor on the threads. Codes of more than 8 bits go to two maps, of
// their low and high bytes.

#include "codes.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr float ROUNDER = 12582912.0f;  // 1.5 * 2^23, see int8_layers.py
constexpr long BLOCK = 64;              // pixels that are summed in float before they enter a double
constexpr long CHUNK = 64;              // channels whose sums one thread makes
constexpr long SMALL = 8192;            // values, below which one thread is quicker

template <typename To, typename From>
inline To bits_of(From value) {
  To result;
  std::memcpy(&result, &value, sizeof(result));
  return result;
}

inline float multiply_add(float a, float b, float c) {
#ifdef __FMA__
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// To about one unit in the last place: x = n ln 2 + r, and a polynomial for exp(r).
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float shifted = multiply_add(x, 1.44269504f, ROUNDER);
  const float n = shifted - ROUNDER;
  const float r = multiply_add(n, 2.12194440e-4f, multiply_add(n, -0.693359375f, x));
  float p = 1.0f / 5040;
  p = multiply_add(p, r, 1.0f / 720);
  p = multiply_add(p, r, 1.0f / 120);
  p = multiply_add(p, r, 1.0f / 24);
  p = multiply_add(p, r, 1.0f / 6);
  p = multiply_add(p, r, 0.5f);
  p = multiply_add(p * r, r, r) + 1.0f;
  const int32_t exponent = bits_of<int32_t>(shifted) - bits_of<int32_t>(ROUNDER) + 127;
  return p * bits_of<float>(exponent << 23);
}

template <bool SILU>
inline float normed(float x, float gain, float shift) {
  const float v = multiply_add(x, gain, shift);
  return SILU ? v / (1.0f + exponential(-v)) : v;
}

struct Input {
  const float* x;
  long stride;  // values from one pixel to the next
  const float *gain, *shift, *factors;  // per channel; gain and shift of the norm
};

template <bool NORM, bool WIDE>
void quantize_row(const float* __restrict x, const Input& in, uint8_t* __restrict out,
                  uint8_t* __restrict high_out, const Size& size, Step step) {
  const float* __restrict gain = in.gain;
  const float* __restrict shift = in.shift;
  const float* __restrict factors = in.factors;
  const float low = ROUNDER - step.zero_point, high = low + step.top;
  const int32_t offset = step.zero_point - bits_of<int32_t>(ROUNDER);
  const float inverse = step.inverse;
  const long channels = size.channels;
  for (long i = 0; i < size.width; ++i, x += in.stride, out += size.pitch, high_out += size.pitch) {
#pragma omp simd
    for (long c = 0; c < channels; ++c) {
      float v = x[c];
      if (NORM) v = normed<true>(v, gain[c], shift[c]);
      float q = v * factors[c] * inverse + ROUNDER;
      q = q < low ? low : q;
      q = q > high ? high : q;
      const int32_t code = bits_of<int32_t>(q) + offset;
      out[c] = static_cast<uint8_t>(code);
      if (WIDE) high_out[c] = static_cast<uint8_t>(code >> 8);
    }
  }
}

// Row y of the map of codes, border included, whose codes stand for zeros.
template <bool NORM>
void quantize_line(const Input& in, uint8_t* out, uint8_t* high_out, const Size& size, Step step,
                   long y) {
  const long row = (size.width + 2 * size.border_x) * size.pitch;
  const long side = size.border_x * size.pitch;
  const bool inside = y >= size.border_y && y < size.border_y + size.height;
  const long ends = inside ? side : row;  // bytes at the start that belong to the border
  for (uint8_t* map : {out, high_out}) {
    if (!map || ends == 0) continue;
    const int32_t zero = map == out ? step.zero_point & 255 : step.zero_point >> 8;
    std::memset(map + y * row, zero, ends);
    if (inside) std::memset(map + (y + 1) * row - side, zero, side);
  }
  if (!inside) return;
  const float* x = in.x + (y - size.border_y) * size.width * in.stride;
  const long at = y * row + side;
  if (high_out)
    quantize_row<NORM, true>(x, in, out + at, high_out + at, size, step);
  else
    quantize_row<NORM, false>(x, in, out + at, out + at, size, step);
}

// Row y of the map in float32, border included, which is zero.
template <bool NORM, bool SILU>
void value_line(const Input& in, float* __restrict out, const Size& size, long y) {
  const long channels = size.channels, side = size.border_x * channels, inner = size.width * channels;
  const bool inside = y >= size.border_y && y < size.border_y + size.height;
  std::fill_n(out, inside ? side : inner + 2 * side, 0.0f);
  if (!inside) return;
  std::fill_n(out + side + inner, side, 0.0f);
  const float* __restrict x = in.x + (y - size.border_y) * size.width * in.stride;
  const float* __restrict gain = in.gain;
  const float* __restrict shift = in.shift;
  out += side;
  for (long i = 0; i < size.width; ++i, x += in.stride, out += channels) {
#pragma omp simd
    for (long c = 0; c < channels; ++c)
      out[c] = NORM ? normed<SILU>(x[c], gain[c], shift[c]) : x[c];
  }
}

// Per channel of `count` neighbours: sum and sum of squares over the pixels of a sample.
void moments(const float* __restrict x, long pixels, long stride, long count,
             double* __restrict sum, double* __restrict squares) {
  float part[CHUNK], part_squares[CHUNK];
  std::fill_n(sum, count, 0.0);
  std::fill_n(squares, count, 0.0);
  for (long start = 0; start < pixels; start += BLOCK) {
    std::fill_n(part, count, 0.0f);
    std::fill_n(part_squares, count, 0.0f);
    for (long i = start; i < std::min(start + BLOCK, pixels); ++i) {
      const float* __restrict row = x + i * stride;
#pragma omp simd
      for (long c = 0; c < count; ++c) {
        part[c] += row[c];
        part_squares[c] += row[c] * row[c];
      }
    }
    for (long c = 0; c < count; ++c) {
      sum[c] += part[c];
      squares[c] += part_squares[c];
    }
  }
}

// GroupNorm of a sample as gain * x + shift per channel, from the sums of its channels.
void affine(const double* sums, const double* squares, const float* weight, const float* bias,
            long pixels, long channels, long groups, double eps, float* gain, float* shift) {
  const long width = channels / groups;
  for (long first = 0; first < channels; first += width) {
    double sum = 0, square = 0;
    for (long c = first; c < first + width; ++c) {
      sum += sums[c];
      square += squares[c];
    }
    const double mean = sum / (width * pixels);
    const double variance = std::max(square / (width * pixels) - mean * mean, 0.0);
    for (long c = first; c < first + width; ++c) {
      gain[c] = static_cast<float>(weight[c] / std::sqrt(variance + eps));
      shift[c] = static_cast<float>(bias[c] - mean * gain[c]);
    }
  }
}

// GroupNorm of each sample, gain and shift per channel.
struct Affine {
  std::vector<double> sums, squares;
  std::vector<float> gain, shift;

  explicit Affine(long count) : sums(count), squares(count), gain(count), shift(count) {}

  // Called by all threads of a team, which share the work.
  void fit(const float* x, const float* weight, const float* bias, long groups, double eps,
           const Size& size) {
    const long pixels = size.height * size.width, channels = size.channels;
    const long chunks = (channels + CHUNK - 1) / CHUNK;
#pragma omp for
    for (long i = 0; i < size.batch * chunks; ++i) {
      const long first = i % chunks * CHUNK, n = i / chunks, at = n * channels + first;
      moments(x + n * pixels * channels + first, pixels, channels,
              std::min(CHUNK, channels - first), &sums[at], &squares[at]);
    }
#pragma omp for
    for (long n = 0; n < size.batch; ++n) {
      const long at = n * channels;
      affine(&sums[at], &squares[at], weight, bias, pixels, channels, groups, eps, &gain[at],
             &shift[at]);
    }
  }
};

long lines_of(const Size& size) { return size.height + 2 * size.border_y; }

long plane_of(const Size& size) {  // bytes of a sample's codes
  return lines_of(size) * (size.width + 2 * size.border_x) * size.pitch;
}

bool worth_threads(const Size& size, int32_t threads) {
  return threads > 1 && size.batch * size.height * size.width * size.channels > SMALL;
}

}  // namespace

extern "C" void codes(const float* x, long stride, const float* factors, uint8_t* out,
                      uint8_t* high_out, const Size* size, float inverse, int32_t zero_point,
                      int32_t top, int32_t threads) {
  const long sample = size->height * size->width * stride, plane = plane_of(*size);
  const long lines = lines_of(*size);
  const Step step{inverse, zero_point, top};
#pragma omp parallel for num_threads(threads) if (worth_threads(*size, threads))
  for (long i = 0; i < size->batch * lines; ++i) {
    const long n = i / lines;
    quantize_line<false>(Input{x + n * sample, stride, nullptr, nullptr, factors}, out + n * plane,
                         high_out ? high_out + n * plane : nullptr, *size, step, i % lines);
  }
}

extern "C" void norm_silu_codes(const float* x, const float* weight, const float* bias,
                                long groups, double eps, const float* factors, uint8_t* out,
                                uint8_t* high_out, const Size* size, float inverse,
                                int32_t zero_point, int32_t top, int32_t threads) {
  const long channels = size->channels, sample = size->height * size->width * channels;
  const long plane = plane_of(*size), lines = lines_of(*size), batch = size->batch;
  const Step step{inverse, zero_point, top};
  Affine norm(batch * channels);
#pragma omp parallel num_threads(threads) if (worth_threads(*size, threads))
  {
    norm.fit(x, weight, bias, groups, eps, *size);
#pragma omp for
    for (long i = 0; i < batch * lines; ++i) {
      const long n = i / lines, at = n * channels;
      quantize_line<true>(Input{x + n * sample, channels, &norm.gain[at], &norm.shift[at], factors},
                          out + n * plane, high_out ? high_out + n * plane : nullptr, *size, step,
                          i % lines);
    }
  }
}

extern "C" void values(const float* x, long stride, const float* weight, const float* bias,
                       long groups, double eps, int32_t silu, float* out, const Size* size,
                       int32_t threads) {
  const long channels = size->channels, sample = size->height * size->width * stride;
  const long lines = lines_of(*size), line = (size->width + 2 * size->border_x) * channels;
  Affine norm(weight ? size->batch * channels : 0);
#pragma omp parallel num_threads(threads) if (worth_threads(*size, threads))
  {
    if (weight) norm.fit(x, weight, bias, groups, eps, *size);
#pragma omp for
    for (long i = 0; i < size->batch * lines; ++i) {
      const long n = i / lines, at = n * channels;
      Input in{x + n * sample, stride, nullptr, nullptr, nullptr};
      if (weight) in.gain = &norm.gain[at], in.shift = &norm.shift[at];
      float* to = out + i * line;
      if (!weight)
        value_line<false, false>(in, to, *size, i % lines);
      else if (silu)
        value_line<true, true>(in, to, *size, i % lines);
      else
        value_line<true, false>(in, to, *size, i % lines);
    }
  }
}

struct Copy {
  long batch, height, width, channels;
  long from[3], to[3];  // values from one sample, one row, one pixel to the next
};

// The pixels of a map, whose channels lie beside each other, to another place.
extern "C" void copy_pixels(const float* from, float* to, const Copy* of, int32_t threads) {
  const long lines = of->batch * of->height;
  const bool whole = of->from[2] == of->channels && of->to[2] == of->channels;  // a line at once
  const long count = whole ? 1 : of->width, size = of->channels * of->width / count * sizeof(float);
  const bool shared = threads > 1 && lines * of->width * of->channels > SMALL;
#pragma omp parallel for num_threads(threads) if (shared)
  for (long i = 0; i < lines; ++i) {
    const long n = i / of->height, y = i % of->height;
    const float* source = from + n * of->from[0] + y * of->from[1];
    float* target = to + n * of->to[0] + y * of->to[1];
    for (long x = 0; x < count; ++x, source += of->from[2], target += of->to[2])
      std::memcpy(target, source, size);
  }
}
