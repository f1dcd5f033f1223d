// Convolution of uint8 codes that have their border with int8 codes; see products.cpp.

#pragma once

#include <cstdint>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#define HAS_PRODUCTS 1
#endif

struct Weight {
  const int8_t* codes;  // in blocks
  const int32_t* sums;  // of an output's codes
  const float* scale;   // of an output
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
