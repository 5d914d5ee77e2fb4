#pragma once

#include "thread_pool.h"

namespace hav::HAV_ISA {

// See hav_embed_codes.
void embed_codes(ThreadPool* pool, const float* table, int64_t width, const int64_t* codes,
                 int64_t codes_stride, int64_t num_codebooks, int64_t codebook_size, float* y,
                 int64_t y_stride, int64_t num_rows);

// One row of it.
void embed_codes_row(const float* table, int64_t width, const int64_t* codes, int64_t num_codebooks,
                     int64_t codebook_size, float* y);

}  // namespace hav::HAV_ISA
