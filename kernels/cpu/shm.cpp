// Collectives of CPU ranks on one host through a shared segment: shm_all_reduce, shm_broadcast and shm_gather. Linux only.
#if defined(__linux__)

#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "shm_collectives.h"
#include "shm_handles.h"

namespace infer {
struct Fp16 {
  uint16_t bits;
};
}  // namespace infer

#define INFER_KERNEL "shm_kernel.h"
#include "foreach_isa.h"

namespace infer::shm {
namespace {

constexpr int64_t grain_bytes = 128 << 10;  // worth a thread of its own
// Above this many bytes each of three or more ranks adds up a share for all, instead of everything for itself.
constexpr int64_t shared_sum_bytes = 32 << 10;

Handles<Collectives> groups("group");

int64_t group_bytes(int64_t size, int64_t slot_bytes) {
  TORCH_CHECK_VALUE(size >= 1, "shm_bytes: size is ", size, ", must be at least 1");
  TORCH_CHECK_VALUE(slot_bytes >= 64 && slot_bytes % 64 == 0, "shm_bytes: slot_bytes is ", slot_bytes,
                    ", must be a positive multiple of 64");
  return static_cast<int64_t>(Collectives::bytes(size, Collectives::slots_a_rank * size, slot_bytes));
}

int64_t open_group(int64_t fd, int64_t index, at::IntArrayRef ranks, at::IntArrayRef pids, at::IntArrayRef start_times,
                   int64_t nonce, int64_t slot_bytes, int64_t spin_us, int64_t timeout_ms) {
  const int64_t size = static_cast<int64_t>(ranks.size());
  group_bytes(size, slot_bytes);  // checks
  auto peers = peers_of("shm_open", index, ranks, pids, start_times);
  const Options options{index,
                        static_cast<uint64_t>(nonce),
                        Collectives::slots_a_rank * size,
                        slot_bytes,
                        /*touch_all=*/true,
                        std::chrono::microseconds(spin_us),
                        std::chrono::milliseconds(timeout_ms)};
  return groups.add(std::make_shared<Collectives>(static_cast<int>(fd), std::move(peers), options));
}

// ---- all-reduce

template <class T>
struct Summer {
  Collectives& segment;
  decltype(INFER_SELECT(sum_in_order<T>)) sum = INFER_SELECT(sum_in_order<T>);

  T* slot(int64_t index) const { return reinterpret_cast<T*>(segment.slot(index)); }

  // out[begin, end) = the sum of all ranks' slots there.
  void sum_slots(T* out, int64_t begin, int64_t end) const {
    at::parallel_for(begin, end, grain_bytes / sizeof(T), [&](int64_t from, int64_t to) {
      std::vector<const T*> parts(segment.size());
      for (int64_t i = 0; i < segment.size(); ++i) parts[i] = slot(i) + from;
      sum(parts.data(), segment.size(), out + from, to - from);
    });
  }

  void copy(T* to, const T* from, int64_t begin, int64_t end) const {
    at::parallel_for(begin, end, grain_bytes / sizeof(T), [&](int64_t first, int64_t last) {
      std::memcpy(to + first, from + first, (last - first) * sizeof(T));
    });
  }

  // Everyone reads everything: one phase.
  void sum_all(T* x, int64_t n) const {
    copy(slot(segment.index()), x, 0, n);
    segment.post();
    segment.wait_for_all();
    sum_slots(x, 0, n);
  }

