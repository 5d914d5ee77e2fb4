// Vectors of the instruction set that a kernel is compiled for, under names that mean the same on
// all of them. The only place where kernels meet intrinsics.
//
//   F32            kLanes floats; + - * / work lane by lane
//   I32            kLanes 32-bit integers; + and -
//   fma(a, b, c)   a * b + c, rounded once where the processor can, in the same way every time
//   even_bf16, odd_bf16   the first, or second, of the two bfloat16s in each 32-bit lane
//   dot2_bf16, dot4_s8, dot4_u4   sum plus, in each 32-bit lane, the products of its two bfloat16s,
//                  four signed bytes, or four unsigned nibbles (a byte each) with signed bytes
//   sum, max_of    over the lanes, always in the same order
//   store_at_least the lanes of a that reach a limit, closed up, and those of b beside them; their
//                  number. What lies behind them, up to a whole vector, is overwritten
//   *_up_to        only the first `count` lanes; the others are 0 on loading and stay unwritten
//
// Compiled with -ffp-contract=off: what is written decides what is rounded, not the optimiser.
// Everything here is forced inline, because code of a wide instruction set that the linker merged
// with that of a narrow one would crash on old processors. For the same reason kernels use no
// containers or algorithms of the standard library.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define HAV_INLINE inline __attribute__((always_inline))

#if defined(HAV_SIMD_AVX512)
#include "simd/avx512.h"
#elif defined(HAV_SIMD_AVX2)
#include "simd/avx2.h"
#elif defined(HAV_SIMD_NEON)
#include "simd/neon.h"
#else
#include "simd/baseline.h"
#endif

namespace hav::HAV_ISA {

#if !defined(HAV_SIMD_AVX512)
HAV_INLINE int store_at_least(F32 a, I32 b, float limit, float* to_a, int32_t* to_b) {
  float values[F32::kLanes];
  int32_t others[F32::kLanes];
  store(values, a);
  store_i32(others, b);
  int num_kept = 0;
  for (int lane = 0; lane < F32::kLanes; ++lane) {
    to_a[num_kept] = values[lane];
    to_b[num_kept] = others[lane];
    num_kept += values[lane] >= limit ? 1 : 0;
  }
  return num_kept;
}
#endif

HAV_INLINE float square_root(float x) { return __builtin_sqrtf(x); }

}  // namespace hav::HAV_ISA
