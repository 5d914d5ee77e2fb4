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

}  // namespace hav::HAV_ISA
