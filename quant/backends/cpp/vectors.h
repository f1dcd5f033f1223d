// The widest registers of floats and integers that a processor with products has, by one set of
// names: 16 lanes with AVX512-VNNI, 8 lanes with AVX2. Every operation rounds alike in both, so that
// results are the same bytes.
//
// Another processor (ARM with dot products or i8mm, say) needs an INSTRUCTION_SET, these operations
// and `add_products` of tiles.h.

#pragma once

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && \
    defined(__AVX512VNNI__)
#define INSTRUCTION_SET "avx512-vnni"
#define WITH_AVX512 1
#if defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__linux__) && !defined(WITHOUT_AMX)
#define WITH_AMX 1
#endif
#elif defined(__AVX2__) && defined(__FMA__) && defined(__AVXVNNI__)
#define INSTRUCTION_SET "avx-vnni"
#define WITH_VNNI 1
#elif defined(__AVX2__) && defined(__FMA__)
#define INSTRUCTION_SET "avx2"
#endif

#ifdef INSTRUCTION_SET
#include <immintrin.h>

#include <algorithm>
#include <cstdint>

constexpr long BLOCK = 16;  // outputs, or columns, whose weights lie together

#ifdef WITH_AVX512

using Floats = __m512;
using Ints = __m512i;
using Mask = __mmask16;
constexpr long LANES = 16;

