// The table of one instruction set; compiled once for each.
#include "conv.h"
#include "decode_attention.h"
#include "decode_step.h"
#include "embed_codes.h"
#include "kernels.h"
#include "rms_norm.h"
#include "sampler.h"

namespace hav::HAV_ISA {

#define HAV_NAME_OF(isa) HAV_NAME_OF_(isa)
#define HAV_NAME_OF_(isa) #isa

const Kernels kKernels = {
    HAV_NAME_OF(HAV_ISA),
    rms_norm,
    plan_linear,
    pack_linear,
    linear_workspace_bytes,
    linear,
    embed_codes,
    attend_rows,
    rope_write_attend,
    sample_frames,
    uniform_numbers,
    decode_step_workspace_bytes,
    decode_step,
    plan_conv,
    pack_conv,
    conv,
    conv_to_mono,
    sum_features,
};

}  // namespace hav::HAV_ISA
