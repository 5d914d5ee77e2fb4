// What every instruction set provides: one table of functions, and the choice between the tables.
//
// Kernel sources are compiled once for each instruction set, all within `namespace hav::HAV_ISA`
// (HAV_ISA is avx512, say). They call each other directly there; everybody else goes by the table.
#pragma once

#include <cstdint>

#include "api.h"
#include "conv.h"
#include "linear.h"
#include "thread_pool.h"

namespace hav {

struct Kernels {
  const char* isa;
  void (*rms_norm)(ThreadPool* pool, const float* x, int64_t x_stride, const float* weight,
                   float eps, float* y, int64_t y_stride, int64_t num_rows, int64_t width);
  LinearWeights (*plan_linear)(const PlainWeights& plain);
  void (*pack_linear)(ThreadPool* pool, const PlainWeights& plain, const LinearWeights& packed);
  size_t (*linear_workspace_bytes)(const LinearWeights& weights, int64_t num_rows);
  void (*linear)(ThreadPool* pool, const LinearWeights& weights, const LinearInput& input,
                 const LinearOutput& output, void* workspace);
  void (*embed_codes)(ThreadPool* pool, const float* table, int64_t width, const int64_t* codes,
                      int64_t codes_stride, int64_t num_codebooks, int64_t codebook_size, float* y,
                      int64_t y_stride, int64_t num_rows);
  void (*attend_rows)(ThreadPool* pool, const hav_kv_cache* cache, const hav_attention* attention,
                      const float* queries, int64_t query_stride, float* context,
                      int64_t context_stride);
  void (*rope_write_attend)(ThreadPool* pool, const hav_kv_cache* cache,
                            const hav_attention* attention, const float* cos,
                            const float* signed_sin, float* qkv, int64_t qkv_stride, float* context,
                            int64_t context_stride);
  void (*sample_frames)(ThreadPool* pool, const hav_streams* streams, const hav_sampling* sampling,
                        const int64_t* rows, int64_t num_rows, float* logits, int16_t* frames,
                        uint8_t* status);
  void (*uniform_numbers)(const uint64_t* seeds, const int64_t* steps, int64_t num_rows,
                          int64_t num_codebooks, uint32_t purpose, float* numbers);
  size_t (*decode_step_workspace_bytes)(const hav_decoder& decoder, int64_t num_rows);
  void (*decode_step)(ThreadPool* pool, const hav_decoder& decoder, const int64_t* rows,
                      int64_t num_rows, int16_t* frames, uint8_t* status, void* workspace);
  ConvWeights (*plan_conv)(const hav_wave_layer& layer);
  void (*pack_conv)(const hav_wave_layer& layer, const ConvWeights& packed);
  void (*conv)(ThreadPool* pool, const ConvCall& call);
  void (*conv_to_mono)(ThreadPool* pool, const MonoCall& call);
  void (*sum_features)(ThreadPool* pool, const FeatureCall& call);
};

// The table in use; see hav_select_isa.
const Kernels& kernels();

// The tables that exist; a kernel source sees its own only.
#define HAV_DECLARE_TABLE(isa)   \
  namespace isa {                \
  extern const Kernels kKernels; \
  }
#if defined(HAV_ISA)
HAV_DECLARE_TABLE(HAV_ISA)
#endif
HAV_DECLARE_TABLE(baseline)
#if defined(HAV_HAS_AVX2)
HAV_DECLARE_TABLE(avx2)
#endif
#if defined(HAV_HAS_AVX512)
HAV_DECLARE_TABLE(avx512)
#endif
#if defined(HAV_HAS_NEON)
HAV_DECLARE_TABLE(neon)
#endif
#undef HAV_DECLARE_TABLE

}  // namespace hav
