// Two queues: what somebody waits for, and what is read ahead.
#include "cache/io_queue.h"

#include <algorithm>
#include <utility>

namespace cfmoe {

class IoQueue::Job {
 public:
  std::function<void()> work;
  bool ahead = false;  // in that queue
  bool done = false;
  std::exception_ptr error;
};

IoQueue::IoQueue(int32_t threads) {
  try {
    for (int32_t i = 0; i < std::max(threads, 1); ++i) threads_.emplace_back([this] { run(); });
  } catch (...) {
    stop();
    throw;
  }
}

IoQueue::~IoQueue() { stop(); }

void IoQueue::stop() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
    queue_.clear();
    ahead_.clear();
  }
  work_arrived_.notify_all();
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
}

IoQueue::JobPtr IoQueue::submit(std::function<void()> work) {
  auto job = std::make_shared<Job>();
  job->work = std::move(work);
  {
    std::lock_guard lock(mutex_);
    queue_.push_back(job);
  }
  work_arrived_.notify_one();
  return job;
}

IoQueue::JobPtr IoQueue::submit_ahead(std::function<void()> work) {
  auto job = std::make_shared<Job>();
  job->work = std::move(work);
  job->ahead = true;
  {
    std::lock_guard lock(mutex_);
    ahead_.push_back(job);
  }
  work_arrived_.notify_one();
  return job;
}

void IoQueue::demand(const JobPtr& job) {
  {
    std::lock_guard lock(mutex_);
    if (!job->ahead) return;
    ahead_.erase(std::find(ahead_.begin(), ahead_.end(), job));
    job->ahead = false;
    queue_.push_back(job);
  }
  work_arrived_.notify_one();
}

bool IoQueue::withdraw(const JobPtr& job) {
  std::lock_guard lock(mutex_);
  if (!job->ahead) return false;
  ahead_.erase(std::find(ahead_.begin(), ahead_.end(), job));
  job->ahead = false;
  job->work = nullptr;
  return true;
}

void IoQueue::hold_ahead(bool held) {
  {
    std::lock_guard lock(mutex_);
    held_ = held;
  }
  if (!held) work_arrived_.notify_one();
}

bool IoQueue::waits(const JobPtr& job) const {
  std::lock_guard lock(mutex_);
  return job->ahead;
}

bool IoQueue::done(const JobPtr& job) const {
  std::lock_guard lock(mutex_);
  return job->done;
}

bool IoQueue::failed(const JobPtr& job) const {
  std::lock_guard lock(mutex_);
  return job->done && job->error;
}

void IoQueue::wait(const JobPtr& job) {
  std::unique_lock lock(mutex_);
  work_done_.wait(lock, [&] { return job->done; });
  if (job->error) std::rethrow_exception(job->error);
}

void IoQueue::wait_any(std::span<const JobPtr> jobs) {
  std::unique_lock lock(mutex_);
  work_done_.wait(lock,
                  [&] { return std::any_of(jobs.begin(), jobs.end(), [](const JobPtr& job) { return job->done; }); });
}

void IoQueue::wait_idle() {
  std::unique_lock lock(mutex_);
  work_done_.wait(lock, [&] { return queue_.empty() && (held_ || ahead_.empty()) && running_ == 0; });
}

void IoQueue::run() {
  std::unique_lock lock(mutex_);
  while (true) {
    work_arrived_.wait(lock, [&] { return stopping_ || !queue_.empty() || may_read_ahead(); });
    if (stopping_) return;
    std::deque<JobPtr>& from = queue_.empty() ? ahead_ : queue_;
    JobPtr job = std::move(from.front());
    from.pop_front();
    job->ahead = false;
    ++running_;
    lock.unlock();
    std::exception_ptr error;
    try {
      job->work();
    } catch (...) {
      error = std::current_exception();
    }
    job->work = nullptr;
    lock.lock();
    job->error = std::move(error);
    job->done = true;
    --running_;
    work_done_.notify_all();
  }
}

}  // namespace cfmoe
