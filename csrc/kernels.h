// What every instruction set provides: one table of functions, and the choice between the tables.
//
// Kernel sources are compiled once for each instruction set, all within `namespace hav::HAV_ISA`
// (HAV_ISA is avx512, say). They call each other directly there; everybody else goes by the table.
#pragma once

#include <cstdint>

#include "thread_pool.h"

namespace hav {

struct Kernels {
  const char* isa;
  void (*rms_norm)(ThreadPool* pool, const float* x, int64_t x_stride, const float* weight,
                   float eps, float* y, int64_t y_stride, int64_t num_rows, int64_t width);
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
#if defined(HAV_HAS_BASELINE)
HAV_DECLARE_TABLE(baseline)
#endif
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
