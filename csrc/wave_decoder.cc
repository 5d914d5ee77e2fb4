#include "wave_decoder.h"

#include <algorithm>
#include <cstring>

namespace hav {
namespace {

int64_t size_of(Range range) { return range.end - range.begin; }

Range within(Range range, int64_t length) {
  return {std::max<int64_t>(range.begin, 0), std::min(range.end, length)};
}

bool is_valid(const hav_wave_layer& layer) {
  if (layer.weight == nullptr || layer.bias == nullptr) return false;
  if (layer.num_inputs < 1 || layer.num_outputs < 1) return false;
  if ((layer.alpha == nullptr) != (layer.inverse == nullptr)) return false;
  if (layer.upsampling > 0) return layer.kernel_size == 2 * layer.upsampling;
  return layer.upsampling == 0 && layer.kernel_size % 2 == 1 && layer.dilation >= 1;
}

bool keeps_rate(const hav_wave_layer& layer) { return layer.upsampling == 0; }

// What a residual layer adds has to have come out of a layer, and has to fit.
bool has_valid_residual(const hav_wave_model& model, int64_t index) {
  const hav_wave_layer& layer = model.layers[index];
  if (!layer.is_residual) return true;
  if (index < 2 || !keeps_rate(layer)) return false;
  const hav_wave_layer& before = model.layers[index - 1];
  return keeps_rate(before) && !before.is_residual && before.num_inputs == layer.num_outputs;
}

bool is_chain(const hav_wave_model& model) {
  if (model.num_layers < 1 || model.num_codebooks < 1 || model.codebook_size < 1) return false;
  int64_t width = model.width;
  for (int64_t i = 0; i < model.num_layers; ++i) {
    const hav_wave_layer& layer = model.layers[i];
    if (!is_valid(layer) || layer.num_inputs != width) return false;
    if (!has_valid_residual(model, i)) return false;
    width = layer.num_outputs;
  }
  const hav_wave_layer& first = model.layers[0];
  const hav_wave_layer& last = model.layers[model.num_layers - 1];
  return first.alpha == nullptr && keeps_rate(last) && !last.is_residual && width == 1;
}

// The one output of the last layer: [num_taps, input_width].
void pack_mono(const hav_wave_layer& layer, const ConvWeights& packed) {
  for (int64_t tap = 0; tap < packed.num_taps; ++tap) {
    for (int64_t i = 0; i < packed.num_inputs; ++i) {
      packed.panels[tap * packed.input_width + i] = layer.weight[i * layer.kernel_size + tap];
    }
  }
  packed.bias[0] = layer.bias[0];
}

}  // namespace

// The rows of every layer for one call, and where they lie.
struct WaveDecoder::Plan {
  std::vector<int64_t> lengths;  // rows of each layer's input in all
  std::vector<Range> inputs;     // rows that each layer reads; outside 0 .. length they are zeros
  size_t activated_size[2] = {0, 0};
  size_t plain_size[2] = {0, 0};
  float* activated[2] = {nullptr, nullptr};  // of layers with an even and an odd index
  float* plain[2] = {nullptr, nullptr};

  // Rows that are computed for a layer.
  Range filled(size_t layer) const { return within(inputs[layer], lengths[layer]); }

  size_t num_values() const {
    return activated_size[0] + activated_size[1] + plain_size[0] + plain_size[1];
  }

  void place(float* memory) {
    for (int i : {0, 1}) {
      activated[i] = memory;
      plain[i] = memory + activated_size[i];
      memory = plain[i] + plain_size[i];
    }
  }

  RowView input_of(size_t layer, const ConvWeights& weights) const {
    return {activated[layer % 2], inputs[layer].begin, weights.input_width};
  }

  // What goes into a layer, before its Snake. No two neighbours keep it.
  RowView plain_input_of(size_t layer, const ConvWeights& weights) const {
    return {plain[layer / 2 % 2], filled(layer).begin, weights.input_width};
  }

