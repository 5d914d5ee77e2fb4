// Attention of single rows over the paged KV cache, and what comes before it.
#pragma once

#include "api.h"
#include "thread_pool.h"

namespace hav::HAV_ISA {

// See hav_attend_rows.
void attend_rows(ThreadPool* pool, const hav_kv_cache* cache, const hav_attention* attention,
                 const float* queries, int64_t query_stride, float* context,
                 int64_t context_stride);

// See hav_rope_write_attend.
void rope_write_attend(ThreadPool* pool, const hav_kv_cache* cache, const hav_attention* attention,
                       const float* cos, const float* signed_sin, float* qkv, int64_t qkv_stride,
                       float* context, int64_t context_stride);

}  // namespace hav::HAV_ISA
