#include "linear.h"

#include "kernels.h"
#include "linear_tile.h"
#include "rms_norm.h"
#include "simd.h"

namespace hav::HAV_ISA {
namespace {

// Rows that are prepared and multiplied together; more only make the prepared rows leave the cache.
constexpr int64_t kRowsPerPass = 64;
// A part of a panel that stays in the first two caches while several blocks of rows use it.
constexpr int64_t kStepsPerPass = 1024;
// Below this many words of weights or inputs a second thread costs more than it saves.
constexpr int64_t kGrainWords = 16384;
// What rows of zeros, and of numbers next to none, are taken to reach: 127 times 2^-100.
constexpr float kSmallestLargest = 127.0f * 0x1p-100f;

constexpr int64_t round_up(int64_t size, int64_t quantum) {
  return (size + quantum - 1) / quantum * quantum;
}

// Of prepared rows.
constexpr int64_t inputs_per_word(WeightFormat format) {
  switch (format) {
    case WeightFormat::kFloat32:
    case WeightFormat::kShortFloat32:
      return 1;
    case WeightFormat::kBfloat16:
      return 2;
    default:
      return 4;
  }
}

// Words of one prepared row.
int64_t row_words(const LinearWeights& weights) {
  return round_up(weights.num_inputs, inputs_per_word(weights.format)) /
         inputs_per_word(weights.format);
}

// Where the parts of the workspace begin, in bytes.
struct WorkspacePlan {
  int64_t normed;      // float [rows, num_inputs]
  int64_t words;       // [rows, row_words]
  int64_t row_scales;  // float [rows]
  int64_t group_sums;  // int32 [rows, groups]
  int64_t size;
};

WorkspacePlan plan_workspace(const LinearWeights& weights, int64_t num_rows) {
  const int64_t rows = num_rows < kRowsPerPass ? num_rows : kRowsPerPass;
  const bool is_int4 = weights.format == WeightFormat::kInt4;
  const int64_t groups = is_int4 ? weights.num_inputs / kInt4GroupSize : 0;
  WorkspacePlan plan;
  plan.normed = 0;
  plan.words = plan.normed + round_up(rows * weights.num_inputs * 4, 64);
  plan.row_scales = plan.words + round_up(rows * row_words(weights) * 4, 64);
  plan.group_sums = plan.row_scales + round_up(rows * 4, 64);
  plan.size = plan.group_sums + round_up(rows * groups * 4, 64);
  return plan;
}

// ---- Preparing rows ---------------------------------------------------------------------------

float largest_magnitude(const float* x, int64_t width) {
  F32 largest = splat(kSmallestLargest);
  for (int64_t i = 0; i < width; i += F32::kLanes) {
    largest = max(largest, abs(load_up_to(x + i, width - i)));
  }
  return max_of(largest);
}

void row_to_bf16(const float* x, int64_t width, uint16_t* y) {
  for (int64_t i = 0; i < width; i += F32::kLanes) {
    store_bf16_up_to(y + i, load_up_to(x + i, width - i), width - i);
  }
  if (width % 2 != 0) y[width] = 0;
}

// Bytes plus 128, as unsigned ones.
void add_128(int8_t* y, int64_t size) {
  for (int64_t i = 0; i < size; ++i) y[i] = static_cast<int8_t>(y[i] ^ -128);
}

// Bytes q with x = q * (what is returned) within half a unit, plus `offset` (0 or 128). The
// operations, and so the integers, are those of quantize_rows in vllm/kernels/quantize.py.
float row_to_int8(const float* x, int64_t width, int offset, int8_t* y) {
  const float largest = largest_magnitude(x, width);
  const F32 factor = splat(127.0f / largest);
  for (int64_t i = 0; i < width; i += F32::kLanes) {
    const I32 q = round_to_i32(load_up_to(x + i, width - i) * factor);
    store_s8_up_to(y + i, q, width - i);
  }
  for (int64_t i = width; i % 4 != 0; ++i) y[i] = 0;
  if (offset == 128) add_128(y, round_up(width, 4));
  return largest / 127.0f;
}

// Minus 8 times the sum of each group: weights are stored with an offset of 8.
void sum_groups(const int8_t* y, int64_t num_groups, int32_t* sums) {
  for (int64_t group = 0; group < num_groups; ++group) {
    int32_t total = 0;
    for (int64_t i = 0; i < kInt4GroupSize; ++i) total += y[group * kInt4GroupSize + i];
    sums[group] = -8 * total;
  }
}

struct Preparation {
  const LinearWeights& weights;
  const LinearInput& input;
  int64_t first_row;
  float* normed;
  uint32_t* words;
  float* row_scales;
  int32_t* group_sums;

