// Linear maps of the C interface: owns the memory of packed matrices and of the work.
#include <new>
#include <utility>

#include "api.h"
#include "kernels.h"
#include "linear.h"
#include "thread_pool.h"
#include "workspace.h"

// A handle is its description, with the memory that it points into.
struct hav_linear {
  hav::LinearWeights weights;
  hav::AlignedMemory memory;
};

namespace {

hav::ThreadPool* as_pool(hav_pool* pool) { return reinterpret_cast<hav::ThreadPool*>(pool); }

bool is_valid(const hav::PlainWeights& plain) {
  const bool is_quantised =
      plain.format == hav::WeightFormat::kInt8 || plain.format == hav::WeightFormat::kInt4;
  if (plain.num_outputs < 1 || plain.num_inputs < 1 || plain.values == nullptr) return false;
  if (is_quantised != (plain.scales != nullptr)) return false;
  if (plain.is_gated && plain.num_outputs % 2 != 0) return false;
  return plain.format != hav::WeightFormat::kInt4 || plain.num_inputs % hav::kInt4GroupSize == 0;
}

// Whether the lower half of every number is zero, and no row ends amid a pair.
bool is_short(const hav::PlainWeights& plain) {
  if (plain.format != hav::WeightFormat::kFloat32 || plain.num_inputs % 2 != 0) return false;
  for (int64_t row = 0; row < plain.num_outputs; ++row) {
    const char* values = static_cast<const char*>(plain.values) + row * plain.stride;
    uint32_t any = 0;
    for (int64_t i = 0; i < plain.num_inputs; ++i) {
      uint32_t bits;
      __builtin_memcpy(&bits, values + i * 4, sizeof bits);
      any |= bits;
    }
    if ((any & 0xffffu) != 0) return false;
  }
  return true;
}

}  // namespace

const hav::LinearWeights& hav::weights_of(const hav_linear* handle) { return handle->weights; }

hav_linear* hav_linear_create(hav_pool* pool, int32_t format, int64_t num_outputs,
                              int64_t num_inputs, const void* values, int64_t value_stride,
                              const void* scales, int32_t is_gated) {
  if (format < HAV_FLOAT32 || format > HAV_INT4) return nullptr;
  hav::PlainWeights plain{static_cast<hav::WeightFormat>(format),
                          num_outputs,
                          num_inputs,
                          values,
                          value_stride,
                          scales,
                          is_gated != 0};
  if (!is_valid(plain)) return nullptr;
  if (is_short(plain)) plain.format = hav::WeightFormat::kShortFloat32;
  const hav::Kernels& kernels = hav::kernels();
  hav::LinearWeights weights = kernels.plan_linear(plain);
  hav::AlignedMemory memory = hav::AlignedMemory::of_zeros(weights.num_bytes);
  hav_linear* handle = new (std::nothrow) hav_linear{weights, std::move(memory)};
  if (handle == nullptr || handle->memory.bytes() == nullptr) {
    delete handle;
    return nullptr;
  }
  char* bytes = handle->memory.bytes();
  handle->weights.panels = reinterpret_cast<uint32_t*>(bytes);
  handle->weights.scales = bytes + weights.scales_offset;
  handle->weights.corrections = reinterpret_cast<int32_t*>(bytes + weights.corrections_offset);
  kernels.pack_linear(as_pool(pool), plain, handle->weights);
  return handle;
}

void hav_linear_destroy(hav_linear* weights) { delete weights; }

int64_t hav_linear_num_bytes(const hav_linear* weights) { return weights->weights.num_bytes; }

int32_t hav_linear_apply(hav_pool* pool, const hav_linear* weights, const float* x,
                         int64_t x_stride, int64_t num_rows, const float* norm_weight,
                         float norm_eps, float* y, int64_t y_stride, int32_t is_added) {
  const hav::LinearWeights& packed = weights->weights;
  const size_t size = packed.kernels->linear_workspace_bytes(packed, num_rows);
  void* workspace = hav::thread_workspace(size);
  if (workspace == nullptr) return -1;
  packed.kernels->linear(as_pool(pool), packed,
                         hav::LinearInput{x, x_stride, num_rows, norm_weight, norm_eps},
                         hav::LinearOutput{y, y_stride, is_added != 0}, workspace);
  return 0;
}
