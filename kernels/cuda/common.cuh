// What every kernel needs: storage types and their conversions, 16-byte vectors, reductions, launches.
#pragma once

#include <cstdint>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "ops.h"

namespace infer::cuda {

constexpr int warp_size = 32;
constexpr unsigned whole_warp = 0xffffffffu;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

template <class T>
__device__ inline T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16(x);
  } else {
    return __float2half(x);
  }
}

// x as it would read back after a store to T: where PyTorch casts in between, so do we.
template <class T>
__device__ inline float rounded_to(float x) {
  return to_float(from_float<T>(x));
}

// N neighbours, loaded and stored as one where they fill 16 bytes (as two where they fill 32).
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T values[N];
};

template <class T, int N>
__device__ inline Pack<T, N> load(const T* p) {
  return *reinterpret_cast<const Pack<T, N>*>(p);
}

template <class T, int N>
__device__ inline void store(T* p, const Pack<T, N>& pack) {
  *reinterpret_cast<Pack<T, N>*>(p) = pack;
}

// The sum over a warp's lanes, in every lane. All lanes take part.
__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int step = warp_size / 2; step > 0; step /= 2) x += __shfl_xor_sync(whole_warp, x, step);
  return x;
}

__device__ inline float warp_max(float x) {
#pragma unroll
  for (int step = warp_size / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(whole_warp, x, step));
  return x;
}

// ---- on the host

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether rows that start at p, `stride` elements of `size` bytes apart, all start at multiples of `bytes`.
inline bool rows_aligned(const void* p, int64_t stride, int64_t size, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0 && stride * size % bytes == 0;
}

// run(T{}) with the storage type of `dtype`.
template <class Run>
cudaError_t for_dtype(Dtype dtype, Run&& run) {
  switch (dtype) {
    case Dtype::f32:
      return run(float{});
    case Dtype::bf16:
      return run(__nv_bfloat16{});
    case Dtype::f16:
      return run(__half{});
  }
  return cudaErrorInvalidValue;
}

template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, int threads, cudaStream_t stream, const Args&... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

}  // namespace infer::cuda
