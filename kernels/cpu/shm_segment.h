// A shared-memory segment that a few ranks have mapped, and how they wait for one another in it. What they use it for is
// another class's: Collectives (shm_collectives.h) or Channel (shm_channel.h).
//
// Layout: Header | Member[size] | slot[num_slots][slot_bytes].
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

enum Kind : uint32_t { kind_all_reduce = 1, kind_gather, kind_broadcast, kind_hand_over };

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
  uint64_t num_slots;
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
  int64_t num_slots;
  int64_t slot_bytes;  // a multiple of 64
  bool touch_all;      // map all of it at once, rather than page by page when it is first used
  nanoseconds spin;    // the longest time to spin before sleeping
  nanoseconds timeout;
};

class Segment {
 public:
  static size_t bytes(int64_t size, int64_t num_slots, int64_t slot_bytes);

  // Maps the segment behind `fd`, which holds bytes() zeros before index 0 comes, and may be closed afterwards. Throws
  // std::runtime_error where it cannot be mapped or is another than expected.
  Segment(int fd, std::vector<Peer> peers, const Options& options);
  ~Segment();  // tells the others that this rank posts no more
  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;

  int64_t size() const { return static_cast<int64_t>(peers_.size()); }
  int64_t index() const { return options_.index; }
  int64_t num_slots() const { return options_.num_slots; }
  int64_t slot_bytes() const { return options_.slot_bytes; }

  // Publishes what this rank has written so far, as its next phase.
  void post();

 protected:
  // Returns once a rank has posted a phase. Throws std::runtime_error where it is gone, gave up or takes longer than the
  // timeout; what it was waited for is call_.
  void wait_for(int64_t index, uint32_t phase);
  // Throws where a rank has left or any has given up, without waiting for anything.
  void check_alive(int64_t index);
  // Ends the segment for everybody: those that wait get an error, too.
  [[noreturn]] void give_up(const std::string& why);
  std::string name(int64_t index) const;
  static std::string words(const Call& call);
  size_t slot_offset(int64_t number) const { return bytes(size(), number, slot_bytes()); }
  std::byte* slot_at(int64_t number) const { return base_ + slot_offset(number); }
  Member& member(int64_t index) const { return reinterpret_cast<Member*>(base_ + sizeof(Header))[index]; }

  uint32_t phase_ = 0;  // posts made; wraps around
  Call call_{};         // what this rank is doing

 private:
  bool spin(const Member& member, uint32_t phase);
  void sleep(int64_t index, uint32_t phase);
  bool is_gone(int64_t index) const;
  Header& header() const { return *reinterpret_cast<Header*>(base_); }

  const std::vector<Peer> peers_;
  const Options options_;
  std::byte* base_ = nullptr;
  nanoseconds spin_;  // how long spinning pays at present
};

}  // namespace infer::shm
