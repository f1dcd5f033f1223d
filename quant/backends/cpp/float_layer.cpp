// A convolution in float32, with the GroupNorm and SiLU before it and what is added after it:
//
//   out = conv(x or silu(norm(x))) + bias + plus
//
// Maps have their channels beside each other. Weights lie in blocks of 16 outputs, which are side by
// side: (O / 16, rows, columns * C, 16), filled up with zeros. A sum is always made in the order of
// the weights, so that an output depends neither on the batch nor on the threads.

#include "codes.h"
#include "tiles.h"

#ifdef INSTRUCTION_SET

constexpr long SMALL = 1 << 19;  // products, below which one thread is quicker

struct FloatLayer {
  const float *weight, *bias;  // bias: null where there is none
  Size size;                   // of the input
  Shape shape;
};

namespace {

constexpr long REGISTERS = 2;  // of outputs, under each of which a tile of pixels lies
constexpr long OUTPUTS = REGISTERS * LANES;
// Whether a tile goes on in the next row, so that narrow maps fill it as well. The large tiles of
// AVX-512 would need more addresses than there are registers.
#ifdef WITH_AVX512
constexpr bool CROSSES = false;
#else
constexpr bool CROSSES = true;
#endif

struct FloatWalk {  // through the values of one output
  long rows, row_step, pixel_step;
  long inputs;  // of a row of the kernel, whose columns follow each other
  long block;   // of 16 outputs' weights
};

struct FloatFinish {  // null pointers: no such term
  const float *bias, *plus;
  long outputs;    // from here on
  long out_step, plus_step;  // from one pixel to the next
};

// at: of each pixel, where its values begin.
template <int M, int N>
void float_tile(const FloatWalk& walk, const float* const* at, const float* w,
                const FloatFinish& end, float* out) {
  Floats sum[M][N];
#pragma GCC unroll 2
  for (int n = 0; n < N; ++n) {
    const Mask mask = mask_of(end.outputs - n * LANES);
    const Floats start = end.bias ? load(mask, end.bias + n * LANES) : all(0.0f);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) sum[m][n] = start;
  }
  for (long r = 0; r < walk.rows; ++r) {
    const float* p[M];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
      p[m] = (CROSSES ? at[m] : at[0] + m * walk.pixel_step) + r * walk.row_step;
    for (long i = 0; i < walk.inputs; ++i, w += BLOCK) {
      Floats weight[N];
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n)
        weight[n] = load_floats(w + n / PER_BLOCK * walk.block + n % PER_BLOCK * LANES);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const Floats value = all(p[m][i]);
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) sum[m][n] = multiply_add(value, weight[n], sum[m][n]);
      }
    }
  }
#pragma GCC unroll 2
  for (int n = 0; n < N; ++n) {
    const Mask mask = mask_of(end.outputs - n * LANES);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      Floats y = sum[m][n];
      if (end.plus) y = add(y, load(mask, end.plus + m * end.plus_step + n * LANES));
      store(out + m * end.out_step + n * LANES, mask, y);
    }
  }
}

using FloatTile = void (*)(const FloatWalk&, const float* const*, const float*,
                           const FloatFinish&, float*);

template <int N, int... M>
FloatTile float_tile_of(long pixels) {
  FloatTile found = nullptr;
  ((pixels == M ? void(found = float_tile<M, N>) : void()), ...);
  return found;
}

// Pixels that follow each other, under up to OUTPUTS outputs.
void float_strip(const FloatWalk& walk, const float* const* at, const float* w, FloatFinish end,
                 long pixels, float* out) {
  for (long done = 0, count; done < pixels; done += count) {
    count = next_tile(pixels - done, {NARROW_SIZES});
    const bool one = end.outputs <= LANES;
    const FloatTile run =
        one ? float_tile_of<1, NARROW_SIZES>(count) : float_tile_of<2, NARROW_SIZES>(count);
    run(walk, at + done, w, end, out + done * end.out_step);
    if (end.plus) end.plus += count * end.plus_step;
  }
}