inline Mask mask_of(long count) {  // the first `count` lanes
  return count >= LANES ? 0xffff : static_cast<Mask>((1 << std::max(count, 0L)) - 1);
}
inline Floats load(Mask mask, const float* from) { return _mm512_maskz_loadu_ps(mask, from); }
inline Ints load(Mask mask, const int32_t* from) { return _mm512_maskz_loadu_epi32(mask, from); }
inline void store(float* to, Mask mask, Floats v) { _mm512_mask_storeu_ps(to, mask, v); }
inline Floats load_floats(const float* from) { return _mm512_loadu_ps(from); }
inline Ints load_all(const void* from) { return _mm512_loadu_si512(from); }
inline void store_all(void* to, Ints v) { _mm512_storeu_si512(to, v); }
inline void store_bytes(void* to, Ints v) {  // the lowest byte of each lane
  _mm_storeu_si128(static_cast<__m128i*>(to), _mm512_cvtepi32_epi8(v));
}
inline Floats all(float v) { return _mm512_set1_ps(v); }
inline Ints all(int32_t v) { return _mm512_set1_epi32(v); }
inline Ints all_bytes(int8_t v) { return _mm512_set1_epi8(v); }
inline Ints keep(Mask mask, Ints v) { return _mm512_maskz_mov_epi32(mask, v); }  // else zeros
inline Floats keep(Mask mask, Floats v, Floats other) {
  return _mm512_mask_mov_ps(other, mask, v);
}
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
inline Floats most(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats least(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats rounded(Floats v) { return _mm512_roundscale_ps(v, 0); }
inline Floats times_power(Floats v, Floats n) { return _mm512_scalef_ps(v, n); }  // v 2^n
inline Floats floats(Ints v) { return _mm512_cvtepi32_ps(v); }
inline Ints rounded_ints(Floats v) { return _mm512_cvtps_epi32(v); }
inline Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Ints sub(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
inline Ints mul(Ints a, Ints b) { return _mm512_mullo_epi32(a, b); }
inline Ints low_byte(Ints v) { return _mm512_and_si512(v, _mm512_set1_epi32(255)); }
inline Ints merge(Ints a, Ints b) { return _mm512_or_si512(a, b); }
inline Ints shift_left(Ints v, int bits) { return _mm512_sll_epi32(v, _mm_cvtsi32_si128(bits)); }

inline __m256 lower(Floats v) { return _mm512_castps512_ps256(v); }
inline __m256 upper(Floats v) {
  return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1));
}

#else

using Floats = __m256;
using Ints = __m256i;
using Mask = __m256i;  // lanes of ones
constexpr long LANES = 8;

inline Mask mask_of(long count) {
  const int32_t lanes = static_cast<int32_t>(std::min(count, LANES));
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(lanes), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Floats load(Mask mask, const float* from) { return _mm256_maskload_ps(from, mask); }
inline Ints load(Mask mask, const int32_t* from) { return _mm256_maskload_epi32(from, mask); }
inline void store(float* to, Mask mask, Floats v) {
  if (_mm256_movemask_ps(_mm256_castsi256_ps(mask)) == 0xff)  // else Zen takes ten times as long
    _mm256_storeu_ps(to, v);
  else
    _mm256_maskstore_ps(to, mask, v);
}
inline Floats load_floats(const float* from) { return _mm256_loadu_ps(from); }
inline Ints load_all(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}
inline void store_all(void* to, Ints v) { _mm256_storeu_si256(static_cast<__m256i*>(to), v); }
inline void store_bytes(void* to, Ints v) {
  const Ints bytes = _mm256_shuffle_epi8(v, _mm256_set1_epi32(0x0c080400));  // in each half
  const Ints order = _mm256_setr_epi32(0, 4, 0, 4, 0, 4, 0, 4);
  _mm_storel_epi64(static_cast<__m128i*>(to),
                   _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(bytes, order)));
}
inline Floats all(float v) { return _mm256_set1_ps(v); }
inline Ints all(int32_t v) { return _mm256_set1_epi32(v); }
inline Ints all_bytes(int8_t v) { return _mm256_set1_epi8(v); }
inline Ints keep(Mask mask, Ints v) { return _mm256_and_si256(v, mask); }
inline Floats keep(Mask mask, Floats v, Floats other) {
  return _mm256_blendv_ps(other, v, _mm256_castsi256_ps(mask));
}
inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats div(Floats a, Floats b) { return _mm256_div_ps(a, b); }
inline Floats most(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline Floats least(Floats a, Floats b) { return _mm256_min_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats rounded(Floats v) {
  return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline Floats floats(Ints v) { return _mm256_cvtepi32_ps(v); }
inline Ints rounded_ints(Floats v) { return _mm256_cvtps_epi32(v); }
inline Floats times_power(Floats v, Floats n) {  // n from -126 to 127
  const Ints exponent = _mm256_add_epi32(rounded_ints(n), _mm256_set1_epi32(127));
  return _mm256_mul_ps(v, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}
inline Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
inline Ints sub(Ints a, Ints b) { return _mm256_sub_epi32(a, b); }
inline Ints mul(Ints a, Ints b) { return _mm256_mullo_epi32(a, b); }
inline Ints low_byte(Ints v) { return _mm256_and_si256(v, _mm256_set1_epi32(255)); }
inline Ints merge(Ints a, Ints b) { return _mm256_or_si256(a, b); }
inline Ints shift_left(Ints v, int bits) { return _mm256_sll_epi32(v, _mm_cvtsi32_si128(bits)); }

#endif

constexpr long PER_BLOCK = BLOCK / LANES;  // registers of a block

// The lanes of a block's registers summed, or their largest, always in the same order: by halves.
inline float sum_of(const Floats (&v)[PER_BLOCK]) {
#ifdef WITH_AVX512
  const __m256 eight = _mm256_add_ps(upper(v[0]), lower(v[0]));
#else
  const __m256 eight = _mm256_add_ps(v[1], v[0]);
#endif
  const __m128 four = _mm_add_ps(_mm256_extractf128_ps(eight, 1), _mm256_castps256_ps128(eight));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

inline float largest_of(Floats v) {
#ifdef WITH_AVX512
  const __m256 eight = _mm256_max_ps(upper(v), lower(v));
#else
  const __m256 eight = v;
#endif
  const __m128 four = _mm_max_ps(_mm256_extractf128_ps(eight, 1), _mm256_castps256_ps128(eight));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
}

// sum + the products of four uint8 codes with four int8 ones in each lane. AVX2 alone has it only
// for codes of which no two products exceed 16 bits.
inline Ints add_four(Ints sum, Ints codes, Ints weights) {
#if defined(WITH_AVX512)
  return _mm512_dpbusd_epi32(sum, codes, weights);
#elif defined(WITH_VNNI)
  return _mm256_dpbusd_avx_epi32(sum, codes, weights);
#else
  const Ints pairs = _mm256_maddubs_epi16(codes, weights);
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
}

#endif
