// rms_norm and add_rms_norm: a block of threads for each row.
#include "common.cuh"

namespace infer::cuda {
namespace {

constexpr int max_threads = 1024;

// The sum over all threads of the block, in every thread.
__device__ float block_sum(float x) {
  __shared__ float warp_sums[max_threads / warp_size];
  const int lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size, warps = blockDim.x / warp_size;
  x = warp_sum(x);
  if (lane == 0) warp_sums[warp] = x;
  __syncthreads();
  return warp_sum(lane < warps ? warp_sums[lane] : 0.0f);
}

// N elements at a time, N dividing hidden. A thread visits the same elements in both passes, so that it may read what it
// wrote itself. blockDim.x is a multiple of the warp size.
template <class T, class W, int N, bool add>
__global__ void __launch_bounds__(max_threads) norm_rows(NormArgs args) {
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(args.x) + row * args.x_stride;
  T* out = static_cast<T*>(args.out) + row * args.hidden;
  T* sum = static_cast<T*>(args.sum) + row * args.hidden;
  float squares = 0.0f;
  for (int64_t at = threadIdx.x * N; at < args.hidden; at += blockDim.x * N) {
    Pack<T, N> in = load<T, N>(x + at);
    if constexpr (add) {
      const auto other = load<T, N>(static_cast<const T*>(args.residual) + row * args.residual_stride + at);
#pragma unroll
      for (int i = 0; i < N; ++i) in.values[i] = from_float<T>(to_float(in.values[i]) + to_float(other.values[i]));
      store(sum + at, in);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) squares += to_float(in.values[i]) * to_float(in.values[i]);
  }
  const float inverse_rms = rsqrtf(block_sum(squares) / args.hidden + args.eps);
  const T* normed = add ? sum : x;
  for (int64_t at = threadIdx.x * N; at < args.hidden; at += blockDim.x * N) {
    Pack<T, N> in = load<T, N>(normed + at);
    const auto weight = load<W, N>(static_cast<const W*>(args.weight) + at);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      in.values[i] = from_float<T>(rounded_to<W>(to_float(in.values[i]) * inverse_rms) * to_float(weight.values[i]));
    }
    store(out + at, in);
  }
}

template <class T, class W, int N>
cudaError_t launch_norm(const NormArgs& args, cudaStream_t stream) {
  const int64_t warps = ceil_div(ceil_div(args.hidden, N), warp_size);
  const int threads = warps * warp_size < max_threads ? static_cast<int>(warps) * warp_size : max_threads;
  const auto kernel = args.residual ? norm_rows<T, W, N, true> : norm_rows<T, W, N, false>;
  return launch(kernel, dim3(args.rows), threads, stream, args);
}

}  // namespace

cudaError_t norm(const NormArgs& args, cudaStream_t stream) {
  if (args.rows == 0 || args.hidden == 0) return cudaSuccess;
  return for_dtype(args.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int wide = 16 / sizeof(T);
    const bool aligned = args.hidden % wide == 0 && rows_aligned(args.x, args.x_stride, sizeof(T), 16) &&
                         rows_aligned(args.residual, args.residual_stride, sizeof(T), 16) &&
                         rows_aligned(args.weight, 0, sizeof(T), 16);
    if (args.float_weight) {
      return aligned ? launch_norm<T, float, wide>(args, stream) : launch_norm<T, float, 1>(args, stream);
    }
    return aligned ? launch_norm<T, T, wide>(args, stream) : launch_norm<T, T, 1>(args, stream);
  });
}

}  // namespace infer::cuda
