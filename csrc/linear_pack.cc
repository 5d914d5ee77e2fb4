// Brings weight matrices into the panels that `linear` reads.
#include "kernels.h"
#include "linear_tile.h"
#include "simd.h"

namespace hav::HAV_ISA {
namespace {

constexpr int64_t round_up(int64_t size, int64_t quantum) {
  return (size + quantum - 1) / quantum * quantum;
}

int64_t steps_of(WeightFormat format, int64_t num_inputs) {
  switch (format) {
    case WeightFormat::kFloat32:
      return num_inputs;
    case WeightFormat::kShortFloat32:
      return num_inputs / 2;
    case WeightFormat::kBfloat16:
      return round_up(num_inputs, 2) / 2;
    case WeightFormat::kInt8:
      return round_up(num_inputs, 4) / 4;
    case WeightFormat::kInt4:
      return num_inputs / kInt4GroupSize;
  }
  return 0;
}

int64_t words_per_step(WeightFormat format) {
  return kPanelWords * (format == WeightFormat::kInt4 ? Int4Format::kLoadsPerStep : 1);
}

int64_t scale_bytes(const LinearWeights& weights) {
  const int64_t columns = weights.num_panels * kPanelWords;
  if (weights.format == WeightFormat::kInt8) return columns * 4;
  if (weights.format == WeightFormat::kInt4) return columns * weights.num_steps * 2;
  return 0;
}

// The row of the plain matrix that a packed column holds, or -1 for padding.
int64_t row_of_column(const LinearWeights& weights, int64_t panel, int column) {
  const int64_t outputs = weights.num_outputs;
  if (weights.is_gated) {
    const int64_t output = panel * F32::kLanes + column % F32::kLanes;
    if (output >= outputs) return -1;
    return column < F32::kLanes ? output : outputs + output;
  }
  const int64_t output = panel * kPanelWords + column;
  return output < outputs ? output : -1;
}

// Words of 1, 2 or 4 inputs: `size` bytes of the row go to the steps of one column.
void pack_words(const char* row, int64_t size, int64_t num_steps, uint32_t* to) {
  for (int64_t step = 0; step < num_steps; ++step) {
    const int64_t left = size - step * 4;
    uint32_t word = 0;
    __builtin_memcpy(&word, row + step * 4, static_cast<size_t>(left < 4 ? left : 4));
    to[step * kPanelWords] = word;
  }
}

// Words of two floats each, of which only the upper halves hold anything.
void pack_upper_halves(const char* row, int64_t num_steps, uint32_t* to) {
  for (int64_t step = 0; step < num_steps; ++step) {
    uint32_t both[2];
    __builtin_memcpy(both, row + step * 8, sizeof both);
    to[step * kPanelWords] = both[0] >> 16 | both[1];
  }
}

int32_t correction_of(const int8_t* row, int64_t num_inputs) {
  int32_t total = 0;
  for (int64_t i = 0; i < num_inputs; ++i) total += row[i];
  return -kInt8InputOffset * total;
}

// The nibbles of inputs 8 i .. 8 i + 3 go into the low halves of a word's bytes, the next four
// into the high ones, so that a mask and a shift give two words of four inputs.
uint32_t interleave_nibbles(const uint8_t* bytes) {
  uint32_t word = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t low = (bytes[i / 2] >> (4 * (i % 2))) & 15u;
    const uint32_t high = (bytes[2 + i / 2] >> (4 * (i % 2))) & 15u;
    word |= (low | high << 4) << (8 * i);
  }
  return word;
}

void pack_nibbles(const uint8_t* row, int64_t num_steps, uint32_t* to) {
  for (int64_t i = 0; i < num_steps * Int4Format::kLoadsPerStep; ++i) {
    to[i * kPanelWords] = interleave_nibbles(row + i * 4);
  }
}

void pack_column(const PlainWeights& plain, const LinearWeights& packed, int64_t panel,
                 int column) {
  const int64_t row = row_of_column(packed, panel, column);
  if (row < 0) return;
  const int64_t steps = packed.num_steps;
  const char* values = static_cast<const char*>(plain.values) + row * plain.stride;
  uint32_t* to = packed.panels + panel * steps * words_per_step(packed.format) + column;
  switch (packed.format) {
    case WeightFormat::kFloat32:
      return pack_words(values, packed.num_inputs * 4, steps, to);
    case WeightFormat::kShortFloat32:
      return pack_upper_halves(values, steps, to);
    case WeightFormat::kBfloat16:
      return pack_words(values, packed.num_inputs * 2, steps, to);
    case WeightFormat::kInt8: {
      pack_words(values, packed.num_inputs, steps, to);
      const int64_t index = panel * kPanelWords + column;
      static_cast<float*>(packed.scales)[index] = static_cast<const float*>(plain.scales)[row];
      packed.corrections[index] =
          correction_of(reinterpret_cast<const int8_t*>(values), packed.num_inputs);
      return;
    }
    case WeightFormat::kInt4: {
      pack_nibbles(reinterpret_cast<const uint8_t*>(values), steps, to);
      const uint16_t* from = static_cast<const uint16_t*>(plain.scales) + row * steps;
      uint16_t* scales = static_cast<uint16_t*>(packed.scales);
      for (int64_t group = 0; group < steps; ++group) {
        scales[(panel * steps + group) * kPanelWords + column] = from[group];
      }
      return;
    }
  }
}

}  // namespace

LinearWeights plan_linear(const PlainWeights& plain) {
  LinearWeights packed{};
  packed.kernels = &kKernels;
  packed.format = plain.format;
  packed.is_gated = plain.is_gated;
  packed.num_outputs = plain.is_gated ? plain.num_outputs / 2 : plain.num_outputs;
  packed.num_inputs = plain.num_inputs;
  packed.num_steps = steps_of(plain.format, plain.num_inputs);
  const int64_t columns_per_panel = plain.is_gated ? F32::kLanes : kPanelWords;
  packed.num_panels = round_up(packed.num_outputs, columns_per_panel) / columns_per_panel;
  const int64_t words = packed.num_panels * packed.num_steps * words_per_step(plain.format);
  const bool has_corrections = plain.format == WeightFormat::kInt8;
  packed.scales_offset = round_up(words * 4, 64);
  packed.corrections_offset = packed.scales_offset + round_up(scale_bytes(packed), 64);
  packed.num_bytes =
      packed.corrections_offset + (has_corrections ? packed.num_panels * kPanelWords * 4 : 0);
  return packed;
}

void pack_linear(ThreadPool* pool, const PlainWeights& plain, const LinearWeights& packed) {
  parallel_for(pool, packed.num_panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      for (int column = 0; column < kPanelWords; ++column) {
        pack_column(plain, packed, panel, column);
      }
    }
  });
}

}  // namespace hav::HAV_ISA
