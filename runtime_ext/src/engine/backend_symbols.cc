// What compiled kernels call back for: parallel loops and temporary memory, under the names that TVM gives them.
#include <tvm/ffi/c_api.h>
#include <tvm/ffi/extra/c_env_api.h>

#include <atomic>
#include <cstdlib>

#include "engine/thread_pool.h"
#include "error.h"

namespace cfmoe {
namespace {

struct ParallelGroup {
  void* sync_handle;
  int32_t num_task;
};
using ParallelLambda = int (*)(int task_id, ParallelGroup* group, void* data);

struct Launch {
  ParallelLambda lambda;
  ParallelGroup* group;
  void* data;
  std::atomic<TVMFFIObjectHandle> error{nullptr};
};

struct BarrierState {
  std::atomic<int> arrived{0};
  bool concurrent = false;
};

thread_local ThreadPool* current_pool = nullptr;

int run_task(int32_t task, void* data) {
  auto* launch = static_cast<Launch*>(data);
  const int result = launch->lambda(task, launch->group, launch->data);
  if (result != 0) {
    // The message was left with this thread; the kernel's caller looks for it on its own.
    TVMFFIObjectHandle error = nullptr, none = nullptr;
    TVMFFIErrorMoveFromRaised(&error);
    if (error != nullptr && !launch->error.compare_exchange_strong(none, error)) TVMFFIObjectDecRef(error);
  }
  return result;
}

int parallel_launch(ParallelLambda lambda, void* data, int num_task) {
  ThreadPool* pool = current_pool;
  const bool concurrent = pool != nullptr && pool->concurrent();
  const int32_t tasks = num_task > 0 ? num_task : concurrent ? pool->size() : 1;
  BarrierState barrier;
  barrier.concurrent = concurrent && tasks <= pool->size();
  ParallelGroup group{&barrier, tasks};
  Launch launch{lambda, &group, data};
  int result = 0;
  if (concurrent) {
    result = pool->run(tasks, run_task, &launch);
  } else {
    for (int32_t i = 0; i < tasks && result == 0; ++i) result = run_task(i, &launch);
  }
  if (TVMFFIObjectHandle error = launch.error.load()) {
    TVMFFIErrorSetRaised(error);
    TVMFFIObjectDecRef(error);
  }
  return result;
}

int parallel_barrier(int /*task_id*/, ParallelGroup* group) {
  auto* state = static_cast<BarrierState*>(group->sync_handle);
  if (group->num_task == 1) return 0;
  if (!state->concurrent) {
    TVMFFIErrorSetRaisedFromCStr("RuntimeError", "a barrier in a loop of more tasks than threads");
    return -1;
  }
  const int ticket = state->arrived.fetch_add(1, std::memory_order_acq_rel);
  const int all = (ticket / group->num_task + 1) * group->num_task;
  if (ticket + 1 == all) {
    state->arrived.notify_all();
    return 0;
  }
  for (int now = state->arrived.load(std::memory_order_acquire); now < all;
       now = state->arrived.load(std::memory_order_acquire)) {
    state->arrived.wait(now, std::memory_order_acquire);
  }
  return 0;
}

void* alloc_workspace(int /*device_type*/, int /*device_id*/, uint64_t bytes, int /*dtype_code*/, int /*dtype_bits*/) {
  constexpr uint64_t kAlignment = 64;
  return std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
}

int free_workspace(int /*device_type*/, int /*device_id*/, void* pointer) {
  std::free(pointer);
  return 0;
}

}  // namespace

PoolScope::PoolScope(ThreadPool& pool) : previous_(current_pool) { current_pool = &pool; }
PoolScope::~PoolScope() { current_pool = previous_; }

void register_backend_symbols() {
  const auto offer = [](const char* name, void* symbol) {
    if (TVMFFIEnvModRegisterContextSymbol(name, symbol) != 0) {
      throw Error(ErrorKind::kInternal, std::string("cannot register ") + name + " with tvm-ffi");
    }
  };
  // The last registration of a name counts: another one in this process may have come in between.
  offer("__TVMBackendParallelLaunch", reinterpret_cast<void*>(&parallel_launch));
  offer("__TVMBackendParallelBarrier", reinterpret_cast<void*>(&parallel_barrier));
  offer("__TVMBackendAllocWorkspace", reinterpret_cast<void*>(&alloc_workspace));
  offer("__TVMBackendFreeWorkspace", reinterpret_cast<void*>(&free_workspace));
}

}  // namespace cfmoe

#if defined(CFMOE_STATIC_KERNELS)
// Kernels that are linked in call these by name.
extern "C" {
int TVMBackendParallelLaunch(cfmoe::ParallelLambda lambda, void* data, int num_task) {
  return cfmoe::parallel_launch(lambda, data, num_task);
}
int TVMBackendParallelBarrier(int task_id, cfmoe::ParallelGroup* group) {
  return cfmoe::parallel_barrier(task_id, group);
}
void* TVMBackendAllocWorkspace(int device_type, int device_id, uint64_t bytes, int dtype_code, int dtype_bits) {
  return cfmoe::alloc_workspace(device_type, device_id, bytes, dtype_code, dtype_bits);
}
int TVMBackendFreeWorkspace(int device_type, int device_id, void* pointer) {
  return cfmoe::free_workspace(device_type, device_id, pointer);
}
}
#endif
