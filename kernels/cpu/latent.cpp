// Multi-head latent attention but for the attention itself. rotary_write_latent: the queries, and the write of a latent
// and its rotated key. packed_head_linear: each head's product with weights that were packed when they were loaded.
#include <type_traits>
#include <vector>

#include "linear.h"

#define INFER_KERNEL "latent_kernel.h"
#include "foreach_isa.h"

namespace infer {
namespace {

// Products of each head's rows with its own packed weights.
template <class T>
struct Heads {
  const T* x;
  int64_t x_row_stride, x_head_stride, inputs, rows;
  int64_t columns, packs;  // of the inputs, in whole packs; packs
  const T* packed;
  int64_t head_stride, block_stride;
  T* out;  // [rows, heads, outputs]
  int64_t heads, outputs;
};

// The outputs of blocks [first, last) of one head.
template <class T>
void head_blocks(const Heads<T>& h, int64_t head, int64_t first, int64_t last) {
  static thread_local std::vector<float> memory, room;  // kept: a step makes many calls
  const int64_t chunk_rows = linear_chunk_rows(h.rows, h.columns);
  memory.resize(chunk_rows * linear_tile_outputs);
  const T* x = h.x + head * h.x_head_stride;
  LinearTask<T> task{nullptr, h.rows, h.x_row_stride, chunk_rows, h.packed + head * h.head_stride, h.block_stride,
                     h.packs, nullptr, h.out + head * h.outputs, h.outputs, h.heads * h.outputs};
  if constexpr (std::is_same_v<T, float>) {
    task.x = x;
  } else {
    room.resize(h.rows * h.columns);
    INFER_SELECT(widen_rows)(x, h.x_row_stride, h.rows, h.inputs, h.columns, room.data());
    task.x = room.data();
    task.x_stride = h.columns;
  }
  INFER_SELECT(linear_blocks<T>)(task, first, last, memory.data());
}

struct Shape {
  int64_t tokens, heads, latent, rope;
};

Shape check_latent(const char* op, const at::Tensor& q_latent, const at::Tensor& q_rope, const at::Tensor& kv,
                   const at::Tensor& positions, const at::Tensor& cos_sin, const at::Tensor& norm,
                   const at::Tensor& pages, const at::Tensor& slots) {
  check_dim(op, "q_latent", q_latent, 3);
  check_dim(op, "q_rope", q_rope, 3);
  check_dim(op, "cos_sin", cos_sin, 2);
  check_dim(op, "pages", pages, 4);
  const Shape s{q_latent.size(0), q_latent.size(1), q_latent.size(2), q_rope.size(2)};
  const auto dtype = q_latent.scalar_type();
  TORCH_CHECK_VALUE(s.rope % 2 == 0, op, ": q_rope has ", s.rope, " dimensions, must have an even number");
  check_tensor(op, "q_latent", q_latent, dtype, {s.tokens, s.heads, s.latent});
  check_tensor(op, "q_rope", q_rope, dtype, {s.tokens, s.heads, s.rope});
  check_tensor(op, "kv", kv, dtype, {s.tokens, s.latent + s.rope});
  check_tensor(op, "positions", positions, at::kLong, {s.tokens});
  check_tensor(op, "slots", slots, at::kLong, {s.tokens});
  check_tensor(op, "cos_sin", cos_sin, at::kFloat, {cos_sin.size(0), s.rope});
  check_tensor(op, "norm", norm, dtype, {s.latent});
  check_tensor(op, "pages", pages, dtype, {pages.size(0), pages.size(1), 1, s.latent + s.rope});
  const int64_t *pos = data<int64_t>(positions), *slot = data<int64_t>(slots);
  const int64_t num_slots = pages.size(0) * pages.size(1);
  for (int64_t t = 0; t < s.tokens; ++t) {
    TORCH_CHECK_INDEX(0 <= pos[t] && pos[t] < cos_sin.size(0), op, ": positions[", t, "] is ", pos[t],
                      ", must be in [0, ", cos_sin.size(0), ")");
    TORCH_CHECK_INDEX(-1 <= slot[t] && slot[t] < num_slots, op, ": slots[", t, "] is ", slot[t],
                      ", must be -1 or in [0, ", num_slots, ")");
  }
  return s;
}

template <class T>
void write_latents(const Shape& s, const at::Tensor& q_latent, const at::Tensor& q_rope, const at::Tensor& kv,
                   const at::Tensor& positions, const at::Tensor& cos_sin, const at::Tensor& norm, float eps,
                   const at::Tensor& pages, const at::Tensor& slots, const at::Tensor& q) {
  const auto rotate = INFER_SELECT(rotate_head<T, T>);
  const auto normalize = INFER_SELECT(rms_norm_row<T, T>);
  const int64_t dim = s.latent + s.rope, half = s.rope / 2, block_size = pages.size(1);
  const int64_t *pos = data<int64_t>(positions), *slot = data<int64_t>(slots);
  at::parallel_for(0, s.tokens, grain_size(s.heads * dim), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const float* angles = data<float>(cos_sin) + pos[t] * cos_sin.stride(0);
      T* out = mutable_data<T>(q) + t * s.heads * dim;
      for (int64_t h = 0; h < s.heads; ++h, out += dim) {
        const T* latent = data<T>(q_latent) + t * q_latent.stride(0) + h * q_latent.stride(1);
        const T* rope = data<T>(q_rope) + t * q_rope.stride(0) + h * q_rope.stride(1);
        std::memcpy(out, latent, s.latent * sizeof(T));
        rotate(rope, nullptr, angles, nullptr, out + s.latent, s.rope, half, 0.0f);
      }
      if (slot[t] < 0) continue;
      const T* row = data<T>(kv) + t * kv.stride(0);
      const int64_t block = slot[t] / block_size, offset = slot[t] % block_size;
      T* kept = mutable_data<T>(pages) + block * pages.stride(0) + offset * pages.stride(1);
      normalize(row, data<T>(norm), kept, s.latent, eps);
      rotate(row + s.latent, nullptr, angles, nullptr, kept + s.latent, s.rope, half, 0.0f);
    }
  });
}

