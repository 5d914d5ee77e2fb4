#include "sampler.h"

#include "philox.h"
#include "simd.h"
#include "vector_math.h"

namespace hav::HAV_ISA {
namespace {

constexpr float kMasked = -__builtin_inff();
constexpr int kMaxRasWindow = 64;  // MAX_RAS_WINDOW in vllm/sampling_params.py
constexpr int kSumLanes = 8;
// Codebooks from which a second thread saves more than it costs.
constexpr int64_t kGrainCodebooks = 8;

// Columns of the counters, as CodebookState has them.
enum Counter { kNumFrames, kEosTurn, kEosLag, kFrameLimit, kEosAllowed, kAnyAllowed, kNumCounters };

enum FrameStatus : uint8_t { kRunning = 0, kStopped = 1, kLimit = 2 };

int64_t* counters_of(const hav_streams& streams, int64_t row) {
  return streams.counters + row * kNumCounters;
}

// The ring's slot of a frame, [num_codebooks]. Slots of frames before the first hold -1.
int16_t* past_frame(const hav_streams& streams, int64_t row, int64_t frame) {
  const int64_t slot = frame & (kMaxRasWindow - 1);
  return streams.history + (row * kMaxRasWindow + slot) * streams.num_codebooks;
}

// One codebook's codes of the last frames; -1 where nothing counts.
struct PastCodes {
  int64_t codes[kMaxRasWindow];
  int size;

