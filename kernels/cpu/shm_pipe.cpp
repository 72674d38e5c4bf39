// Tensors handed from one rank to the next on one host: shm_send and shm_receive. Linux only.
#if defined(__linux__)

#include <memory>
#include <utility>

#include "shm_channel.h"
#include "shm_handles.h"

namespace infer::shm {
namespace {

Handles<Channel> channels("pipe");

int64_t pipe_bytes(int64_t num_slots, int64_t slot_bytes) {
  TORCH_CHECK_VALUE(num_slots >= 1, "shm_pipe_bytes: num_slots is ", num_slots, ", must be at least 1");
  TORCH_CHECK_VALUE(slot_bytes >= 128 && slot_bytes % 64 == 0, "shm_pipe_bytes: slot_bytes is ", slot_bytes,
                    ", must be a multiple of 64 and at least 128");
  return static_cast<int64_t>(Channel::bytes(2, num_slots, slot_bytes));
}

int64_t open_pipe(int64_t fd, int64_t index, at::IntArrayRef ranks, at::IntArrayRef pids, at::IntArrayRef start_times,
                  int64_t nonce, int64_t num_slots, int64_t slot_bytes, int64_t spin_us, int64_t timeout_ms) {
  pipe_bytes(num_slots, slot_bytes);  // checks
  TORCH_CHECK_VALUE(ranks.size() == 2, "shm_pipe_open: ", ranks.size(), " ranks, must be a sender and a receiver");
  const Options options{index, static_cast<uint64_t>(nonce), num_slots, slot_bytes, /*touch_all=*/false,
                        std::chrono::microseconds(spin_us), std::chrono::milliseconds(timeout_ms)};
  auto peers = peers_of("shm_pipe_open", index, ranks, pids, start_times);
  return channels.add(std::make_shared<Channel>(static_cast<int>(fd), std::move(peers), options));
}

void check(const char* op, const Channel& channel, int64_t index, const at::Tensor& x, int64_t step) {
  TORCH_CHECK_VALUE(channel.index() == index, op, ": this is the pipe's other end");
  TORCH_CHECK_VALUE(x.device().is_cpu(), op, ": x is on ", x.device(), ", must be on the CPU");
  TORCH_CHECK_VALUE(x.is_contiguous(), op, ": x has strides ", x.strides(), ", must be contiguous");
  TORCH_CHECK_VALUE(step >= 0, op, ": step is ", step, ", must not be negative");
}

Call call_of(const at::Tensor& x) {
  return {kind_hand_over, static_cast<uint32_t>(x.scalar_type()), static_cast<uint64_t>(x.nbytes())};
}

void send(int64_t handle, const at::Tensor& x, int64_t step) {
  const auto channel = channels.at(handle);
  check("shm_send", *channel, Channel::sender, x, step);
  channel->send(call_of(x), step, static_cast<const std::byte*>(x.const_data_ptr()));
}

void receive(int64_t handle, at::Tensor& x, int64_t step) {
  const auto channel = channels.at(handle);
  check("shm_receive", *channel, Channel::receiver, x, step);
  channel->receive(call_of(x), step, static_cast<std::byte*>(x.mutable_data_ptr()));
}

}  // namespace
}  // namespace infer::shm

TORCH_LIBRARY_FRAGMENT(infer, m) {
  m.def("shm_pipe_bytes(int num_slots, int slot_bytes) -> int", &infer::shm::pipe_bytes);
  m.def(
      "shm_pipe_open(int fd, int index, int[] ranks, int[] pids, int[] start_times, int nonce, int num_slots, "
      "int slot_bytes, int spin_us, int timeout_ms) -> int",
      &infer::shm::open_pipe);
  m.def("shm_pipe_close(int pipe) -> ()", [](int64_t handle) { infer::shm::channels.remove(handle); });
  m.def("shm_send(int pipe, Tensor x, int step) -> ()");
  m.def("shm_receive(int pipe, Tensor(a!) x, int step) -> ()");
}

TORCH_LIBRARY_IMPL(infer, CPU, m) {
  m.impl("shm_send", &infer::shm::send);
  m.impl("shm_receive", &infer::shm::receive);
}

#endif  // __linux__