  void clear_padding(size_t layer, const ConvWeights& weights) const {
    const RowView rows = input_of(layer, weights);
    const Range all = inputs[layer], inner = filled(layer);
    const size_t row_bytes = static_cast<size_t>(rows.width) * sizeof(float);
    std::memset(rows.row(all.begin), 0, static_cast<size_t>(inner.begin - all.begin) * row_bytes);
    std::memset(rows.row(inner.end), 0, static_cast<size_t>(all.end - inner.end) * row_bytes);
  }
};

std::unique_ptr<WaveDecoder> WaveDecoder::create(const hav_wave_model& model) {
  if (!is_chain(model)) return nullptr;
  std::unique_ptr<WaveDecoder> decoder(new WaveDecoder(model));
  for (int64_t i = 0; i < model.num_layers; ++i) {
    const bool is_last = i == model.num_layers - 1;
    if (!decoder->append(model.layers[i], is_last)) return nullptr;
  }
  return decoder;
}

WaveDecoder::WaveDecoder(const hav_wave_model& model) : kernels_(kernels()), tables_(model) {
  tables_.layers = nullptr;
  layers_.reserve(static_cast<size_t>(model.num_layers));
}

bool WaveDecoder::append(const hav_wave_layer& layer, bool is_mono) {
  Layer added{kernels_.plan_conv(layer), {nullptr, nullptr}, layer.is_residual != 0};
  ConvWeights& weights = added.weights;
  const int64_t num_weights =
      is_mono ? weights.num_taps * weights.input_width : weights.num_panel_values;
  const int64_t num_columns = weights.num_phases * weights.output_width;
  const int64_t num_values = num_weights + num_columns + 2 * weights.input_width;
  AlignedMemory memory = AlignedMemory::of_zeros(num_values * static_cast<int64_t>(sizeof(float)));
  if (memory.bytes() == nullptr) return false;
  weights.panels = reinterpret_cast<float*>(memory.bytes());
  weights.bias = weights.panels + num_weights;
  if (is_mono) {
    pack_mono(layer, weights);
  } else {
    kernels_.pack_conv(layer, weights);
  }
  if (layer.alpha != nullptr) {
    float* alpha = weights.bias + num_columns;
    float* inverse = alpha + weights.input_width;
    std::copy_n(layer.alpha, layer.num_inputs, alpha);
    std::copy_n(layer.inverse, layer.num_inputs, inverse);
    added.snake = {alpha, inverse};
  }
  hop_ *= weights.num_phases;
  num_bytes_ += num_values * static_cast<int64_t>(sizeof(float));
  layers_.push_back(added);
  memory_.push_back(std::move(memory));
  return true;
}

bool WaveDecoder::is_kept_plain(size_t index) const {
  return index + 1 < layers_.size() && layers_[index + 1].is_residual;
}

WaveDecoder::Plan WaveDecoder::plan(int64_t num_frames, Range frames) const {
  Plan plan;
  int64_t length = num_frames;
  for (const Layer& layer : layers_) {
    plan.lengths.push_back(length);
    length *= layer.weights.num_phases;
  }
  plan.inputs.resize(layers_.size());
  Range wanted{frames.begin * hop_, frames.end * hop_};
  for (size_t i = layers_.size(); i-- > 0;) {
    plan.inputs[i] = layers_[i].weights.inputs_for(wanted);
    wanted = plan.filled(i);
    const int64_t width = layers_[i].weights.input_width;
    size_t& activated = plan.activated_size[i % 2];
    activated = std::max(activated, static_cast<size_t>(size_of(plan.inputs[i]) * width));
    if (!is_kept_plain(i)) continue;
    size_t& plain = plan.plain_size[i / 2 % 2];
    plain = std::max(plain, static_cast<size_t>(size_of(wanted) * width));
  }
  return plan;
}

ConvOutput WaveDecoder::output_of(const Plan& plan, size_t index) const {
  const Layer& next = layers_[index + 1];
  ConvOutput output{};
  output.rows = plan.filled(index + 1);
  output.activated = plan.input_of(index + 1, next.weights);
  output.snake = next.snake;
  if (is_kept_plain(index + 1)) output.plain = plan.plain_input_of(index + 1, next.weights);
  if (layers_[index].is_residual) {
    output.residual = plan.plain_input_of(index - 1, layers_[index - 1].weights);
  }
  return output;
}

bool WaveDecoder::decode(ThreadPool* pool, const int64_t* codes, int64_t codes_stride,
                         int64_t num_frames, Range frames, float* samples) const {
  if (size_of(frames) <= 0) return true;
  Plan plan = this->plan(num_frames, frames);
  void* memory = thread_workspace(plan.num_values() * sizeof(float));
  if (memory == nullptr) return false;
  plan.place(static_cast<float*>(memory));

  plan.clear_padding(0, layers_[0].weights);
  const FeatureCall features{
      tables_.table,         tables_.table_bias,    tables_.width,
      tables_.num_codebooks, tables_.codebook_size, codes,
      codes_stride,          plan.filled(0),        plan.input_of(0, layers_[0].weights)};
  kernels_.sum_features(pool, features);
  for (size_t i = 0; i + 1 < layers_.size(); ++i) {
    const ConvWeights& weights = layers_[i].weights;
    plan.clear_padding(i + 1, layers_[i + 1].weights);
    kernels_.conv(pool, {weights, plan.input_of(i, weights), output_of(plan, i)});
  }
  const size_t last = layers_.size() - 1;
  const ConvWeights& weights = layers_[last].weights;
  kernels_.conv_to_mono(pool, {weights.panels,
                               weights.bias[0],
                               weights.num_taps,
                               weights.dilation,
                               weights.reach,
                               plan.input_of(last, weights),
                               {frames.begin * hop_, frames.end * hop_},
                               samples});
  return true;
}

}  // namespace hav
