// The C interface: unpacks handles and calls the kernels of the instruction set in use.
#include "api.h"

#include <new>
#include <system_error>

#include "isa.h"
#include "kernels.h"
#include "thread_pool.h"

// The handles of api.h are the classes themselves.
static hav::ThreadPool* as_pool(hav_pool* pool) { return reinterpret_cast<hav::ThreadPool*>(pool); }

int32_t hav_abi_version(void) { return HAV_ABI_VERSION; }

const char* hav_supported_isas(void) { return hav::supported_isas(); }

const char* hav_isa(void) { return hav::kernels().isa; }

int32_t hav_select_isa(const char* name) { return hav::select_isa(name) ? 0 : -1; }

hav_pool* hav_pool_create(int32_t num_threads) {
  if (num_threads < 1) return nullptr;
  try {
    return reinterpret_cast<hav_pool*>(new hav::ThreadPool(num_threads));
  } catch (const std::bad_alloc&) {
    return nullptr;
  } catch (const std::system_error&) {
    return nullptr;
  }
}

void hav_pool_destroy(hav_pool* pool) { delete as_pool(pool); }

int32_t hav_pool_num_threads(const hav_pool* pool) {
  return pool == nullptr ? 1 : reinterpret_cast<const hav::ThreadPool*>(pool)->num_threads();
}

void hav_rms_norm(hav_pool* pool, const float* x, int64_t x_stride, const float* weight, float eps,
                  float* y, int64_t y_stride, int64_t num_rows, int64_t width) {
  hav::kernels().rms_norm(as_pool(pool), x, x_stride, weight, eps, y, y_stride, num_rows, width);
}

void hav_embed_codes(hav_pool* pool, const float* table, int64_t width, const int64_t* codes,
                     int64_t codes_stride, int64_t num_codebooks, int64_t codebook_size, float* y,
                     int64_t y_stride, int64_t num_rows) {
  hav::kernels().embed_codes(as_pool(pool), table, width, codes, codes_stride, num_codebooks,
                             codebook_size, y, y_stride, num_rows);
}

void hav_attend_rows(hav_pool* pool, const hav_kv_cache* cache, const hav_attention* attention,
                     const float* queries, int64_t query_stride, float* context,
                     int64_t context_stride) {
  hav::kernels().attend_rows(as_pool(pool), cache, attention, queries, query_stride, context,
                             context_stride);
}

void hav_rope_write_attend(hav_pool* pool, const hav_kv_cache* cache,
                           const hav_attention* attention, const float* cos,
                           const float* signed_sin, float* qkv, int64_t qkv_stride, float* context,
                           int64_t context_stride) {
  hav::kernels().rope_write_attend(as_pool(pool), cache, attention, cos, signed_sin, qkv,
                                   qkv_stride, context, context_stride);
}

void hav_sample_frames(hav_pool* pool, const hav_streams* streams, const hav_sampling* sampling,
                       const int64_t* rows, int64_t num_rows, float* logits, int16_t* frames,
                       uint8_t* status) {
  hav::kernels().sample_frames(as_pool(pool), streams, sampling, rows, num_rows, logits, frames,
                               status);
}

void hav_uniform(const uint64_t* seeds, const int64_t* steps, int64_t num_rows,
                 int64_t num_codebooks, uint32_t purpose, float* numbers) {
  hav::kernels().uniform_numbers(seeds, steps, num_rows, num_codebooks, purpose, numbers);
}
