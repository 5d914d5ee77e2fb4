#include "embed_codes.h"

#include "simd.h"

namespace hav::HAV_ISA {
namespace {

// Below this many elements a second thread costs more than it saves.
constexpr int64_t kGrainElements = 4096;

}  // namespace

void embed_codes_row(const float* table, int64_t width, const int64_t* codes, int64_t num_codebooks,
                     int64_t codebook_size, float* y) {
  for (int64_t i = 0; i < width; i += F32::kLanes) {
    F32 sum = zero();
    for (int64_t k = 0; k < num_codebooks; ++k) {
      const float* entry = table + (k * codebook_size + codes[k]) * width;
      sum = sum + load_up_to(entry + i, width - i);
    }
    store_up_to(y + i, sum, width - i);
  }
}

void embed_codes(ThreadPool* pool, const float* table, int64_t width, const int64_t* codes,
                 int64_t codes_stride, int64_t num_codebooks, int64_t codebook_size, float* y,
                 int64_t y_stride, int64_t num_rows) {
  const int64_t grain = kGrainElements / (width < 1 ? 1 : width);
  parallel_for(pool, num_rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      embed_codes_row(table, width, codes + row * codes_stride, num_codebooks, codebook_size,
                      y + row * y_stride);
    }
  });
}

}  // namespace hav::HAV_ISA
