// AVX2 with FMA: 8 lanes, 16 registers.
#pragma once

#include <immintrin.h>

namespace hav::HAV_ISA {

constexpr int kNumRegisters = 16;

struct F32 {
  static constexpr int kLanes = 8;
  __m256 v;
};

struct I32 {
  static constexpr int kLanes = 8;
  __m256i v;
};

HAV_INLINE __m256i first_lanes(int64_t count) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const int32_t limit = static_cast<int32_t>(count < 8 ? count : 8);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(limit), lanes);
}

HAV_INLINE F32 zero() { return {_mm256_setzero_ps()}; }
HAV_INLINE F32 splat(float x) { return {_mm256_set1_ps(x)}; }
HAV_INLINE F32 load(const float* p) { return {_mm256_loadu_ps(p)}; }
HAV_INLINE void store(float* p, F32 a) { _mm256_storeu_ps(p, a.v); }
HAV_INLINE F32 load_up_to(const float* p, int64_t count) {
  return {_mm256_maskload_ps(p, first_lanes(count))};
}
HAV_INLINE void store_up_to(float* p, F32 a, int64_t count) {
  _mm256_maskstore_ps(p, first_lanes(count), a.v);
}

HAV_INLINE F32 operator+(F32 a, F32 b) { return {_mm256_add_ps(a.v, b.v)}; }
HAV_INLINE F32 operator-(F32 a, F32 b) { return {_mm256_sub_ps(a.v, b.v)}; }
HAV_INLINE F32 operator*(F32 a, F32 b) { return {_mm256_mul_ps(a.v, b.v)}; }
HAV_INLINE F32 operator/(F32 a, F32 b) { return {_mm256_div_ps(a.v, b.v)}; }
HAV_INLINE F32 fma(F32 a, F32 b, F32 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
HAV_INLINE F32 max(F32 a, F32 b) { return {_mm256_max_ps(a.v, b.v)}; }
HAV_INLINE F32 min(F32 a, F32 b) { return {_mm256_min_ps(a.v, b.v)}; }
HAV_INLINE F32 abs(F32 a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }

HAV_INLINE float sum(F32 a) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}
HAV_INLINE float max_of(F32 a) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
}

HAV_INLINE I32 zero_i32() { return {_mm256_setzero_si256()}; }
HAV_INLINE I32 splat_i32(int32_t x) { return {_mm256_set1_epi32(x)}; }
HAV_INLINE I32 load_i32(const int32_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
}
HAV_INLINE void store_i32(int32_t* p, I32 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v);
}
HAV_INLINE I32 operator+(I32 a, I32 b) { return {_mm256_add_epi32(a.v, b.v)}; }
HAV_INLINE I32 operator-(I32 a, I32 b) { return {_mm256_sub_epi32(a.v, b.v)}; }

// Nearest integer, halves to even.
HAV_INLINE I32 round_to_i32(F32 a) { return {_mm256_cvtps_epi32(a.v)}; }
HAV_INLINE F32 to_f32(I32 a) { return {_mm256_cvtepi32_ps(a.v)}; }
// 2^a for integers a from -126 to 127.
HAV_INLINE F32 two_to_the(I32 a) {
  const __m256i biased = _mm256_add_epi32(a.v, _mm256_set1_epi32(127));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(biased, 23))};
}

// bfloat16, rounded to nearest even.
HAV_INLINE __m256i to_bf16_bits(F32 a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounding = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, rounding), 16);
  const __m256 is_nan = _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q);
  return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), _mm256_castps_si256(is_nan));
}
HAV_INLINE void store_bf16_up_to(uint16_t* p, F32 a, int64_t count) {
  uint32_t bits[8];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(bits), to_bf16_bits(a));
  for (int i = 0; i < 8 && i < count; ++i) p[i] = static_cast<uint16_t>(bits[i]);
}
HAV_INLINE F32 load_bf16(const uint16_t* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
}
HAV_INLINE void store_s8_up_to(int8_t* p, I32 a, int64_t count) {
  int32_t lanes[8];
  store_i32(lanes, a);
  for (int i = 0; i < 8 && i < count; ++i) p[i] = static_cast<int8_t>(lanes[i]);
}

HAV_INLINE I32 load_words(const uint32_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
}
HAV_INLINE I32 splat_word(const uint32_t* p) {
  int32_t word;
  __builtin_memcpy(&word, p, sizeof word);
  return splat_i32(word);
}
HAV_INLINE F32 even_bf16(I32 a) { return {_mm256_castsi256_ps(_mm256_slli_epi32(a.v, 16))}; }
HAV_INLINE F32 odd_bf16(I32 a) {
  const __m256i high = _mm256_set1_epi32(static_cast<int32_t>(0xffff0000u));
  return {_mm256_castsi256_ps(_mm256_and_si256(a.v, high))};
}
HAV_INLINE F32 dot2_bf16(F32 sum, I32 weights, I32 inputs) {
  return fma(odd_bf16(weights), odd_bf16(inputs), fma(even_bf16(weights), even_bf16(inputs), sum));
}
constexpr int kInt8InputOffset = 0;
// By pairs of 16-bit products: adding 8-bit products in 16 bits would overflow.
HAV_INLINE I32 dot4_s8(I32 sum, I32 weights, I32 inputs) {
  const __m256i even_weights = _mm256_srai_epi16(_mm256_slli_epi16(weights.v, 8), 8);
  const __m256i even_inputs = _mm256_srai_epi16(_mm256_slli_epi16(inputs.v, 8), 8);
  const __m256i odd_weights = _mm256_srai_epi16(weights.v, 8);
  const __m256i odd_inputs = _mm256_srai_epi16(inputs.v, 8);
  const __m256i even = _mm256_madd_epi16(even_weights, even_inputs);
  const __m256i odd = _mm256_madd_epi16(odd_weights, odd_inputs);
  return {_mm256_add_epi32(_mm256_add_epi32(sum.v, even), odd)};
}
// Two products of at most 15 * 128 fit into 16 bits.
HAV_INLINE I32 dot4_u4(I32 sum, I32 weights, I32 inputs) {
  const __m256i pairs = _mm256_maddubs_epi16(weights.v, inputs.v);
  return {_mm256_add_epi32(sum.v, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))};
}
HAV_INLINE I32 low_nibbles(I32 a) { return {_mm256_and_si256(a.v, _mm256_set1_epi8(15))}; }
HAV_INLINE I32 high_nibbles(I32 a) {
  return {_mm256_and_si256(_mm256_srli_epi16(a.v, 4), _mm256_set1_epi8(15))};
}

}  // namespace hav::HAV_ISA
