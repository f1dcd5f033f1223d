// Quantization to uint8 codes, and what a float32 layer reads; see codes.cpp.

#pragma once

#include <cstdint>

struct Step {  // clamp(round(x * inverse) + zero_point, 0, top)
  float inverse;
  int32_t zero_point, top;
};

struct Size {  // of the float map and of the codes: border zero points around it, pitch bytes a pixel
  long batch, height, width, channels, border_y, border_x, pitch;
};

// stride: values from one pixel to the next. high_out is null where 8 bits are enough.
extern "C" void codes(const float* x, long stride, const float* factors, uint8_t* out,
                      uint8_t* high_out, const Size* size, float inverse, int32_t zero_point,
                      int32_t top, int32_t threads);

extern "C" void norm_silu_codes(const float* x, const float* weight, const float* bias,
                                long groups, double eps, const float* factors, uint8_t* out,
                                uint8_t* high_out, const Size* size, float inverse,
                                int32_t zero_point, int32_t top, int32_t threads);

// The map in float32 with a border of zeros: norm(x), with its SiLU, or x itself without a weight.
extern "C" void values(const float* x, long stride, const float* weight, const float* bias,
                       long groups, double eps, int32_t silu, float* out, const Size* size,
                       int32_t threads);
