// A whole decode step: codes of all rows in, codes of all rows out.
#pragma once

#include <cstddef>

#include "api.h"
#include "thread_pool.h"

namespace hav::HAV_ISA {

// Bytes that decode_step works in.
size_t decode_step_workspace_bytes(const hav_decoder& decoder, int64_t num_rows);

// See hav_decode_step. `workspace` is aligned to 64 bytes.
void decode_step(ThreadPool* pool, const hav_decoder& decoder, const int64_t* rows,
                 int64_t num_rows, int16_t* frames, uint8_t* status, void* workspace);

}  // namespace hav::HAV_ISA
