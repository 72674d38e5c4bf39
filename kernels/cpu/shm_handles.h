// How Python names the segments that this process has open.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "common.h"
#include "shm_segment.h"

namespace infer::shm {

template <class T>
class Handles {
 public:
  // what: a word for the errors.
  explicit Handles(const char* what) : what_(what) {}

  int64_t add(std::shared_ptr<T> value) {
    const std::lock_guard lock(mutex_);
    values_[++last_] = std::move(value);
    return last_;
  }

  std::shared_ptr<T> at(int64_t handle) {
    const std::lock_guard lock(mutex_);
    const auto found = values_.find(handle);
    TORCH_CHECK_VALUE(found != values_.end(), "shm: there is no ", what_, " ", handle, ", or it is closed");
    return found->second;
  }

  void remove(int64_t handle) {
    const std::lock_guard lock(mutex_);
    TORCH_CHECK_VALUE(values_.erase(handle) == 1, "shm: there is no ", what_, " ", handle, ", or it is closed");
  }

 private:
  const char* const what_;
  std::mutex mutex_;
  std::map<int64_t, std::shared_ptr<T>> values_;
  int64_t last_ = 0;
};

// The ranks of a segment. op: named in errors.
inline std::vector<Peer> peers_of(const char* op, int64_t index, at::IntArrayRef ranks, at::IntArrayRef pids,
                                  at::IntArrayRef start_times) {
  const int64_t size = static_cast<int64_t>(ranks.size());
  TORCH_CHECK_VALUE(pids.size() == ranks.size() && start_times.size() == ranks.size(), op, ": ", size, " ranks, ",
                    pids.size(), " pids and ", start_times.size(), " start times, must be one each");
  TORCH_CHECK_VALUE(0 <= index && index < size, op, ": index is ", index, ", must be in [0, ", size, ")");
  std::vector<Peer> peers;
  for (int64_t i = 0; i < size; ++i) {
    peers.push_back({ranks[i], static_cast<pid_t>(pids[i]), static_cast<uint64_t>(start_times[i])});
  }
  return peers;
}

}  // namespace infer::shm
