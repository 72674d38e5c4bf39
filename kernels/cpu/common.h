// What every CPU op needs: storage types, argument checks, and the choice of instruction set.
#pragma once

#include <cstdint>
#include <string_view>

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

namespace infer {

// A bfloat16 in memory. Arithmetic is float32; simd.h converts.
struct Bf16 {
  uint16_t bits;
};

template <class T>
const T* data(const at::Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
T* mutable_data(const at::Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Calls run(T{}) with the storage type of `dtype`.
template <class Run>
void for_dtype(const char* op, at::ScalarType dtype, Run&& run) {
  switch (dtype) {
    case at::kFloat:
      return run(float{});
    case at::kBFloat16:
      return run(Bf16{});
    default:
      TORCH_CHECK(false, op, ": dtype is ", dtype, ", must be Float or BFloat16");
  }
}

// `t` is on the CPU, of this dtype and shape, and contiguous in its last dimension.
inline void check_tensor(const char* op, const char* name, const at::Tensor& t, at::ScalarType dtype,
                         at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(t.device().is_cpu(), op, ": ", name, " is on ", t.device(), ", must be on the CPU");
  TORCH_CHECK_VALUE(t.scalar_type() == dtype, op, ": ", name, " has dtype ", t.scalar_type(), ", must have ", dtype);
  TORCH_CHECK_VALUE(t.sizes() == shape, op, ": ", name, " has shape ", t.sizes(), ", must have ", shape);
  TORCH_CHECK_VALUE(t.dim() == 0 || t.size(-1) <= 1 || t.stride(-1) == 1, op, ": the last dimension of ", name,
                    " has stride ", t.stride(-1), ", must be contiguous");
}

inline void check_dim(const char* op, const char* name, const at::Tensor& t, int64_t dim) {
  TORCH_CHECK_VALUE(t.dim() == dim, op, ": ", name, " has shape ", t.sizes(), ", must have ", dim, " dimensions");
}

// The weight of a norm of tensors of `dtype`: it has that dtype, or is float.
inline void check_norm_weight(const char* op, const char* name, const at::Tensor& weight, at::ScalarType dtype,
                              int64_t size) {
  check_tensor(op, name, weight, weight.scalar_type() == at::kFloat ? at::kFloat : dtype, {size});
}

// Calls run(T{}, W{}): T stands for `dtype`, W for the weight's, which check_norm_weight has looked at.
template <class Run>
void for_norm_dtypes(const char* op, at::ScalarType dtype, const at::Tensor& weight, Run&& run) {
  for_dtype(op, dtype, [&](auto type) {
    if (weight.scalar_type() == at::kFloat) {
      run(type, float{});
    } else {
      run(type, type);
    }
  });
}

// Rows of `cost` elements each that are worth a thread of their own.
inline int64_t grain_size(int64_t cost) {
  constexpr int64_t elements_per_thread = 16384;
  return elements_per_thread / (cost > 0 ? cost : 1) + 1;
}

enum class Isa { portable, avx2, avx512 };

// The instruction set torch chose for itself, so that ATEN_CPU_CAPABILITY (default, avx2, avx512) holds here too.
inline Isa isa() {
#if defined(__x86_64__)
  static const Isa chosen = [] {
    const std::string capability = at::get_cpu_capability();
    return capability == "AVX512" ? Isa::avx512 : capability == "AVX2" ? Isa::avx2 : Isa::portable;
  }();
  return chosen;
#else
  return Isa::portable;
#endif
}

// The build of a kernel (a function name, template arguments included) for this machine. See foreach_isa.h.
#if defined(__x86_64__)
#define INFER_SELECT(...)                                                     \
  (::infer::isa() == ::infer::Isa::avx512 ? &::infer::avx512::__VA_ARGS__     \
   : ::infer::isa() == ::infer::Isa::avx2 ? &::infer::avx2::__VA_ARGS__       \
                                          : &::infer::portable::__VA_ARGS__)
#else
#define INFER_SELECT(...) (&::infer::portable::__VA_ARGS__)
#endif

}  // namespace infer
