// Sending and receiving through a ring of slots. Linux only.
#if defined(__linux__)

#include "shm_channel.h"

#include <fcntl.h>
#include <unistd.h>

#include <ATen/Parallel.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <utility>

namespace infer::shm {
namespace {

constexpr int64_t grain_bytes = 256 << 10;  // worth a thread of its own

void copy(std::byte* to, const std::byte* from, uint64_t length) {
  at::parallel_for(0, static_cast<int64_t>(length), grain_bytes, [&](int64_t begin, int64_t end) {
    std::memcpy(to + begin, from + begin, end - begin);
  });
}

}  // namespace

Channel::Channel(int fd, std::vector<Peer> peers, const Options& options)
    : Segment(fd, std::move(peers), options), fd_(fcntl(fd, F_DUPFD_CLOEXEC, 0)), reserved_(options.num_slots, 0) {
  if (fd_ < 0) throw std::runtime_error(std::string("dup: ") + std::strerror(errno));
}

Channel::~Channel() { close(fd_); }

void Channel::send(const Call& call, uint64_t step, const std::byte* data) {
  call_ = call;
  check_alive(receiver);
  uint64_t first = 0;
  do {
    const uint64_t length = std::min(room(), call.bytes - first);
    wait_for(receiver, phase_ + 1 - static_cast<uint32_t>(num_slots()));
    reserve(slot_, sizeof(Head) + length);
    std::byte* slot = slot_at(slot_);
    new (slot) Head{call, step, first};
    copy(slot + sizeof(Head), data + first, length);
    post();
    slot_ = (slot_ + 1) % num_slots();
    first += length;
  } while (first < call.bytes);
}

void Channel::receive(const Call& call, uint64_t step, std::byte* data) {
  call_ = call;
  uint64_t first = 0;
  do {
    wait_for(sender, phase_ + 1);
    const std::byte* slot = slot_at(slot_);
    const Head& head = *reinterpret_cast<const Head*>(slot);
    if (head.call != call || head.step != step || head.first != first) {
      give_up(name(sender) + " sends " + words(head.call) + " of step " + std::to_string(head.step) + " at byte " +
              std::to_string(head.first) + ", " + name(receiver) + " expects " + words(call) + " of step " +
              std::to_string(step) + " at byte " + std::to_string(first));
    }
    const uint64_t length = std::min(room(), call.bytes - first);
    copy(data + first, slot + sizeof(Head), length);
    post();
    slot_ = (slot_ + 1) % num_slots();
    first += length;
  } while (first < call.bytes);
}

// Sees to it that the first `length` bytes of a slot have memory behind them.
void Channel::reserve(int64_t slot, uint64_t length) {
  if (length <= reserved_[slot]) return;
  int failed;
  do {
    failed = posix_fallocate(fd_, static_cast<off_t>(slot_offset(slot)), static_cast<off_t>(length));
  } while (failed == EINTR);
  if (failed != 0) give_up(name(sender) + " has no memory for " + words(call_) + ": " + std::strerror(failed));
  reserved_[slot] = length;
}

}  // namespace infer::shm

#endif  // __linux__
