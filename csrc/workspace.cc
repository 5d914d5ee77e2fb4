#include "workspace.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <utility>

namespace hav {
namespace {

constexpr size_t kCacheLine = 64;
constexpr size_t kHugePage = size_t{2} << 20;

constexpr size_t round_up(size_t size, size_t quantum) {
  return (size + quantum - 1) / quantum * quantum;
}

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
  const bool is_large = wanted >= kHugePage / 2;
  const size_t alignment = is_large ? kHugePage : kCacheLine;
  memory.bytes_ = static_cast<char*>(std::aligned_alloc(alignment, round_up(wanted, alignment)));
  if (memory.bytes_ == nullptr) return memory;
#if defined(MADV_HUGEPAGE)
  // A request only: where the system has no huge pages, small ones do.
  if (is_large) madvise(memory.bytes_, round_up(wanted, alignment), MADV_HUGEPAGE);
#endif
  std::memset(memory.bytes_, 0, wanted);
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
