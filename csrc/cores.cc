#include "cores.h"

namespace hav {

#if defined(__linux__)

int current_core() { return sched_getcpu(); }

void CoreChoice::avoid(int core, int num_threads) {
  cpu_set_t now;
  if (sched_getaffinity(0, sizeof now, &now) != 0) return;
  if (!CPU_EQUAL(&now, &chosen_)) given_ = now;
  if (CPU_COUNT(&given_) < num_threads) return;
  cpu_set_t others = given_;
  CPU_CLR(static_cast<unsigned>(core), &others);
  if (CPU_COUNT(&others) == 0 || sched_setaffinity(0, sizeof others, &others) != 0) return;
  chosen_ = others;
}

#else

int current_core() { return -1; }

void CoreChoice::avoid(int, int) {}

#endif

}  // namespace hav
