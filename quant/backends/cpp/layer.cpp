// A whole layer: the codes of its input's parts, or of silu(norm(input)), and their products.
//
// Behind a skip concatenation the input has two parts, each with its quantizer and its weight; codes
// of more than 8 bits are two maps. The products of all of them add up in out.

#include "codes.h"
#include "products.h"

#ifdef INSTRUCTION_SET

struct Part {
  long channels, pitch;  // of the input, and of its codes
  const float* factors;
  Weight weight;
};

struct Layer {
  long parts;
  Part part[2];
  Size size;    // of the first part
  Shape shape;  // likewise
  const float* bias;
};

struct PartStep {
  float inverse, scale;
  int32_t zero_point, top;
};


// stride: values from one pixel of x to the next. scratch: of the largest part's codes, both maps.
extern "C" void layer(const Layer* of, const PartStep* steps, const float* x, long stride,
                      const float* norm_weight, const float* norm_bias, long groups, double eps,
                      const float* plus_values, long plus_sample, long plus_pixel, float* out,
                      uint8_t* scratch, int32_t threads) {
  Size size = of->size;
  Shape shape = of->shape;
  const float* bias = of->bias;
  Plus plus{plus_values, plus_sample, plus_pixel};
  for (long i = 0; i < of->parts; ++i) {
    const Part& part = of->part[i];
    const PartStep& step = steps[i];
    size.channels = part.channels;
    size.pitch = shape.channels = part.pitch;
    const bool two = step.top > 255;
    uint8_t* high = two ? scratch + shape.batch * shape.height * shape.width * part.pitch : nullptr;
    if (norm_weight)
      norm_silu_codes(x, norm_weight, norm_bias, groups, eps, part.factors, scratch, high, &size,
                      step.inverse, step.zero_point, step.top, threads);
    else
      codes(x, stride, part.factors, scratch, high, &size, step.inverse, step.zero_point, step.top,
            threads);
    for (long plane = 0; plane <= two; ++plane) {
      convolution(plane ? high : scratch, part.weight, bias, plus, out, shape,
                  plane ? step.scale * 256 : step.scale,
                  plane ? step.zero_point >> 8 : step.zero_point & 255, threads);
      bias = nullptr;
      plus = Plus{out, shape.out_height * shape.out_width * shape.outputs, shape.outputs};
    }
    x += part.channels;
  }
}

#endif
