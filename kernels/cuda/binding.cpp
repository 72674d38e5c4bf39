// The CUDA ops as torch sees them: checks, outputs, stream and device. The only file here that includes torch.
//
// Unlike on a CPU, values on the device (positions, slots, block ids, lengths) are not checked: reading them back would
// stall the host at every layer. Who makes them checks them.
#include <algorithm>
#include <optional>
#include <string_view>
#include <tuple>

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "ops.h"

namespace infer {
namespace {

using at::Tensor;
using cuda::Dtype;

Dtype storage_type(const char* op, const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return Dtype::f32;
    case at::kBFloat16:
      return Dtype::bf16;
    case at::kHalf:
      return Dtype::f16;
    default:
      TORCH_CHECK_TYPE(false, op, ": dtype is ", t.scalar_type(), ", must be Float, BFloat16 or Half");
  }
}

void check_dim(const char* op, const char* name, const Tensor& t, int64_t dim) {
  TORCH_CHECK_VALUE(t.dim() == dim, op, ": ", name, " has shape ", t.sizes(), ", must have ", dim, " dimensions");
}

// `t` is on `device`, of this dtype and shape, and contiguous in its last dimension.
void check_tensor(const char* op, const char* name, const Tensor& t, at::Device device, at::ScalarType dtype,
                  at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(t.device() == device, op, ": ", name, " is on ", t.device(), ", must be on ", device);
  TORCH_CHECK_VALUE(t.scalar_type() == dtype, op, ": ", name, " has dtype ", t.scalar_type(), ", must have ", dtype);
  TORCH_CHECK_VALUE(t.sizes() == shape, op, ": ", name, " has shape ", t.sizes(), ", must have ", shape);
  TORCH_CHECK_VALUE(t.dim() == 0 || t.size(-1) <= 1 || t.stride(-1) == 1, op, ": the last dimension of ", name,
                    " has stride ", t.stride(-1), ", must be contiguous");
}

// Kernels count rows, heads and keys in 32 bits.
int narrow(const char* op, const char* name, int64_t value) {
  TORCH_CHECK_VALUE(0 <= value && value <= INT32_MAX, op, ": ", name, " is ", value, ", must be in [0, 2^31)");
  return static_cast<int>(value);
}

// The weight of a norm of tensors like x: it has x's dtype, or is float.
void check_norm_weight(const char* op, const char* name, const Tensor& weight, const Tensor& x, int64_t size) {
  check_tensor(op, name, weight, x.device(), weight.scalar_type() == at::kFloat ? at::kFloat : x.scalar_type(), {size});
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  check_dim("rms_norm", "x", x, 2);
  const int64_t rows = x.size(0), hidden = x.size(1);
  check_tensor("rms_norm", "x", x, x.device(), x.scalar_type(), {rows, hidden});
  check_norm_weight("rms_norm", "weight", weight, x, hidden);
  const c10::cuda::CUDAGuard guard(x.device());
  Tensor out = at::empty({rows, hidden}, x.options());
  const cuda::NormArgs args{.dtype = storage_type("rms_norm", x), .rows = rows, .hidden = hidden,
                      .x = x.const_data_ptr(), .x_stride = x.stride(0),
                      .residual = nullptr, .residual_stride = 0,
                      .float_weight = weight.scalar_type() == at::kFloat,
                      .weight = weight.const_data_ptr(), .out = out.mutable_data_ptr(), .sum = nullptr,
                      .eps = static_cast<float>(eps)};
  C10_CUDA_CHECK(cuda::norm(args, c10::cuda::getCurrentCUDAStream()));
  return out;
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps) {
  check_dim("add_rms_norm", "x", x, 2);
  const int64_t rows = x.size(0), hidden = x.size(1);
  check_tensor("add_rms_norm", "x", x, x.device(), x.scalar_type(), {rows, hidden});
  check_tensor("add_rms_norm", "residual", residual, x.device(), x.scalar_type(), {rows, hidden});
  check_norm_weight("add_rms_norm", "weight", weight, x, hidden);
  const c10::cuda::CUDAGuard guard(x.device());
  Tensor out = at::empty({rows, hidden}, x.options()), sum = at::empty({rows, hidden}, x.options());
  const cuda::NormArgs args{.dtype = storage_type("add_rms_norm", x), .rows = rows, .hidden = hidden,
                      .x = x.const_data_ptr(), .x_stride = x.stride(0),
                      .residual = residual.const_data_ptr(), .residual_stride = residual.stride(0),
                      .float_weight = weight.scalar_type() == at::kFloat,
                      .weight = weight.const_data_ptr(), .out = out.mutable_data_ptr(), .sum = sum.mutable_data_ptr(),
                      .eps = static_cast<float>(eps)};
  C10_CUDA_CHECK(cuda::norm(args, c10::cuda::getCurrentCUDAStream()));
  return {out, sum};
}

cuda::Activation activation(std::string_view kind) {
  if (kind == "silu") return cuda::Activation::silu;
  if (kind == "gelu") return cuda::Activation::gelu;
  TORCH_CHECK_VALUE(kind == "gelu_tanh", "act_and_mul: kind is '", kind, "', must be one of silu, gelu, gelu_tanh");
  return cuda::Activation::gelu_tanh;
}

Tensor act_and_mul(const Tensor& x, std::string_view kind) {
  check_dim("act_and_mul", "x", x, 2);
  TORCH_CHECK_VALUE(x.size(1) % 2 == 0, "act_and_mul: x has ", x.size(1), " columns, must have an even number");
  const int64_t rows = x.size(0), columns = x.size(1) / 2;
  check_tensor("act_and_mul", "x", x, x.device(), x.scalar_type(), {rows, 2 * columns});
  const c10::cuda::CUDAGuard guard(x.device());
  Tensor out = at::empty({rows, columns}, x.options());
  const cuda::ActivationArgs args{.dtype = storage_type("act_and_mul", x), .kind = activation(kind), .rows = rows,
                            .columns = columns, .x = x.const_data_ptr(), .x_stride = x.stride(0),
                            .out = out.mutable_data_ptr()};
  C10_CUDA_CHECK(cuda::act_and_mul(args, c10::cuda::getCurrentCUDAStream()));
  return out;
}

Tensor rotary_write_kv(const Tensor& qkv, const Tensor& positions, const Tensor& cos_sin,
                       const std::optional<Tensor>& q_norm, const std::optional<Tensor>& k_norm, double eps,
                       const Tensor& k_pages, const Tensor& v_pages, const Tensor& slots, int64_t num_q,
                       int64_t num_kv) {
  constexpr const char* op = "rotary_write_kv";
  check_dim(op, "qkv", qkv, 2);
  check_dim(op, "cos_sin", cos_sin, 2);
  check_dim(op, "k_pages", k_pages, 4);
  const auto device = qkv.device();
  const auto dtype = qkv.scalar_type();
  const int64_t num_tokens = qkv.size(0), dim = k_pages.size(3), rot_dim = cos_sin.size(1);
  TORCH_CHECK_VALUE(rot_dim % 2 == 0 && rot_dim <= dim, op, ": cos_sin has ", rot_dim,
                    " columns, must have an even number up to the head size ", dim);
  check_tensor(op, "qkv", qkv, device, dtype, {num_tokens, (num_q + 2 * num_kv) * dim});
  check_tensor(op, "positions", positions, device, at::kLong, {num_tokens});
  check_tensor(op, "slots", slots, device, at::kLong, {num_tokens});
  check_tensor(op, "cos_sin", cos_sin, device, at::kFloat, {cos_sin.size(0), rot_dim});
  check_tensor(op, "k_pages", k_pages, device, dtype, {k_pages.size(0), k_pages.size(1), num_kv, dim});
  check_tensor(op, "v_pages", v_pages, device, dtype, k_pages.sizes());
  if (q_norm) check_norm_weight(op, "q_norm", *q_norm, qkv, dim);
  if (k_norm) check_norm_weight(op, "k_norm", *k_norm, qkv, dim);
  TORCH_CHECK_VALUE(!q_norm || !k_norm || q_norm->scalar_type() == k_norm->scalar_type(), op,
                    ": q_norm and k_norm must have the same dtype");
  const c10::cuda::CUDAGuard guard(device);
  Tensor q = at::empty({num_tokens, num_q, dim}, qkv.options());
  const cuda::RotaryArgs args{.dtype = storage_type(op, qkv), .num_tokens = num_tokens,
                        .num_q = narrow(op, "num_q", num_q), .num_kv = narrow(op, "num_kv", num_kv),
                        .dim = narrow(op, "the head size", dim), .half = static_cast<int>(rot_dim / 2),
                        .qkv = qkv.const_data_ptr(), .qkv_stride = qkv.stride(0),
                        .positions = positions.const_data_ptr<int64_t>(), .slots = slots.const_data_ptr<int64_t>(),
                        .cos_sin = cos_sin.const_data_ptr<float>(), .cos_sin_stride = cos_sin.stride(0),
                        .float_norms = (q_norm ? *q_norm : k_norm ? *k_norm : qkv).scalar_type() == at::kFloat,
                        .q_norm = q_norm ? q_norm->const_data_ptr() : nullptr,
                        .k_norm = k_norm ? k_norm->const_data_ptr() : nullptr, .eps = static_cast<float>(eps),
                        .k_pages = k_pages.mutable_data_ptr(), .v_pages = v_pages.mutable_data_ptr(),
                        .block_size = k_pages.size(1),
                        .k_strides = {k_pages.stride(0), k_pages.stride(1), k_pages.stride(2)},
                        .v_strides = {v_pages.stride(0), v_pages.stride(1), v_pages.stride(2)},
                        .q_out = q.mutable_data_ptr()};
  C10_CUDA_CHECK(cuda::rotary_write_kv(args, c10::cuda::getCurrentCUDAStream()));
  return q;
}

// Whether every row of t (along its last dimension) starts at a multiple of 16 bytes.
bool rows_aligned(const Tensor& t) {
  bool aligned = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  for (int64_t d = 0; d + 1 < t.dim(); ++d) {
    aligned = aligned && (t.size(d) <= 1 || t.stride(d) * t.element_size() % 16 == 0);
  }
  return aligned;
}

void check_attention(const char* op, const Tensor& q, const Tensor& k_pages, const Tensor& v_pages,
                     const Tensor& block_table, const Tensor& query_start, const Tensor& seq_lens,
                     const Tensor& kv_map, int64_t window, double soft_cap) {
  check_dim(op, "q", q, 3);
  check_dim(op, "k_pages", k_pages, 4);
  check_dim(op, "block_table", block_table, 2);
  const auto device = q.device();
  const auto dtype = q.scalar_type();
  const int64_t num_seqs = block_table.size(0), num_q = q.size(1), dim = q.size(2);
  check_tensor(op, "q", q, device, dtype, q.sizes());
  check_tensor(op, "k_pages", k_pages, device, dtype, {k_pages.size(0), k_pages.size(1), k_pages.size(2), dim});
  check_tensor(op, "v_pages", v_pages, device, dtype, k_pages.sizes());
  check_tensor(op, "block_table", block_table, device, at::kInt, block_table.sizes());
  check_tensor(op, "query_start", query_start, device, at::kInt, {num_seqs + 1});
  check_tensor(op, "seq_lens", seq_lens, device, at::kInt, {num_seqs});
  check_tensor(op, "kv_map", kv_map, device, at::kInt, {num_q});
  TORCH_CHECK_VALUE(window >= 0, op, ": window is ", window, ", must not be negative");
  TORCH_CHECK_VALUE(soft_cap >= 0, op, ": soft_cap is ", soft_cap, ", must not be negative");
  TORCH_CHECK_VALUE(dim % cuda::head_unit == 0 && dim <= cuda::max_head_dim, op, ": the head size is ", dim,
                    ", must be a multiple of ", cuda::head_unit, " up to ", cuda::max_head_dim);
  TORCH_CHECK_VALUE(num_q <= cuda::max_query_heads, op, ": there are ", num_q, " query heads, must be ",
                    cuda::max_query_heads,
                    " at most");
  TORCH_CHECK_VALUE(k_pages.size(1) > 0 && k_pages.size(2) > 0, op, ": k_pages has shape ", k_pages.sizes(),
                    ", must have slots and heads");
  TORCH_CHECK_VALUE(k_pages.strides() == v_pages.strides(), op, ": k_pages has strides ", k_pages.strides(),
                    ", v_pages ", v_pages.strides(), ", must be the same");
  TORCH_CHECK_VALUE(rows_aligned(k_pages) && rows_aligned(v_pages), op,
                    ": the heads of k_pages or v_pages do not start at multiples of 16 bytes");
}

// Attention of all rows, or of those of sequences with one row, into out (contiguous, like q).
void attend(const char* op, bool each_row, const Tensor& out, const Tensor& q, const Tensor& k_pages,
            const Tensor& v_pages, const Tensor& block_table, const Tensor& query_start, const Tensor& seq_lens,
            const Tensor& kv_map, double scale, int64_t window, double soft_cap) {
  check_attention(op, q, k_pages, v_pages, block_table, query_start, seq_lens, kv_map, window, soft_cap);
  const c10::cuda::CUDAGuard guard(q.device());
  if (block_table.size(0) == 0) {  // no sequence has any of the rows
    out.zero_();
    return;
  }
  cuda::AttentionArgs args{.dtype = storage_type(op, q), .each_row = each_row,
                     .num_rows = narrow(op, "the number of rows", q.size(0)),
                     .num_seqs = narrow(op, "the number of sequences", block_table.size(0)),
                     .num_q = static_cast<int>(q.size(1)),
                     .num_kv = narrow(op, "the number of KV heads", k_pages.size(2)),
                     .dim = static_cast<int>(q.size(2)), .block_size = narrow(op, "the block size", k_pages.size(1)),
                     .max_blocks = narrow(op, "the width of block_table", block_table.size(1)),
                     .q = q.const_data_ptr(), .q_strides = {q.stride(0), q.stride(1)},
                     .k_pages = k_pages.const_data_ptr(), .v_pages = v_pages.const_data_ptr(),
                     .page_strides = {k_pages.stride(0), k_pages.stride(1), k_pages.stride(2)},
                     .block_table = block_table.const_data_ptr<int32_t>(), .table_stride = block_table.stride(0),
                     .query_start = query_start.const_data_ptr<int32_t>(),
                     .seq_lens = seq_lens.const_data_ptr<int32_t>(), .kv_map = kv_map.const_data_ptr<int32_t>(),
                     .scale = static_cast<float>(scale), .soft_cap = static_cast<float>(soft_cap),
                     .window = static_cast<int>(std::min<int64_t>(window, INT32_MAX)),
                     .out = out.mutable_data_ptr(), .scratch = nullptr};
  if (out.numel() == 0) return;
  const Tensor scratch = at::empty({cuda::attention_scratch_floats(args)}, q.options().dtype(at::kFloat));
  args.scratch = scratch.mutable_data_ptr<float>();
  C10_CUDA_CHECK(cuda::paged_attention(args, c10::cuda::getCurrentCUDAStream()));
}

Tensor paged_attention(const Tensor& q, const Tensor& k_pages, const Tensor& v_pages, const Tensor& block_table,
                       const Tensor& query_start, const Tensor& seq_lens, const Tensor& kv_map, double scale,
                       int64_t window, double soft_cap) {
  Tensor out = at::empty(q.sizes(), q.options());
  attend("paged_attention", true, out, q, k_pages, v_pages, block_table, query_start, seq_lens, kv_map, scale, window,
         soft_cap);
  return out;
}

void attend_single_rows(const Tensor& q, const Tensor& k_pages, const Tensor& v_pages, const Tensor& block_table,
                        const Tensor& query_start, const Tensor& seq_lens, const Tensor& kv_map, double scale,
                        int64_t window, double soft_cap, const Tensor& out) {
  check_tensor("attend_single_rows", "out", out, q.device(), q.scalar_type(), q.sizes());
  TORCH_CHECK_VALUE(out.is_contiguous(), "attend_single_rows: out has strides ", out.strides(),
                    ", must be contiguous");
  attend("attend_single_rows", false, out, q, k_pages, v_pages, block_table, query_start, seq_lens, kv_map, scale,
         window, soft_cap);
}

}  // namespace
}  // namespace infer

// The other schemas stand beside the CPU's implementations, which every build has.
TORCH_LIBRARY_FRAGMENT(infer, m) {
  m.def(
      "attend_single_rows(Tensor q, Tensor k_pages, Tensor v_pages, Tensor block_table, Tensor query_start, "
      "Tensor seq_lens, Tensor kv_map, float scale, int window, float soft_cap, Tensor(a!) out) -> ()");
}

TORCH_LIBRARY_IMPL(infer, CUDA, m) {
  m.impl("rms_norm", &infer::rms_norm);
  m.impl("add_rms_norm", &infer::add_rms_norm);
  m.impl("act_and_mul", &infer::act_and_mul);
  m.impl("rotary_write_kv", &infer::rotary_write_kv);
  m.impl("paged_attention", &infer::paged_attention);
  m.impl("attend_single_rows", &infer::attend_single_rows);
}
