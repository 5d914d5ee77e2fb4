#include "conv.h"

#include "conv_tile.h"
#include "simd.h"
#include "vector_math.h"

namespace hav::HAV_ISA {
namespace {

constexpr int64_t kTilesPerBlock = 8;  // whose input stays in the cache while panels pass
constexpr int64_t kGrainSamples = 1024;
constexpr int64_t kGrainFeatures = 8192;

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

int64_t parts_of(int64_t size, int64_t largest) { return (size + largest - 1) / largest; }

// ---- Packing ----------------------------------------------------------------------------------

// Where in the kernel the weight of a tap and phase lies. The first tap of a transposed convolution
// is the row before, whose kernel is already s further on.
int64_t kernel_index(const hav_wave_layer& layer, int64_t tap, int64_t phase) {
  if (layer.upsampling == 0) return tap;
  return phase + (tap == 0 ? layer.upsampling : 0);
}

const float* weight_of(const hav_wave_layer& layer, int64_t output, int64_t input) {
  const bool is_transposed = layer.upsampling != 0;
  const int64_t index =
      is_transposed ? input * layer.num_outputs + output : output * layer.num_inputs + input;
  return layer.weight + index * layer.kernel_size;
}

void pack_column(const hav_wave_layer& layer, const ConvWeights& packed, int64_t column) {
  const int64_t phase = column / packed.output_width, output = column % packed.output_width;
  if (output >= packed.num_outputs) return;
  packed.bias[column] = layer.bias[output];
  const int64_t columns_per_panel = kPanelVectors * F32::kLanes;
  const int64_t first = column / columns_per_panel * columns_per_panel;
  const int64_t stride = smaller(packed.num_vectors * F32::kLanes - first, columns_per_panel);
  const int64_t num_steps = packed.num_taps * packed.num_inputs;
  float* to = packed.panels + first * num_steps + (column - first);
  for (int64_t tap = 0; tap < packed.num_taps; ++tap) {
    const int64_t index = kernel_index(layer, tap, phase);
    for (int64_t input = 0; input < packed.num_inputs; ++input) {
      *to = weight_of(layer, output, input)[index];
      to += stride;
    }
  }
}

// ---- What becomes of the sums -----------------------------------------------------------------

HAV_INLINE F32 through(const Snake& snake, int64_t channel, F32 x) {
  if (snake.alpha == nullptr) return x;
  const F32 wave = sin_squared(load(snake.alpha + channel) * x);
  return fma(wave, load(snake.inverse + channel), x);
}

// One vector of columns, which is part of one row of the output for each row of the tile.
HAV_INLINE void finish_vector(const ConvCall& call, int64_t column, int64_t step, int64_t num_rows,
                              const float* sums) {
  const ConvWeights& weights = call.weights;
  const ConvOutput& output = call.output;
  const int64_t phase = column / weights.output_width;
  const int64_t channel = column - phase * weights.output_width;
  for (int64_t r = 0; r < num_rows; ++r) {
    const int64_t row = (step + r) * weights.num_phases + phase - weights.shift;
    if (row < output.rows.begin || row >= output.rows.end) continue;
    F32 value = load(sums + r * kPanelVectors * F32::kLanes);
    if (output.residual.values != nullptr) value = value + load(output.residual.row(row) + channel);
    if (output.plain.values != nullptr) store(output.plain.row(row) + channel, value);
    store(output.activated.row(row) + channel, through(output.snake, channel, value));
  }
}

void run_tile(const ConvCall& call, int64_t panel, Range steps) {
  const int64_t first = panel * kPanelVectors;
  const int64_t num_vectors = smaller(call.weights.num_vectors - first, kPanelVectors);
  alignas(64) TileSums tile;
  find_sum_tile(steps.end - steps.begin, num_vectors)(call, panel, steps.begin, tile);
  for (int64_t v = 0; v < num_vectors; ++v) {
    finish_vector(call, (first + v) * F32::kLanes, steps.begin, steps.end - steps.begin,
                  &tile[0][v * F32::kLanes]);
  }
}

// ---- One channel ------------------------------------------------------------------------------

// Lanes whose sum is the product of one row's taps.
HAV_INLINE F32 row_product(const MonoCall& call, int64_t row) {
  const int64_t width = call.input.width;
  F32 sum = zero();
  for (int64_t tap = 0; tap < call.num_taps; ++tap) {
    const float* x = call.input.row(row - call.reach + tap * call.dilation);
    const float* weights = call.weights + tap * width;
    for (int64_t i = 0; i < width; i += F32::kLanes) {
      sum = fma(load(x + i), load(weights + i), sum);
    }
  }
  return sum;
}

}  // namespace

int64_t padded_channels(int64_t channels) {
  return (channels + F32::kLanes - 1) / F32::kLanes * F32::kLanes;
}

ConvWeights plan_conv(const hav_wave_layer& layer) {
  const bool is_transposed = layer.upsampling != 0;
  ConvWeights packed{};
  packed.num_inputs = layer.num_inputs;
  packed.num_outputs = layer.num_outputs;
  packed.input_width = padded_channels(layer.num_inputs);
  packed.output_width = padded_channels(layer.num_outputs);
  packed.num_phases = is_transposed ? layer.upsampling : 1;
  packed.num_taps = is_transposed ? 2 : layer.kernel_size;
  packed.dilation = is_transposed ? 1 : layer.dilation;
  packed.reach = is_transposed ? 1 : layer.kernel_size / 2 * layer.dilation;
  packed.shift = is_transposed ? (layer.upsampling + 1) / 2 : 0;
  packed.num_vectors = packed.num_phases * packed.output_width / F32::kLanes;
  packed.num_panel_values = packed.num_vectors * F32::kLanes * packed.num_taps * packed.num_inputs;
  return packed;
}

void pack_conv(const hav_wave_layer& layer, const ConvWeights& packed) {
  const int64_t num_columns = packed.num_vectors * F32::kLanes;
  for (int64_t column = 0; column < num_columns; ++column) pack_column(layer, packed, column);
}

void conv(ThreadPool* pool, const ConvCall& call) {
  const Range steps = call.weights.steps_for(call.output.rows);
  const int64_t num_steps = steps.end - steps.begin;
  const int64_t num_blocks = parts_of(num_steps, kTilesPerBlock * kMaxTileRows);
  const int64_t num_panels = parts_of(call.weights.num_vectors, kPanelVectors);
  parallel_for(pool, num_blocks * num_panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int block = static_cast<int>(item / num_panels);
      const Range rows = part_of(num_steps, block, static_cast<int>(num_blocks));
      const int num_tiles = static_cast<int>(parts_of(rows.end - rows.begin, kMaxTileRows));
      for (int tile = 0; tile < num_tiles; ++tile) {
        const Range part = part_of(rows.end - rows.begin, tile, num_tiles);
        const int64_t first = steps.begin + rows.begin;
        run_tile(call, item % num_panels, {first + part.begin, first + part.end});
      }
    }
  });
}

