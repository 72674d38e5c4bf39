// A shared-memory segment that the ranks of one group have mapped, and how they wait for one another in it.
//
// Layout: Header | Member[size] | slot[size][2][slot_bytes]. Every rank makes the same calls in the same order. A call
// (or a chunk of a large one) writes the rank's own slot of one buffer, posts a phase, and reads what others posted;
// calls alternate between the two buffers.
//
// Invariant: a rank that has posted in call k + 1 has read all it wants of call k. So a rank may write its slot for
// call k + 2, which is the slot of call k, once every other rank has posted in call k + 1 (begin waits for that).
#pragma once

#include <sys/types.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace infer::shm {

using Clock = std::chrono::steady_clock;
using std::chrono::nanoseconds;

// What a call is about. Equal on all ranks, or the program is wrong: checked, because the sum of two different tensors
// is an error that nobody would see.
struct Call {
  uint32_t kind;
  uint32_t dtype;
  uint64_t bytes;
  bool operator==(const Call&) const = default;
};

// Written by its owner alone (but for `sleepers`). Two cache lines, since processors fetch lines in pairs.
struct alignas(128) Member {
  std::atomic<uint32_t> posted;    // the last phase this rank has posted; a futex
  std::atomic<uint32_t> sleepers;  // processes that sleep on `posted`, or are about to
  std::atomic<uint32_t> left;      // 1: it will post no more
  Call calls[2];                   // by buffer; valid once the phase of the call is posted
};

struct alignas(128) Header {
  uint64_t magic;  // of this layout
  uint64_t nonce;  // of this segment
  uint64_t size;
  uint64_t slot_bytes;
  std::atomic<uint32_t> aborted;  // 0, or 1 + the index of the rank that gave up
};

static_assert(std::atomic<uint32_t>::is_always_lock_free && sizeof(std::atomic<uint32_t>) == 4);

// A rank of the group as this host knows it. start_time: field 22 of /proc/PID/stat; a pid alone is used again.
struct Peer {
  int64_t rank;
  pid_t pid;
  uint64_t start_time;
};

struct Options {
  int64_t index;  // this rank's place among the peers; 0 sets the segment up
  uint64_t nonce;
  int64_t slot_bytes;  // a multiple of 64
  nanoseconds spin;    // the longest time to spin before sleeping
  nanoseconds timeout;
};

class Segment {
 public:
  static size_t bytes(int64_t size, int64_t slot_bytes);

  // Maps the segment behind `fd`, which holds bytes() zeros before index 0 comes, and may be closed afterwards. Throws
  // std::runtime_error where it cannot be mapped or is another than expected.
  Segment(int fd, std::vector<Peer> peers, const Options& options);
  ~Segment();  // tells the others that this rank posts no more
  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;

  int64_t size() const { return static_cast<int64_t>(peers_.size()); }
  int64_t index() const { return options_.index; }
  int64_t slot_bytes() const { return options_.slot_bytes; }

  // Begins a call: afterwards this rank's slot may be written.
  void begin(const Call& call);
  // The slot of a rank in the buffer of the present call.
  std::byte* slot(int64_t index) const;
  // Publishes what this rank has written so far.
  void post();
  // Waits until every other rank has made the post that this rank made last. Throws std::runtime_error where one is
  // gone, gave up, takes longer than the timeout, or makes a different call.
  void wait_for_all();

 private:
  void wait_for(int64_t index, uint32_t phase);
  bool spin(const Member& member, uint32_t phase);
  void sleep(int64_t index, uint32_t phase);
  void check_call(int64_t index);
  bool is_gone(int64_t index) const;
  [[noreturn]] void give_up(const std::string& why);
  std::string name(int64_t index) const;
  Header& header() const { return *reinterpret_cast<Header*>(base_); }
  Member& member(int64_t index) const { return reinterpret_cast<Member*>(base_ + sizeof(Header))[index]; }

  const std::vector<Peer> peers_;
  const Options options_;
  std::byte* base_ = nullptr;
  uint32_t phase_ = 0;     // posts made; wraps around
  uint32_t previous_ = 0;  // the first phase of the call before this one
  uint32_t first_ = 0;     // the first phase of this call
  int buffer_ = 0;         // of this call
  Call call_{};
  nanoseconds spin_;  // how long spinning pays at present
};

}  // namespace infer::shm
