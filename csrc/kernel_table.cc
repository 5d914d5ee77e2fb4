// The table of one instruction set; compiled once for each.
#include "kernels.h"
#include "rms_norm.h"

namespace hav::HAV_ISA {

#define HAV_NAME_OF(isa) HAV_NAME_OF_(isa)
#define HAV_NAME_OF_(isa) #isa

const Kernels kKernels = {
    HAV_NAME_OF(HAV_ISA),
    rms_norm,
};

}  // namespace hav::HAV_ISA
