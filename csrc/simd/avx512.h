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

// bfloat16, rounded to nearest even.
HAV_INLINE void store_bf16_up_to(uint16_t* p, F32 a, int64_t count) {
  const __m256i bits = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.v));
  _mm256_mask_storeu_epi16(p, first_lanes(count), bits);
}
HAV_INLINE F32 load_bf16(const uint16_t* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
HAV_INLINE void store_s8_up_to(int8_t* p, I32 a, int64_t count) {
  _mm512_mask_cvtsepi32_storeu_epi8(p, first_lanes(count), a.v);
}

HAV_INLINE int store_at_least(F32 a, I32 b, float limit, float* to_a, int32_t* to_b) {
  const __mmask16 kept = _mm512_cmp_ps_mask(a.v, _mm512_set1_ps(limit), _CMP_GE_OQ);
  _mm512_storeu_ps(to_a, _mm512_maskz_compress_ps(kept, a.v));
  _mm512_storeu_si512(to_b, _mm512_maskz_compress_epi32(kept, b.v));
  return __builtin_popcount(kept);
}

HAV_INLINE I32 load_words(const uint32_t* p) { return {_mm512_loadu_si512(p)}; }
HAV_INLINE I32 splat_word(const uint32_t* p) {
  int32_t word;
  __builtin_memcpy(&word, p, sizeof word);
  return splat_i32(word);
}
HAV_INLINE F32 even_bf16(I32 a) { return {_mm512_castsi512_ps(_mm512_slli_epi32(a.v, 16))}; }
HAV_INLINE F32 odd_bf16(I32 a) {
  const __m512i high = _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u));
  return {_mm512_castsi512_ps(_mm512_and_si512(a.v, high))};
}
HAV_INLINE F32 dot2_bf16(F32 sum, I32 weights, I32 inputs) {
  return {_mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(weights.v),
                           reinterpret_cast<__m512bh>(inputs.v))};
}
// The instruction takes unsigned times signed bytes, so inputs carry an offset that their users
// take out again.
constexpr int kInt8InputOffset = 128;
// sum plus four unsigned bytes times four signed ones. GCC 12 copies every sum twice around the
// intrinsic, because it sees it in two types of vector.
HAV_INLINE I32 dot4_u8_s8(I32 sum, I32 unsigned_bytes, I32 signed_bytes) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum.v) : "v"(unsigned_bytes.v), "v"(signed_bytes.v));
  return sum;
}
HAV_INLINE I32 dot4_s8(I32 sum, I32 weights, I32 inputs) {
  return dot4_u8_s8(sum, inputs, weights);
}
HAV_INLINE I32 dot4_u4(I32 sum, I32 weights, I32 inputs) {
  return dot4_u8_s8(sum, weights, inputs);
}
HAV_INLINE I32 low_nibbles(I32 a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(15))}; }
HAV_INLINE I32 high_nibbles(I32 a) {
  return {_mm512_and_si512(_mm512_srli_epi16(a.v, 4), _mm512_set1_epi8(15))};
}

}  // namespace hav::HAV_ISA
