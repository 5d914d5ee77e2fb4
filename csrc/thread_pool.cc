#include "thread_pool.h"

#include <chrono>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace hav {
namespace {

// A layer's regions follow each other within this time. Handing work to a thread that spins took
// 0.5 microseconds on two virtual cores, waking one that sleeps 30 to 35; longer spinning would
// only take the core from others.
constexpr std::chrono::nanoseconds kSpinTime{5000};
constexpr int kPausesPerLook = 8;

void pause_briefly() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Whether is_done() came true while spinning.
template <typename Condition>
bool spin_until(const Condition& is_done) {
  if (is_done()) return true;
  const auto deadline = std::chrono::steady_clock::now() + kSpinTime;
  do {
    for (int i = 0; i < kPausesPerLook; ++i) {
      pause_briefly();
      if (is_done()) return true;
    }
  } while (std::chrono::steady_clock::now() < deadline);
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
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    round_.fetch_add(1);
  }
  wake_workers_.notify_all();
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
}

void ThreadPool::run(Task task, const void* context) {
  if (num_threads_ == 1 || is_taken_.test_and_set(std::memory_order_acquire)) {
    for (int worker = 0; worker < num_threads_; ++worker) task(context, worker);
    return;
  }
  task_ = task;
  context_ = context;
  num_working_.store(num_threads_ - 1);
  // Sequentially consistent on both sides: either the worker that is about to sleep sees the new
  // round, or this thread sees that it sleeps.
  round_.fetch_add(1);
  if (num_asleep_.load() > 0) {
    { const std::lock_guard<std::mutex> lock(mutex_); }
    wake_workers_.notify_all();
  }
  task(context, 0);
  await_workers();
  is_taken_.clear(std::memory_order_release);
}

void ThreadPool::work(int worker) {
  uint32_t seen = 0;
  for (;;) {
    seen = await_round(seen);
    if (is_stopping_.load()) return;
    task_(context_, worker);
    if (num_working_.fetch_sub(1) == 1 && caller_asleep_.load()) {
      { const std::lock_guard<std::mutex> lock(mutex_); }
      wake_caller_.notify_one();
    }
  }
}

uint32_t ThreadPool::await_round(uint32_t seen) {
  const auto has_come = [&] { return round_.load() != seen; };
  if (!spin_until(has_come)) {
    std::unique_lock<std::mutex> lock(mutex_);
    num_asleep_.fetch_add(1);
    wake_workers_.wait(lock, has_come);
    num_asleep_.fetch_sub(1);
  }
  return round_.load();
}

void ThreadPool::await_workers() {
  const auto are_done = [&] { return num_working_.load() == 0; };
  if (spin_until(are_done)) return;
  std::unique_lock<std::mutex> lock(mutex_);
  caller_asleep_.store(true);
  wake_caller_.wait(lock, are_done);
  caller_asleep_.store(false);
}

}  // namespace hav
