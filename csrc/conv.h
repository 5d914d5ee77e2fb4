// Convolutions over time of rows of channels: tap by tap, each a product with packed weights.
//
// Activations are channels-last: one row per moment, its channels side by side, filled up with
// zeros to whole vectors. A convolution of stride s upwards (transposed) is one of two taps whose
// columns are s phases, each a row of the output; so both kinds are one loop.
//
// Packed weights are panels of up to two vectors of columns, read from the first input of the first
// tap to the last of the last. Every output is one chain of additions in that order, whatever rows,
// columns and threads are computed beside it: so its bits are its own.
#pragma once

#include <cstdint>

#include "api.h"
#include "thread_pool.h"

// Sources of all instruction sets share these members, so the linker must not find copies of them.
#define HAV_ALWAYS_INLINE inline __attribute__((always_inline))

namespace hav {

// Rows origin, origin + 1, ... of `width` numbers each.
struct RowView {
  float* values;
  int64_t origin;
  int64_t width;

  HAV_ALWAYS_INLINE float* row(int64_t index) const { return values + (index - origin) * width; }
};

// x + sin(alpha x)^2 * inverse, one of each per channel; none where the pointers are null.
struct Snake {
  const float* alpha;    // [width of the rows], zeros beyond the channels
  const float* inverse;  // the same
};

struct ConvWeights {
  int64_t num_inputs;
  int64_t num_outputs;
  int64_t input_width;   // of a row, filled up
  int64_t output_width;  // of one phase
  int64_t num_phases;    // rows of output for each of input
  int64_t num_taps;
  int64_t dilation;  // input rows between taps
  int64_t reach;     // input rows before the first tap
  int64_t shift;     // phase p of row j is row j * num_phases + p - shift of the output
  int64_t num_vectors;
  int64_t num_panel_values;
  float* panels;
  float* bias;  // [num_phases * output_width]

  // Input rows whose taps make the rows `output`; its steps, before taps reach beyond them.
  HAV_ALWAYS_INLINE Range steps_for(Range output) const {
    return {floor_of(output.begin + shift), floor_of(output.end - 1 + shift) + 1};
  }
  HAV_ALWAYS_INLINE Range inputs_for(Range output) const {
    const Range steps = steps_for(output);
    return {steps.begin - reach, steps.end - reach + (num_taps - 1) * dilation};
  }

 private:
  HAV_ALWAYS_INLINE int64_t floor_of(int64_t row) const {
    return row >= 0 ? row / num_phases : -((num_phases - 1 - row) / num_phases);
  }
};

// What becomes of the sums: output = sums (+ residual), kept as it is, through a Snake, or both.
struct ConvOutput {
  Range rows;         // that are wanted
  RowView activated;  // through `snake`
  RowView plain;      // values may be null
  RowView residual;   // values may be null
  Snake snake;        // may be none
};

struct ConvCall {
  const ConvWeights& weights;
  RowView input;  // all rows of inputs_for(output.rows)
  ConvOutput output;
};

// What the last convolution gives, one number for each row, limited to -1 .. 1.
struct MonoCall {
  const float* weights;  // [num_taps, input.width]
  float bias;
  int64_t num_taps;
  int64_t dilation;
  int64_t reach;
  RowView input;
  Range rows;
  float* samples;  // [rows]
};

// Sums of one table row per codebook, plus a bias.
struct FeatureCall {
  const float* table;  // [num_codebooks * codebook_size, width]
  const float* bias;   // [width]
  int64_t width;
  int64_t num_codebooks;
  int64_t codebook_size;
  const int64_t* codes;  // [num_codebooks, rows]
  int64_t codes_stride;
  Range rows;
  RowView output;
};

#if defined(HAV_ISA)
namespace HAV_ISA {

// Channels of a row filled up to whole vectors.
int64_t padded_channels(int64_t channels);

// Sizes of what pack_conv fills in; no memory yet.
ConvWeights plan_conv(const hav_wave_layer& layer);

// Fill panels and bias of a planned convolution, whose memory is there and zero.
void pack_conv(const hav_wave_layer& layer, const ConvWeights& packed);

void conv(ThreadPool* pool, const ConvCall& call);

void conv_to_mono(ThreadPool* pool, const MonoCall& call);

void sum_features(ThreadPool* pool, const FeatureCall& call);

}  // namespace HAV_ISA
#endif

}  // namespace hav
