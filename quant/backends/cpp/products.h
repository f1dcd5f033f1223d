// Convolution of uint8 codes that have their border with int8 codes; see products.cpp.

#pragma once

#include <cstdint>

#include "vectors.h"

struct Weight {
  const int8_t* codes;  // in blocks
  const int32_t* sums;  // of an output's codes
  const float* scale;   // of an output
  // Of AVX2 alone, see tiles.h. planes: 2 where a code is 16 times one of the first plus one of the
  // second, else 1. depth: groups of four inputs whose products fit 16 bits.
  long planes, depth;
};

struct Plus {  // values: null where nothing is added
  const float* values;
  long sample, pixel;  // values from one sample, one pixel, to the next; the outputs lie side by side
};

// codes (batch, height, width, channels), channels a multiple of 4, border included; out (batch,
// out_height, out_width, outputs).
struct Shape {
  long batch, height, width, channels, out_height, out_width, outputs;
  long rows, columns, stride_y, stride_x;  // of the kernel
};

void convolution(const uint8_t* codes, const Weight& weight, const float* bias, const Plus& plus,
                 float* out, const Shape& of, float x_scale, int32_t zero_point, int32_t threads);
