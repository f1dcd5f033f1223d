// Quantization to uint8 codes, alone or with the GroupNorm and SiLU before it, in one pass over the
// memory.
//
// Inputs are float32 with the channels beside each other (channels_last); see compiled.py. A sample is
// computed by one thread, so that its bytes depend neither on the batch nor on the threads. Codes of
// more than 8 bits go to two maps, of their low and high bytes.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr float ROUNDER = 12582912.0f;  // 1.5 * 2^23, see int8_layers.py
constexpr long BLOCK = 64;              // pixels that are summed in float before they enter a double

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

struct Step {  // clamp(round(x * inverse) + zero_point, 0, top)
  float inverse;
  int32_t zero_point, top;
};

struct Size {  // of the float map and of the codes: border zero points around it, pitch bytes a pixel
  long batch, height, width, channels, border_y, border_x, pitch;
};

struct Input {
  const float* x;
  long stride;  // values from one pixel to the next
  const float *gain, *shift, *factors;  // per channel; gain and shift of the norm
};

template <bool SILU, bool WIDE>
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
      if (SILU) {
        v = multiply_add(v, gain[c], shift[c]);
        v = v / (1.0f + exponential(-v));
      }
      float q = v * factors[c] * inverse + ROUNDER;
      q = q < low ? low : q;
      q = q > high ? high : q;
      const int32_t code = bits_of<int32_t>(q) + offset;
      out[c] = static_cast<uint8_t>(code);
      if (WIDE) high_out[c] = static_cast<uint8_t>(code >> 8);
    }
  }
}

// The codes of a border, which stand for zeros: above, below, left and right of the map.
void fill_border(uint8_t* out, const Size& size, int32_t zero_point) {
  const long row = (size.width + 2 * size.border_x) * size.pitch;
  const long side = size.border_x * size.pitch;
  std::memset(out, zero_point, size.border_y * row);
  out += size.border_y * row;
  for (long y = 0; side > 0 && y < size.height; ++y) {
    std::memset(out + y * row, zero_point, side);
    std::memset(out + (y + 1) * row - side, zero_point, side);
  }
  std::memset(out + size.height * row, zero_point, size.border_y * row);
}

template <bool SILU>
void quantize_map(const Input& in, uint8_t* out, uint8_t* high_out, const Size& size, Step step) {
  fill_border(out, size, step.zero_point & 255);
  if (high_out) fill_border(high_out, size, step.zero_point >> 8);
  const long row = (size.width + 2 * size.border_x) * size.pitch;
  for (long y = 0; y < size.height; ++y) {
    const long at = (y + size.border_y) * row + size.border_x * size.pitch;
    const float* x = in.x + y * size.width * in.stride;
    if (high_out)
      quantize_row<SILU, true>(x, in, out + at, high_out + at, size, step);
    else
      quantize_row<SILU, false>(x, in, out + at, out + at, size, step);
  }
}

// Per channel: sum and sum of squares over the pixels of a sample.
void moments(const float* __restrict x, long pixels, long channels, double* __restrict total) {
  std::vector<float> part(2 * channels);
  float* __restrict sum = part.data();
  float* __restrict squares = sum + channels;
  for (long start = 0; start < pixels; start += BLOCK) {
    std::fill(part.begin(), part.end(), 0.0f);
    for (long i = start; i < std::min(start + BLOCK, pixels); ++i) {
      const float* __restrict row = x + i * channels;
#pragma omp simd
      for (long c = 0; c < channels; ++c) {
        sum[c] += row[c];
        squares[c] += row[c] * row[c];
      }
    }
    for (long c = 0; c < 2 * channels; ++c) total[c] += part[c];
  }
}

// GroupNorm of a sample as gain * x + shift per channel.
void affine(const float* x, const float* weight, const float* bias, long pixels, long channels,
            long groups, double eps, float* gain, float* shift) {
  std::vector<double> total(2 * channels, 0.0);
  moments(x, pixels, channels, total.data());
  const long width = channels / groups;
  for (long first = 0; first < channels; first += width) {
    double sum = 0, squares = 0;
    for (long c = first; c < first + width; ++c) {
      sum += total[c];
      squares += total[channels + c];
    }
    const double mean = sum / (width * pixels);
    const double variance = std::max(squares / (width * pixels) - mean * mean, 0.0);
    for (long c = first; c < first + width; ++c) {
      gain[c] = static_cast<float>(weight[c] / std::sqrt(variance + eps));
      shift[c] = static_cast<float>(bias[c] - mean * gain[c]);
    }
  }
}

}  // namespace

// high_out is null where 8 bits are enough.
extern "C" void codes(const float* x, long stride, const float* factors, uint8_t* out,
                      uint8_t* high_out, const Size* size, float inverse, int32_t zero_point,
                      int32_t top, int32_t threads) {
  const long pixels = size->height * size->width;
  const long plane =
      (size->height + 2 * size->border_y) * (size->width + 2 * size->border_x) * size->pitch;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (long n = 0; n < size->batch; ++n)
    quantize_map<false>(Input{x + n * pixels * stride, stride, nullptr, nullptr, factors},
                        out + n * plane, high_out ? high_out + n * plane : nullptr, *size,
                        Step{inverse, zero_point, top});
}

extern "C" void norm_silu_codes(const float* x, const float* weight, const float* bias,
                                long groups, double eps, const float* factors, uint8_t* out,
                                uint8_t* high_out, const Size* size, float inverse,
                                int32_t zero_point, int32_t top, int32_t threads) {
  const long pixels = size->height * size->width, channels = size->channels;
  const long plane =
      (size->height + 2 * size->border_y) * (size->width + 2 * size->border_x) * size->pitch;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (long n = 0; n < size->batch; ++n) {
    const float* sample = x + n * pixels * channels;
    std::vector<float> gain(channels), shift(channels);
    affine(sample, weight, bias, pixels, channels, groups, eps, gain.data(), shift.data());
    quantize_map<true>(Input{sample, channels, gain.data(), shift.data(), factors},
                       out + n * plane, high_out ? high_out + n * plane : nullptr, *size,
                       Step{inverse, zero_point, top});
  }
}
