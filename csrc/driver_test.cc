// Calls the C interface without Python, so that sanitizers can look at all of it: every instruction
// set of this machine, every format, one thread and several, and callers that share a pool.
//
// What is computed is compared with plain loops; the tests in Python compare it with torch.
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "api.h"

namespace {

void expect(bool condition, const std::string& what) {
  if (condition) return;
  std::fprintf(stderr, "failed: %s (%s)\n", what.c_str(), hav_isa());
  std::exit(1);
}

// Reproducible numbers from -1 to 1.
class Numbers {
 public:
  float next() {
    state_ = state_ * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<float>(static_cast<int32_t>(state_ >> 32)) / 2147483648.0f;
  }

  std::vector<float> take(size_t count) {
    std::vector<float> numbers(count);
    for (float& each : numbers) each = next();
    return numbers;
  }

 private:
  uint64_t state_ = 1;
};

// A matrix of one format, and the numbers that it stands for.
struct Matrix {
  int32_t format;
  int64_t num_outputs, num_inputs;
  std::vector<uint8_t> values;
  int64_t stride;  // bytes
  std::vector<uint8_t> scales;
  std::vector<float> meaning;  // [num_outputs, num_inputs]

  hav_linear* packed(hav_pool* pool, bool is_gated) const {
    return hav_linear_create(pool, format, num_outputs, num_inputs, values.data(), stride,
                             scales.empty() ? nullptr : scales.data(), is_gated);
  }
};

uint16_t truncated_to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<uint16_t>(bits >> 16);
}

float of_bf16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, sizeof x);
  return x;
}

template <typename T>
void append(std::vector<uint8_t>& bytes, T value) {
  const size_t size = bytes.size();
  bytes.resize(size + sizeof value);
  std::memcpy(bytes.data() + size, &value, sizeof value);
}

// Integer i of row r, within the range of the format.
int integer_at(int64_t row, int64_t i, int largest) {
  return static_cast<int>((row * 7 + i * 13) % (2 * largest + 1)) - largest;
}

// `is_short`: of numbers that are bfloat16, whatever the format.
Matrix make_matrix(int32_t format, int64_t num_outputs, int64_t num_inputs, Numbers& numbers,
                   bool is_short = false) {
  Matrix matrix{format, num_outputs, num_inputs, {}, 0, {}, {}};
  for (int64_t row = 0; row < num_outputs; ++row) {
    const float scale = 0.01f + 0.001f * static_cast<float>(row % 5);
    if (format == HAV_INT8) append(matrix.scales, scale);
    for (int64_t i = 0; i < num_inputs; ++i) {
      const float drawn = numbers.next();
      const float x = is_short ? of_bf16(truncated_to_bf16(drawn)) : drawn;
      if (format == HAV_FLOAT32) {
        append(matrix.values, x);
        matrix.meaning.push_back(x);
      } else if (format == HAV_BFLOAT16) {
        append(matrix.values, truncated_to_bf16(x));
        matrix.meaning.push_back(of_bf16(truncated_to_bf16(x)));
      } else if (format == HAV_INT8) {
        const int q = integer_at(row, i, 127);
        append(matrix.values, static_cast<int8_t>(q));
        matrix.meaning.push_back(static_cast<float>(q) * scale);
      } else {
        const uint16_t group_scale = truncated_to_bf16(scale);
        const int q = integer_at(row, i, 7);
        if (i % 32 == 0) append(matrix.scales, group_scale);
        if (i % 2 == 0) append(matrix.values, static_cast<uint8_t>(q + 8));
        if (i % 2 == 1) matrix.values.back() |= static_cast<uint8_t>((q + 8) << 4);
        matrix.meaning.push_back(static_cast<float>(q) * of_bf16(group_scale));
      }
    }
  }
  matrix.stride = static_cast<int64_t>(matrix.values.size()) / num_outputs;
  return matrix;
}

float silu(double x) { return static_cast<float>(x / (1.0 + std::exp(-x))); }