void float_convolution(const float* x, const FloatLayer& layer, const Shape& of, const Plus& plus,
                       float* out, int32_t threads) {
  const long inputs = of.columns * of.channels;
  const FloatWalk walk{of.rows, of.width * of.channels, of.stride_x * of.channels, inputs,
                       of.rows * inputs * BLOCK};
  const long groups = (of.outputs + OUTPUTS - 1) / OUTPUTS;
  const long sample = of.out_height * of.out_width;
  const long line = CROSSES ? sample : of.out_width;  // pixels that may share a strip
  const long strips = (line + STRIP - 1) / STRIP, lines = sample / line;
  const long tasks = groups * of.batch * lines * strips;
  const bool shared = threads > 1 && of.batch * sample * of.outputs * of.rows * inputs > SMALL;
#pragma omp parallel for num_threads(threads) if (shared) schedule(static)
  for (long i = 0; i < tasks; ++i) {
    const long left = i % strips * STRIP, b = i / strips / lines % of.batch;
    const long first = i / strips / lines / of.batch * OUTPUTS;
    const long pixel = i / strips % lines * line + left, count = std::min(STRIP, line - left);
    const float* at[STRIP];
    for (long j = 0; j < count; ++j) {
      const long row = (pixel + j) / of.out_width, column = (pixel + j) % of.out_width;
      at[j] = x + ((b * of.height + row * of.stride_y) * of.width + column * of.stride_x) * of.channels;
    }
    const FloatFinish end{
        layer.bias ? layer.bias + first : nullptr,
        plus.values ? plus.values + b * plus.sample + pixel * plus.pixel + first : nullptr,
        of.outputs - first, of.outputs, plus.pixel};
    float_strip(walk, at, layer.weight + first / BLOCK * walk.block, end, count,
                out + (b * sample + pixel) * of.outputs + first);
  }
}

}  // namespace

// stride: values from one pixel of x to the next. Without norm_weight there is no norm. plus: null
// where nothing is added. scratch: as large as the input with its border.
extern "C" void float_layer(const FloatLayer* of, const float* x, long stride,
                            const float* norm_weight, const float* norm_bias, long groups,
                            double eps, const float* plus_values, long plus_sample,
                            long plus_pixel, float* out, float* scratch, int32_t threads) {
  Size size = of->size;
  Shape shape = of->shape;
  const bool bordered = size.border_y || size.border_x;
  const bool copied = norm_weight || bordered || stride != shape.channels;
  // What is larger stays in the cache: a sample of the input, or the weights of some outputs.
  const bool alone = shape.height * shape.width > shape.rows * shape.columns * OUTPUTS;
  if (alone) size.batch = shape.batch = 1;
  const long sample = size.height * size.width * stride;
  const long scratch_sample = shape.height * shape.width * shape.channels;
  const long out_sample = shape.out_height * shape.out_width * shape.outputs;
  const long products = out_sample * shape.rows * shape.columns * shape.channels;
  if (shape.rows * shape.columns * shape.stride_y * shape.stride_x == 1 && !bordered) {  // one row
    shape.out_width *= shape.out_height;
    shape.width *= shape.height;
    shape.out_height = shape.height = 1;
  }
  const auto run = [&](long b, float* own, int32_t threads) {
    const float* input = x + b * sample;
    if (copied) {
      values(input, stride, norm_weight, norm_bias, groups, eps, true, own, &size, threads);
      input = own;
    }
    const Plus plus{plus_values ? plus_values + b * plus_sample : nullptr, plus_sample, plus_pixel};
    float_convolution(input, *of, shape, plus, out + b * out_sample, threads);
  };
  // Threads that have as many samples each do not wait for each other in between.
  const long batch = of->size.batch, share = batch / threads;
  if (alone && threads > 1 && batch % threads == 0 && batch * products > SMALL) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long b = 0; b < batch; ++b) run(b, scratch + b / share * scratch_sample, 1);
  } else {
    for (long b = 0; b < batch; b += size.batch) run(b, scratch, threads);
  }
}

// out (rows, outputs) = x (rows, inputs) @ weight (outputs, inputs) transposed, + bias, which may be
// null. Reads the weight once: for few rows. A row depends neither on the others nor on the threads.
extern "C" void few_rows(const float* x, const float* weight, const float* bias, float* out,
                         const long* size, int32_t threads) {
  const long rows = size[0], inputs = size[1], outputs = size[2];
  const bool shared = threads > 1 && rows * inputs * outputs > SMALL;
#pragma omp parallel for num_threads(threads) if (shared) schedule(static)
  for (long o = 0; o < outputs; ++o) {
    const float* w = weight + o * inputs;
    for (long r = 0; r < rows; ++r) {
      const float* row = x + r * inputs;
      Floats sum[PER_BLOCK];
      for (Floats& part : sum) part = all(0.0f);
      for (long i = 0; i < inputs; i += BLOCK) {
        for (long part = 0; part < PER_BLOCK; ++part) {
          const long at = i + part * LANES;
          const Mask mask = mask_of(inputs - at);
          sum[part] = multiply_add(load(mask, row + at), load(mask, w + at), sum[part]);
        }
      }
      out[r * outputs + o] = sum_of(sum) + (bias ? bias[o] : 0.0f);
    }
  }
}

#endif
