// Functions of whole vectors that more than one kernel needs.
#pragma once

#include <utility>

#include "simd.h"

namespace hav::HAV_ISA {

// e^x within 2 units in the last place for x from -87 to 88; below that, at most 1.2e-38.
HAV_INLINE F32 exp_of(F32 x) {
  x = max(x, splat(-87.3f));
  const I32 octaves = round_to_i32(x * splat(1.442695041f));
  const F32 n = to_f32(octaves);
  // ln 2 in two parts, so that the remainder keeps its low bits.
  const F32 r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), x));
  F32 y = splat(1.9875691500e-4f);
  y = fma(y, r, splat(1.3981999507e-3f));
  y = fma(y, r, splat(8.3334519073e-3f));
  y = fma(y, r, splat(4.1665795894e-2f));
  y = fma(y, r, splat(1.6666665459e-1f));
  y = fma(y, r, splat(5.0000001201e-1f));
  y = fma(y, r * r, r) + splat(1.0f);
  return y * two_to_the(octaves);
}

// x / (1 + e^-x).
HAV_INLINE F32 silu(F32 x) {
  const F32 clamped = max(x, splat(-87.0f));
  return x / (splat(1.0f) + exp_of(zero() - clamped));
}

// sin(x)^2 within 2e-7 for x from -2e4 to 2e4. Its period is pi, so no sign needs care.
HAV_INLINE F32 sin_squared(F32 x) {
  const F32 n = to_f32(round_to_i32(x * splat(0.318309886f)));
  // pi in three parts, of which the first two times n are exact.
  F32 r = fma(n, splat(-3.140625f), x);
  r = fma(n, splat(-9.67502593994140625e-4f), r);
  r = fma(n, splat(-1.509957990978376432e-7f), r);
  const F32 r2 = r * r;
  F32 y = splat(2.60831052e-6f);
  y = fma(y, r2, splat(-1.98108118e-4f));
  y = fma(y, r2, splat(8.33308366e-3f));
  y = fma(y, r2, splat(-1.66666603e-1f));
  const F32 sine = fma(y * r2, r, r);
  return sine * sine;
}

// Lanes of a, or behind them of b, by their numbers.
template <int... kIndex>
HAV_INLINE F32 pick_lanes(F32 a, F32 b) {
#if defined(__clang__)
  return {__builtin_shufflevector(a.v, b.v, kIndex...)};
#else
  typedef int32_t Indices __attribute__((vector_size(sizeof(F32))));
  return {__builtin_shuffle(a.v, b.v, Indices{kIndex...})};
#endif
}

// One step of `sums_of`: rows a and b, folded to half their width and put side by side within
// each run of 2 * kHalf lanes.
template <int kHalf, int... kLane>
HAV_INLINE F32 fold(F32 a, F32 b, std::integer_sequence<int, kLane...>) {
  constexpr int kRun = 2 * kHalf;
  const F32 low =
      pick_lanes<(kLane / kRun * kRun + kLane % kHalf + kLane / kHalf % 2 * F32::kLanes)...>(a, b);
  const F32 high = pick_lanes<(kLane / kRun * kRun + kLane % kHalf +
                               kLane / kHalf % 2 * F32::kLanes + kHalf)...>(a, b);
  return low + high;
}

template <int kHalf>
HAV_INLINE void fold_all(F32* rows) {
  if constexpr (kHalf >= 1) {
    for (int i = 0; i < kHalf; ++i) {
      rows[i] =
          fold<kHalf>(rows[i], rows[i + kHalf], std::make_integer_sequence<int, F32::kLanes>{});
    }
    fold_all<kHalf / 2>(rows);
  }
}

// The sum of each of F32::kLanes vectors, in their order; overwrites them.
HAV_INLINE F32 sums_of(F32* rows) {
  fold_all<F32::kLanes / 2>(rows);
  return rows[0];
}

}  // namespace hav::HAV_ISA
