// rotary_write_kv: per-head norm, rotation of q and k, and the write of k and v into the paged cache.
#include "common.cuh"

namespace infer::cuda {
namespace {

constexpr int warps = 4;  // of a block

// What a warp does to the head at `in`: an rms_norm where there is a weight, and a rotation of its first 2 * half
// dimensions by the angles (`half` cosines, then as many sines). All lanes take part.
template <class T, class W>
__device__ void rotate_head(const T* in, const W* weight, float eps, const float* angles, int half, int dim, T* out) {
  const int lane = threadIdx.x % warp_size;
  float inverse_rms = 1.0f;
  if (weight) {
    float squares = 0.0f;
    for (int i = lane; i < dim; i += warp_size) squares += to_float(in[i]) * to_float(in[i]);
    inverse_rms = rsqrtf(warp_sum(squares) / dim + eps);
  }
  const auto normed = [&](int i) {
    const float x = to_float(in[i]);
    return weight ? rounded_to<T>(rounded_to<W>(x * inverse_rms) * to_float(weight[i])) : x;
  };
  for (int i = lane; i < half; i += warp_size) {
    const float first = normed(i), second = normed(half + i), cosine = angles[i], sine = angles[half + i];
    out[i] = from_float<T>(first * cosine - second * sine);
    out[half + i] = from_float<T>(second * cosine + first * sine);
  }
  for (int i = 2 * half + lane; i < dim; i += warp_size) out[i] = from_float<T>(normed(i));
}

// A warp for each head (q, k and v in turn) of the token blockIdx.x.
template <class T, class W>
__global__ void __launch_bounds__(warps* warp_size) rotate_and_write(RotaryArgs args) {
  const int64_t token = blockIdx.x;
  const int head = blockIdx.y * warps + threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
  if (head >= args.num_q + 2 * args.num_kv) return;
  const T* in = static_cast<const T*>(args.qkv) + token * args.qkv_stride + int64_t(head) * args.dim;
  const float* angles = args.cos_sin + args.positions[token] * args.cos_sin_stride;
  if (head < args.num_q) {
    T* out = static_cast<T*>(args.q_out) + (token * args.num_q + head) * args.dim;
    rotate_head(in, static_cast<const W*>(args.q_norm), args.eps, angles, args.half, args.dim, out);
    return;
  }
  const int64_t slot = args.slots[token];
  if (slot < 0) return;
  const int64_t block = slot / args.block_size, offset = slot % args.block_size;
  const int kv_head = (head - args.num_q) % args.num_kv;
  if (head < args.num_q + args.num_kv) {
    const int64_t* strides = args.k_strides;
    T* out = static_cast<T*>(args.k_pages) + block * strides[0] + offset * strides[1] + kv_head * strides[2];
    rotate_head(in, static_cast<const W*>(args.k_norm), args.eps, angles, args.half, args.dim, out);
  } else {
    const int64_t* strides = args.v_strides;
    T* out = static_cast<T*>(args.v_pages) + block * strides[0] + offset * strides[1] + kv_head * strides[2];
    for (int i = lane; i < args.dim; i += warp_size) out[i] = in[i];
  }
}

}  // namespace

cudaError_t rotary_write_kv(const RotaryArgs& args, cudaStream_t stream) {
  const int heads = args.num_q + 2 * args.num_kv;
  if (args.num_tokens == 0 || heads == 0 || args.dim == 0) return cudaSuccess;
  return for_dtype(args.dtype, [&](auto type) {
    using T = decltype(type);
    const auto kernel = args.float_norms ? rotate_and_write<T, float> : rotate_and_write<T, T>;
    return launch(kernel, dim3(args.num_tokens, ceil_div(heads, warps)), warps * warp_size, stream, args);
  });
}

}  // namespace infer::cuda
