// The codec decoder of the C interface.
#include <new>

#include "api.h"
#include "thread_pool.h"
#include "wave_decoder.h"

namespace {

hav::ThreadPool* as_pool(hav_pool* pool) { return reinterpret_cast<hav::ThreadPool*>(pool); }

const hav::WaveDecoder& as_decoder(const hav_wave_decoder* decoder) {
  return *reinterpret_cast<const hav::WaveDecoder*>(decoder);
}

}  // namespace

hav_wave_decoder* hav_wave_decoder_create(const hav_wave_model* model) {
  try {
    return reinterpret_cast<hav_wave_decoder*>(hav::WaveDecoder::create(*model).release());
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

void hav_wave_decoder_destroy(hav_wave_decoder* decoder) {
  delete reinterpret_cast<hav::WaveDecoder*>(decoder);
}

int64_t hav_wave_decoder_num_bytes(const hav_wave_decoder* decoder) {
  return as_decoder(decoder).num_bytes();
}

int32_t hav_wave_decode(hav_pool* pool, const hav_wave_decoder* decoder, const int64_t* codes,
                        int64_t codes_stride, int64_t num_frames, int64_t first_frame,
                        int64_t last_frame, float* samples) {
  try {
    const bool is_done = as_decoder(decoder).decode(as_pool(pool), codes, codes_stride, num_frames,
                                                    {first_frame, last_frame}, samples);
    return is_done ? 0 : -1;
  } catch (const std::bad_alloc&) {
    return -1;
  }
}
