// Any processor: 4 lanes in the compiler's own vector types, SSE2 on x86-64.
#pragma once

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

}  // namespace hav::HAV_ISA
