// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): the numbers
// of vllm/kernels/philox.py to the bit. A number depends on its key and counter alone.
#pragma once

#include "simd.h"

namespace hav::HAV_ISA {

// What a number is for; part of the counter, so that no two uses share one.
enum class Purpose : uint32_t { kDraw = 0, kRasRedraw = 1 };

struct PhiloxWords {
  uint32_t w[4];
};

HAV_INLINE PhiloxWords philox_round(const PhiloxWords& x, uint32_t key0, uint32_t key1) {
  const uint64_t product0 = uint64_t{0xD2511F53} * x.w[0];
  const uint64_t product2 = uint64_t{0xCD9E8D57} * x.w[2];
  return {{static_cast<uint32_t>(product2 >> 32) ^ x.w[1] ^ key0, static_cast<uint32_t>(product2),
           static_cast<uint32_t>(product0 >> 32) ^ x.w[3] ^ key1, static_cast<uint32_t>(product0)}};
}

HAV_INLINE PhiloxWords philox4x32(PhiloxWords counter, uint64_t key) {
  uint32_t key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    counter = philox_round(counter, key0, key1);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// A number in [0, 1) with 24 random bits.
HAV_INLINE float uniform(uint64_t seed, int64_t frame, int64_t codebook, Purpose purpose) {
  const PhiloxWords counter{{static_cast<uint32_t>(frame), static_cast<uint32_t>(codebook),
                             static_cast<uint32_t>(purpose), 0}};
  return static_cast<float>(philox4x32(counter, seed).w[0] >> 8) * 0x1p-24f;
}

}  // namespace hav::HAV_ISA
