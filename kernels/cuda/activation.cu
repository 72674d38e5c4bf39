// act_and_mul: the gated activation of an MLP.
#include "common.cuh"

namespace infer::cuda {
namespace {

constexpr int threads = 256;

template <Activation kind>
__device__ float activate(float x) {
  if constexpr (kind == Activation::silu) {
    return x / (1.0f + expf(-x));
  } else if constexpr (kind == Activation::gelu) {
    return x * normcdff(x);  // not 1 + erf, which cancels in the lower tail
  } else {
    // tanh's form of the sigmoid: 0.5 * (1 + tanh(z)) = 1 / (1 + e^-2z)
    const float z = 0.7978845608f * (x + 0.044715f * x * x * x);
    return x / (1.0f + expf(-2.0f * z));
  }
}

// A row for each blockIdx.x; N columns for each thread.
template <class T, int N, Activation kind>
__global__ void __launch_bounds__(threads) act_and_mul_rows(ActivationArgs args) {
  const int64_t row = blockIdx.x, at = (int64_t(blockIdx.y) * threads + threadIdx.x) * N;
  if (at >= args.columns) return;
  const T* x = static_cast<const T*>(args.x) + row * args.x_stride + at;
  Pack<T, N> gate = load<T, N>(x);
  const auto up = load<T, N>(x + args.columns);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    gate.values[i] = from_float<T>(rounded_to<T>(activate<kind>(to_float(gate.values[i]))) * to_float(up.values[i]));
  }
  store(static_cast<T*>(args.out) + row * args.columns + at, gate);
}

template <class T, int N>
cudaError_t launch_act_and_mul(const ActivationArgs& args, cudaStream_t stream) {
  const auto kernel = args.kind == Activation::silu   ? act_and_mul_rows<T, N, Activation::silu>
                      : args.kind == Activation::gelu ? act_and_mul_rows<T, N, Activation::gelu>
                                                      : act_and_mul_rows<T, N, Activation::gelu_tanh>;
  return launch(kernel, dim3(args.rows, ceil_div(args.columns, threads * N)), threads, stream, args);
}

}  // namespace

cudaError_t act_and_mul(const ActivationArgs& args, cudaStream_t stream) {
  if (args.rows == 0 || args.columns == 0) return cudaSuccess;
  return for_dtype(args.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int wide = 16 / sizeof(T);
    const bool aligned = args.columns % wide == 0 && rows_aligned(args.x, args.x_stride, sizeof(T), 16);
    return aligned ? launch_act_and_mul<T, wide>(args, stream) : launch_act_and_mul<T, 1>(args, stream);
  });
}

}  // namespace infer::cuda