  int count(int64_t code) const {
    int num = 0;
    for (int age = 0; age < size; ++age) num += codes[age] == code ? 1 : 0;
    return num;
  }
};

PastCodes past_codes(const hav_streams& streams, int64_t row, int64_t codebook, int64_t window) {
  PastCodes past;
  past.size = static_cast<int>(window);
  const int64_t newest = counters_of(streams, row)[kNumFrames] - 1;
  for (int age = 0; age < past.size; ++age) {
    past.codes[age] = past_frame(streams, row, newest - age)[codebook];
  }
  return past;
}

float maximum(const float* values, int count) {
  F32 best = splat(kMasked);
  int i = 0;
  for (; i + F32::kLanes <= count; i += F32::kLanes) best = max(load(values + i), best);
  float most = max_of(best);
  for (; i < count; ++i) most = values[i] > most ? values[i] : most;
  return most;
}

int argmax(const float* values, int count) {
  constexpr int kRun = 64;  // values that are compared at once
  const float most = maximum(values, count);
  int i = 0;
  for (; i + kRun <= count; i += kRun) {
    int32_t is_here = 0;
    for (int j = 0; j < kRun; ++j) is_here |= values[i + j] == most ? 1 : 0;
    if (is_here != 0) break;
  }
  for (; i < count; ++i) {
    if (values[i] == most) return i;
  }
  return 0;
}

// Masks codes that fill the recent past, unless no code would be left.
void mask_repeated(float* logits, int count, const PastCodes& past, int64_t repeats) {
  float saved[kMaxRasWindow];
  int64_t masked[kMaxRasWindow];
  int num_masked = 0;
  for (int age = 0; age < past.size; ++age) {
    const int64_t code = past.codes[age];
    if (code < 0 || logits[code] == kMasked || past.count(code) < repeats) continue;
    saved[num_masked] = logits[code];
    masked[num_masked++] = code;
    logits[code] = kMasked;
  }
  if (num_masked == 0 || maximum(logits, count) != kMasked) return;
  for (int i = 0; i < num_masked; ++i) logits[masked[i]] = saved[i];
}

int count_at_least(const float* weights, int count, float limit) {
  int num = 0;
  for (int i = 0; i < count; ++i) num += weights[i] >= limit ? 1 : 0;
  return num;
}

typedef float Floats __attribute__((vector_size(kSumLanes * sizeof(float))));
typedef double Doubles __attribute__((vector_size(kSumLanes * sizeof(double))));

// Sum of the weights above a limit of -1 or more, in float64 and always in the same order.
double mass_above(const float* weights, int count, float limit) {
  Doubles lanes = {};
  Floats part;
  int i = 0;
  for (; i + kSumLanes <= count; i += kSumLanes) {
    __builtin_memcpy(&part, weights + i, sizeof part);
    lanes += __builtin_convertvector(part > limit ? part : Floats{}, Doubles);
  }
  for (int lane = 0; i < count; ++i, ++lane) {
    lanes[lane] += weights[i] > limit ? static_cast<double>(weights[i]) : 0.0;
  }
  const double low = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
  return low + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

// Weights lie in 0 .. 1, so their bit patterns are ordered as they are and can be bisected.
int32_t bits_of(float value) {
  int32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

float float_of(int32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// A limit that is reached by all codes as likely as the k-th, and by no other.
float top_k_limit(const float* weights, int count, int64_t top_k) {
  int32_t low = 0, high = bits_of(1.0f) + 1;
  while (high - low > 1) {
    const int32_t middle = low + (high - low) / 2;
    const int num = count_at_least(weights, count, float_of(middle));
    if (num == top_k) return float_of(middle);
    (num > top_k ? low : high) = middle;
  }
  return float_of(low);
}

// A limit that is reached by the smallest weight that stays, and by none below it: the weights
// above that one hold less than `enough`.
float top_p_limit(const float* weights, int count, double enough) {
  // What lies above `low` holds enough, what lies above `high` does not.
  int32_t low = -1, high = bits_of(1.0f);
  int num_above_low = count, num_above_high = 0;
  while (high - low > 1 && num_above_low - num_above_high > 1) {
    const int32_t middle = low + (high - low) / 2;
    const int num_above = count_at_least(weights, count, float_of(middle + 1));
    const bool is_enough = mass_above(weights, count, float_of(middle)) >= enough;
    (is_enough ? low : high) = middle;
    (is_enough ? num_above_low : num_above_high) = num_above;
  }
  return float_of(low + 1);
}

// Codes that may be drawn, in rising order, with their weights.
struct Candidates {
  float weights[HAV_MAX_CODEBOOK_SIZE];
  int32_t codes[HAV_MAX_CODEBOOK_SIZE];
  int size;

  // Softmax up to a factor: the largest weight is 1, a masked code has 0.
  void fill(const float* logits, int count, float temperature) {
    size = count;
    const F32 divisor = splat(temperature);
    const F32 top = splat(maximum(logits, count) / temperature);
    for (int i = 0; i < count; i += F32::kLanes) {
      const F32 scaled = load_up_to(logits + i, count - i) / divisor;
      store_up_to(weights + i, exp_of(scaled - top), count - i);
    }
    for (int i = 0; i < count; ++i) {
      weights[i] = logits[i] == kMasked ? 0.0f : weights[i];
      codes[i] = i;
    }
  }

  void keep_at_least(float limit) {
    int num_kept = 0, i = 0;
    for (; i + F32::kLanes <= size; i += F32::kLanes) {
      num_kept += store_at_least(load(weights + i), load_i32(codes + i), limit, weights + num_kept,
                                 codes + num_kept);
    }
    for (; i < size; ++i) {
      const float weight = weights[i];
      weights[num_kept] = weight;
      codes[num_kept] = codes[i];
      num_kept += weight >= limit ? 1 : 0;
    }
    size = num_kept;
  }

  void keep_top_k(int64_t top_k) {
    if (top_k >= 1 && top_k < size) keep_at_least(top_k_limit(weights, size, top_k));
  }

  void keep_top_p(float top_p) {
    if (top_p >= 1.0f) return;
    const double enough = static_cast<double>(top_p) * mass_above(weights, size, -1.0f);
    keep_at_least(top_p_limit(weights, size, enough));
  }

  // Inverse of the cumulative distribution at `noise` in [0, 1).
  int64_t draw(float noise) const {
    double total = 0.0, mass = 0.0;
    for (int i = 0; i < size; ++i) total += weights[i];
    const double target = total * static_cast<double>(noise);
    for (int i = 0; i < size; ++i) {
      mass += weights[i];
      if (mass > target) return codes[i];
    }
    return 0;  // only where logits are not numbers
  }
};

// One codebook of one row, with the settings of the row.
struct Draw {
  const hav_sampling& sampling;
  int64_t row;
  int64_t frame;
  int64_t codebook;
  int num_codes;

  float noise(Purpose purpose) const {
    return uniform(sampling.seed[row], frame, codebook, purpose);
  }

  int64_t first(const float* logits) const {
    const float temperature = sampling.temperature[row];
    if (temperature == 0.0f) return argmax(logits, num_codes);
    Candidates candidates;
    candidates.fill(logits, num_codes, temperature);
    candidates.keep_top_k(sampling.top_k[row]);
    candidates.keep_top_p(sampling.top_p[row]);
    return candidates.draw(noise(Purpose::kDraw));
  }

  // From the logits before the temperature, and without filters, as the reference does.
  int64_t again(const float* logits) const {
    Candidates candidates;
    candidates.fill(logits, num_codes, 1.0f);
    return candidates.draw(noise(Purpose::kRasRedraw));
  }
};

// The code that the delay pattern dictates, or -1.
int64_t forced_code(const hav_streams& streams, const int64_t* counters, int64_t codebook) {
  const int64_t frame = counters[kNumFrames];
  if (frame <= codebook) return streams.bos;
  return frame - counters[kEosTurn] >= codebook ? streams.eos : -1;
}

// Rules out BOS and EOS where they may not appear.
void mask_markers(const hav_streams& streams, const int64_t* counters, int64_t codebook,
                  float* logits) {
  if (counters[kAnyAllowed] > 0) return;
  logits[streams.bos] = kMasked;
  const bool may_end = codebook == 0 && counters[kNumFrames] >= counters[kEosAllowed];
  if (!may_end) logits[streams.eos] = kMasked;
}

int64_t sample_code(const hav_streams& streams, const hav_sampling& sampling, int64_t row,
                    int64_t codebook, float* logits) {
  const int64_t* counters = counters_of(streams, row);
  const int64_t forced = forced_code(streams, counters, codebook);
  if (forced >= 0) return forced;
  mask_markers(streams, counters, codebook, logits);
  const int num_codes = static_cast<int>(streams.codebook_size);
  const Draw draw{sampling, row, counters[kNumFrames], codebook, num_codes};
  const int64_t window = sampling.ras_window[row], repeats = sampling.ras_repeats[row];
  if (window == 0 || repeats == 0) return draw.first(logits);
  const PastCodes past = past_codes(streams, row, codebook, window);
  if (sampling.ras_blocks[row]) {
    mask_repeated(logits, num_codes, past, repeats);
    return draw.first(logits);
  }
  const int64_t code = draw.first(logits);
  return past.count(code) >= repeats ? draw.again(logits) : code;
}

// Appends the frame [num_codebooks] to its row's stream.
FrameStatus advance_row(const hav_streams& streams, int64_t row, const int16_t* frame) {
  int64_t* counters = counters_of(streams, row);
  const int64_t index = counters[kNumFrames];
  int16_t* remembered = past_frame(streams, row, index);
  int64_t* last_frame = streams.last_frame + row * streams.num_codebooks;
  int64_t num_eos = 0;
  for (int64_t k = 0; k < streams.num_codebooks; ++k) {
    const bool is_eos = frame[k] == streams.eos;
    num_eos += is_eos ? 1 : 0;
    remembered[k] = is_eos || frame[k] == streams.bos ? int16_t{-1} : frame[k];
    last_frame[k] = frame[k];
  }
  const int64_t turn = index + counters[kEosLag];
  if (num_eos > 0 && turn < counters[kEosTurn]) counters[kEosTurn] = turn;
  counters[kNumFrames] = index + 1;
  if (num_eos == streams.num_codebooks) return kStopped;
  return index + 1 >= counters[kFrameLimit] ? kLimit : kRunning;
}

}  // namespace

void sample_frames(ThreadPool* pool, const hav_streams* streams, const hav_sampling* sampling,
                   const int64_t* rows, int64_t num_rows, float* logits, int16_t* frames,
                   uint8_t* status) {
  const int64_t num_codebooks = streams->num_codebooks;
  parallel_for(pool, num_rows * num_codebooks, kGrainCodebooks, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* of_codebook = logits + i * streams->codebook_size;
      frames[i] = static_cast<int16_t>(sample_code(*streams, *sampling, rows[i / num_codebooks],
                                                   i % num_codebooks, of_codebook));
    }
  });
  for (int64_t i = 0; i < num_rows; ++i) {
    status[i] = advance_row(*streams, rows[i], frames + i * num_codebooks);
  }
}

void uniform_numbers(const uint64_t* seeds, const int64_t* steps, int64_t num_rows,
                     int64_t num_codebooks, uint32_t purpose, float* numbers) {
  for (int64_t row = 0; row < num_rows; ++row) {
    for (int64_t k = 0; k < num_codebooks; ++k) {
      numbers[row * num_codebooks + k] =
          uniform(seeds[row], steps[row], k, static_cast<Purpose>(purpose));
    }
  }
}

}  // namespace hav::HAV_ISA
