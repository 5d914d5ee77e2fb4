// Arm NEON: 4 lanes, 32 registers.
#pragma once

#include <arm_neon.h>

namespace hav::HAV_ISA {

constexpr int kNumRegisters = 32;

struct F32 {
  static constexpr int kLanes = 4;
  float32x4_t v;
};

struct I32 {
  static constexpr int kLanes = 4;
  int32x4_t v;
};

HAV_INLINE F32 zero() { return {vdupq_n_f32(0.0f)}; }
HAV_INLINE F32 splat(float x) { return {vdupq_n_f32(x)}; }
HAV_INLINE F32 load(const float* p) { return {vld1q_f32(p)}; }
HAV_INLINE void store(float* p, F32 a) { vst1q_f32(p, a.v); }
HAV_INLINE F32 load_up_to(const float* p, int64_t count) {
  float lanes[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  for (int i = 0; i < 4 && i < count; ++i) lanes[i] = p[i];
  return load(lanes);
}
HAV_INLINE void store_up_to(float* p, F32 a, int64_t count) {
  float lanes[4];
  store(lanes, a);
  for (int i = 0; i < 4 && i < count; ++i) p[i] = lanes[i];
}

HAV_INLINE F32 operator+(F32 a, F32 b) { return {vaddq_f32(a.v, b.v)}; }
HAV_INLINE F32 operator-(F32 a, F32 b) { return {vsubq_f32(a.v, b.v)}; }
HAV_INLINE F32 operator*(F32 a, F32 b) { return {vmulq_f32(a.v, b.v)}; }
HAV_INLINE F32 operator/(F32 a, F32 b) { return {vdivq_f32(a.v, b.v)}; }
HAV_INLINE F32 fma(F32 a, F32 b, F32 c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
HAV_INLINE F32 max(F32 a, F32 b) { return {vmaxq_f32(a.v, b.v)}; }
HAV_INLINE F32 min(F32 a, F32 b) { return {vminq_f32(a.v, b.v)}; }
HAV_INLINE F32 abs(F32 a) { return {vabsq_f32(a.v)}; }

HAV_INLINE float sum(F32 a) { return vaddvq_f32(a.v); }
HAV_INLINE float max_of(F32 a) { return vmaxvq_f32(a.v); }

HAV_INLINE I32 zero_i32() { return {vdupq_n_s32(0)}; }
HAV_INLINE I32 splat_i32(int32_t x) { return {vdupq_n_s32(x)}; }
HAV_INLINE I32 load_i32(const int32_t* p) { return {vld1q_s32(p)}; }
HAV_INLINE void store_i32(int32_t* p, I32 a) { vst1q_s32(p, a.v); }
HAV_INLINE I32 operator+(I32 a, I32 b) { return {vaddq_s32(a.v, b.v)}; }
HAV_INLINE I32 operator-(I32 a, I32 b) { return {vsubq_s32(a.v, b.v)}; }

// Nearest integer, halves to even.
HAV_INLINE I32 round_to_i32(F32 a) { return {vcvtnq_s32_f32(a.v)}; }
HAV_INLINE F32 to_f32(I32 a) { return {vcvtq_f32_s32(a.v)}; }
// 2^a for integers a from -126 to 127.
HAV_INLINE F32 two_to_the(I32 a) {
  return {vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(a.v, vdupq_n_s32(127)), 23))};
}

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
  return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16))};
}

HAV_INLINE I32 load_words(const uint32_t* p) { return {vreinterpretq_s32_u32(vld1q_u32(p))}; }
HAV_INLINE I32 splat_word(const uint32_t* p) { return {vreinterpretq_s32_u32(vld1q_dup_u32(p))}; }
HAV_INLINE F32 even_bf16(I32 a) { return {vreinterpretq_f32_s32(vshlq_n_s32(a.v, 16))}; }
HAV_INLINE F32 odd_bf16(I32 a) {
  return {vreinterpretq_f32_s32(vandq_s32(a.v, vdupq_n_s32(static_cast<int32_t>(0xffff0000u))))};
}
HAV_INLINE F32 dot2_bf16(F32 sum, I32 weights, I32 inputs) {
  return fma(odd_bf16(weights), odd_bf16(inputs), fma(even_bf16(weights), even_bf16(inputs), sum));
}
constexpr int kInt8InputOffset = 0;
HAV_INLINE I32 dot4_s8(I32 sum, I32 weights, I32 inputs) {
  return {vdotq_s32(sum.v, vreinterpretq_s8_s32(weights.v), vreinterpretq_s8_s32(inputs.v))};
}
HAV_INLINE I32 dot4_u4(I32 sum, I32 weights, I32 inputs) { return dot4_s8(sum, weights, inputs); }
HAV_INLINE I32 low_nibbles(I32 a) { return {vandq_s32(a.v, vdupq_n_s32(0x0f0f0f0f))}; }
HAV_INLINE I32 high_nibbles(I32 a) {
  const uint8x16_t high = vshrq_n_u8(vreinterpretq_u8_s32(a.v), 4);
  return {vreinterpretq_s32_u8(high)};
}

}  // namespace hav::HAV_ISA