double product(const Matrix& matrix, const float* x, int64_t output) {
  double sum = 0;
  for (int64_t i = 0; i < matrix.num_inputs; ++i) {
    sum += static_cast<double>(matrix.meaning[output * matrix.num_inputs + i]) * x[i];
  }
  return sum;
}

struct Rows {
  int64_t count, width;
  std::vector<float> values;
};

// Rows that no format has to round: multiples of 1 / 1024, the largest of each row 127 of them.
Rows make_rows(int64_t count, int64_t width) {
  Rows rows{count, width, {}};
  for (int64_t row = 0; row < count; ++row) {
    for (int64_t i = 0; i < width; ++i) {
      const int q = i == row % width ? 127 : integer_at(row + 3, i * i, 127);
      rows.values.push_back(static_cast<float>(q) / 1024.0f);
    }
  }
  return rows;
}

std::vector<float> apply(hav_pool* pool, const hav_linear* weights, const Rows& rows,
                         int64_t num_outputs) {
  std::vector<float> y(rows.count * num_outputs, 0.0f);
  expect(hav_linear_apply(pool, weights, rows.values.data(), rows.width, rows.count, nullptr, 0.0f,
                          y.data(), num_outputs, 0) == 0,
         "memory for a product");
  return y;
}

void check_product(const Matrix& matrix, bool is_gated, const Rows& rows, hav_pool* pool) {
  hav_linear* weights = matrix.packed(pool, is_gated);
  expect(weights != nullptr, "packing");
  const int64_t outputs = is_gated ? matrix.num_outputs / 2 : matrix.num_outputs;
  const std::vector<float> alone = apply(nullptr, weights, rows, outputs);
  expect(alone == apply(pool, weights, rows, outputs), "threads change bits");
  for (int64_t row = 0; row < rows.count; ++row) {
    for (int64_t output = 0; output < outputs; ++output) {
      const float* x = rows.values.data() + row * rows.width;
      double expected = product(matrix, x, output);
      if (is_gated) expected = silu(expected) * product(matrix, x, outputs + output);
      const double actual = alone[row * outputs + output];
      expect(std::abs(actual - expected) <= 1e-4 * (1.0 + std::abs(expected)),
             "product of format " + std::to_string(matrix.format));
    }
  }
  hav_linear_destroy(weights);
}

void check_products(hav_pool* pool) {
  Numbers numbers;
  const auto check = [&](const Matrix& matrix) {
    for (int64_t count : {1, 2, 3, 5, 8, 20, 65}) {
      const Rows rows = make_rows(count, matrix.num_inputs);
      check_product(matrix, false, rows, pool);
      check_product(matrix, true, rows, pool);
    }
  };
  for (int64_t num_inputs : {32, 96, 1056}) {
    check(make_matrix(HAV_FLOAT32, 74, num_inputs - 1, numbers));
    check(make_matrix(HAV_FLOAT32, 74, num_inputs, numbers, /*is_short=*/true));
    check(make_matrix(HAV_BFLOAT16, 74, num_inputs - 1, numbers));
    check(make_matrix(HAV_INT8, 74, num_inputs - 1, numbers));
    check(make_matrix(HAV_INT4, 74, num_inputs, numbers));
  }
}

void check_norm(hav_pool* pool) {
  Numbers numbers;
  const int64_t rows = 33, width = 1000;
  const std::vector<float> x = numbers.take(rows * width), weight = numbers.take(width);
  std::vector<float> alone(rows * width), together(rows * width);
  hav_rms_norm(nullptr, x.data(), width, weight.data(), 1e-5f, alone.data(), width, rows, width);
  hav_rms_norm(pool, x.data(), width, weight.data(), 1e-5f, together.data(), width, rows, width);
  expect(alone == together, "threads change the norm");
}

