// Runs reads on a few threads, in the order of submission, and carries their errors to whoever waits for them. Reads
// ahead wait until no other is queued or running.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <thread>
#include <vector>

namespace cfmoe {

class IoQueue {
 public:
  // One read. Everything that `work` wrote is visible to a thread that has seen it done.
  class Job;
  using JobPtr = std::shared_ptr<Job>;

  explicit IoQueue(int32_t threads);
  // Drops what has not begun, waits for what has.
  ~IoQueue();
  IoQueue(const IoQueue&) = delete;
  IoQueue& operator=(const IoQueue&) = delete;

  JobPtr submit(std::function<void()> work);
  // A read that nobody waits for yet. Begins, one at a time, where there is no other.
  JobPtr submit_ahead(std::function<void()> work);
  // Somebody wants it now: one that waits to be read ahead queues up behind the other reads.
  void demand(const JobPtr& job);
  // Takes out a read ahead that has not begun; false for any other.
  bool withdraw(const JobPtr& job);
  // While held back, no read ahead begins.
  void hold_ahead(bool held);
  // One that withdraw would take out.
  bool waits(const JobPtr& job) const;
  bool done(const JobPtr& job) const;
  // Done, but the work threw.
  bool failed(const JobPtr& job) const;
  // Waits, then throws what the work threw.
  void wait(const JobPtr& job);
  // Waits until one of them is done; not for an empty list.
  void wait_any(std::span<const JobPtr> jobs);
  // Waits until nothing is queued or running, reads ahead that are held back left out. Errors stay with their jobs.
  void wait_idle();

 private:
  void stop();
  void run();
  bool may_read_ahead() const { return !held_ && queue_.empty() && running_ == 0 && !ahead_.empty(); }

  mutable std::mutex mutex_;
  std::condition_variable work_arrived_, work_done_;
  std::deque<JobPtr> queue_, ahead_;
  int32_t running_ = 0;
  bool stopping_ = false, held_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace cfmoe
