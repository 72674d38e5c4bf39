// Mapping, posting and waiting. Linux only: futexes, and /proc to see whether a process is still there.
#if defined(__linux__)

#include "shm_segment.h"

#include <linux/futex.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <new>
#include <stdexcept>
#include <utility>

namespace infer::shm {
namespace {

constexpr uint64_t layout_magic = 0x696e6665722d3032;  // "infer-02"
constexpr nanoseconds check_interval = std::chrono::seconds(1);
constexpr nanoseconds shortest_spin = std::chrono::microseconds(2);
constexpr int yields = 2;

// Phases are counted modulo 2^32; ranks are never more than a few apart.
bool reached(uint32_t posted, uint32_t phase) { return static_cast<int32_t>(posted - phase) >= 0; }

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb" ::: "memory");
#endif
}

// Not FUTEX_PRIVATE_FLAG: the sleepers are other processes.
void futex_wait(std::atomic<uint32_t>& word, uint32_t seen, nanoseconds longest) {
  const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(longest);
  const timespec limit{static_cast<time_t>(seconds.count()), static_cast<long>((longest - seconds).count())};
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT, seen, &limit, nullptr, 0);
}

void futex_wake_all(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

}  // namespace

size_t Segment::bytes(int64_t size, int64_t num_slots, int64_t slot_bytes) {
  return sizeof(Header) + size * sizeof(Member) + num_slots * slot_bytes;
}

std::string Segment::words(const Call& call) {
  const char* kinds[] = {"nothing", "all_reduce", "gather", "broadcast", "hand-over"};
  return std::string(call.kind < std::size(kinds) ? kinds[call.kind] : "an unknown call") + " of " +
         std::to_string(call.bytes) + " bytes (dtype " + std::to_string(call.dtype) + ")";
}

Segment::Segment(int fd, std::vector<Peer> peers, const Options& options)
    : peers_(std::move(peers)), options_(options), spin_(options.spin) {
  const size_t length = bytes(size(), num_slots(), slot_bytes());
  struct stat status;
  if (fstat(fd, &status) != 0) throw std::runtime_error(std::string("fstat: ") + std::strerror(errno));
  if (static_cast<size_t>(status.st_size) != length) {  // reading past the end of a file would be a SIGBUS
    throw std::runtime_error("the segment has " + std::to_string(status.st_size) + " bytes, not " +
                             std::to_string(length));
  }
  const int flags = MAP_SHARED | (options.touch_all ? MAP_POPULATE : 0);
  void* mapped = mmap(nullptr, length, PROT_READ | PROT_WRITE, flags, fd, 0);
  if (mapped == MAP_FAILED) throw std::runtime_error(std::string("mmap: ") + std::strerror(errno));
  base_ = static_cast<std::byte*>(mapped);
  Header& head = header();
  if (index() == 0) {
    new (&head) Header{layout_magic, options_.nonce, peers_.size(), static_cast<uint64_t>(num_slots()),
                       static_cast<uint64_t>(slot_bytes()), {0}};
    for (int64_t i = 0; i < size(); ++i) new (&member(i)) Member{};
  } else if (head.magic != layout_magic || head.nonce != options_.nonce || head.size != peers_.size() ||
             head.num_slots != static_cast<uint64_t>(num_slots()) ||
             head.slot_bytes != static_cast<uint64_t>(slot_bytes())) {
    munmap(base_, length);
    throw std::runtime_error("the segment is not the one that was agreed on");
  }
}

Segment::~Segment() {
  member(index()).left.store(1, std::memory_order_release);
  futex_wake_all(member(index()).posted);
  munmap(base_, bytes(size(), num_slots(), slot_bytes()));
}

void Segment::post() {
  Member& mine = member(index());
  // Sequentially consistent against the pair in sleep: either we see the sleeper, or it sees the phase.
  mine.posted.store(++phase_, std::memory_order_seq_cst);
  if (mine.sleepers.load(std::memory_order_seq_cst) != 0) futex_wake_all(mine.posted);
}

void Segment::wait_for(int64_t index, uint32_t phase) {
  const Member& other = member(index);
  if (reached(other.posted.load(std::memory_order_acquire), phase)) return;
  if (spin(other, phase)) return;
  // Where ranks share a core, the one that is waited for may run on ours; that is cheaper than sleeping and being woken.
  for (int i = 0; i < yields; ++i) {
    sched_yield();
    if (reached(other.posted.load(std::memory_order_acquire), phase)) return;
  }
  sleep(index, phase);
}

