#pragma once

#include "thread_pool.h"

namespace hav::HAV_ISA {

// See hav_silu_mul.
void silu_mul(ThreadPool* pool, const float* gate_up, int64_t gate_up_stride, float* y,
              int64_t y_stride, int64_t num_rows, int64_t width);

// One row of it, of separate gate and up; y may be either.
void silu_mul_row(const float* gate, const float* up, float* y, int64_t width);

}  // namespace hav::HAV_ISA
