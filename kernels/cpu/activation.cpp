// act_and_mul: the gated activation of an MLP.
#include "common.h"

namespace infer {
enum class Activation { silu, gelu, gelu_tanh };
}

#define INFER_KERNEL "activation_kernel.h"
#include "foreach_isa.h"

namespace infer {
namespace {

template <class T>
auto select_row(std::string_view kind) {
  if (kind == "silu") return INFER_SELECT(act_and_mul_row<T, Activation::silu>);
  if (kind == "gelu") return INFER_SELECT(act_and_mul_row<T, Activation::gelu>);
  TORCH_CHECK_VALUE(kind == "gelu_tanh", "act_and_mul: kind is '", kind, "', must be one of silu, gelu, gelu_tanh");
  return INFER_SELECT(act_and_mul_row<T, Activation::gelu_tanh>);
}

at::Tensor act_and_mul(const at::Tensor& x, std::string_view kind) {
  check_dim("act_and_mul", "x", x, 2);
  TORCH_CHECK_VALUE(x.size(1) % 2 == 0, "act_and_mul: x has ", x.size(1), " columns, must have an even number");
  const int64_t rows = x.size(0), n = x.size(1) / 2;
  check_tensor("act_and_mul", "x", x, x.scalar_type(), {rows, 2 * n});
  at::Tensor out = at::empty({rows, n}, x.options());
  for_dtype("act_and_mul", x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto run = select_row<T>(kind);
    const T* in = data<T>(x);
    T* dst = mutable_data<T>(out);
    const int64_t stride = x.stride(0);
    at::parallel_for(0, rows, grain_size(4 * n), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) run(in + t * stride, in + t * stride + n, dst + t * n, n);
    });
  });
  return out;
}

}  // namespace
}  // namespace infer

TORCH_LIBRARY_FRAGMENT(infer, m) { m.def("act_and_mul(Tensor x, str kind) -> Tensor"); }

TORCH_LIBRARY_IMPL(infer, CPU, m) { m.impl("act_and_mul", &infer::act_and_mul); }
