// A one-way queue of tensors between two ranks of one host: a ring of slots in a segment.
//
// Each posts a phase for every chunk: index 0, the sender, when a slot is full; index 1, the receiver, when it is empty
// again. Invariant: received <= sent <= received + num_slots; chunk k lies in slot k % num_slots. So the sender waits only
// where num_slots chunks are on their way, and a tensor up to the size of a slot is one chunk.
//
// The file has holes: the sender gives a slot memory as far as tensors reach into it (an error then is one that can be
// reported, unlike the SIGBUS of a page that cannot be had).
#pragma once

#include <vector>

#include "shm_segment.h"

namespace infer::shm {

class Channel : public Segment {
 public:
  static constexpr int64_t sender = 0, receiver = 1;
  // What a slot begins with.
  struct alignas(64) Head {
    Call call;
    uint64_t step;   // the caller's number of the tensor
    uint64_t first;  // byte of the tensor where this chunk begins
  };

  Channel(int fd, std::vector<Peer> peers, const Options& options);
  ~Channel();

  // Sends a tensor's bytes; the receiver must expect the same call and step. Both throw std::runtime_error as wait_for.
  void send(const Call& call, uint64_t step, const std::byte* data);
  // The next tensor's bytes. Throws std::runtime_error where it is another than the one that is expected, too.
  void receive(const Call& call, uint64_t step, std::byte* data);

 private:
  uint64_t room() const { return slot_bytes() - sizeof(Head); }
  void reserve(int64_t slot, uint64_t length);

  int fd_;                          // of the sender
  int64_t slot_ = 0;                // of the next chunk
  std::vector<uint64_t> reserved_;  // bytes of each slot that have memory
};

}  // namespace infer::shm
