#include "silu_mul.h"

#include "simd.h"
#include "vector_math.h"

namespace hav::HAV_ISA {
namespace {

// Below this many elements a second thread costs more than it saves.
constexpr int64_t kGrainElements = 8192;

}  // namespace

void silu_mul_row(const float* gate, const float* up, float* y, int64_t width) {
  int64_t i = 0;
  for (; i + F32::kLanes <= width; i += F32::kLanes) {
    store(y + i, silu(load(gate + i)) * load(up + i));
  }
  if (i < width) {
    const F32 last = silu(load_up_to(gate + i, width - i)) * load_up_to(up + i, width - i);
    store_up_to(y + i, last, width - i);
  }
}

void silu_mul(ThreadPool* pool, const float* gate_up, int64_t gate_up_stride, float* y,
              int64_t y_stride, int64_t num_rows, int64_t width) {
  const int64_t grain = kGrainElements / (width < 1 ? 1 : width);
  parallel_for(pool, num_rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* gate = gate_up + row * gate_up_stride;
      silu_mul_row(gate, gate + width, y + row * y_stride, width);
    }
  });
}

}  // namespace hav::HAV_ISA
