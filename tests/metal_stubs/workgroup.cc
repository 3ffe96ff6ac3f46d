// Runs kernels of kernels.metal, compiled as C++, on the CPU: a workgroup's threads are fibers that take turns at barriers. For tests
// alone.
#include <ucontext.h>

#include <cstdint>
#include <memory>
#include <vector>

namespace {

constexpr size_t kStackBytes = 256 << 10;

using Body = void (*)(void** buffers, const int32_t* block, const unsigned* group, const unsigned* thread);

struct Call {
  Body body;
  void** buffers;
  const int32_t* block;
};

struct Fiber {
  ucontext_t context;
  unsigned thread[3];
  bool ended = false;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
};

ucontext_t scheduler;
Fiber* current = nullptr;
const Call* call = nullptr;
unsigned group[3];

void run_fiber() {
  call->body(call->buffers, call->block, group, current->thread);
  current->ended = true;
  swapcontext(&current->context, &scheduler);
}

// All threads of a group, from barrier to barrier. False where some wait at a barrier that others never reach.
bool run_group(std::vector<Fiber>& fibers) {
  for (Fiber& fiber : fibers) {
    fiber.ended = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack = {fiber.stack.get(), 0, kStackBytes};
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
  }
  for (size_t ended = 0; ended < fibers.size();) {
    size_t now = 0;
    for (Fiber& fiber : fibers) {
      current = &fiber;
      swapcontext(&scheduler, &fiber.context);
      now += fiber.ended ? 1 : 0;
    }
    if (now != 0 && now != fibers.size()) return false;
    ended = now;
  }
  return true;
}

}  // namespace

extern "C" void cfmoe_barrier() { swapcontext(&current->context, &scheduler); }

// Not reentrant: a group's shared memory is static. 0, or 1 for threads that part at a barrier.
extern "C" int cfmoe_run(Body body, void** buffers, const int32_t* block, const unsigned* groups, const unsigned* local) {
  const Call made{body, buffers, block};
  call = &made;
  std::vector<Fiber> fibers(size_t{local[0]} * local[1] * local[2]);
  for (size_t i = 0; i < fibers.size(); ++i) {
    fibers[i].thread[0] = static_cast<unsigned>(i % local[0]);
    fibers[i].thread[1] = static_cast<unsigned>(i / local[0] % local[1]);
    fibers[i].thread[2] = static_cast<unsigned>(i / local[0] / local[1]);
  }
  for (group[2] = 0; group[2] < groups[2]; ++group[2]) {
    for (group[1] = 0; group[1] < groups[1]; ++group[1]) {
      for (group[0] = 0; group[0] < groups[0]; ++group[0]) {
        if (!run_group(fibers)) return 1;
      }
    }
  }
  return 0;
}
