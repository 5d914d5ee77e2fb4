// The innermost loops of `linear`: some rows by some panels, in each number format.
#pragma once

#include <cstdint>

#include "linear.h"
#include "simd.h"
#include "vector_math.h"

namespace hav::HAV_ISA {

constexpr int kPanelWords = 2 * F32::kLanes;  // of one step

// Input rows in the form of the weights' format.
struct PreparedRows {
  const uint32_t* words;  // [num_rows, row words] with `stride`
  int64_t stride;
  int64_t num_rows;
  const float* row_scales;    // int8, int4: [num_rows]
  const int32_t* group_sums;  // int4: [num_rows, num_groups]
  int64_t num_groups;
};

struct TileCall {
  const LinearWeights& weights;
  const PreparedRows& rows;
  const LinearOutput& output;
};

// Steps first .. last - 1 of a product; sums of earlier and for later steps lie in `partial`.
struct Segment {
  int64_t first;
  int64_t last;
  uint32_t* partial;  // [rows of the tile, kPanelWords]
  // What will be read next, fetched little by little: so many bytes with each load of weights.
  const char* ahead;
  int64_t ahead_bytes;

  HAV_INLINE void fetch(int64_t load) const { __builtin_prefetch(ahead + load * ahead_bytes); }
};

// The first row of the tile and its first panel; how many of each is the function's own.
using Tile = void (*)(const TileCall& call, int64_t panel, int64_t row, const Segment& segment);

// ---- Formats ----------------------------------------------------------------------------------
//
// Each says how a chain of sums starts, goes on by one step, and becomes a number.

struct Float32Format {
  using Sum = F32;
  static constexpr int kMaxRows = kNumRegisters == 32 ? 8 : 6;
  static constexpr int64_t kLoadsPerStep = 1;  // of a panel's two vectors of weights

  template <int kRows, int kPanels>
  static HAV_INLINE void start(const TileCall&, int64_t, int64_t, F32 (&sums)[kRows][kPanels][2]) {
    for (auto& row : sums) {
      for (auto& panel : row) panel[0] = panel[1] = zero();
    }
  }

  template <int kRows, int kPanels>
  static HAV_INLINE void add_steps(const TileCall& call, int64_t panel, int64_t row,
                                   const Segment& segment, F32 (&sums)[kRows][kPanels][2]) {
    const int64_t panel_stride = call.weights.num_steps * kPanelWords;
    const float* weights =
        reinterpret_cast<const float*>(call.weights.panels) + panel * panel_stride;
    const float* inputs = reinterpret_cast<const float*>(call.rows.words) + row * call.rows.stride;
    for (int64_t step = segment.first; step < segment.last; ++step) {
      segment.fetch(step - segment.first);
      F32 columns[kPanels][2];
#pragma GCC unroll 4
      for (int p = 0; p < kPanels; ++p) {
        const float* from = weights + p * panel_stride + step * kPanelWords;
        columns[p][0] = load(from);
        columns[p][1] = load(from + F32::kLanes);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const F32 x = splat(inputs[r * call.rows.stride + step]);
#pragma GCC unroll 4
        for (int p = 0; p < kPanels; ++p) {
          sums[r][p][0] = fma(columns[p][0], x, sums[r][p][0]);
          sums[r][p][1] = fma(columns[p][1], x, sums[r][p][1]);
        }
      }
    }
  }

  static HAV_INLINE F32 finish(const TileCall&, F32 sum, int64_t, int64_t) { return sum; }
};

// Weights that are bfloat16, by inputs that are float32: the additions are those of Float32Format.
struct ShortFloat32Format {
  using Sum = F32;
  static constexpr int kMaxRows = Float32Format::kMaxRows;
  static constexpr int64_t kLoadsPerStep = 1;

  template <int kRows, int kPanels>
  static HAV_INLINE void start(const TileCall& call, int64_t panel, int64_t row,
                               F32 (&sums)[kRows][kPanels][2]) {
    Float32Format::start(call, panel, row, sums);
  }