// Calls of several threads on one pool, with pauses in which its threads go to sleep.
void check_shared_pool(hav_pool* pool) {
  Numbers numbers;
  const Matrix matrix = make_matrix(HAV_FLOAT32, 2048, 64, numbers);
  hav_linear* weights = matrix.packed(pool, false);
  const Rows rows = make_rows(4, 64);
  const std::vector<float> expected = apply(nullptr, weights, rows, 2048);
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 3; ++caller) {
    callers.emplace_back([&] {
      for (int i = 0; i < 200; ++i) {
        expect(apply(pool, weights, rows, 2048) == expected, "a shared pool");
        if (i % 20 == 0) std::this_thread::sleep_for(std::chrono::microseconds(300));
      }
    });
  }
  for (std::thread& each : callers) each.join();
  hav_linear_destroy(weights);
}

// Two layers, five rows on their own pages: everything that a decode step reads and writes, each in
// an allocation of exactly its size.
class SmallDecoder {
 public:
  SmallDecoder(hav_pool* pool, int32_t format) : pool_(pool), format_(format) {
    for (int64_t i = 0; i < kLayers; ++i) layers_.push_back(make_layer(i));
    for (int64_t i = 0; i < kRows * kBlocksPerRow; ++i) block_tables_.push_back(i);
    for (int64_t row = 0; row < kRows; ++row) {
      positions_.push_back(row * 33);
      // As CodebookState starts a row behind its BOS frame.
      for (int64_t each : {1, 1 << 30, 0, 30, 2, 0}) counters_.push_back(each);
    }
    head_ = make_weights(kCodes, kHidden, false);
  }

  ~SmallDecoder() {
    for (hav_linear* each : weights_) hav_linear_destroy(each);
  }

  // Codes of so many steps.
  std::vector<int16_t> run(int num_steps) {
    const hav_decoder decoder = describe();
    std::vector<int64_t> rows(kRows);
    for (int64_t row = 0; row < kRows; ++row) rows[row] = kRows - 1 - row;
    std::vector<int16_t> all, frames(kRows * kCodebooks);
    std::vector<uint8_t> status(kRows);
    for (int step = 0; step < num_steps; ++step) {
      expect(
          hav_decode_step(pool_, &decoder, rows.data(), kRows, frames.data(), status.data()) == 0,
          "memory for a step");
      all.insert(all.end(), frames.begin(), frames.end());
      for (int64_t& each : positions_) ++each;
    }
    return all;
  }

 private:
  static constexpr int64_t kLayers = 2, kRows = 5, kHidden = 48, kWidth = 96, kHeads = 6;
  static constexpr int64_t kKeyHeads = 2, kHeadDim = 16, kBlockSize = 16, kBlocksPerRow = 11;
  static constexpr int64_t kCodebooks = 3, kCodebookSize = 37, kCodes = kCodebooks * kCodebookSize;
  static constexpr int64_t kPositions = kBlockSize * kBlocksPerRow;
  static constexpr int64_t kCacheSize = kRows * kPositions * kKeyHeads * kHeadDim;

  hav_linear* make_weights(int64_t num_outputs, int64_t num_inputs, bool is_gated) {
    const Matrix matrix = make_matrix(format_, num_outputs, num_inputs, numbers_);
    weights_.push_back(matrix.packed(pool_, is_gated));
    return weights_.back();
  }

  hav_decoder_layer make_layer(int64_t index) {
    std::vector<uint8_t>& cache = caches_[index];
    for (float each : numbers_.take(2 * kCacheSize)) {
      if (format_ == HAV_BFLOAT16) {
        append(cache, truncated_to_bf16(each));
      } else {
        append(cache, each);
      }
    }
    return {gains_.data(),
            gains_.data(),
            make_weights((kHeads + 2 * kKeyHeads) * kHeadDim, kHidden, false),
            make_weights(kHidden, kHeads * kHeadDim, false),
            make_weights(2 * kWidth, kHidden, true),
            make_weights(kHidden, kWidth, false),
            {cache.data(), kCacheSize, kKeyHeads * kBlockSize * kHeadDim, kBlockSize * kHeadDim,
             kHeadDim, kBlockSize, kKeyHeads, kHeadDim, format_}};
  }

