// Any processor: 4 lanes in the compiler's own vector types, SSE2 on x86-64.
#pragma once

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace hav::HAV_ISA {

constexpr int kNumRegisters = 16;

typedef float float4 __attribute__((vector_size(16)));
typedef int32_t int4 __attribute__((vector_size(16)));

struct F32 {
  static constexpr int kLanes = 4;
  float4 v;
};

struct I32 {
  static constexpr int kLanes = 4;
  int4 v;
};

HAV_INLINE F32 zero() { return {float4{}}; }
HAV_INLINE F32 splat(float x) { return {float4{x, x, x, x}}; }
HAV_INLINE F32 load(const float* p) {
  F32 a;
  __builtin_memcpy(&a.v, p, sizeof a.v);
  return a;
}
HAV_INLINE void store(float* p, F32 a) { __builtin_memcpy(p, &a.v, sizeof a.v); }
HAV_INLINE F32 load_up_to(const float* p, int64_t count) {
  F32 a = zero();
  for (int i = 0; i < 4 && i < count; ++i) a.v[i] = p[i];
  return a;
}
HAV_INLINE void store_up_to(float* p, F32 a, int64_t count) {
  for (int i = 0; i < 4 && i < count; ++i) p[i] = a.v[i];
}

HAV_INLINE F32 operator+(F32 a, F32 b) { return {a.v + b.v}; }
HAV_INLINE F32 operator-(F32 a, F32 b) { return {a.v - b.v}; }
HAV_INLINE F32 operator*(F32 a, F32 b) { return {a.v * b.v}; }
HAV_INLINE F32 operator/(F32 a, F32 b) { return {a.v / b.v}; }
HAV_INLINE F32 fma(F32 a, F32 b, F32 c) { return {a.v * b.v + c.v}; }
HAV_INLINE F32 max(F32 a, F32 b) { return {a.v > b.v ? a.v : b.v}; }
HAV_INLINE F32 min(F32 a, F32 b) { return {a.v < b.v ? a.v : b.v}; }
HAV_INLINE F32 abs(F32 a) {
  return {reinterpret_cast<float4>(reinterpret_cast<int4>(a.v) & 0x7fffffff)};
}

HAV_INLINE float sum(F32 a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
HAV_INLINE float max_of(F32 a) {
  const float even = a.v[0] > a.v[2] ? a.v[0] : a.v[2];
  const float odd = a.v[1] > a.v[3] ? a.v[1] : a.v[3];
  return even > odd ? even : odd;
}

HAV_INLINE I32 zero_i32() { return {int4{}}; }
HAV_INLINE I32 splat_i32(int32_t x) { return {int4{x, x, x, x}}; }
HAV_INLINE I32 load_i32(const int32_t* p) {
  I32 a;
  __builtin_memcpy(&a.v, p, sizeof a.v);
  return a;
}
HAV_INLINE void store_i32(int32_t* p, I32 a) { __builtin_memcpy(p, &a.v, sizeof a.v); }
HAV_INLINE I32 operator+(I32 a, I32 b) { return {a.v + b.v}; }
HAV_INLINE I32 operator-(I32 a, I32 b) { return {a.v - b.v}; }

HAV_INLINE F32 to_f32(I32 a) { return {__builtin_convertvector(a.v, float4)}; }
// Nearest integer, halves to even, for |a| < 2^22: adding 1.5 * 2^23 leaves it in the low bits.
HAV_INLINE I32 round_to_i32(F32 a) {
  const F32 magic = splat(12582912.0f);
  const int4 bits = reinterpret_cast<int4>((a + magic).v);
  return {bits - reinterpret_cast<int4>(magic.v)};
}
// 2^a for integers a from -126 to 127.
HAV_INLINE F32 two_to_the(I32 a) { return {reinterpret_cast<float4>((a.v + 127) << 23)}; }

// bfloat16, rounded to nearest even.
HAV_INLINE uint16_t to_bf16_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  if (x != x) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
HAV_INLINE void store_bf16_up_to(uint16_t* p, F32 a, int64_t count) {
  float lanes[4];
  store(lanes, a);
  for (int i = 0; i < 4 && i < count; ++i) p[i] = to_bf16_bits(lanes[i]);
}
HAV_INLINE void store_s8_up_to(int8_t* p, I32 a, int64_t count) {
  int32_t lanes[4];
  store_i32(lanes, a);
  for (int i = 0; i < 4 && i < count; ++i) p[i] = static_cast<int8_t>(lanes[i]);
}

HAV_INLINE F32 load_bf16(const uint16_t* p) {
  const int4 bits = {p[0] << 16, p[1] << 16, p[2] << 16, p[3] << 16};
  return {reinterpret_cast<float4>(bits)};
}

HAV_INLINE I32 load_words(const uint32_t* p) {
  I32 a;
  __builtin_memcpy(&a.v, p, sizeof a.v);
  return a;
}
HAV_INLINE I32 splat_word(const uint32_t* p) {
  int32_t word;
  __builtin_memcpy(&word, p, sizeof word);
  return splat_i32(word);
}
HAV_INLINE F32 even_bf16(I32 a) { return {reinterpret_cast<float4>(a.v << 16)}; }
HAV_INLINE F32 odd_bf16(I32 a) {
  return {reinterpret_cast<float4>(a.v & static_cast<int32_t>(0xffff0000u))};
}
HAV_INLINE F32 dot2_bf16(F32 sum, I32 weights, I32 inputs) {
  return fma(odd_bf16(weights), odd_bf16(inputs), fma(even_bf16(weights), even_bf16(inputs), sum));
}
constexpr int kInt8InputOffset = 0;
// Sum over the two 16-bit halves of each lane.
HAV_INLINE I32 dot2_s16(I32 a, I32 b) {
#if defined(__SSE2__)
  return {reinterpret_cast<int4>(
      _mm_madd_epi16(reinterpret_cast<__m128i>(a.v), reinterpret_cast<__m128i>(b.v)))};
#else
  return {((a.v << 16) >> 16) * ((b.v << 16) >> 16) + (a.v >> 16) * (b.v >> 16)};
#endif
}
typedef int16_t short8 __attribute__((vector_size(16)));
HAV_INLINE I32 even_bytes(I32 a) {
  return {reinterpret_cast<int4>((reinterpret_cast<short8>(a.v) << 8) >> 8)};
}
HAV_INLINE I32 odd_bytes(I32 a) {
  return {reinterpret_cast<int4>(reinterpret_cast<short8>(a.v) >> 8)};
}
HAV_INLINE I32 dot4_s8(I32 sum, I32 weights, I32 inputs) {
  return sum + dot2_s16(even_bytes(weights), even_bytes(inputs)) +
         dot2_s16(odd_bytes(weights), odd_bytes(inputs));
}
HAV_INLINE I32 dot4_u4(I32 sum, I32 weights, I32 inputs) { return dot4_s8(sum, weights, inputs); }
HAV_INLINE I32 low_nibbles(I32 a) { return {a.v & 0x0f0f0f0f}; }
HAV_INLINE I32 high_nibbles(I32 a) { return {(a.v >> 4) & 0x0f0f0f0f}; }

}  // namespace hav::HAV_ISA
