// Codes to samples: summed table rows through a chain of convolutions with Snakes between them.
//
// Owns the packed weights and decides which rows each layer computes: those that the wanted samples
// depend on, and no others. Rows before the first frame and after the last are zeros, as a
// convolution's padding is; rows that are only not wanted are computed where a layer needs them. So
// a part of the samples has the bits that it has in the whole.
#pragma once

#include <memory>
#include <vector>

#include "api.h"
#include "conv.h"
#include "kernels.h"
#include "thread_pool.h"
#include "workspace.h"

namespace hav {

class WaveDecoder {
 public:
  // Null when the layers are no such chain, or there is no memory.
  static std::unique_ptr<WaveDecoder> create(const hav_wave_model& model);

  // Samples of `frames`, which are some of num_frames. False when there is no memory for the work.
  bool decode(ThreadPool* pool, const int64_t* codes, int64_t codes_stride, int64_t num_frames,
              Range frames, float* samples) const;

  int64_t num_bytes() const { return num_bytes_; }

 private:
  struct Layer {
    ConvWeights weights;
    Snake snake;  // that its input goes through
    bool is_residual;
  };
  struct Plan;

  explicit WaveDecoder(const hav_wave_model& model);
  bool append(const hav_wave_layer& layer, bool is_mono);
  Plan plan(int64_t num_frames, Range frames) const;
  ConvOutput output_of(const Plan& plan, size_t index) const;
  bool is_kept_plain(size_t index) const;

  const Kernels& kernels_;
  hav_wave_model tables_;  // without its layers
  int64_t hop_ = 1;        // samples of a frame
  int64_t num_bytes_ = 0;
  std::vector<Layer> layers_;  // the last has one output
  std::vector<AlignedMemory> memory_;
};

}  // namespace hav
