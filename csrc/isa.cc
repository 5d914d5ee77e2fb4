#include "isa.h"

#include <atomic>
#include <cstring>
#include <string>
#include <vector>

#include "kernels.h"

#if defined(HAV_HAS_NEON)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace hav {
namespace {

// What CMakeLists.txt lets the compiler use for each. __builtin_cpu_supports also asks whether the
// operating system keeps the wide registers.
#if defined(HAV_HAS_AVX2)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
#endif

#if defined(HAV_HAS_AVX512)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
#endif

#if defined(HAV_HAS_NEON)
// Dot products came last of what the compiler may use: a processor with them has the rest.
bool has_neon() { return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0; }
#endif

std::vector<const Kernels*> find_tables() {
  std::vector<const Kernels*> tables;
  tables.push_back(&baseline::kKernels);
#if defined(HAV_HAS_AVX2)
  if (has_avx2()) tables.push_back(&avx2::kKernels);
#endif
#if defined(HAV_HAS_AVX512)
  if (has_avx512()) tables.push_back(&avx512::kKernels);
#endif
#if defined(HAV_HAS_NEON)
  if (has_neon()) tables.push_back(&neon::kKernels);
#endif
  return tables;
}

const std::vector<const Kernels*>& tables() {
  static const std::vector<const Kernels*> found = find_tables();
  return found;
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> table{tables().back()};
  return table;
}

}  // namespace

const Kernels& kernels() { return *chosen().load(std::memory_order_relaxed); }

const char* supported_isas() {
  static const std::string names = [] {
    std::string joined;
    for (const Kernels* table : tables()) {
      if (!joined.empty()) joined += ' ';
      joined += table->isa;
    }
    return joined;
  }();
  return names.c_str();
}

bool select_isa(const char* name) {
  for (const Kernels* table : tables()) {
    if (std::strcmp(table->isa, name) == 0) {
      chosen().store(table);
      return true;
    }
  }
  return false;
}

}  // namespace hav
