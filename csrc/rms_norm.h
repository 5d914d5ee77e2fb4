#pragma once

#include <cstdint>

#include "thread_pool.h"

namespace hav::HAV_ISA {

// See hav_rms_norm.
void rms_norm(ThreadPool* pool, const float* x, int64_t x_stride, const float* weight, float eps,
              float* y, int64_t y_stride, int64_t num_rows, int64_t width);

// One row of it: x, weight and y have `width` elements, y may be x.
void rms_norm_row(const float* x, const float* weight, float eps, float* y, int64_t width);

// 1 / sqrt(mean(x^2) + eps), what a row is multiplied by before the gain.
float inverse_rms(const float* x, float eps, int64_t width);

}  // namespace hav::HAV_ISA
