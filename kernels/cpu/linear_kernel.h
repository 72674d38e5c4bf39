// One thread's part of a product with packed weights. Included once per instruction set by foreach_isa.h; no include
// guard.
//
// Packed weights [blocks, pairs, lanes, P]: `lanes` outputs side by side, so that a vector holds one input's weights for
// several outputs; P consecutive inputs of one output stay together (bfloat16: 2, since both are unpacked from one
// 32-bit load; float32: 1). Inputs are added in rising order into one accumulator per output, whatever the number of
// rows: a row's result does not depend on the rows beside it.

namespace infer::INFER_ISA {

constexpr int block_vectors = linear_lanes / width;      // vectors that one block's outputs fill
constexpr int tile_vectors = width == 16 ? 4 : block_vectors;  // of a register tile
constexpr int tile_blocks = tile_vectors / block_vectors;
constexpr int tile_rows = width == 4 ? 2 : 6;

INFER_TARGET inline void widen_rows(const Bf16* x, int64_t stride, int64_t rows, int64_t count, int64_t columns,
                                    float* out) {
  for (int64_t r = 0; r < rows; ++r, x += stride, out += columns) {
    for (int64_t i = 0; i < columns; i += width) store_n(out + i, load_n(x + i, count - i), columns - i);
  }
}

// acc[r][v] += x[r][k] * w[k][v] over `pairs` packed inputs. w[b]: block b at the first of them.
template <int rows, int vectors>
INFER_INLINE void accumulate(const float* x, int64_t x_stride, const float* w, int64_t block_stride, int64_t pairs,
                             VFloat (&acc)[rows][vectors]) {
  for (int64_t k = 0; k < pairs; ++k) {
    VFloat weights[vectors];
    for (int v = 0; v < vectors; ++v) {
      weights[v] = load(w + (v / block_vectors) * block_stride + k * linear_lanes + (v % block_vectors) * width);
    }
    for (int r = 0; r < rows; ++r) {
      const VFloat input = splat(x[r * x_stride + k]);
      for (int v = 0; v < vectors; ++v) acc[r][v] += weights[v] * input;
    }
  }
}

template <int rows, int vectors>
INFER_INLINE void accumulate(const float* x, int64_t x_stride, const Bf16* w, int64_t block_stride, int64_t pairs,
                             VFloat (&acc)[rows][vectors]) {
  for (int64_t k = 0; k < pairs; ++k) {
    VUint both[vectors];
    for (int v = 0; v < vectors; ++v) {
      const Bf16* from = w + (v / block_vectors) * block_stride + 2 * (k * linear_lanes + (v % block_vectors) * width);
      if constexpr (rows <= 2) __builtin_prefetch(from + linear_ahead);
      std::memcpy(&both[v], from, sizeof both[v]);
    }
    // The bits of a bfloat16 are the upper half of the float32: the first input lies in the lower half of a lane.
    VFloat weights[vectors];
    for (int v = 0; v < vectors; ++v) weights[v] = (VFloat)(both[v] << 16);
    for (int r = 0; r < rows; ++r) {
      const VFloat input = splat(x[r * x_stride + 2 * k]);
      for (int v = 0; v < vectors; ++v) acc[r][v] += weights[v] * input;
    }
    for (int v = 0; v < vectors; ++v) weights[v] = (VFloat)(both[v] & 0xffff0000u);
    for (int r = 0; r < rows; ++r) {
      const VFloat input = splat(x[r * x_stride + 2 * k + 1]);
      for (int v = 0; v < vectors; ++v) acc[r][v] += weights[v] * input;
    }
  }
}

// One register tile over one stretch of the inputs; partial sums wait in `sums` between stretches.
template <class T, int rows, int vectors>
INFER_TARGET void linear_tile(const LinearTask<T>& task, const float* x, const T* w, int64_t pairs, float* sums) {
  VFloat acc[rows][vectors];
  for (int r = 0; r < rows; ++r) {
    for (int v = 0; v < vectors; ++v) acc[r][v] = load(sums + r * linear_tile_outputs + v * width);
  }
  accumulate<rows, vectors>(x, task.x_stride, w, task.block_stride, pairs, acc);
  for (int r = 0; r < rows; ++r) {
    for (int v = 0; v < vectors; ++v) store(sums + r * linear_tile_outputs + v * width, acc[r][v]);
  }
}

template <class T, int rows>
INFER_TARGET void linear_tile_of(int vectors, const LinearTask<T>& task, const float* x, const T* w, int64_t pairs,
                                 float* sums) {
  if constexpr (tile_blocks == 1) {
    return linear_tile<T, rows, tile_vectors>(task, x, w, pairs, sums);
  } else {
    switch (vectors) {
      case 4: return linear_tile<T, rows, 4>(task, x, w, pairs, sums);
      case 3: return linear_tile<T, rows, 3>(task, x, w, pairs, sums);
      case 2: return linear_tile<T, rows, 2>(task, x, w, pairs, sums);
      default: return linear_tile<T, rows, 1>(task, x, w, pairs, sums);
    }
  }
}

template <class T>
INFER_TARGET void linear_rows(int64_t rows, int vectors, const LinearTask<T>& task, const float* x, const T* w,
                              int64_t pairs, float* sums) {
  if constexpr (tile_rows > 2) {
    switch (rows) {
      case 6: return linear_tile_of<T, 6>(vectors, task, x, w, pairs, sums);
      case 5: return linear_tile_of<T, 5>(vectors, task, x, w, pairs, sums);
      case 4: return linear_tile_of<T, 4>(vectors, task, x, w, pairs, sums);
      case 3: return linear_tile_of<T, 3>(vectors, task, x, w, pairs, sums);
      default: break;
    }
  }
  if (rows == 2) return linear_tile_of<T, 2>(vectors, task, x, w, pairs, sums);
  linear_tile_of<T, 1>(vectors, task, x, w, pairs, sums);
}

// Outputs of blocks [first, last) for all rows. `sums`: room for linear_chunk_rows * linear_tile_outputs floats.
template <class T>
INFER_TARGET void linear_blocks(const LinearTask<T>& task, int64_t first, int64_t last, float* sums) {
  constexpr int64_t per_pair = sizeof(float) / sizeof(T);
  for (int64_t row = 0; row < task.rows; row += linear_chunk_rows) {
    const int64_t rows = std::min(linear_chunk_rows, task.rows - row);
    for (int64_t block = first; block < last; block += tile_blocks) {
      const int64_t blocks = std::min<int64_t>(tile_blocks, last - block);
      const T* w = task.packed + block * task.block_stride;
      std::memset(sums, 0, rows * linear_tile_outputs * sizeof(float));
      for (int64_t pair = 0; pair < task.pairs; pair += linear_stretch) {
        const int64_t pairs = std::min(linear_stretch, task.pairs - pair);
        for (int64_t r = 0; r < rows; r += tile_rows) {
          const float* x = task.x + (row + r) * task.x_stride + pair * per_pair;
          linear_rows(std::min<int64_t>(tile_rows, rows - r), int(blocks) * block_vectors, task, x,
                      w + pair * linear_lanes * per_pair, pairs, sums + r * linear_tile_outputs);
        }
      }
      const int64_t begin = block * linear_lanes, count = std::min(blocks * linear_lanes, task.outputs - begin);
      for (int64_t r = 0; r < rows; ++r) {
        T* out = task.out + (row + r) * task.outputs + begin;
        for (int64_t i = 0; i < count; i += width) {
          VFloat value = load(sums + r * linear_tile_outputs + i);
          if (task.bias) value += load_n(task.bias + begin + i, count - i);
          store_n(out + i, value, count - i);
        }
      }
    }
  }
}

}  // namespace infer::INFER_ISA