  hav_decoder describe() {
    return {kLayers,
            layers_.data(),
            kHidden,
            kHeads,
            1e-5f,
            embedding_.data(),
            angles_.data(),
            angles_.data(),
            gains_.data(),
            head_,
            block_tables_.data(),
            kBlocksPerRow,
            positions_.data(),
            {last_frame_.data(), counters_.data(), history_.data(), kCodebooks, kCodebookSize,
             kCodebookSize - 2, kCodebookSize - 1},
            {temperature_.data(), top_k_.data(), top_p_.data(), seed_.data(), ras_window_.data(),
             ras_repeats_.data(), ras_blocks_.data()}};
  }

  hav_pool* pool_;
  int32_t format_;  // of weights and pages
  Numbers numbers_;
  std::vector<hav_linear*> weights_;
  std::vector<float> gains_ = std::vector<float>(kHidden, 1.0f);
  std::vector<float> embedding_ = numbers_.take(kCodes * kHidden);
  std::vector<float> angles_ = numbers_.take(kPositions * kHeadDim);
  std::vector<uint8_t> caches_[kLayers];
  std::vector<hav_decoder_layer> layers_;
  hav_linear* head_;
  std::vector<int64_t> block_tables_, positions_, counters_;
  std::vector<int64_t> last_frame_ = std::vector<int64_t>(kRows * kCodebooks, kCodebookSize - 2);
  std::vector<int16_t> history_ = std::vector<int16_t>(kRows * 64 * kCodebooks, -1);
  std::vector<float> temperature_ = {0.0f, 1.0f, 0.7f, 1.0f, 1.0f};
  std::vector<int64_t> top_k_ = {0, 50, 5, -1, 1};
  std::vector<float> top_p_ = {1.0f, 0.95f, 1.0f, 0.5f, 1.0f};
  std::vector<uint64_t> seed_ = {0, 1, 2, 3, ~uint64_t{0}};
  std::vector<int64_t> ras_window_ = {0, 7, 64, 3, 1};
  std::vector<int64_t> ras_repeats_ = {0, 2, 1, 1, 1};
  std::vector<uint8_t> ras_blocks_ = {0, 0, 0, 1, 1};
};

void check_decode_steps(hav_pool* pool) {
  for (int32_t format : {HAV_FLOAT32, HAV_BFLOAT16}) {
    const std::vector<int16_t> expected = SmallDecoder(nullptr, format).run(40);
    expect(SmallDecoder(pool, format).run(40) == expected, "threads change codes");
    for (int16_t code : expected) expect(code >= 0 && code < 37, "a code that there is");
  }
}

// A convolution, one that doubles the rate, a residual unit and one channel of samples.
class SmallCodec {
 public:
  SmallCodec() {
    add({7, 20, 5, 0, 3, false});
    add({20, 9, 4, 2, 1, false});
    add({9, 9, 7, 0, 3, false});
    add({9, 9, 1, 0, 1, true});
    add({9, 1, 7, 0, 1, false});
    const hav_wave_model model{table_.data(),
                               table_.data(),
                               kCodebooks,
                               kCodebookSize,
                               7,
                               static_cast<int64_t>(layers_.size()),
                               layers_.data()};
    decoder_ = hav_wave_decoder_create(&model);
    expect(decoder_ != nullptr, "a codec");
    expect(hav_wave_decoder_num_bytes(decoder_) > 0, "bytes of a codec");
  }
  SmallCodec(const SmallCodec&) = delete;
  SmallCodec& operator=(const SmallCodec&) = delete;
  ~SmallCodec() { hav_wave_decoder_destroy(decoder_); }

  std::vector<float> decode(hav_pool* pool, int64_t first, int64_t last) const {
    std::vector<int64_t> codes;
    for (int64_t i = 0; i < kCodebooks * kFrames; ++i) codes.push_back(i * i % kCodebookSize);
    std::vector<float> samples(static_cast<size_t>(2 * (last - first)));
    expect(hav_wave_decode(pool, decoder_, codes.data(), kFrames, kFrames, first, last,
                           samples.data()) == 0,
           "memory to decode");
    return samples;
  }

