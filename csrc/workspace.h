// Aligned memory: of packed weights, and for the work of a call.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hav {

// Owns zeroed memory that vectors may be loaded from; large ones lie in huge pages where there are.
class AlignedMemory {
 public:
  AlignedMemory() = default;
  ~AlignedMemory();
  AlignedMemory(AlignedMemory&& other) noexcept;
  AlignedMemory& operator=(AlignedMemory&& other) noexcept;
  AlignedMemory(const AlignedMemory&) = delete;
  AlignedMemory& operator=(const AlignedMemory&) = delete;

  // bytes() is null when there is no memory.
  static AlignedMemory of_zeros(int64_t size);

  char* bytes() const { return bytes_; }

 private:
  char* bytes_ = nullptr;
};

// At least `size` bytes for one call's work, of the calling thread, aligned to 64; valid until the
// thread asks again. Null when there is no memory.
void* thread_workspace(size_t size);

}  // namespace hav