  template <int kRows, int kPanels>
  static HAV_INLINE void add_steps(const TileCall& call, int64_t panel, int64_t row,
                                   const Segment& segment, F32 (&sums)[kRows][kPanels][2]) {
    const int64_t panel_stride = call.weights.num_steps * kPanelWords;
    const uint32_t* weights = call.weights.panels + panel * panel_stride;
    const float* inputs = reinterpret_cast<const float*>(call.rows.words) + row * call.rows.stride;
    for (int64_t step = segment.first; step < segment.last; ++step) {
      segment.fetch(step - segment.first);
      F32 even[kPanels][2], odd[kPanels][2];
#pragma GCC unroll 4
      for (int p = 0; p < kPanels; ++p) {
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
          const uint32_t* from = weights + p * panel_stride + step * kPanelWords;
          const I32 both = load_words(from + v * I32::kLanes);
          even[p][v] = even_bf16(both);
          odd[p][v] = odd_bf16(both);
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const float* x = inputs + r * call.rows.stride + 2 * step;
        const F32 first = splat(x[0]), second = splat(x[1]);
#pragma GCC unroll 4
        for (int p = 0; p < kPanels; ++p) {
#pragma GCC unroll 2
          for (int v = 0; v < 2; ++v) {
            sums[r][p][v] = fma(odd[p][v], second, fma(even[p][v], first, sums[r][p][v]));
          }
        }
      }
    }
  }

  static HAV_INLINE F32 finish(const TileCall&, F32 sum, int64_t, int64_t) { return sum; }
};

// A step of bfloat16 and int8 alike: words of weights and of inputs, and a product of the two.
template <typename Format, typename Sum, int kRows, int kPanels>
HAV_INLINE void add_word_steps(const TileCall& call, int64_t panel, int64_t row,
                               const Segment& segment, Sum (&sums)[kRows][kPanels][2]) {
  const int64_t panel_stride = call.weights.num_steps * kPanelWords;
  const uint32_t* weights = call.weights.panels + panel * panel_stride;
  const uint32_t* inputs = call.rows.words + row * call.rows.stride;
  for (int64_t step = segment.first; step < segment.last; ++step) {
    segment.fetch(step - segment.first);
    I32 columns[kPanels][2];
#pragma GCC unroll 4
    for (int p = 0; p < kPanels; ++p) {
      const uint32_t* from = weights + p * panel_stride + step * kPanelWords;
      columns[p][0] = load_words(from);
      columns[p][1] = load_words(from + I32::kLanes);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const I32 x = splat_word(inputs + r * call.rows.stride + step);
#pragma GCC unroll 4
      for (int p = 0; p < kPanels; ++p) {
        sums[r][p][0] = Format::dot(sums[r][p][0], columns[p][0], x);
        sums[r][p][1] = Format::dot(sums[r][p][1], columns[p][1], x);
      }
    }
  }
}

struct Bfloat16Format {
  using Sum = F32;
  static constexpr int kMaxRows = Float32Format::kMaxRows;
  static constexpr int64_t kLoadsPerStep = 1;

  static HAV_INLINE F32 dot(F32 sum, I32 weights, I32 inputs) {
    return dot2_bf16(sum, weights, inputs);
  }

  template <int kRows, int kPanels>
  static HAV_INLINE void start(const TileCall& call, int64_t panel, int64_t row,
                               F32 (&sums)[kRows][kPanels][2]) {
    Float32Format::start(call, panel, row, sums);
  }

  template <int kRows, int kPanels>
  static HAV_INLINE void add_steps(const TileCall& call, int64_t panel, int64_t row,
                                   const Segment& segment, F32 (&sums)[kRows][kPanels][2]) {
    add_word_steps<Bfloat16Format>(call, panel, row, segment, sums);
  }

  static HAV_INLINE F32 finish(const TileCall&, F32 sum, int64_t, int64_t) { return sum; }
};

struct Int8Format {
  using Sum = I32;
  static constexpr int kMaxRows = Float32Format::kMaxRows;
  static constexpr int64_t kLoadsPerStep = 1;

  static HAV_INLINE I32 dot(I32 sum, I32 weights, I32 inputs) {
    return dot4_s8(sum, weights, inputs);
  }