  const float* input_row(int64_t row) const { return input.x + (first_row + row) * input.stride; }
};

void prepare_row(const Preparation& to, int64_t row) {
  const LinearWeights& weights = to.weights;
  const int64_t width = weights.num_inputs;
  const float* x = to.input_row(row);
  if (to.input.norm_weight != nullptr) {
    float* normed = to.normed + row * width;
    rms_norm_row(x, to.input.norm_weight, to.input.norm_eps, normed, width);
    x = normed;
  }
  uint32_t* words = to.words + row * row_words(weights);
  switch (weights.format) {
    case WeightFormat::kFloat32:
    case WeightFormat::kShortFloat32:
      return;
    case WeightFormat::kBfloat16:
      return row_to_bf16(x, width, reinterpret_cast<uint16_t*>(words));
    case WeightFormat::kInt8:
      to.row_scales[row] =
          row_to_int8(x, width, kInt8InputOffset, reinterpret_cast<int8_t*>(words));
      return;
    case WeightFormat::kInt4: {
      int8_t* bytes = reinterpret_cast<int8_t*>(words);
      const int64_t num_groups = width / kInt4GroupSize;
      to.row_scales[row] = row_to_int8(x, width, 0, bytes);
      sum_groups(bytes, num_groups, to.group_sums + row * num_groups);
      return;
    }
  }
}

PreparedRows prepare(ThreadPool* pool, const LinearWeights& weights, const LinearInput& input,
                     int64_t first_row, int64_t num_rows, char* workspace) {
  const WorkspacePlan plan = plan_workspace(weights, input.num_rows);
  const Preparation to{weights,
                       input,
                       first_row,
                       reinterpret_cast<float*>(workspace + plan.normed),
                       reinterpret_cast<uint32_t*>(workspace + plan.words),
                       reinterpret_cast<float*>(workspace + plan.row_scales),
                       reinterpret_cast<int32_t*>(workspace + plan.group_sums)};
  const bool is_float = inputs_per_word(weights.format) == 1;
  const bool is_as_given = is_float && input.norm_weight == nullptr;
  if (!is_as_given) {
    parallel_for(pool, num_rows, kGrainWords / weights.num_inputs, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) prepare_row(to, row);
    });
  }
  PreparedRows rows;
  rows.num_rows = num_rows;
  rows.row_scales = to.row_scales;
  rows.group_sums = to.group_sums;
  rows.num_groups = weights.num_inputs / kInt4GroupSize;
  rows.stride = row_words(weights);
  rows.words = to.words;
  if (is_float) rows.words = reinterpret_cast<const uint32_t*>(to.normed);
  if (is_as_given) {
    rows.words = reinterpret_cast<const uint32_t*>(to.input_row(0));
    rows.stride = input.stride;
  }
  return rows;
}

// ---- Products ---------------------------------------------------------------------------------

// All rows by panels begin .. end - 1, few rows: each panel is read once.
template <typename Format>
void multiply_few(const TileCall& call, int64_t begin, int64_t end) {
  const Tile wide = wide_tile<Format>(call.rows.num_rows);
  const Tile narrow = narrow_tile<Format>(call.rows.num_rows);
  const int64_t width = panels_of_wide_tile<Format>(call.rows.num_rows);
  const char* weights = reinterpret_cast<const char*>(call.weights.panels);
  const Segment all{0, call.weights.num_steps, nullptr, weights, 0};  // nothing to fetch ahead
  int64_t panel = begin;
  for (; panel + width <= end; panel += width) wide(call, panel, 0, all);
  for (; panel < end; ++panel) narrow(call, panel, 0, all);
}

