// What binding.cpp calls: the CUDA ops on raw pointers. Neither torch nor kernels appear here, so that the .cu files
// need CUDA's headers alone and binding.cpp needs no nvcc.
//
// Pointers are device memory of the current device. Strides count elements; the last dimension is contiguous. Every
// function only enqueues work on `stream`, allocates nothing and reads nothing back, so it can be captured in a graph.
#pragma once

#include <cstdint>

#include <cuda_runtime_api.h>

namespace infer::cuda {

enum class Dtype { f32, bf16, f16 };
enum class Activation { silu, gelu, gelu_tanh };

struct NormArgs {
  Dtype dtype;
  int64_t rows, hidden;
  const void* x;
  int64_t x_stride;
  const void* residual;  // or null: a norm of x alone
  int64_t residual_stride;
  bool float_weight;   // the weight is f32, whatever dtype is; the product then is not rounded before it
  const void* weight;  // [hidden]
  void* out;           // [rows, hidden] contiguous
  void* sum;           // x + residual, likewise; unused without a residual
  float eps;
};

struct ActivationArgs {
  Dtype dtype;
  Activation kind;
  int64_t rows, columns;  // of the output; x has twice the columns
  const void* x;
  int64_t x_stride;
  void* out;  // [rows, columns] contiguous
};

struct RotaryArgs {
  Dtype dtype;
  int64_t num_tokens;
  int num_q, num_kv, dim, half;  // half: of the rotated dimensions
  const void* qkv;
  int64_t qkv_stride;
  const int64_t *positions, *slots;
  const float* cos_sin;
  int64_t cos_sin_stride;
  bool float_norms;             // as float_weight
  const void *q_norm, *k_norm;  // or null
  float eps;
  void *k_pages, *v_pages;
  int64_t block_size;
  int64_t k_strides[3], v_strides[3];  // of block, offset and head
  void* q_out;                         // [num_tokens, num_q, dim] contiguous
};

struct AttentionArgs {
  Dtype dtype;
  // With each_row, every row of q is computed. Without, only the rows of sequences that have just one row; the other
  // sequences' rows are left as they are. Rows of no sequence become zeros either way.
  bool each_row;
  int num_rows, num_seqs, num_q, num_kv, dim, block_size, max_blocks;
  const void* q;
  int64_t q_strides[2];  // of row and head
  const void *k_pages, *v_pages;
  int64_t page_strides[3];  // of block, offset and head; the same for k and v
  const int32_t* block_table;
  int64_t table_stride;
  const int32_t *query_start, *seq_lens, *kv_map;
  float scale, soft_cap;  // soft_cap 0: none
  int window;             // 0: none
  void* out;              // [num_rows, num_q, dim] contiguous
  float* scratch;         // attention_scratch_floats(...) floats
};

// Limits of paged_attention: dim is a multiple of head_unit up to max_head_dim. q, pages and their strides keep rows
// aligned to 16 bytes.
constexpr int head_unit = 8, max_head_dim = 256, max_query_heads = 256;

cudaError_t norm(const NormArgs& args, cudaStream_t stream);
cudaError_t act_and_mul(const ActivationArgs& args, cudaStream_t stream);
cudaError_t rotary_write_kv(const RotaryArgs& args, cudaStream_t stream);
cudaError_t paged_attention(const AttentionArgs& args, cudaStream_t stream);
int64_t attention_scratch_floats(const AttentionArgs& args);

}  // namespace infer::cuda
