#include "rms_norm.h"

#include "simd.h"

namespace hav::HAV_ISA {
namespace {

// Below this many elements a second thread costs more than it saves.
constexpr int64_t kGrainElements = 16384;

// Four sums side by side, so that additions need not wait for each other.
float sum_of_squares(const float* x, int64_t width) {
  constexpr int64_t kStep = 4 * F32::kLanes;
  F32 sum0 = zero(), sum1 = zero(), sum2 = zero(), sum3 = zero();
  int64_t i = 0;
  for (; i + kStep <= width; i += kStep) {
    const F32 a = load(x + i), b = load(x + i + F32::kLanes);
    const F32 c = load(x + i + 2 * F32::kLanes), d = load(x + i + 3 * F32::kLanes);
    sum0 = fma(a, a, sum0);
    sum1 = fma(b, b, sum1);
    sum2 = fma(c, c, sum2);
    sum3 = fma(d, d, sum3);
  }
  for (; i < width; i += F32::kLanes) {
    const F32 a = load_up_to(x + i, width - i);
    sum0 = fma(a, a, sum0);
  }
  return sum((sum0 + sum1) + (sum2 + sum3));
}

}  // namespace

float inverse_rms(const float* x, float eps, int64_t width) {
  return 1.0f / square_root(sum_of_squares(x, width) / static_cast<float>(width) + eps);
}

void rms_norm_row(const float* x, const float* weight, float eps, float* y, int64_t width) {
  const F32 factor = splat(inverse_rms(x, eps, width));
  int64_t i = 0;
  for (; i + F32::kLanes <= width; i += F32::kLanes) {
    store(y + i, load(x + i) * factor * load(weight + i));
  }
  if (i < width) {
    const F32 gain = load_up_to(weight + i, width - i);
    store_up_to(y + i, load_up_to(x + i, width - i) * factor * gain, width - i);
  }
}

void rms_norm(ThreadPool* pool, const float* x, int64_t x_stride, const float* weight, float eps,
              float* y, int64_t y_stride, int64_t num_rows, int64_t width) {
  const int64_t grain = kGrainElements / (width < 1 ? 1 : width);
  parallel_for(pool, num_rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      rms_norm_row(x + row * x_stride, weight, eps, y + row * y_stride, width);
    }
  });
}

}  // namespace hav::HAV_ISA