// Blocks of rows in turn by parts of a panel that stay in the cache. Each block fetches its share
// of the next part: other layers and pages have taken its place since the last product.
template <typename Format>
void multiply_many(const TileCall& call, int64_t begin, int64_t end) {
  constexpr int64_t kStepBytes =
      Format::kLoadsPerStep * kPanelWords * static_cast<int64_t>(sizeof(uint32_t));
  uint32_t partial[kRowsPerPass * kPanelWords];
  const char* weights = reinterpret_cast<const char*>(call.weights.panels);
  const int64_t num_rows = call.rows.num_rows, num_steps = call.weights.num_steps;
  const int num_blocks = static_cast<int>((num_rows + Format::kMaxRows - 1) / Format::kMaxRows);
  const int64_t ahead_bytes = kPanelWords * sizeof(uint32_t) / num_blocks;
  for (int64_t panel = begin; panel < end; ++panel) {
    for (int64_t first = 0; first < num_steps; first += kStepsPerPass) {
      const int64_t last = first + kStepsPerPass < num_steps ? first + kStepsPerPass : num_steps;
      const char* next = weights + (panel * num_steps + last) * kStepBytes;
      const int64_t share = (last - first) * Format::kLoadsPerStep * ahead_bytes;
      for (int block = 0; block < num_blocks; ++block) {
        const Range rows = part_of(num_rows, block, num_blocks);
        const Segment segment{first, last, partial + rows.begin * kPanelWords, next + block * share,
                              ahead_bytes};
        narrow_tile<Format>(rows.end - rows.begin)(call, panel, rows.begin, segment);
      }
    }
  }
}

template <typename Format>
void multiply(ThreadPool* pool, const TileCall& call) {
  const bool is_few = call.rows.num_rows <= Format::kMaxRows;
  const int64_t words_per_panel = call.weights.num_steps * 2 * F32::kLanes;
  const int64_t quantum = is_few ? panels_of_wide_tile<Format>(call.rows.num_rows) : 1;
  parallel_for(
      pool, call.weights.num_panels, kGrainWords / (words_per_panel + 1),
      [&](int64_t begin, int64_t end) {
        if (is_few) {
          multiply_few<Format>(call, begin, end);
        } else {
          multiply_many<Format>(call, begin, end);
        }
      },
      quantum);
}

void multiply_in_its_format(ThreadPool* pool, const TileCall& call) {
  switch (call.weights.format) {
    case WeightFormat::kFloat32:
      return multiply<Float32Format>(pool, call);
    case WeightFormat::kShortFloat32:
      return multiply<ShortFloat32Format>(pool, call);
    case WeightFormat::kBfloat16:
      return multiply<Bfloat16Format>(pool, call);
    case WeightFormat::kInt8:
      return multiply<Int8Format>(pool, call);
    case WeightFormat::kInt4:
      return multiply<Int4Format>(pool, call);
  }
}

}  // namespace

size_t linear_workspace_bytes(const LinearWeights& weights, int64_t num_rows) {
  return static_cast<size_t>(plan_workspace(weights, num_rows).size);
}

void linear(ThreadPool* pool, const LinearWeights& weights, const LinearInput& input,
            const LinearOutput& output, void* workspace) {
  for (int64_t first = 0; first < input.num_rows; first += kRowsPerPass) {
    const int64_t left = input.num_rows - first;
    const int64_t num_rows = left < kRowsPerPass ? left : kRowsPerPass;
    const PreparedRows rows =
        prepare(pool, weights, input, first, num_rows, static_cast<char*>(workspace));
    const LinearOutput here{output.y + first * output.stride, output.stride, output.is_added};
    multiply_in_its_format(pool, TileCall{weights, rows, here});
  }
}

}  // namespace hav::HAV_ISA