  static constexpr int64_t kFrames = 300;

 private:
  static constexpr int64_t kCodebooks = 3, kCodebookSize = 11;

  struct Sizes {
    int64_t num_inputs, num_outputs, kernel_size, upsampling, dilation;
    bool is_residual;
  };

  void add(const Sizes& sizes) {
    const int64_t num_weights = sizes.num_inputs * sizes.num_outputs * sizes.kernel_size;
    values_.push_back(numbers_.take(static_cast<size_t>(num_weights)));
    const float* weight = values_.back().data();
    values_.push_back(numbers_.take(static_cast<size_t>(sizes.num_inputs + sizes.num_outputs)));
    const float* bias = values_.back().data();
    const float* alpha = layers_.empty() ? nullptr : bias + sizes.num_outputs;
    layers_.push_back({weight, bias, sizes.num_outputs, sizes.num_inputs, sizes.kernel_size,
                       sizes.dilation, sizes.upsampling, alpha, alpha, sizes.is_residual});
  }

  Numbers numbers_;
  std::vector<float> table_ = numbers_.take(kCodebooks * kCodebookSize * 7);
  std::vector<std::vector<float>> values_;
  std::vector<hav_wave_layer> layers_;
  hav_wave_decoder* decoder_ = nullptr;
};

void check_codec(hav_pool* pool) {
  const SmallCodec codec;
  const std::vector<float> whole = codec.decode(nullptr, 0, SmallCodec::kFrames);
  expect(codec.decode(pool, 0, SmallCodec::kFrames) == whole, "threads change samples");
  expect(codec.decode(pool, 20, 220) == std::vector<float>(&whole[40], &whole[440]),
         "a part of the samples");
  expect(codec.decode(pool, 5, 5).empty(), "no samples");
}

void check_refusals() {
  const float value = 1.0f;
  expect(hav_pool_create(0) == nullptr, "a pool of no thread");
  expect(hav_linear_create(nullptr, 7, 1, 1, &value, 4, nullptr, 0) == nullptr, "format 7");
  expect(hav_linear_create(nullptr, HAV_INT8, 1, 1, &value, 1, nullptr, 0) == nullptr,
         "int8 without scales");
  expect(hav_linear_create(nullptr, HAV_FLOAT32, 1, 1, &value, 4, nullptr, 1) == nullptr,
         "a gate without its up");
  expect(hav_linear_create(nullptr, HAV_INT4, 1, 40, &value, 20, &value, 0) == nullptr,
         "int4 with part of a group");
  expect(hav_select_isa("none") == -1, "an unknown instruction set");
  const hav_wave_model empty{&value, &value, 1, 1, 1, 0, nullptr};
  expect(hav_wave_decoder_create(&empty) == nullptr, "a codec without layers");
  hav_linear_destroy(nullptr);
  hav_wave_decoder_destroy(nullptr);
  hav_pool_destroy(nullptr);
}

std::vector<std::string> words_of(const char* text) {
  std::vector<std::string> words{""};
  for (; *text != '\0'; ++text) {
    if (*text == ' ') {
      words.emplace_back();
    } else {
      words.back() += *text;
    }
  }
  return words;
}

}  // namespace

int main() {
  expect(hav_abi_version() == HAV_ABI_VERSION, "version");
  check_refusals();
  for (const std::string& isa : words_of(hav_supported_isas())) {
    expect(hav_select_isa(isa.c_str()) == 0, isa);
    for (int num_threads : {1, 2, 4}) {
      hav_pool* pool = hav_pool_create(num_threads);
      expect(hav_pool_num_threads(pool) == num_threads, "threads of a pool");
      check_products(pool);
      check_norm(pool);
      check_decode_steps(pool);
      check_codec(pool);
      check_shared_pool(pool);
      hav_pool_destroy(pool);
    }
    std::printf("%s: good\n", isa.c_str());
  }
  return 0;
}