void conv_to_mono(ThreadPool* pool, const MonoCall& call) {
  const int64_t num_rows = call.rows.end - call.rows.begin;
  const int64_t num_groups = parts_of(num_rows, F32::kLanes);
  parallel_for(pool, num_groups, kGrainSamples / F32::kLanes, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      const int64_t first = group * F32::kLanes;
      const int64_t count = smaller(num_rows - first, F32::kLanes);
      F32 products[F32::kLanes];
      for (int64_t r = 0; r < F32::kLanes; ++r) {
        products[r] = r < count ? row_product(call, call.rows.begin + first + r) : zero();
      }
      const F32 sums = sums_of(products) + splat(call.bias);
      // Of a number and no number, the second operand comes out: a failure stays to be seen.
      store_up_to(call.samples + first, max(splat(-1.0f), min(splat(1.0f), sums)), count);
    }
  });
}

void sum_features(ThreadPool* pool, const FeatureCall& call) {
  const int64_t num_rows = call.rows.end - call.rows.begin;
  parallel_for(pool, num_rows, kGrainFeatures / call.width, [&](int64_t begin, int64_t end) {
    for (int64_t row = call.rows.begin + begin; row < call.rows.begin + end; ++row) {
      float* to = call.output.row(row);
      for (int64_t i = 0; i < call.width; i += F32::kLanes) {
        F32 sum = load_up_to(call.bias + i, call.width - i);
        for (int64_t k = 0; k < call.num_codebooks; ++k) {
          const int64_t entry = k * call.codebook_size + call.codes[k * call.codes_stride + row];
          sum = sum + load_up_to(call.table + entry * call.width + i, call.width - i);
        }
        store(to + i, sum);
      }
    }
  });
}

}  // namespace hav::HAV_ISA
