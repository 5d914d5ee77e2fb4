#include "decode_step.h"

#include "decode_attention.h"
#include "embed_codes.h"
#include "linear.h"
#include "sampler.h"
#include "simd.h"

namespace hav::HAV_ISA {
namespace {

// Widths of the intermediate results of one row.
struct Widths {
  int64_t hidden, qkv, context, gated, logits;
};

Widths widths_of(const hav_decoder& decoder) {
  const hav_kv_cache& cache = decoder.layers[0].cache;
  Widths widths;
  widths.hidden = decoder.hidden_size;
  widths.qkv = (decoder.num_heads + 2 * cache.num_kv_heads) * cache.head_dim;
  widths.context = decoder.num_heads * cache.head_dim;
  widths.gated = weights_of(decoder.layers[0].gate_up).num_outputs;
  widths.logits = decoder.streams.num_codebooks * decoder.streams.codebook_size;
  return widths;
}

// Hands out parts of a workspace; of none, it only counts them.
class Carver {
 public:
  explicit Carver(char* bytes) : bytes_(bytes) {}

  template <typename T>
  T* take(int64_t count) {
    T* part = reinterpret_cast<T*>(bytes_ == nullptr ? nullptr : bytes_ + used_);
    used_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return part;
  }

  size_t used() const { return used_; }

 private:
  char* bytes_;
  size_t used_ = 0;
};

struct Workspace {
  float* hidden;
  float* qkv;
  float* context;
  float* gated;
  float* logits;
  int64_t* positions;  // of the rows of this step
  char* of_linear;
};

size_t linear_bytes(const hav_decoder& decoder, int64_t num_rows) {
  size_t most = linear_workspace_bytes(weights_of(decoder.head), num_rows);
  for (int64_t i = 0; i < decoder.num_layers; ++i) {
    const hav_decoder_layer& layer = decoder.layers[i];
    const hav_linear* const all[] = {layer.qkv, layer.output, layer.gate_up, layer.down};
    for (const hav_linear* each : all) {
      const size_t bytes = linear_workspace_bytes(weights_of(each), num_rows);
      most = bytes > most ? bytes : most;
    }
  }
  return most;
}

Workspace carve(const hav_decoder& decoder, int64_t num_rows, Carver& carver) {
  const Widths widths = widths_of(decoder);
  Workspace work;
  work.hidden = carver.take<float>(num_rows * widths.hidden);
  work.qkv = carver.take<float>(num_rows * widths.qkv);
  work.context = carver.take<float>(num_rows * widths.context);
  work.gated = carver.take<float>(num_rows * widths.gated);
  work.logits = carver.take<float>(num_rows * widths.logits);
  work.positions = carver.take<int64_t>(num_rows);
  work.of_linear = carver.take<char>(static_cast<int64_t>(linear_bytes(decoder, num_rows)));
  return work;
}

// The step's rows and what all parts of it need.
struct Step {
  ThreadPool* pool;
  const hav_decoder& decoder;
  const int64_t* rows;
  int64_t num_rows;
  Widths widths;
  Workspace work;

  LinearInput rows_of(const float* x, int64_t width) const {
    return {x, width, num_rows, nullptr, 0.0f};
  }

  LinearInput normed_hidden(const float* gain) const {
    return {work.hidden, widths.hidden, num_rows, gain, decoder.norm_eps};
  }

  LinearOutput added_to_hidden() const { return {work.hidden, widths.hidden, true}; }

  void apply(const hav_linear* weights, const LinearInput& input,
             const LinearOutput& output) const {
    linear(pool, weights_of(weights), input, output, work.of_linear);
  }
};

void embed_last_frames(const Step& step) {
  const hav_streams& streams = step.decoder.streams;
  for (int64_t i = 0; i < step.num_rows; ++i) {
    embed_codes_row(step.decoder.embedding, step.widths.hidden,
                    streams.last_frame + step.rows[i] * streams.num_codebooks,
                    streams.num_codebooks, streams.codebook_size,
                    step.work.hidden + i * step.widths.hidden);
  }
}

// Five parallel regions: each linear map is one, with the norm before it or the sum after it.
void run_layer(const Step& step, const hav_decoder_layer& layer, const hav_attention& attention) {
  const Widths& widths = step.widths;
  const Workspace& work = step.work;
  step.apply(layer.qkv, step.normed_hidden(layer.input_norm), {work.qkv, widths.qkv, false});
  rope_write_attend(step.pool, &layer.cache, &attention, step.decoder.cos, step.decoder.signed_sin,
                    work.qkv, widths.qkv, work.context, widths.context);
  step.apply(layer.output, step.rows_of(work.context, widths.context), step.added_to_hidden());
  step.apply(layer.gate_up, step.normed_hidden(layer.post_norm), {work.gated, widths.gated, false});
  step.apply(layer.down, step.rows_of(work.gated, widths.gated), step.added_to_hidden());
}

hav_attention attention_of(const Step& step) {
  const hav_decoder& decoder = step.decoder;
  for (int64_t i = 0; i < step.num_rows; ++i) {
    step.work.positions[i] = decoder.positions[step.rows[i]];
  }
  const float head_dim = static_cast<float>(decoder.layers[0].cache.head_dim);
  return {decoder.block_tables,
          decoder.block_table_stride,
          step.rows,
          step.work.positions,
          step.num_rows,
          decoder.num_heads,
          1.0f / square_root(head_dim)};
}

}  // namespace

size_t decode_step_workspace_bytes(const hav_decoder& decoder, int64_t num_rows) {
  Carver carver(nullptr);
  carve(decoder, num_rows, carver);
  return carver.used();
}

void decode_step(ThreadPool* pool, const hav_decoder& decoder, const int64_t* rows,
                 int64_t num_rows, int16_t* frames, uint8_t* status, void* workspace) {
  Carver carver(static_cast<char*>(workspace));
  const Step step{
      pool, decoder, rows, num_rows, widths_of(decoder), carve(decoder, num_rows, carver)};
  const hav_attention attention = attention_of(step);
  embed_last_frames(step);
  for (int64_t i = 0; i < decoder.num_layers; ++i) run_layer(step, decoder.layers[i], attention);
  step.apply(decoder.head, step.normed_hidden(decoder.norm),
             {step.work.logits, step.widths.logits, false});
  sample_frames(pool, &decoder.streams, &decoder.sampling, rows, num_rows, step.work.logits, frames,
                status);
}

}  // namespace hav::HAV_ISA
