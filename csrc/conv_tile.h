// The innermost loop of `conv`: some rows by one panel.
#pragma once

#include <cstdint>
#include <utility>

#include "conv.h"
#include "simd.h"

namespace hav::HAV_ISA {

constexpr int kPanelVectors = 2;
// As many chains of sums as the registers hold beside the weights and an input.
constexpr int kMaxTileRows = kNumRegisters == 32 ? 12 : 6;

// Sums of a tile, bias included: [rows, vectors of the panel].
using TileSums = float[kMaxTileRows][kPanelVectors * F32::kLanes];

template <int kRows, int kVectors>
HAV_INLINE void start_sums(const float* bias, F32 (&sums)[kRows][kVectors]) {
  for (int v = 0; v < kVectors; ++v) {
    const F32 start = load(bias + v * F32::kLanes);
    for (int r = 0; r < kRows; ++r) sums[r][v] = start;
  }
}

// One tap of every row; `x` is where the first row's input begins.
template <int kRows, int kVectors>
HAV_INLINE void add_tap(const float* weights, const float* x, int64_t stride, int64_t num_inputs,
                        F32 (&sums)[kRows][kVectors]) {
  for (int64_t i = 0; i < num_inputs; ++i) {
    F32 columns[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      columns[v] = load(weights + (i * kVectors + v) * F32::kLanes);
    }
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const F32 input = splat(x[r * stride + i]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sums[r][v] = fma(columns[v], input, sums[r][v]);
    }
  }
}

template <int kRows, int kVectors>
void sum_tile(const ConvCall& call, int64_t panel, int64_t step, TileSums& tile) {
  const ConvWeights& weights = call.weights;
  const int64_t column = panel * kPanelVectors * F32::kLanes;
  const int64_t num_inputs = weights.num_inputs;
  const float* from = weights.panels + column * weights.num_taps * num_inputs;
  F32 sums[kRows][kVectors];
  start_sums(weights.bias + column, sums);
  for (int64_t tap = 0; tap < weights.num_taps; ++tap) {
    const float* x = call.input.row(step - weights.reach + tap * weights.dilation);
    add_tap(from, x, call.input.width, num_inputs, sums);
    from += num_inputs * kVectors * F32::kLanes;
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) store(&tile[r][v * F32::kLanes], sums[r][v]);
  }
}

using SumTile = void (*)(const ConvCall& call, int64_t panel, int64_t step, TileSums& tile);

template <int kVectors, int... kRow>
HAV_INLINE SumTile sum_tile_of(int64_t num_rows, std::integer_sequence<int, kRow...>) {
  static constexpr SumTile kTiles[] = {sum_tile<kRow + 1, kVectors>...};
  return kTiles[num_rows - 1];
}

// The function for this many rows, 1 to kMaxTileRows, and vectors, 1 or 2.
HAV_INLINE SumTile find_sum_tile(int64_t num_rows, int64_t num_vectors) {
  constexpr auto kRows = std::make_integer_sequence<int, kMaxTileRows>{};
  return num_vectors == 1 ? sum_tile_of<1>(num_rows, kRows) : sum_tile_of<2>(num_rows, kRows);
}

}  // namespace hav::HAV_ISA
