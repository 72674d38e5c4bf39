// Calls that all ranks of a group make together, over a segment of two slots a rank.
//
// Every rank makes the same calls in the same order. A call (or a chunk of a large one) writes the rank's own slot of one
// buffer, posts a phase, and reads what others posted; calls alternate between the two buffers.
//
// Invariant: a rank that has posted in call k + 1 has read all it wants of call k. So a rank may write its slot for
// call k + 2, which is the slot of call k, once every other rank has posted in call k + 1 (begin waits for that).
#pragma once

#include "shm_segment.h"

namespace infer::shm {

class Collectives : public Segment {
 public:
  static constexpr int64_t slots_a_rank = 2;
  using Segment::Segment;

  // Begins a call: afterwards this rank's slot may be written.
  void begin(const Call& call) {
    previous_ = first_;
    first_ = phase_ + 1;
    buffer_ ^= 1;
    call_ = call;
    for (int64_t i = 0; i < size(); ++i) wait_for(i, previous_);
    member(index()).calls[buffer_] = call;
  }

  // The slot of a rank in the buffer of the present call.
  std::byte* slot(int64_t index) const { return slot_at(slots_a_rank * index + buffer_); }

  // Waits until another rank has made the post that this rank made last. Throws std::runtime_error as wait_for, and where
  // that rank makes a different call.
  void wait_for_post_of(int64_t index) {
    wait_for(index, phase_);
    if (phase_ != first_) return;
    const Call theirs = member(index).calls[buffer_];
    if (theirs == call_) return;
    give_up(name(this->index()) + " calls " + words(call_) + " where " + name(index) + " calls " + words(theirs));
  }

  void wait_for_all() {
    for (int64_t i = 0; i < size(); ++i) {
      if (i != index()) wait_for_post_of(i);
    }
  }

 private:
  uint32_t previous_ = 0;  // the first phase of the call before this one
  uint32_t first_ = 0;     // the first phase of this call
  int buffer_ = 0;         // of this call
};

}  // namespace infer::shm
