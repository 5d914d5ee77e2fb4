// Threads that work on one call at a time, woken within a microsecond when calls follow closely.
//
// Work is divided by the number of threads alone, never by who is free first, so that a result can
// depend on nothing that a clock decides. Knows no kernel.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace hav {

class ThreadPool {
 public:
  // What each thread runs: task(context, worker) with worker from 0 to num_threads() - 1.
  using Task = void (*)(const void* context, int worker);

  // Starts num_threads - 1 threads; throws std::system_error when they cannot be had.
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return num_threads_; }

  // Runs the task once for each worker and returns when all are done; worker 0 is the calling
  // thread. A call that comes while another one runs does all parts itself, so tasks must not keep
  // state per worker beyond the call.
  void run(Task task, const void* context);

 private:
  void start_workers();
  void stop_workers();
  void work(int worker);
  uint32_t await_round(uint32_t seen);
  void await_workers();

  const int num_threads_;
  std::vector<std::thread> threads_;
  std::atomic_flag is_taken_ = ATOMIC_FLAG_INIT;
  Task task_ = nullptr;
  const void* context_ = nullptr;

  // Each on a cache line of its own: one is written by the caller, the other by the workers.
  alignas(64) std::atomic<uint32_t> round_{0};
  alignas(64) std::atomic<int> num_working_{0};
  alignas(64) std::atomic<int> num_asleep_{0};
  std::atomic<bool> caller_asleep_{false};
  std::atomic<bool> is_stopping_{false};
  std::mutex mutex_;
  std::condition_variable wake_workers_;
  std::condition_variable wake_caller_;
};

struct Range {
  int64_t begin;
  int64_t end;
};

// Part `worker` of 0 .. size - 1 cut into num_workers runs that differ by one at most.
inline Range part_of(int64_t size, int worker, int num_workers) {
  const int64_t share = size / num_workers;
  const int64_t extra = size % num_workers;
  const int64_t begin = worker * share + (worker < extra ? worker : extra);
  return {begin, begin + share + (worker < extra ? 1 : 0)};
}

// Calls body(begin, end) on runs that together are 0 .. size - 1, one for each thread of the pool.
// Without a pool, or with only `grain` or fewer items, the calling thread does them all.
template <typename Body>
void parallel_for(ThreadPool* pool, int64_t size, int64_t grain, const Body& body) {
  if (size <= 0) return;
  if (pool == nullptr || pool->num_threads() == 1 || size <= grain) {
    body(int64_t{0}, size);
    return;
  }
  struct Call {
    const Body& body;
    int64_t size;
    int num_workers;
  };
  const Call call{body, size, pool->num_threads()};
  const ThreadPool::Task task = [](const void* context, int worker) {
    const Call& each = *static_cast<const Call*>(context);
    const Range range = part_of(each.size, worker, each.num_workers);
    if (range.begin < range.end) each.body(range.begin, range.end);
  };
  pool->run(task, &call);
}

}  // namespace hav
