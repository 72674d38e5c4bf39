// rotary_write_latent: the queries of multi-head latent attention, and the write of the latent and its rotated key.
#include "common.h"

#define INFER_KERNEL "rotary_kernel.h"
#include "foreach_isa.h"

namespace infer {
namespace {

constexpr const char* op = "rotary_write_latent";

struct Shape {
  int64_t tokens, heads, latent, rope;
};

Shape check_arguments(const at::Tensor& q_latent, const at::Tensor& q_rope, const at::Tensor& kv,
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

at::Tensor rotary_write_latent(const at::Tensor& q_latent, const at::Tensor& q_rope, const at::Tensor& kv,
                               const at::Tensor& positions, const at::Tensor& cos_sin, const at::Tensor& norm,
                               double eps, const at::Tensor& pages, const at::Tensor& slots) {
  const Shape s = check_arguments(q_latent, q_rope, kv, positions, cos_sin, norm, pages, slots);
  const int64_t dim = s.latent + s.rope, half = s.rope / 2, block_size = pages.size(1);
  at::Tensor q = at::empty({s.tokens, s.heads, dim}, q_latent.options());
  for_dtype(op, q_latent.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto rotate = INFER_SELECT(rotate_head<T>);
    const auto normalize = INFER_SELECT(rms_norm_row<T>);
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
        T* kept = mutable_data<T>(pages) + slot[t] / block_size * pages.stride(0) + slot[t] % block_size * pages.stride(1);
        normalize(row, data<T>(norm), kept, s.latent, static_cast<float>(eps));
        rotate(row + s.latent, nullptr, angles, nullptr, kept + s.latent, s.rope, half, 0.0f);
      }
    });
  });
  return q;
}

}  // namespace
}  // namespace infer

TORCH_LIBRARY_FRAGMENT(infer, m) {
  m.def(
      "rotary_write_latent(Tensor q_latent, Tensor q_rope, Tensor kv, Tensor positions, Tensor cos_sin, Tensor norm, "
      "float eps, Tensor(a!) pages, Tensor slots) -> Tensor");
}

TORCH_LIBRARY_IMPL(infer, CPU, m) { m.impl("rotary_write_latent", &infer::rotary_write_latent); }
