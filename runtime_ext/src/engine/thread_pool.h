// Runs the parallel loops of kernels and the runtime's own waves on a fixed set of threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <thread>
#include <vector>

namespace cfmoe {

class ThreadPool {
 public:
  using Task = int (*)(int32_t task, void* data);

  // `threads` counts the caller of run(); 0 means one per physical core that this process may use.
  explicit ThreadPool(int32_t threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int32_t size() const { return size_; }
  // True where a call to run() would spread its tasks, so that tasks may wait for one another if there are at most
  // size() of them.
  bool concurrent() const;
  // Runs task(0…num_tasks-1) and returns when all have ended: 0, or the non-zero result of the lowest failing share; an
  // exception of a task is thrown again here. Share s is the tasks s, s + size(), … in this order on one thread: the
  // caller for share 0, a worker for each other, or the caller where that worker has not begun when the caller's own
  // share has ended (the system may have given its CPU to somebody else). A nested call, or one while the pool is busy,
  // runs inline.
  int run(int32_t num_tasks, Task task, void* data);

  template <typename F>
  int run(int32_t num_tasks, F& task) {
    return run(num_tasks, [](int32_t i, void* data) -> int { return (*static_cast<F*>(data))(i); }, &task);
  }

 private:
  struct alignas(64) Share {
    std::thread worker;
    std::atomic<uint32_t> claimed{0};  // the last round in which somebody took it
    std::atomic<int> cpu{-1};          // where its thread was last seen
    int result = 0;
    std::exception_ptr exception;
  };
  void work(int32_t index);
  bool claim(int32_t index, uint32_t round);
  void run_share(int32_t index);

  int32_t size_;
  int64_t spin_ns_;
  std::unique_ptr<Share[]> shares_;
  std::atomic<bool> busy_{false};
  std::atomic<bool> stop_{false};
  int32_t num_tasks_ = 0;
  Task task_ = nullptr;
  void* data_ = nullptr;
  // The rest describes the round under way: written before round_, read by who has claimed a share of it.
  alignas(64) std::atomic<int> round_{0};
  alignas(64) std::atomic<int> pending_{0};
};

// Physical cores in this process's affinity mask, at least 1.
int32_t physical_cores();

// While one lives, kernels launched from this thread run their parallel loops on `pool`.
class PoolScope {
 public:
  explicit PoolScope(ThreadPool& pool);
  ~PoolScope();
  PoolScope(const PoolScope&) = delete;
  PoolScope& operator=(const PoolScope&) = delete;

 private:
  ThreadPool* previous_;
};

// Offers the pool and workspace allocation to kernel libraries that are loaded from now on.
void register_backend_symbols();

}  // namespace cfmoe
