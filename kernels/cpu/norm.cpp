// rms_norm and add_rms_norm.
#include <tuple>

#include "common.h"

#define INFER_KERNEL "norm_kernel.h"
#include "foreach_isa.h"

namespace infer {
namespace {

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  check_dim("rms_norm", "x", x, 2);
  const int64_t rows = x.size(0), hidden = x.size(1);
  check_tensor("rms_norm", "x", x, x.scalar_type(), {rows, hidden});
  check_norm_weight("rms_norm", "weight", weight, x.scalar_type(), hidden);
  at::Tensor out = at::empty({rows, hidden}, x.options());
  for_norm_dtypes("rms_norm", x.scalar_type(), weight, [&](auto type, auto weight_type) {
    using T = decltype(type);
    using W = decltype(weight_type);
    const auto run = INFER_SELECT(rms_norm_row<T, W>);
    const T* in = data<T>(x);
    const W* w = data<W>(weight);
    T* dst = mutable_data<T>(out);
    const int64_t stride = x.stride(0);
    at::parallel_for(0, rows, grain_size(hidden), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) run(in + t * stride, w, dst + t * hidden, hidden, eps);
    });
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor> add_rms_norm(const at::Tensor& x, const at::Tensor& residual,
                                                const at::Tensor& weight, double eps) {
  check_dim("add_rms_norm", "x", x, 2);
  const int64_t rows = x.size(0), hidden = x.size(1);
  check_tensor("add_rms_norm", "x", x, x.scalar_type(), {rows, hidden});
  check_tensor("add_rms_norm", "residual", residual, x.scalar_type(), {rows, hidden});
  check_norm_weight("add_rms_norm", "weight", weight, x.scalar_type(), hidden);
  at::Tensor normed = at::empty({rows, hidden}, x.options()), sum = at::empty({rows, hidden}, x.options());
  for_norm_dtypes("add_rms_norm", x.scalar_type(), weight, [&](auto type, auto weight_type) {
    using T = decltype(type);
    using W = decltype(weight_type);
    const auto run = INFER_SELECT(add_rms_norm_row<T, W>);
    const T *in = data<T>(x), *res = data<T>(residual);
    const W* w = data<W>(weight);
    T *out = mutable_data<T>(normed), *total = mutable_data<T>(sum);
    const int64_t stride = x.stride(0), res_stride = residual.stride(0);
    at::parallel_for(0, rows, grain_size(hidden), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        run(in + t * stride, res + t * res_stride, w, out + t * hidden, total + t * hidden, hidden, eps);
      }
    });
  });
  return {normed, sum};
}

}  // namespace
}  // namespace infer

TORCH_LIBRARY_FRAGMENT(infer, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(infer, CPU, m) {
  m.impl("rms_norm", &infer::rms_norm);
  m.impl("add_rms_norm", &infer::add_rms_norm);
}
