#include "thread_pool.h"

#include <chrono>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace hav {
namespace {

// Handing work to a thread that spins took 0.5 microseconds on two virtual cores, waking one that
// sleeps 30 to 35. So a thread spins, then goes on looking while it offers its core to others, and
// sleeps when the next part of a step should have come long ago.
constexpr std::chrono::nanoseconds kSpinTime{5000};
constexpr std::chrono::nanoseconds kYieldTime{50000};
constexpr int kPausesPerLook = 8;

// Parts of the state.
constexpr uint64_t kOneHelper = 1;
constexpr uint64_t kHelpers = (uint64_t{1} << 31) - 1;
constexpr uint64_t kIsOpen = uint64_t{1} << 31;
constexpr int kRoundShift = 32;

void pause_briefly() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Whether is_done() came true before it was time to sleep.
template <typename Condition>
bool spin_until(const Condition& is_done) {
  if (is_done()) return true;
  const auto start = std::chrono::steady_clock::now();
  auto now = start;
  while (now - start < kSpinTime) {
    for (int i = 0; i < kPausesPerLook; ++i) {
      pause_briefly();
      if (is_done()) return true;
    }
    now = std::chrono::steady_clock::now();
  }
  while (now - start < kSpinTime + kYieldTime) {
    std::this_thread::yield();
    if (is_done()) return true;
    now = std::chrono::steady_clock::now();
  }
  return false;
}

}  // namespace

ThreadPool::ThreadPool(int num_threads) : num_threads_(num_threads < 1 ? 1 : num_threads) {
  start_workers();
}

ThreadPool::~ThreadPool() { stop_workers(); }

void ThreadPool::start_workers() {
  threads_.reserve(num_threads_ - 1);
  try {
    for (int worker = 1; worker < num_threads_; ++worker) {
      threads_.emplace_back([this, worker] { work(worker); });
    }
  } catch (...) {
    stop_workers();
    throw;
  }
}

void ThreadPool::stop_workers() {
  is_stopping_.store(true);
  state_.fetch_add(uint64_t{1} << kRoundShift);
  { const std::lock_guard<std::mutex> lock(mutex_); }
  wake_workers_.notify_all();
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
}

void ThreadPool::run(Task task, const void* context) {
  if (num_threads_ == 1 || is_taken_.test_and_set(std::memory_order_acquire)) {
    task(context, 0);
    return;
  }
  // Nobody is within a round that is closed, so nobody reads these.
  task_ = task;
  context_ = context;
  caller_core_.store(current_core(), std::memory_order_relaxed);
  const uint64_t round = (state_.load(std::memory_order_relaxed) >> kRoundShift) + 1;
  state_.store(round << kRoundShift | kIsOpen);
  wake_workers();
  task(context, 0);
  if ((state_.fetch_and(~kIsOpen) & kHelpers) != 0) await_helpers();
  is_taken_.clear(std::memory_order_release);
}

// Sequentially consistent, as the waits: either a worker that is about to sleep sees the new round,
// or this thread sees that one may sleep.
void ThreadPool::wake_workers() {
  if (!may_sleep_.load() || !may_sleep_.exchange(false)) return;
  { const std::lock_guard<std::mutex> lock(mutex_); }
  wake_workers_.notify_all();
}

void ThreadPool::work(int worker) {
  CoreChoice cores;
  uint64_t seen = 0;
  for (;;) {
    seen = await_round(seen);
    if (is_stopping_.load()) return;
    step_aside(cores);
    if (!enter(seen)) continue;
    task_(context_, worker);
    leave();
  }
}

// The number of a round that is not the one that was seen.
uint64_t ThreadPool::await_round(uint64_t seen) {
  const auto has_come = [&] { return state_.load() >> kRoundShift != seen; };
  if (!spin_until(has_come)) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      may_sleep_.store(true);
      if (has_come()) break;
      wake_workers_.wait(lock);
    }
  }
  return state_.load() >> kRoundShift;
}

// The system may start a thread on the core of the one that wakes it, and leave it there though
// another core is idle.
void ThreadPool::step_aside(CoreChoice& cores) const {
  const int core = current_core();
  if (core < 0 || core != caller_core_.load(std::memory_order_relaxed)) return;
  cores.avoid(core, num_threads_);
}

// Whether the round was still open.
bool ThreadPool::enter(uint64_t round) {
  uint64_t state = state_.load();
  while (state >> kRoundShift == round && (state & kIsOpen) != 0) {
    if (state_.compare_exchange_weak(state, state + kOneHelper)) return true;
  }
  return false;
}

void ThreadPool::leave() {
  const uint64_t left = state_.fetch_sub(kOneHelper) - kOneHelper;
  if ((left & (kIsOpen | kHelpers)) == 0 && caller_asleep_.load()) {
    { const std::lock_guard<std::mutex> lock(mutex_); }
    wake_caller_.notify_one();
  }
}

void ThreadPool::await_helpers() {
  const auto are_done = [&] { return (state_.load() & kHelpers) == 0; };
  if (spin_until(are_done)) return;
  std::unique_lock<std::mutex> lock(mutex_);
  caller_asleep_.store(true);
  wake_caller_.wait(lock, are_done);
  caller_asleep_.store(false);
}

SharedWork::SharedWork(int64_t size, int64_t chunk, int num_threads)
    : size_(size), chunk_(chunk), num_runs_(num_threads < kMaxRuns ? num_threads : kMaxRuns) {
  const int64_t num_chunks = (size + chunk - 1) / chunk;
  for (int i = 0; i < num_runs_; ++i) {
    const Range range = part_of(num_chunks, i, num_runs_);
    runs_[i].next.store(range.begin, std::memory_order_relaxed);
    runs_[i].end = range.end;
  }
}

}  // namespace hav
