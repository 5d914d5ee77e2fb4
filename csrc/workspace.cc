#include "workspace.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <utility>

namespace hav {
namespace {

constexpr size_t kCacheLine = 64;
constexpr size_t kHugePage = size_t{2} << 20;

struct ThreadMemory {
  AlignedMemory memory;
  size_t size = 0;
};

}  // namespace

AlignedMemory::~AlignedMemory() { std::free(bytes_); }

AlignedMemory::AlignedMemory(AlignedMemory&& other) noexcept
    : bytes_(std::exchange(other.bytes_, nullptr)) {}

AlignedMemory& AlignedMemory::operator=(AlignedMemory&& other) noexcept {
  std::swap(bytes_, other.bytes_);
  return *this;
}

AlignedMemory AlignedMemory::of_zeros(int64_t size) {
  AlignedMemory memory;
  const size_t wanted = static_cast<size_t>(size < 1 ? 1 : size);
  const size_t alignment = wanted >= kHugePage ? kHugePage : kCacheLine;
  void* bytes = nullptr;
  if (posix_memalign(&bytes, alignment, wanted) != 0) return memory;
#if defined(MADV_HUGEPAGE)
  // A request only, for the huge pages that are filled wholly: the rest lies in small ones.
  if (wanted >= kHugePage) madvise(bytes, wanted / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
  std::memset(bytes, 0, wanted);
  memory.bytes_ = static_cast<char*>(bytes);
  return memory;
}

void* thread_workspace(size_t size) {
  static thread_local ThreadMemory held;
  if (held.memory.bytes() == nullptr || held.size < size) {
    held.memory = AlignedMemory::of_zeros(static_cast<int64_t>(size));
    held.size = held.memory.bytes() == nullptr ? 0 : size;
  }
  return held.memory.bytes();
}

}  // namespace hav
