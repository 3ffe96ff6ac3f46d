// The thread pool: workers spin for a moment between two parallel loops, then sleep.
#include "engine/thread_pool.h"

#include <algorithm>
#include <chrono>
#include <fstream>
#include <set>
#include <string>
#include <utility>

#if defined(__linux__)
#include <sched.h>
#endif

namespace cfmoe {
namespace {

// Longer than the serial work between two kernels of a token, far shorter than a read from storage.
constexpr int64_t kSpinNs = 40'000;

thread_local bool inside_task = false;

inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

int32_t usable_cpus(std::vector<int32_t>* cpus) {
#if defined(__linux__)
  cpu_set_t mask;
  CPU_ZERO(&mask);
  if (sched_getaffinity(0, sizeof(mask), &mask) == 0) {
    for (int32_t cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
      if (CPU_ISSET(cpu, &mask)) cpus->push_back(cpu);
    }
    if (!cpus->empty()) return static_cast<int32_t>(cpus->size());
  }
#endif
  return std::max(1, static_cast<int32_t>(std::thread::hardware_concurrency()));
}

// The CPU that the calling thread runs on; -1 where that is unknown.
int current_cpu() {
#if defined(__linux__)
  return sched_getcpu();
#else
  return -1;
#endif
}

// Waits until `value` differs from `old`: spins for `spin_ns`, then sleeps; sleeps at once where `pointless(cpu)` says
// that who is waited for needs this very CPU, as happens when other processes hold the rest.
template <typename Pointless>
void wait_for_change(std::atomic<int>& value, int old, int64_t spin_ns, Pointless pointless) {
  if (spin_ns > 0) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::nanoseconds(spin_ns);
    do {
      for (int i = 0; i < 32; ++i) {
        if (value.load(std::memory_order_acquire) != old) return;
        pause_cpu();
      }
      const int cpu = current_cpu();
      if (cpu >= 0 && pointless(cpu)) break;
    } while (std::chrono::steady_clock::now() < end);
  }
  value.wait(old, std::memory_order_acquire);
}

}  // namespace

int32_t physical_cores() {
  std::vector<int32_t> cpus;
  const int32_t logical = usable_cpus(&cpus);
  std::set<std::pair<int, int>> cores;
  for (int32_t cpu : cpus) {
    const std::string topology = "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/";
    int package = 0, core = 0;
    if (!(std::ifstream(topology + "physical_package_id") >> package) ||
        !(std::ifstream(topology + "core_id") >> core)) {
      return logical;
    }
    cores.insert({package, core});
  }
  return cores.empty() ? logical : static_cast<int32_t>(cores.size());
}

ThreadPool::ThreadPool(int32_t threads) : size_(threads > 0 ? threads : physical_cores()) {
  std::vector<int32_t> cpus;
  // A spinning thread that shares its CPU with the one it waits for only delays it.
  spin_ns_ = usable_cpus(&cpus) >= size_ ? kSpinNs : 0;
  shares_ = std::make_unique<Share[]>(static_cast<size_t>(size_));
  for (int32_t i = 1; i < size_; ++i) shares_[i].worker = std::thread([this, i] { work(i); });
}

ThreadPool::~ThreadPool() {
  stop_ = true;
  round_.fetch_add(1, std::memory_order_release);
  round_.notify_all();
  for (int32_t i = 1; i < size_; ++i) shares_[i].worker.join();
}

bool ThreadPool::concurrent() const { return size_ > 1 && !inside_task && !busy_.load(std::memory_order_relaxed); }

// A round ends only after each of its shares was claimed and run: whoever claims one finds that round's task unchanged.
bool ThreadPool::claim(int32_t index, uint32_t round) {
  uint32_t before = round - 1;
  return shares_[index].claimed.compare_exchange_strong(before, round, std::memory_order_acq_rel,
                                                        std::memory_order_relaxed);
}

void ThreadPool::work(int32_t index) {
  inside_task = true;
  for (int seen = 0;;) {
    wait_for_change(round_, seen, spin_ns_,
                    [this](int cpu) { return cpu == shares_[0].cpu.load(std::memory_order_relaxed); });
    seen = round_.load(std::memory_order_acquire);
    if (stop_) return;
    if (!claim(index, static_cast<uint32_t>(seen))) continue;
    shares_[index].cpu.store(current_cpu(), std::memory_order_relaxed);
    run_share(index);
    if (pending_.fetch_sub(1, std::memory_order_acq_rel) == 1) pending_.notify_one();
  }
}

void ThreadPool::run_share(int32_t index) {
  Share& share = shares_[index];
  share.result = 0;
  try {
    for (int32_t i = index; i < num_tasks_ && share.result == 0; i += size_) share.result = task_(i, data_);
  } catch (...) {
    share.exception = std::current_exception();
  }
}

int ThreadPool::run(int32_t num_tasks, Task task, void* data) {
  if (num_tasks <= 0) return 0;
  if (num_tasks == 1 || size_ == 1 || inside_task || busy_.exchange(true, std::memory_order_acquire)) {
    for (int32_t i = 0; i < num_tasks; ++i) {
      if (const int result = task(i, data)) return result;
    }
    return 0;
  }
  num_tasks_ = num_tasks;
  task_ = task;
  data_ = data;
  pending_.store(size_ - 1, std::memory_order_relaxed);
  shares_[0].cpu.store(current_cpu(), std::memory_order_relaxed);
  const uint32_t round = static_cast<uint32_t>(round_.fetch_add(1, std::memory_order_release)) + 1;
  round_.notify_all();
  inside_task = true;
  run_share(0);
  for (int32_t i = 1; i < size_; ++i) {
    if (!claim(i, round)) continue;
    run_share(i);
    pending_.fetch_sub(1, std::memory_order_acq_rel);
  }
  inside_task = false;
  for (int left = pending_.load(std::memory_order_acquire); left != 0;
       left = pending_.load(std::memory_order_acquire)) {
    wait_for_change(pending_, left, spin_ns_, [this](int cpu) {
      for (int32_t i = 1; i < size_; ++i) {
        if (shares_[i].cpu.load(std::memory_order_relaxed) == cpu) return true;
      }
      return false;
    });
  }
  int result = 0;
  std::exception_ptr exception;
  for (int32_t i = 0; i < size_; ++i) {
    if (!exception && shares_[i].exception) exception = shares_[i].exception;
    shares_[i].exception = nullptr;
    if (result == 0) result = shares_[i].result;
  }
  busy_.store(false, std::memory_order_release);
  if (exception) std::rethrow_exception(exception);
  return result;
}

}  // namespace cfmoe
