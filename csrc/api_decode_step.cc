// The decode step of the C interface: finds the kernels that its matrices were packed for.
#include "api.h"
#include "kernels.h"
#include "linear.h"
#include "thread_pool.h"
#include "workspace.h"

int32_t hav_decode_step(hav_pool* pool, const hav_decoder* decoder, const int64_t* rows,
                        int64_t num_rows, int16_t* frames, uint8_t* status) {
  const hav::Kernels& kernels = *hav::weights_of(decoder->head).kernels;
  void* workspace = hav::thread_workspace(kernels.decode_step_workspace_bytes(*decoder, num_rows));
  if (workspace == nullptr) return -1;
  kernels.decode_step(reinterpret_cast<hav::ThreadPool*>(pool), *decoder, rows, num_rows, frames,
                      status, workspace);
  return 0;
}