// Spins as long as that has paid lately: twice as long after a success, half as long after a failure.
bool Segment::spin(const Member& member, uint32_t phase) {
  const auto end = Clock::now() + spin_;
  do {
    for (int i = 0; i < 8; ++i) {
      relax();
      if (reached(member.posted.load(std::memory_order_acquire), phase)) {
        spin_ = std::min(2 * spin_, options_.spin);
        return true;
      }
    }
  } while (Clock::now() < end);
  spin_ = std::max(spin_ / 2, std::min(shortest_spin, options_.spin));
  return false;
}

void Segment::sleep(int64_t index, uint32_t phase) {
  Member& other = member(index);
  const auto started = Clock::now();
  const nanoseconds interval = std::min(check_interval, options_.timeout);
  while (true) {
    other.sleepers.fetch_add(1, std::memory_order_seq_cst);
    const uint32_t seen = other.posted.load(std::memory_order_seq_cst);
    const bool has_left = other.left.load(std::memory_order_acquire) != 0;
    const uint32_t aborted = header().aborted.load(std::memory_order_acquire);
    if (!reached(seen, phase) && !has_left && aborted == 0) futex_wait(other.posted, seen, interval);
    other.sleepers.fetch_sub(1, std::memory_order_relaxed);
    if (reached(other.posted.load(std::memory_order_acquire), phase)) return;
    if (aborted != 0) {
      throw std::runtime_error(name(aborted - 1) + " gave up on " + words(call_) + ": connection closed");
    }
    if (has_left) give_up(name(index) + " has left the group: connection closed");
    const auto waited = Clock::now() - started;
    // It may have posted just before it went.
    if (waited >= check_interval && is_gone(index) &&
        !reached(other.posted.load(std::memory_order_acquire), phase)) {
      give_up(name(index) + " is gone: connection closed");
    }
    if (waited >= options_.timeout) {
      give_up(name(index) + " did not come to " + words(call_) + " within " +
              std::to_string(std::chrono::duration_cast<std::chrono::seconds>(options_.timeout).count()) +
              " s: timed out");
    }
  }
}

void Segment::check_alive(int64_t index) {
  const uint32_t aborted = header().aborted.load(std::memory_order_acquire);
  if (aborted != 0) {
    throw std::runtime_error(name(aborted - 1) + " gave up before " + words(call_) + ": connection closed");
  }
  if (member(index).left.load(std::memory_order_acquire) != 0) {
    give_up(name(index) + " has left the group: connection closed");
  }
}

// Whether the process has ended. One that has, but is not yet reaped by its parent, is a zombie.
bool Segment::is_gone(int64_t index) const {
  const Peer& peer = peers_[index];
  const std::string path = "/proc/" + std::to_string(peer.pid) + "/stat";
  std::FILE* file = std::fopen(path.c_str(), "r");
  if (file == nullptr) return errno == ENOENT;
  char text[1024] = {};
  const size_t length = std::fread(text, 1, sizeof text - 1, file);
  std::fclose(file);
  if (length == 0) return true;  // it ended between the two calls
  // PID (COMMAND) STATE ...: the command may hold anything, so count from its last parenthesis.
  const char* at = std::strrchr(text, ')');
  if (at == nullptr || at[1] == '\0' || at[2] == '\0') return false;
  const char state = at[2];
  at += 2;
  for (int field = 3; field < 22 && at != nullptr; ++field) {
    at = std::strchr(at, ' ');
    if (at != nullptr) ++at;
  }
  return state == 'Z' || state == 'X' || (at != nullptr && std::strtoull(at, nullptr, 10) != peer.start_time);
}

void Segment::give_up(const std::string& why) {
  header().aborted.store(static_cast<uint32_t>(index()) + 1, std::memory_order_seq_cst);
  for (int64_t i = 0; i < size(); ++i) futex_wake_all(member(i).posted);
  throw std::runtime_error(why);
}

std::string Segment::name(int64_t index) const {
  return "rank " + std::to_string(peers_[index].rank) + " (pid " + std::to_string(peers_[index].pid) + ")";
}

}  // namespace infer::shm

#endif  // __linux__
