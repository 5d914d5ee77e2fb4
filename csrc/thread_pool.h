// Threads that help a calling thread with one call at a time, at once when calls follow closely.
//
// Who computes a part of the work is decided by who is free, so a kernel may only be divided into
// parts that have the same bits whoever computes them, and beside whatever else. Knows no kernel.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#include "cores.h"

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

  // Runs the task on the calling thread, as worker 0, and on each thread of the pool that comes
  // before worker 0 is done; returns when all that came are done. So worker 0 must do whatever
  // nobody else does, and never waits for a thread that the system gives no core. In a call that
  // comes while another one runs, worker 0 is alone.
  void run(Task task, const void* context);

 private:
  void start_workers();
  void stop_workers();
  void work(int worker);
  uint64_t await_round(uint64_t seen);
  void step_aside(CoreChoice& cores) const;
  bool enter(uint64_t round);
  void leave();
  void wake_workers();
  void await_helpers();

  const int num_threads_;
  std::vector<std::thread> threads_;
  std::atomic_flag is_taken_ = ATOMIC_FLAG_INIT;
  Task task_ = nullptr;
  const void* context_ = nullptr;
  std::atomic<int> caller_core_{-1};

  // The number of the round, whether threads may still enter it, and how many are within.
  alignas(64) std::atomic<uint64_t> state_{0};
  alignas(64) std::atomic<bool> may_sleep_{false};  // some worker
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

// Items 0 .. size - 1 in chunks, a run of chunks for each thread: a thread finds its own run where
// it was in the call before, in its cache, and takes chunks of the others when it is done with it.
class SharedWork {
 public:
  SharedWork(int64_t size, int64_t chunk, int num_threads);

  // Calls body(begin, end) for chunks until there are none.
  template <typename Body>
  void help(int worker, const Body& body) {
    for (int i = 0; i < num_runs_; ++i) {
      Run& run = runs_[(worker + i) % num_runs_];
      for (;;) {
        const int64_t index = run.next.fetch_add(1, std::memory_order_relaxed);
        if (index >= run.end) break;
        const int64_t begin = index * chunk_, end = begin + chunk_;
        body(begin, end < size_ ? end : size_);
      }
    }
  }

 private:
  static constexpr int kMaxRuns = 64;

  struct alignas(64) Run {
    std::atomic<int64_t> next;  // chunk
    int64_t end;
  };

  const int64_t size_;
  const int64_t chunk_;
  const int num_runs_;
  Run runs_[kMaxRuns];
};

// Enough that threads end together, few enough that a chunk is worth taking.
constexpr int64_t kChunksPerThread = 4;

// Calls body(begin, end) on runs that together are 0 .. size - 1, each but the last a multiple of
// `quantum` items. Without a pool, or with only `grain` or fewer items, it is a single call.
template <typename Body>
void parallel_for(ThreadPool* pool, int64_t size, int64_t grain, const Body& body,
                  int64_t quantum = 1) {
  if (size <= 0) return;
  if (pool == nullptr || pool->num_threads() == 1 || size <= grain) {
    body(int64_t{0}, size);
    return;
  }
  const int64_t quanta_per_chunk = kChunksPerThread * quantum * pool->num_threads();
  const int64_t chunk = (size + quanta_per_chunk - 1) / quanta_per_chunk * quantum;
  struct Call {
    SharedWork work;
    const Body& body;
  };
  Call call{SharedWork(size, chunk, pool->num_threads()), body};
  pool->run(
      [](const void* context, int worker) {
        Call& each = *static_cast<Call*>(const_cast<void*>(context));
        each.work.help(worker, each.body);
      },
      &call);
}

}  // namespace hav
