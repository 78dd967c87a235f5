// Tasks on XLA's own threads. The calling thread takes part and waits only for helpers that have begun, so that it never
// depends on a pool that is busy, or that a fork has left without threads.

#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>

#include "xla/ffi/api/ffi.h"

struct Team {
  std::mutex mutex;
  std::condition_variable left;
  std::atomic<int64_t> next{0};
  int64_t joined = 1, active = 0;
  bool closed = false;
};

// Calls run(task, member) for every task, on at most so many threads; a member is one of them, from 0 on.
template <class Run>
void RunTasks(xla::ffi::ThreadPool& pool, int64_t tasks, int64_t threads, Run run) {
  const auto team = std::make_shared<Team>();
  const auto work = [&, team = team.get()](int64_t member) {
    for (int64_t task; (task = team->next.fetch_add(1)) < tasks;) run(task, member);
  };
  for (int64_t i = 1; i < threads; ++i) {
    pool.Schedule([team, &work] {
      std::unique_lock<std::mutex> lock(team->mutex);
      if (team->closed) return;  // the call is over, and `work` with it
      const int64_t member = team->joined++;
      ++team->active;
      lock.unlock();
      work(member);
      lock.lock();
      if (--team->active == 0) team->left.notify_one();
    });
  }
  work(0);
  std::unique_lock<std::mutex> lock(team->mutex);
  team->closed = true;
  team->left.wait(lock, [&] { return team->active == 0; });
}
