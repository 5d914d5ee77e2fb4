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

}  // namespace hav::HAV_ISA
