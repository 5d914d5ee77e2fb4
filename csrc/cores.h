// Which core a thread runs on, and where else it may. Knows nothing of what threads do.
#pragma once

#if defined(__linux__)
#include <sched.h>
#endif

namespace hav {

// Number of the core that this thread runs on; -1 where the system does not say.
int current_core();

// Where one thread, the only one to call this, may run. Does nothing where the system cannot.
class CoreChoice {
 public:
  // Moves this thread off a core and keeps it off, within the cores that it was given: those of the
  // thread that started it, or what somebody has set since. Leaves it there when these are fewer
  // than num_threads.
  void avoid(int core, int num_threads);

#if defined(__linux__)
 private:
  cpu_set_t given_ = {};
  cpu_set_t chosen_ = {};  // of given_, by this class
#endif
};

}  // namespace hav