  template <int kRows, int kPanels>
  static HAV_INLINE void start(const TileCall& call, int64_t panel, int64_t,
                               I32 (&sums)[kRows][kPanels][2]) {
#pragma GCC unroll 4
    for (int p = 0; p < kPanels; ++p) {
      const int32_t* from = call.weights.corrections + (panel + p) * kPanelWords;
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        sums[r][p][0] = load_i32(from);
        sums[r][p][1] = load_i32(from + I32::kLanes);
      }
    }
  }

  template <int kRows, int kPanels>
  static HAV_INLINE void add_steps(const TileCall& call, int64_t panel, int64_t row,
                                   const Segment& segment, I32 (&sums)[kRows][kPanels][2]) {
    add_word_steps<Int8Format>(call, panel, row, segment, sums);
  }

  static HAV_INLINE F32 finish(const TileCall& call, I32 sum, int64_t row, int64_t column) {
    const F32 scale = load(static_cast<const float*>(call.weights.scales) + column);
    return to_f32(sum) * scale * splat(call.rows.row_scales[row]);
  }
};

// A step is a group of inputs: its products are summed as integers, then scaled.
struct Int4Format {
  using Sum = F32;
  static constexpr int kMaxRows = 4;
  static constexpr int64_t kWordsPerGroup = kInt4GroupSize / 4;  // of inputs
  static constexpr int64_t kLoadsPerStep =
      kInt4GroupSize / 8;  // of words that hold two steps of inputs

  template <int kRows, int kPanels>
  static HAV_INLINE void start(const TileCall& call, int64_t panel, int64_t row,
                               F32 (&sums)[kRows][kPanels][2]) {
    Float32Format::start(call, panel, row, sums);
  }

  template <int kRows, int kPanels>
  static HAV_INLINE void add_steps(const TileCall& call, int64_t panel, int64_t row,
                                   const Segment& segment, F32 (&sums)[kRows][kPanels][2]) {
    for (int64_t group = segment.first; group < segment.last; ++group) {
#pragma GCC unroll 4
      for (int p = 0; p < kPanels; ++p) add_group(call, panel + p, p, row, group, segment, sums);
    }
  }

  template <int kRows, int kPanels>
  static HAV_INLINE void add_group(const TileCall& call, int64_t panel, int p, int64_t row,
                                   int64_t group, const Segment& segment,
                                   F32 (&sums)[kRows][kPanels][2]) {
    const PreparedRows& rows = call.rows;
    const int64_t index = panel * call.weights.num_steps + group;
    const uint32_t* weights = call.weights.panels + index * kLoadsPerStep * kPanelWords;
    const uint32_t* inputs = rows.words + row * rows.stride + group * kWordsPerGroup;
    I32 products[kRows][2];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const int32_t sum = rows.group_sums[(row + r) * rows.num_groups + group];
      products[r][0] = products[r][1] = splat_i32(sum);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kLoadsPerStep; ++i) {
      segment.fetch((group - segment.first) * kLoadsPerStep + i);
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        const I32 nibbles = load_words(weights + i * kPanelWords + v * I32::kLanes);
        const I32 low = low_nibbles(nibbles), high = high_nibbles(nibbles);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const uint32_t* x = inputs + r * rows.stride + 2 * i;
          products[r][v] = dot4_u4(products[r][v], low, splat_word(x));
          products[r][v] = dot4_u4(products[r][v], high, splat_word(x + 1));
        }
      }
    }
    const uint16_t* scales =
        static_cast<const uint16_t*>(call.weights.scales) + index * kPanelWords;
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const F32 scale = load_bf16(scales + v * F32::kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        sums[r][p][v] = fma(to_f32(products[r][v]), scale, sums[r][p][v]);
      }
    }
  }

  static HAV_INLINE F32 finish(const TileCall& call, F32 sum, int64_t row, int64_t) {
    return sum * splat(call.rows.row_scales[row]);
  }
};

// ---- Tiles ------------------------------------------------------------------------------------

HAV_INLINE void load_sum(const uint32_t* p, F32* sum) {
  *sum = load(reinterpret_cast<const float*>(p));
}
HAV_INLINE void load_sum(const uint32_t* p, I32* sum) { *sum = load_words(p); }
HAV_INLINE void store_sum(uint32_t* p, F32 sum) { store(reinterpret_cast<float*>(p), sum); }
HAV_INLINE void store_sum(uint32_t* p, I32 sum) { store_i32(reinterpret_cast<int32_t*>(p), sum); }

