// The sampler of all codebooks: what a row may emit, what it draws, and what follows from it.
//
// The rules are those of vllm/v1/sample and of CodebookState, on the same memory. A code depends on
// its own row's logits and state and on nothing else.
#pragma once

#include "api.h"
#include "thread_pool.h"

namespace hav::HAV_ISA {

// See hav_sample_frames.
void sample_frames(ThreadPool* pool, const hav_streams* streams, const hav_sampling* sampling,
                   const int64_t* rows, int64_t num_rows, float* logits, int16_t* frames,
                   uint8_t* status);

// See hav_uniform.
void uniform_numbers(const uint64_t* seeds, const int64_t* steps, int64_t num_rows,
                     int64_t num_codebooks, uint32_t purpose, float* numbers);

}  // namespace hav::HAV_ISA
