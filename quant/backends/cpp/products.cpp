// Products of uint8 codes with int8 codes: convolutions, linear layers, attention.
//
//   out = x_scale * scale[o] * (sum q_w (q_x - zero_point)) * row + bias[o] + plus
//
// The sum is exact in int32, so that an output depends neither on the batch, nor on the threads, nor
// on the processor. int8 codes lie in blocks of 16 outputs, and there four inputs of an output side
// by side, as one instruction wants them: (O / 16, planes, taps, C / 4, 16, 4), filled up with zeros.

#include "products.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "amx.h"
#include "codes.h"
#include "tiles.h"

#ifdef INSTRUCTION_SET

namespace {

constexpr long SMALL = 1 << 20;  // products, below which one thread is quicker
constexpr long DEEPEST = 32;  // groups of four inputs summed in int16; more would gain nothing
constexpr int32_t LARGEST_SUM = 128;  // of int8 codes of one sign: 255 * 128 < 2^15

// All of a row of pixels under up to WIDE blocks of weights.
void strip(const Walk& walk, const Pixels& at, const int8_t* w, const Finish& end, long first) {
  const long outputs = std::min(WIDE * BLOCK, end.channels - first);
  const long registers = (outputs + LANES - 1) / LANES;
  for (long done = 0, count; done < at.stop; done += count) {
    Tile run;
#ifdef WITH_AVX512
    if (registers > 2) {
      count = next_tile(at.stop - done, {WIDE_SIZES});
      run = wide_tile(count, registers);
    } else
#endif
    {
      count = next_tile(at.stop - done, {NARROW_SIZES});
      run = narrow_tile(count, registers);
    }
    run(walk, at.x + done * walk.pixel_step, w, end, first, at.out + done * end.channels,
        at.plus ? at.plus + done * end.plus_step : nullptr, at.rows ? at.rows + done : nullptr);
  }
}

// clamp(round(x), ..) of a register, minus the zero point.
inline Ints centred(Floats x, const Step& step) {
  const Floats low = all(static_cast<float>(-step.zero_point));
  const Floats high = all(static_cast<float>(step.top - step.zero_point));
  return rounded_ints(least(most(mul(x, all(step.inverse)), low), high));
}

// exp of values up to 0, to about one unit in the last place: x = n ln 2 + r, a polynomial for exp(r).
inline Floats exponential(Floats x) {
  x = most(x, all(-87.0f));
  const Floats n = rounded(mul(x, all(1.44269504f)));
  Floats r = multiply_add(n, all(-0.693359375f), x);
  r = multiply_add(n, all(2.12194440e-4f), r);
  Floats p = all(1.0f / 5040);
  for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    p = multiply_add(p, r, all(c));
  return times_power(p, n);
}

float largest(const float* x, long count) {
  Floats top = all(x[0]);
  for (long i = 0; i < count; i += LANES) {
    const Mask mask = mask_of(count - i);
    top = keep(mask, most(top, load(mask, x + i)), top);
  }
  return largest_of(top);
}

// out = exp(scale * (x - the largest x)); returns the sum.
float exponentials(const float* x, long count, float scale, float* out) {
  const Floats top = all(largest(x, count)), factor = all(scale);
  Floats total[PER_BLOCK];
  for (Floats& part : total) part = all(0.0f);
  for (long i = 0; i < count; i += BLOCK) {
    for (long part = 0; part < PER_BLOCK; ++part) {
      const long at = i + part * LANES;
      const Mask mask = mask_of(count - at);
      const Floats e = exponential(mul(sub(load(mask, x + at), top), factor));
      total[part] = keep(mask, add(total[part], e), total[part]);
      store(out + at, mask, e);
    }
  }
  return sum_of(total);
}

// The codes of a row of the left operand, divided by `divisor`.
void quantize_row(const float* x, long count, const Step& step, float divisor, uint8_t* out) {
  const Ints zero = all(step.zero_point);
  const Floats by = all(divisor);
  for (long i = 0; i < count; i += LANES) {
    Floats v = load(mask_of(count - i), x + i);
    if (divisor != 1.0f) v = div(v, by);
    store_bytes(out + i, add(centred(v, step), zero));
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

// How int8 codes of any value are multiplied exactly.
#if defined(WITH_AVX512) || defined(WITH_VNNI)
constexpr long RIGHT_PLANES = 1, RIGHT_DEPTH = 0;
#else
constexpr long RIGHT_PLANES = 2;
constexpr long RIGHT_DEPTH = 8;  // 8 * 2 codes of up to 8
#endif

// Whether sums of `depth` groups of four inputs, see depth_of, fit 16 bits.
bool fits(const int8_t* codes, long rows, long quads, long depth) {
  constexpr long PAIRS = 2 * BLOCK;
  for (long r = 0; r < rows; ++r) {
    for (long q = 0; q < quads; q += depth) {
      int32_t positive[PAIRS] = {}, negative[PAIRS] = {};
      for (long k = q; k < std::min(q + depth, quads); ++k, codes += 2 * PAIRS) {
        for (long i = 0; i < PAIRS; ++i) {
          const int32_t a = codes[2 * i], b = codes[2 * i + 1];
          positive[i] += std::max(a, 0) + std::max(b, 0);
          negative[i] -= std::min(a, 0) + std::min(b, 0);
        }
      }
      for (long i = 0; i < PAIRS; ++i)
        if (positive[i] > LARGEST_SUM || negative[i] > LARGEST_SUM) return false;
    }
  }
  return true;
}

// codes = 16 * codes + codes[count..], within -8..8 and -8..7.
void split(int8_t* codes, long count) {
  for (long i = 0; i < count; ++i) {
    const int high = (codes[i] + 8) >> 4;
    codes[count + i] = static_cast<int8_t>(codes[i] - 16 * high);
    codes[i] = static_cast<int8_t>(high);
  }
}

// The right operand (inner, columns) as int8 in blocks, and the sums over its inner dimension. One
// of its two strides is 1.
void pack_right(const float* x, long inner_step, long column_step, long inner, long columns,
                const Step& step, int8_t* out, int32_t* sums) {
  const long quads = (inner + 3) / 4, plane = quads * 4 * BLOCK;
  for (long c = 0; c < columns; c += BLOCK, out += RIGHT_PLANES * plane, sums += BLOCK) {
    const long width = std::min(BLOCK, columns - c);
    if (inner_step == 1) {
      std::memset(out, 0, plane);
      for (long j = 0; j < width; ++j) {
        const float* row = x + (c + j) * column_step;
        for (long k = 0; k < inner; k += LANES) {
          const Mask mask = mask_of(inner - k);
          int32_t fours[LANES / 4];
          store_bytes(fours, keep(mask, centred(load(mask, row + k), step)));
          for (long i = 0; i < std::min(LANES / 4, quads - k / 4); ++i)
            std::memcpy(out + ((k / 4 + i) * BLOCK + j) * 4, fours + i, 4);
        }
      }
    } else {
      for (long k = 0; k < inner; k += 4) {
        for (long part = 0; part < PER_BLOCK; ++part) {
          const Mask mask = mask_of(width - part * LANES);
          Ints four = all(0);
          for (long i = 0; i < std::min(4L, inner - k); ++i) {
            const float* row = x + (k + i) * inner_step + c + part * LANES;
            const Ints q = keep(mask, centred(load(mask, row), step));
            four = merge(four, shift_left(low_byte(q), static_cast<int>(8 * i)));
          }
          store_all(out + k * BLOCK + part * 4 * LANES, four);
        }
      }
    }
    for (long part = 0; part < PER_BLOCK; ++part) {
      Ints total = all(0);
      for (long q = 0; q < quads; ++q)
        total = add_four(total, all_bytes(1), load_all(out + q * 4 * BLOCK + part * 4 * LANES));
      store_all(sums + part * LANES, total);
    }
    if (RIGHT_PLANES == 2) split(out, plane);
  }
}

}  // namespace

extern "C" const char* instruction_set() {
  return amx_allowed() ? "amx" : INSTRUCTION_SET;
}

// Of how many groups of four inputs, one after the other in each of the rows, the products with any
// uint8 codes may be summed in int16 pairs; 0 if not even of one. codes: (rows, quads, 16, 4).
extern "C" int64_t depth_of(const int8_t* codes, int64_t rows, int64_t quads) {
  if (RIGHT_PLANES == 1) return quads;  // VNNI needs no such sums
  for (long parts = (quads + DEEPEST - 1) / DEEPEST; parts <= quads; ++parts) {
    const long depth = (quads + parts - 1) / parts;
    if (fits(codes, rows, quads, depth)) return depth;
  }
  return 0;
}

void convolution(const uint8_t* codes, const Weight& weight, const float* bias, const Plus& plus,
                 float* out, const Shape& shape, float x_scale, int32_t zero_point,
                 int32_t threads) {
  Shape of = shape;
  if (of.rows * of.columns == 1 && of.height == of.out_height && of.width == of.out_width) {
    of.out_width = of.width *= of.height;  // one row
    of.out_height = of.height = 1;
  }
  const long channels = of.channels;
  const Walk walk{of.rows,
                  of.width * channels,
                  of.stride_x * channels,
                  of.columns * channels / 4,
                  weight.planes,
                  weight.depth,
                  weight.planes * of.rows * of.columns * channels * BLOCK};
  const Finish end{weight.sums, weight.scale, bias, x_scale, zero_point, of.outputs, plus.pixel};
  const long lines = of.batch * of.out_height;
  const bool shared =
      threads > 1 && lines * of.out_width * of.outputs * of.rows * walk.quads * 4 > SMALL;
  const auto pixels = [&](long line, long left, long start, long stop) {
    const long b = line / of.out_height, y = line % of.out_height;
    const long from = (b * of.height + y * of.stride_y) * of.width + left * of.stride_x;
    const float* added = nullptr;
    if (plus.values)
      added = plus.values + b * plus.sample + (y * of.out_width + left) * plus.pixel;
    return Pixels{codes + from * channels, out + (line * of.out_width + left) * of.outputs, added,
                  nullptr, start, stop};
  };
  const long depth = of.out_width > 1 ? amx_depth(walk.quads) : 0;
  if (depth) {
    const long parts = (of.out_width + PIXELS - 1) / PIXELS;  // of a row of pixels
    const long size = (of.out_width + parts - 1) / parts, tiles = lines * parts;
    const long pairs = (tiles + 1) / 2, groups = (of.outputs + AMX_OUTPUTS - 1) / AMX_OUTPUTS;
#pragma omp parallel num_threads(threads) if (shared)
    {
      const Amx amx(size, depth);
#pragma omp for schedule(static)
      for (long i = 0; i < groups * pairs; ++i) {
        const long first = i / pairs * AMX_OUTPUTS, start = i % pairs * 2;
        Pixels pair[2];
        long count = 0;
        for (long t = start; t < std::min(start + 2, tiles); ++t) {
          // The last tile of a row begins earlier, and what it has twice is written once.
          const long wanted = t % parts * size, left = std::min(wanted, of.out_width - size);
          pair[count++] = pixels(t / parts, left, wanted - left, size);
        }
        amx.run(walk, pair, count, weight.codes + first / BLOCK * walk.block, end, first);
      }
    }
    return;
  }
  const long wide = WIDE * BLOCK;
  const long groups = (of.outputs + wide - 1) / wide, strips = (of.out_width + STRIP - 1) / STRIP;
  const long tasks = groups * lines * strips;
#pragma omp parallel for num_threads(threads) if (shared) schedule(static)
  for (long i = 0; i < tasks; ++i) {
    const long left = i % strips * STRIP, line = i / strips % lines, first = i / strips / lines * wide;
    const Pixels row = pixels(line, left, 0, std::min(STRIP, of.out_width - left));
    strip(walk, row, weight.codes + first / BLOCK * walk.block, end, first);
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
  const long quads = (inner + 3) / 4, blocks = (columns + BLOCK - 1) / BLOCK;
  const long pitch = (inner + BLOCK - 1) / BLOCK * BLOCK;
  const Step of_left{left_inverse, left_zero_point, left_top};
  const Step of_right{right_inverse, right_zero_point, right_top};
  const long block = RIGHT_PLANES * quads * 4 * BLOCK, packed_size = blocks * block;
  const long depth = amx_depth(quads), height = depth ? 2 * PIXELS : STRIP;
  const long strips = (rows + height - 1) / height;
  std::vector<int8_t> packed(batch * packed_size);
  std::vector<int32_t> sums(batch * blocks * BLOCK);
  const Walk walk{1, 0, pitch, quads, RIGHT_PLANES, RIGHT_DEPTH, block};
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const Amx amx(PIXELS, depth);
    std::vector<uint8_t> codes(height * pitch);
    std::vector<float> tops(height), buffer(inner);
#pragma omp for schedule(static)
    for (long b = 0; b < batch; ++b)
      pack_right(right + b * right_batch, right_inner, right_column, inner, columns, of_right,
                 &packed[b * packed_size], &sums[b * blocks * BLOCK]);
#pragma omp for schedule(static)
    for (long s = 0; s < batch * strips; ++s) {
      const long b = s / strips, r = s % strips * height, count = std::min(height, rows - r);
      const Finish end{&sums[b * blocks * BLOCK], nullptr, nullptr, scale, left_zero_point, columns, 0};
      for (long i = 0; i < count; ++i)
        tops[i] = row_codes(left + b * left_batch + (r + i) * left_row, inner, of_left, kind,
                            score_scale, buffer.data(), codes.data() + i * pitch);
      const int8_t* weights = &packed[b * packed_size];
      const Pixels row{codes.data(), out + (b * rows + r) * columns, nullptr, tops.data(), 0, count};
      if (depth) {
        Pixels pair[2] = {row, row};
        pair[0].stop = std::min(count, PIXELS);
        pair[1].x += PIXELS * pitch, pair[1].out += PIXELS * columns, pair[1].rows += PIXELS;
        pair[1].stop -= PIXELS;
        for (long first = 0; first < columns; first += AMX_OUTPUTS)
          amx.run(walk, pair, count > PIXELS ? 2 : 1, weights + first / BLOCK * block, end, first);
      } else {
        for (long first = 0; first < columns; first += WIDE * BLOCK)
          strip(walk, row, weights + first / BLOCK * block, end, first);
      }
    }
  }
}

// softmax(scale * x) of each row, in place.
extern "C" void softmax(float* x, long rows, long count, float scale, int32_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows > 1) schedule(static)
  for (long r = 0; r < rows; ++r) {
    float* row = x + r * count;
    const Floats share = all(1.0f / exponentials(row, count, scale, row));
    for (long i = 0; i < count; i += LANES) {
      const Mask mask = mask_of(count - i);
      store(row + i, mask, mul(load(mask, row + i), share));
    }
  }
}

#else

extern "C" const char* instruction_set() { return ""; }

#endif
