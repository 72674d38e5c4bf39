// What products with packed weights share: the shape of their tiles, and one product as linear_kernel.h takes it.
#pragma once

#include <algorithm>

#include "common.h"

namespace infer {

constexpr int linear_lanes = 16;          // outputs of a block; infer/ops.py packs by it
constexpr int linear_tile_outputs = 64;   // outputs a thread works on at a time, at most
constexpr int64_t linear_stretch = 2048;  // packs a tile adds before it moves on: 64 outputs of them stay in L2
constexpr int64_t linear_ahead = 512;     // weights fetched ahead where memory is the limit: 8% at one row
constexpr int64_t linear_chunk_bytes = 400 << 10;  // of activations that stay in L2 while the weights pass

template <class T>
struct LinearTask {
  const float* x;  // [rows, x_stride], inputs beyond the last are zero
  int64_t rows, x_stride;
  int64_t chunk_rows;  // rows that the weights pass at a time
  const T* packed;
  int64_t block_stride, packs;  // elements of a block; packs of inputs in a block
  const T* bias;                // [outputs] or null
  T* out;                       // [rows, outputs] by out_stride
  int64_t outputs, out_stride;
};

// LinearTask::chunk_rows for that many rows of inputs.
inline int64_t linear_chunk_rows(int64_t rows, int64_t columns) {
  constexpr int64_t least = 48;  // under that, the weights would pass too often
  const int64_t fitting = linear_chunk_bytes / (columns * int64_t(sizeof(float))) / 8 * 8;
  return std::min(rows, std::max(fitting, least));
}

}  // namespace infer