at::Tensor rotary_write_latent(const at::Tensor& q_latent, const at::Tensor& q_rope, const at::Tensor& kv,
                               const at::Tensor& positions, const at::Tensor& cos_sin, const at::Tensor& norm,
                               double eps, const at::Tensor& pages, const at::Tensor& slots) {
  constexpr const char* op = "rotary_write_latent";
  const Shape s = check_latent(op, q_latent, q_rope, kv, positions, cos_sin, norm, pages, slots);
  at::Tensor q = at::empty({s.tokens, s.heads, s.latent + s.rope}, q_latent.options());
  for_dtype(op, q_latent.scalar_type(), [&](auto type) {
    write_latents<decltype(type)>(s, q_latent, q_rope, kv, positions, cos_sin, norm, static_cast<float>(eps), pages,
                                  slots, q);
  });
  return q;
}

at::Tensor packed_head_linear(const at::Tensor& x, const at::Tensor& packed, int64_t outputs) {
  constexpr const char* op = "packed_head_linear";
  check_dim(op, "x", x, 3);
  check_dim(op, "packed", packed, 5);
  const int64_t rows = x.size(0), heads = packed.size(0), blocks = packed.size(1), packs = packed.size(2);
  const int64_t pack = packed.size(4), columns = packs * pack;
  TORCH_CHECK_VALUE(packed.is_contiguous() && packed.size(3) == linear_lanes, op, ": packed has shape ",
                    packed.sizes(), ", must be contiguous with ", linear_lanes, " lanes");
  TORCH_CHECK_VALUE((outputs + linear_lanes - 1) / linear_lanes == blocks && outputs > 0, op, ": ", outputs,
                    " outputs do not fill ", blocks, " blocks of ", linear_lanes);
  TORCH_CHECK_VALUE(x.size(2) <= columns && columns < x.size(2) + pack, op, ": x has ", x.size(2),
                    " columns, the weights ", columns);
  check_tensor(op, "x", x, packed.scalar_type(), {rows, heads, x.size(2)});
  at::Tensor out = at::empty({rows, heads, outputs}, x.options());
  if (rows == 0) return out;
  for_dtype(op, packed.scalar_type(), [&](auto type) {
    using T = decltype(type);
    TORCH_CHECK_VALUE(pack == int64_t(sizeof(float) / sizeof(T)), op, ": packed has ", pack,
                      " inputs together, must have ", sizeof(float) / sizeof(T));
    const Heads<T> all{data<T>(x), x.stride(0), x.stride(1), x.size(2), rows, columns, packs,
                       data<T>(packed), packed.stride(0), packed.stride(1), mutable_data<T>(out), heads, outputs};
    // Items are the blocks of all heads, one head after another: a thread's share may begin and end within a head.
    at::parallel_for(0, heads * blocks, grain_size(rows * columns * linear_lanes / 8), [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end;) {
        const int64_t head = at / blocks, stop = std::min(end, (head + 1) * blocks);
        head_blocks(all, head, at - head * blocks, stop - head * blocks);
        at = stop;
      }
    });
  });
  return out;
}

}  // namespace
}  // namespace infer

TORCH_LIBRARY_FRAGMENT(infer, m) {
  m.def(
      "rotary_write_latent(Tensor q_latent, Tensor q_rope, Tensor kv, Tensor positions, Tensor cos_sin, Tensor norm, "
      "float eps, Tensor(a!) pages, Tensor slots) -> Tensor");
  m.def("packed_head_linear(Tensor x, Tensor packed, int outputs) -> Tensor");
}

TORCH_LIBRARY_IMPL(infer, CPU, m) {
  m.impl("rotary_write_latent", &infer::rotary_write_latent);
  m.impl("packed_head_linear", &infer::packed_head_linear);
}
