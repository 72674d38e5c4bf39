// What the paged attention kernel is given; shared by attention.cpp and every build of attention_kernel.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

namespace infer {

// Keys are read in tiles that begin at multiples of tile_keys, and a few query rows over many keys are cut into chunks
// of chunk_keys, which threads take independently. Both are positions in the sequence, so that a row's sums are formed
// in the same order whatever else is in the batch and however many threads run.
constexpr int64_t tile_keys = 64;
constexpr int64_t chunk_keys = 512;

template <class T>
struct Pages {
  const T* data;
  int64_t block_stride, offset_stride, head_stride;
};

template <class T>
struct Attention {
  const T* q;  // [T, num_q, dim] by q_row_stride, q_head_stride
  T* out;      // [T, num_q, value_dim], contiguous
  Pages<T> k, v;
  const int32_t* block_table;  // [S, max_blocks]
  int64_t q_row_stride, q_head_stride, table_stride, block_size, num_q, dim, value_dim, window;
  float scale, soft_cap;
};

// Query rows [row_begin, row_end) of one sequence and the heads that share one KV head, over its keys [key_begin,
// key_end). A query is one (row, head); there are (row_end - row_begin) * num_heads of them, heads innermost.
struct AttentionTask {
  int64_t sequence, kv_head;
  const int32_t* heads;
  int64_t num_heads;
  int64_t row_begin, row_end;  // rows of q
  int64_t first_position;      // of row_begin
  int64_t key_begin, key_end;
  // Null: write to out. Else room for the chunk's queries, each `value_dim` unnormalized sums, maximum and sum of weights.
  float* partial;

  int64_t num_queries() const { return (row_end - row_begin) * num_heads; }
};

// Float32 working memory for one thread; `queries` is the most that any task has.
struct AttentionScratch {
  float *q, *scores, *sums;   // [queries, padded_dim], [queries, tile_keys], [queries, padded_value_dim]
  float *maximum, *weight;    // [queries]
  float *k, *k_transposed;    // [tile_keys, padded_dim], [padded_dim, tile_keys]
  float* v;                   // [tile_keys, padded_value_dim]
  float* zero;                // zeros, as many as a key or a value has; the rest is written before it is read

  static int64_t padded(int64_t dim) { return (dim + 15) / 16 * 16; }

  static int64_t size(int64_t queries, int64_t dim, int64_t value_dim) {
    const int64_t columns = padded(dim), values = padded(value_dim);
    return queries * (columns + values + tile_keys) + 2 * padded(queries) + tile_keys * (2 * columns + values) +
           std::max(columns, values);
  }

  // Over `memory`, size(queries, dim, value_dim) floats.
  AttentionScratch(float* memory, int64_t queries, int64_t dim, int64_t value_dim) {
    const int64_t columns = padded(dim), values = padded(value_dim), padded_queries = padded(queries);
    const auto take = [&memory](int64_t count) { return std::exchange(memory, memory + count); };
    q = take(queries * columns);
    scores = take(queries * tile_keys);
    sums = take(queries * values);
    maximum = take(padded_queries);
    weight = take(padded_queries);
    k = take(tile_keys * columns);
    k_transposed = take(tile_keys * columns);
    v = take(tile_keys * values);
    zero = take(std::max(columns, values));
    std::fill_n(zero, std::max(columns, values), 0.0f);
  }
};

}  // namespace infer
