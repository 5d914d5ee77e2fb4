// AVX-512 with VNNI and bfloat16: 16 lanes, 32 registers.
#pragma once

#include <immintrin.h>

namespace hav::HAV_ISA {

constexpr int kNumRegisters = 32;

struct F32 {
  static constexpr int kLanes = 16;
  __m512 v;
};

struct I32 {
  static constexpr int kLanes = 16;
  __m512i v;
};

HAV_INLINE __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffffu : (1u << count) - 1u);
}

HAV_INLINE F32 zero() { return {_mm512_setzero_ps()}; }
HAV_INLINE F32 splat(float x) { return {_mm512_set1_ps(x)}; }
HAV_INLINE F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
HAV_INLINE void store(float* p, F32 a) { _mm512_storeu_ps(p, a.v); }
HAV_INLINE F32 load_up_to(const float* p, int64_t count) {
  return {_mm512_maskz_loadu_ps(first_lanes(count), p)};
}
HAV_INLINE void store_up_to(float* p, F32 a, int64_t count) {
  _mm512_mask_storeu_ps(p, first_lanes(count), a.v);
}

HAV_INLINE F32 operator+(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
HAV_INLINE F32 operator-(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
HAV_INLINE F32 operator*(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
HAV_INLINE F32 operator/(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
HAV_INLINE F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
HAV_INLINE F32 max(F32 a, F32 b) { return {_mm512_max_ps(a.v, b.v)}; }
HAV_INLINE F32 min(F32 a, F32 b) { return {_mm512_min_ps(a.v, b.v)}; }
HAV_INLINE F32 abs(F32 a) { return {_mm512_abs_ps(a.v)}; }

HAV_INLINE float sum(F32 a) { return _mm512_reduce_add_ps(a.v); }
HAV_INLINE float max_of(F32 a) { return _mm512_reduce_max_ps(a.v); }

HAV_INLINE I32 zero_i32() { return {_mm512_setzero_si512()}; }
HAV_INLINE I32 splat_i32(int32_t x) { return {_mm512_set1_epi32(x)}; }
HAV_INLINE I32 load_i32(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
HAV_INLINE void store_i32(int32_t* p, I32 a) { _mm512_storeu_si512(p, a.v); }
HAV_INLINE I32 operator+(I32 a, I32 b) { return {_mm512_add_epi32(a.v, b.v)}; }
HAV_INLINE I32 operator-(I32 a, I32 b) { return {_mm512_sub_epi32(a.v, b.v)}; }

// Nearest integer, halves to even.
HAV_INLINE I32 round_to_i32(F32 a) { return {_mm512_cvtps_epi32(a.v)}; }
HAV_INLINE F32 to_f32(I32 a) { return {_mm512_cvtepi32_ps(a.v)}; }
// 2^a for integers a from -126 to 127.
HAV_INLINE F32 two_to_the(I32 a) {
  const __m512i biased = _mm512_add_epi32(a.v, _mm512_set1_epi32(127));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(biased, 23))};
}

}  // namespace hav::HAV_ISA