// Columns beyond the matrix are padding and stay unwritten.
HAV_INLINE void write(const LinearOutput& output, int64_t row, int64_t column, int64_t num_columns,
                      F32 value) {
  float* to = output.y + row * output.stride + column;
  const int64_t count = num_columns - column;
  if (count >= F32::kLanes) {
    store(to, output.is_added ? load(to) + value : value);
  } else if (count > 0) {
    store_up_to(to, output.is_added ? load_up_to(to, count) + value : value, count);
  }
}

// All numbers are made before the first is written, so that scales are loaded once for all rows.
template <typename Format, int kRows, int kPanels>
HAV_INLINE void finish_panel(const TileCall& call, int64_t panel, int p, int64_t row,
                             const typename Format::Sum (&sums)[kRows][kPanels][2]) {
  const LinearOutput output = call.output;
  const int64_t num_outputs = call.weights.num_outputs;
  const int64_t column = panel * kPanelWords;
  F32 first[kRows], second[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    first[r] = Format::finish(call, sums[r][p][0], row + r, column);
    second[r] = Format::finish(call, sums[r][p][1], row + r, column + F32::kLanes);
  }
  if (call.weights.is_gated) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) first[r] = silu(first[r]) * second[r];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      write(output, row + r, panel * F32::kLanes, num_outputs, first[r]);
    }
    return;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    write(output, row + r, column, num_outputs, first[r]);
    write(output, row + r, column + F32::kLanes, num_outputs, second[r]);
  }
}

template <typename Format, int kRows, int kPanels>
void run_tile(const TileCall& call, int64_t panel, int64_t row, const Segment& segment) {
  typename Format::Sum sums[kRows][kPanels][2];
  if (segment.first == 0) {
    Format::start(call, panel, row, sums);
  } else {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      load_sum(segment.partial + r * kPanelWords, &sums[r][0][0]);
      load_sum(segment.partial + r * kPanelWords + F32::kLanes, &sums[r][0][1]);
    }
  }
  Format::add_steps(call, panel, row, segment, sums);
  if (segment.last < call.weights.num_steps) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      store_sum(segment.partial + r * kPanelWords, sums[r][0][0]);
      store_sum(segment.partial + r * kPanelWords + F32::kLanes, sums[r][0][1]);
    }
    return;
  }
#pragma GCC unroll 4
  for (int p = 0; p < kPanels; ++p) finish_panel<Format>(call, panel + p, p, row, sums);
}

// Additions of one chain wait for each other, so few rows take several panels at once.
constexpr int wide_panels(int num_rows) { return num_rows == 1 ? 4 : num_rows <= 3 ? 2 : 1; }

template <typename Format, int... kRow>
struct TileTables {
  static constexpr Tile kNarrow[] = {run_tile<Format, kRow, 1>...};
  static constexpr Tile kWide[] = {run_tile<Format, kRow, wide_panels(kRow)>...};
};

template <typename Format, int kMaxRows>
struct TablesUpTo;
template <typename Format>
struct TablesUpTo<Format, 4> : TileTables<Format, 1, 2, 3, 4> {};
template <typename Format>
struct TablesUpTo<Format, 6> : TileTables<Format, 1, 2, 3, 4, 5, 6> {};
template <typename Format>
struct TablesUpTo<Format, 8> : TileTables<Format, 1, 2, 3, 4, 5, 6, 7, 8> {};

// Tiles of `num_rows` rows, from 1 to Format::kMaxRows: one panel wide, or as wide as pays.
template <typename Format>
HAV_INLINE Tile narrow_tile(int64_t num_rows) {
  return TablesUpTo<Format, Format::kMaxRows>::kNarrow[num_rows - 1];
}
template <typename Format>
HAV_INLINE Tile wide_tile(int64_t num_rows) {
  return TablesUpTo<Format, Format::kMaxRows>::kWide[num_rows - 1];
}
template <typename Format>
HAV_INLINE int64_t panels_of_wide_tile(int64_t num_rows) {
  return wide_panels(static_cast<int>(num_rows));
}

}  // namespace hav::HAV_ISA
