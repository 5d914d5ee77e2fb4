// Products of a few rows with a packed weight matrix, in four number formats.
//
// A packed matrix is a run of panels, each of them two vectors of output columns wide and read
// from its first to its last input:
//
//     panel 0: step 0 [2 * lanes words], step 1 [2 * lanes words], ...   panel 1: ...
//
// One word holds, of one column, 1 float32, 2 bfloat16 or 4 int8 inputs; int4 has 8 in a word, for
// two steps. A float32 matrix whose numbers are all bfloat16, as most checkpoints are, is held as
// such, with the bits of float32 products: a step is then two of theirs. Every output is one chain
// of additions over the steps, from the first to the last, whatever rows, columns and threads are
// computed beside it: so its bits are its own.
#pragma once

#include <cstddef>
#include <cstdint>

#include "api.h"
#include "thread_pool.h"

namespace hav {

struct Kernels;

// The values are those of the C interface, but for the last, which kFloat32 becomes where it can.
enum class WeightFormat : int32_t {
  kFloat32 = 0,
  kBfloat16 = 1,
  kInt8 = 2,
  kInt4 = 3,
  kShortFloat32 = 4
};

constexpr int64_t kInt4GroupSize = 32;

// A matrix as its owner has it, row-major [num_outputs, num_inputs].
struct PlainWeights {
  WeightFormat format;
  int64_t num_outputs;
  int64_t num_inputs;
  const void* values;  // int4: two to a byte, the even input in the low half, offset by 8
  int64_t stride;      // bytes from row to row
  const void* scales;  // int8: float [num_outputs]; int4: bfloat16 [num_outputs, num_inputs / 32]
  bool is_gated;       // rows are gates and then as many ups: silu(gate) * up comes out
};

// The same, packed for the instruction set of `kernels`. The pointers are into one allocation.
struct LinearWeights {
  const Kernels* kernels;
  WeightFormat format;
  bool is_gated;
  int64_t num_outputs;  // columns that come out: half the rows of a gated matrix
  int64_t num_inputs;
  int64_t num_steps;  // int4: groups; otherwise words of one column
  int64_t num_panels;
  int64_t num_bytes;  // of the allocation, which begins with the panels
  int64_t scales_offset;
  int64_t corrections_offset;
  uint32_t* panels;
  void* scales;  // int8: float [panels, 2 * lanes]; int4: bfloat16 [panels, groups, 2 * lanes]
  int32_t* corrections;  // int8: [panels, 2 * lanes], takes out the offset of the inputs
};

// Rows that go in, normalised first when there is a norm's weight.
struct LinearInput {
  const float* x;
  int64_t stride;
  int64_t num_rows;
  const float* norm_weight;  // [num_inputs] or null
  float norm_eps;
};

// Where the products go, or what they are added to.
struct LinearOutput {
  float* y;
  int64_t stride;
  bool is_added;
};

// What a handle of the C interface stands for.
const LinearWeights& weights_of(const hav_linear* handle);

#if defined(HAV_ISA)
namespace HAV_ISA {

// Sizes of what pack_linear fills in, for given format, shape and is_gated; no memory yet.
LinearWeights plan_linear(const PlainWeights& plain);

// Fill the panels of a planned matrix whose memory is there.
void pack_linear(ThreadPool* pool, const PlainWeights& plain, const LinearWeights& packed);

// Bytes that `linear` needs to prepare its input rows.
size_t linear_workspace_bytes(const LinearWeights& weights, int64_t num_rows);

// y[r] (+)= W x[r], or silu(gate) * up of it, for every row. `workspace` is aligned to 64 bytes.
void linear(ThreadPool* pool, const LinearWeights& weights, const LinearInput& input,
            const LinearOutput& output, void* workspace);

}  // namespace HAV_ISA
#endif

}  // namespace hav
