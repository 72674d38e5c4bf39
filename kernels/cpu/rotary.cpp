// rotary_write_kv: per-head norm, rotation of q and k, and the write of k and v into the paged cache.
#include <optional>
#include <vector>

#include "common.h"

#define INFER_KERNEL "rotary_kernel.h"
#include "foreach_isa.h"

namespace infer {
namespace {

constexpr const char* op = "rotary_write_kv";

void check_indices(const at::Tensor& positions, const at::Tensor& slots, int64_t max_pos, int64_t num_slots) {
  const int64_t *pos = data<int64_t>(positions), *slot = data<int64_t>(slots);
  for (int64_t t = 0; t < positions.size(0); ++t) {
    TORCH_CHECK_INDEX(0 <= pos[t] && pos[t] < max_pos, op, ": positions[", t, "] is ", pos[t], ", must be in [0, ",
                      max_pos, ")");
    TORCH_CHECK_INDEX(-1 <= slot[t] && slot[t] < num_slots, op, ": slots[", t, "] is ", slot[t],
                      ", must be -1 or in [0, ", num_slots, ")");
  }
}

// Where slot `slot` begins in pages of [num_blocks, block_size, num_kv, D]. Pages may be strided views.
template <class T>
T* slot_data(const at::Tensor& pages, int64_t slot) {
  const int64_t block_size = pages.size(1);
  return mutable_data<T>(pages) + slot / block_size * pages.stride(0) + slot % block_size * pages.stride(1);
}

template <class T, class W>
void run(const at::Tensor& qkv, const at::Tensor& positions, const at::Tensor& cos_sin, const W* q_norm,
         const W* k_norm, float eps, const at::Tensor& k_pages, const at::Tensor& v_pages, const at::Tensor& slots,
         int64_t num_q, int64_t num_kv, const at::Tensor& q_out) {
  const auto rotate = INFER_SELECT(rotate_head<T, W>);
  const int64_t dim = k_pages.size(3), half = cos_sin.size(1) / 2;
  const int64_t *pos = data<int64_t>(positions), *slot = data<int64_t>(slots);
  at::parallel_for(0, qkv.size(0), grain_size(qkv.size(1)), [&](int64_t begin, int64_t end) {
    std::vector<T> scratch(dim);
    for (int64_t t = begin; t < end; ++t) {
      const T* q = data<T>(qkv) + t * qkv.stride(0);
      const T *k = q + num_q * dim, *v = k + num_kv * dim;
      const float* angles = data<float>(cos_sin) + pos[t] * cos_sin.stride(0);
      T* out = mutable_data<T>(q_out) + t * num_q * dim;
      for (int64_t h = 0; h < num_q; ++h) {
        rotate(q + h * dim, q_norm, angles, scratch.data(), out + h * dim, dim, half, eps);
      }
      if (slot[t] < 0) continue;
      T *k_out = slot_data<T>(k_pages, slot[t]), *v_out = slot_data<T>(v_pages, slot[t]);
      for (int64_t h = 0; h < num_kv; ++h) {
        rotate(k + h * dim, k_norm, angles, scratch.data(), k_out + h * k_pages.stride(2), dim, half, eps);
        std::memcpy(v_out + h * v_pages.stride(2), v + h * dim, dim * sizeof(T));
      }
    }
  });
}

at::Tensor rotary_write_kv(const at::Tensor& qkv, const at::Tensor& positions, const at::Tensor& cos_sin,
                           const std::optional<at::Tensor>& q_norm, const std::optional<at::Tensor>& k_norm,
                           double eps, const at::Tensor& k_pages, const at::Tensor& v_pages, const at::Tensor& slots,
                           int64_t num_q, int64_t num_kv) {
  check_dim(op, "qkv", qkv, 2);
  check_dim(op, "cos_sin", cos_sin, 2);
  check_dim(op, "k_pages", k_pages, 4);
  const auto dtype = qkv.scalar_type();
  const int64_t num_tokens = qkv.size(0), dim = k_pages.size(3), rot_dim = cos_sin.size(1);
  TORCH_CHECK_VALUE(num_q >= 0 && num_kv >= 0, op, ": num_q is ", num_q, ", num_kv is ", num_kv,
                    ", must not be negative");
  TORCH_CHECK_VALUE(rot_dim % 2 == 0 && rot_dim <= dim, op, ": cos_sin has ", rot_dim,
                    " columns, must have an even number up to the head size ", dim);
  check_tensor(op, "qkv", qkv, dtype, {num_tokens, (num_q + 2 * num_kv) * dim});
  check_tensor(op, "positions", positions, at::kLong, {num_tokens});
  check_tensor(op, "slots", slots, at::kLong, {num_tokens});
  check_tensor(op, "cos_sin", cos_sin, at::kFloat, {cos_sin.size(0), rot_dim});
  check_tensor(op, "k_pages", k_pages, dtype, {k_pages.size(0), k_pages.size(1), num_kv, dim});
  check_tensor(op, "v_pages", v_pages, dtype, k_pages.sizes());
  if (q_norm) check_norm_weight(op, "q_norm", *q_norm, dtype, dim);
  if (k_norm) check_norm_weight(op, "k_norm", *k_norm, dtype, dim);
  TORCH_CHECK_VALUE(!q_norm || !k_norm || q_norm->scalar_type() == k_norm->scalar_type(), op,
                    ": q_norm and k_norm must have the same dtype");
  check_indices(positions, slots, cos_sin.size(0), k_pages.size(0) * k_pages.size(1));
  at::Tensor q = at::empty({num_tokens, num_q, dim}, qkv.options());
  for_norm_dtypes(op, dtype, q_norm ? *q_norm : k_norm ? *k_norm : qkv, [&](auto type, auto weight_type) {
    using T = decltype(type);
    using W = decltype(weight_type);
    run<T, W>(qkv, positions, cos_sin, q_norm ? data<W>(*q_norm) : nullptr, k_norm ? data<W>(*k_norm) : nullptr, eps,
              k_pages, v_pages, slots, num_q, num_kv, q);
  });
  return q;
}

}  // namespace
}  // namespace infer

TORCH_LIBRARY_FRAGMENT(infer, m) {
  m.def(
      "rotary_write_kv(Tensor qkv, Tensor positions, Tensor cos_sin, Tensor? q_norm, Tensor? k_norm, float eps, "
      "Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor slots, int num_q, int num_kv) -> Tensor");
}

TORCH_LIBRARY_IMPL(infer, CPU, m) { m.impl("rotary_write_kv", &infer::rotary_write_kv); }