  // Everyone adds up a share, in place, since nobody else reads that part of its slot; then reads the others' shares.
  void sum_shares(T* x, int64_t n) const {
    constexpr int64_t line = 64 / sizeof(T);
    const int64_t share = (n / segment.size() / line + 1) * line, mine = segment.index();
    const auto begin = [&](int64_t index) { return std::min(n, index * share); };
    copy(slot(mine), x, 0, n);
    segment.post();
    segment.wait_for_all();
    sum_slots(slot(mine), begin(mine), begin(mine + 1));
    segment.post();
    segment.wait_for_all();
    for (int64_t i = 0; i < segment.size(); ++i) copy(x, slot(i), begin(i), begin(i + 1));
  }
};

template <class T>
void sum_chunks(Collectives& segment, at::ScalarType dtype, T* x, int64_t n) {
  const Summer<T> summer{segment};
  const int64_t most = segment.slot_bytes() / static_cast<int64_t>(sizeof(T));
  for (int64_t first = 0; first < n; first += most) {
    const int64_t count = std::min(most, n - first);
    segment.begin({kind_all_reduce, static_cast<uint32_t>(dtype), static_cast<uint64_t>(n * sizeof(T))});
    if (segment.size() > 2 && count * static_cast<int64_t>(sizeof(T)) > shared_sum_bytes) {
      summer.sum_shares(x + first, count);
    } else {
      summer.sum_all(x + first, count);
    }
  }
}

void all_reduce(int64_t handle, at::Tensor& x) {
  TORCH_CHECK_VALUE(x.device().is_cpu(), "shm_all_reduce: x is on ", x.device(), ", must be on the CPU");
  TORCH_CHECK_VALUE(x.is_contiguous(), "shm_all_reduce: x has strides ", x.strides(), ", must be contiguous");
  const auto segment = groups.at(handle);
  switch (x.scalar_type()) {
    case at::kFloat:
      return sum_chunks(*segment, x.scalar_type(), mutable_data<float>(x), x.numel());
    case at::kBFloat16:
      return sum_chunks(*segment, x.scalar_type(), mutable_data<Bf16>(x), x.numel());
    case at::kHalf:
      return sum_chunks(*segment, x.scalar_type(), mutable_data<Fp16>(x), x.numel());
    default:
      TORCH_CHECK_VALUE(false, "shm_all_reduce: dtype is ", x.scalar_type(), ", must be Float, BFloat16 or Half");
  }
}

// ---- broadcast

// The first rank's bytes to all. Everyone posts, as in every call, but only the first is waited for.
void broadcast(int64_t handle, at::Tensor& x) {
  TORCH_CHECK_VALUE(x.device().is_cpu(), "shm_broadcast: x is on ", x.device(), ", must be on the CPU");
  TORCH_CHECK_VALUE(x.is_contiguous(), "shm_broadcast: x has strides ", x.strides(), ", must be contiguous");
  const auto segment = groups.at(handle);
  const auto length = static_cast<int64_t>(x.nbytes());
  auto* data = static_cast<std::byte*>(x.mutable_data_ptr());
  for (int64_t first = 0; first < length; first += segment->slot_bytes()) {
    const int64_t count = std::min(segment->slot_bytes(), length - first);
    segment->begin({kind_broadcast, static_cast<uint32_t>(x.scalar_type()), static_cast<uint64_t>(length)});
    if (segment->index() == 0) std::memcpy(segment->slot(0), data + first, count);
    segment->post();
    if (segment->index() == 0) continue;
    segment->wait_for_post_of(0);
    std::memcpy(data + first, segment->slot(0), count);
  }
}

// ---- gather

// Bytes [begin, end) of a rank's rows (`width` bytes each, one after another) to their columns in rows of `stride`
// bytes; `out` is where its first row goes.
void scatter_rows(const std::byte* from, std::byte* out, int64_t width, int64_t stride, int64_t begin, int64_t end) {
  for (int64_t at = begin; at < end;) {
    const int64_t row = at / width, column = at % width, count = std::min(width - column, end - at);
    std::memcpy(out + row * stride + column, from + (at - begin), count);
    at += count;
  }
}

at::Tensor gather(int64_t handle, const at::Tensor& x, at::IntArrayRef widths) {
  const auto segment = groups.at(handle);
  const int64_t size = segment->size(), mine = segment->index();
  check_dim("shm_gather", "x", x, 2);
  TORCH_CHECK_VALUE(static_cast<int64_t>(widths.size()) == size, "shm_gather: ", widths.size(), " widths for ", size,
                    " ranks");
  TORCH_CHECK_VALUE(x.device().is_cpu(), "shm_gather: x is on ", x.device(), ", must be on the CPU");
  TORCH_CHECK_VALUE(x.is_contiguous(), "shm_gather: x has strides ", x.strides(), ", must be contiguous");
  TORCH_CHECK_VALUE(x.size(1) == widths[mine], "shm_gather: x has ", x.size(1), " columns, widths say ", widths[mine]);
  const int64_t rows = x.size(0), item = x.element_size();
  int64_t total = 0, widest = 0;
  for (const int64_t width : widths) {
    TORCH_CHECK_VALUE(width >= 0, "shm_gather: widths are ", widths, ", none may be negative");
    total += width;
    widest = std::max(widest, width);
  }
  const at::Tensor out = at::empty({mine == 0 ? rows : 0, total}, x.options());
  const auto* in = static_cast<const std::byte*>(x.const_data_ptr());
  // Chunks are the same byte range [first, first + slot_bytes) of every rank's part, as far as it goes.
  for (int64_t first = 0; first < rows * widest * item; first += segment->slot_bytes()) {
    const auto end = [&](int64_t i) { return std::min(rows * widths[i] * item, first + segment->slot_bytes()); };
    segment->begin({kind_gather, static_cast<uint32_t>(x.scalar_type()), static_cast<uint64_t>(rows * total * item)});
    if (mine != 0 && first < end(mine)) std::memcpy(segment->slot(mine), in + first, end(mine) - first);
    segment->post();
    if (mine != 0) continue;
    segment->wait_for_all();
    auto* column = static_cast<std::byte*>(out.mutable_data_ptr());
    for (int64_t i = 0; i < size; column += widths[i++] * item) {
      if (first >= end(i)) continue;
      scatter_rows(i == 0 ? in + first : segment->slot(i), column, widths[i] * item, total * item, first, end(i));
    }
  }
  return out;
}

}  // namespace
}  // namespace infer::shm

TORCH_LIBRARY_FRAGMENT(infer, m) {
  m.def("shm_bytes(int size, int slot_bytes) -> int", &infer::shm::group_bytes);
  m.def(
      "shm_open(int fd, int index, int[] ranks, int[] pids, int[] start_times, int nonce, int slot_bytes, "
      "int spin_us, int timeout_ms) -> int",
      &infer::shm::open_group);
  m.def("shm_close(int group) -> ()", [](int64_t handle) { infer::shm::groups.remove(handle); });
  m.def("shm_all_reduce(int group, Tensor(a!) x) -> ()");
  m.def("shm_broadcast(int group, Tensor(a!) x) -> ()");
  m.def("shm_gather(int group, Tensor x, int[] widths) -> Tensor");
}

TORCH_LIBRARY_IMPL(infer, CPU, m) {
  m.impl("shm_all_reduce", &infer::shm::all_reduce);
  m.impl("shm_broadcast", &infer::shm::broadcast);
  m.impl("shm_gather", &infer::shm::gather);
}

#endif  // __linux__
