// One thread's part of a product with packed weights. Included once per instruction set by foreach_isa.h; no include
// guard.
//
// Packed weights [blocks, pairs, lanes, P]: `lanes` outputs side by side, so that a vector holds one input's weights for
// several outputs; P consecutive inputs of one output stay together (bfloat16: 2, since both are unpacked from one
// 32-bit load; float32: 1). Inputs are added in rising order into one accumulator per output, whatever the number of
// rows: a row's result does not depend on the rows beside it.

namespace infer::INFER_ISA {

// Register tiles. A wide one keeps many sums going over few rows; a tall one, of fewer outputs, loads and widens its
// weights for more rows.
constexpr int block_vectors = linear_lanes / width;  // vectors that one block's outputs fill
constexpr int wide_vectors = width == 16 ? 4 : block_vectors;
constexpr int wide_rows = width == 4 ? 2 : 6;
constexpr int tall_vectors = width == 16 ? 3 : block_vectors;
constexpr int tall_rows = width == 16 ? 8 : wide_rows;

INFER_TARGET inline void widen_rows(const Bf16* x, int64_t stride, int64_t rows, int64_t count, int64_t columns,
                                    float* out) {
  for (int64_t r = 0; r < rows; ++r, x += stride, out += columns) {
    for (int64_t i = 0; i < columns; i += width) store_n(out + i, load_n(x + i, count - i), columns - i);
  }
}

// acc[r][v] += x[r][k] * w[k][v] over `pairs` packs of inputs. w[b]: block b at the first of them.
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
template <class W, int rows, int vectors>
INFER_TARGET void linear_tile(const float* x, int64_t x_stride, const W* w, int64_t block_stride, int64_t pairs,
                              float* sums) {
  VFloat acc[rows][vectors];
  for (int r = 0; r < rows; ++r) {
    for (int v = 0; v < vectors; ++v) acc[r][v] = load(sums + r * linear_tile_outputs + v * width);
  }
  accumulate<rows, vectors>(x, x_stride, w, block_stride, pairs, acc);
  for (int r = 0; r < rows; ++r) {
    for (int v = 0; v < vectors; ++v) store(sums + r * linear_tile_outputs + v * width, acc[r][v]);
  }
}

template <class W>
using Tile = void (*)(const float*, int64_t, const W*, int64_t, int64_t, float*);

template <class W, int rows>
INFER_TARGET Tile<W> tile_of(int64_t blocks) {
  if constexpr (block_vectors > 1) {
    return linear_tile<W, rows, block_vectors>;  // of one block
  } else {
    if (blocks == 1) return linear_tile<W, rows, 1>;
    if (blocks == 2) return linear_tile<W, rows, 2>;
    if constexpr (rows <= wide_rows) {
      if (blocks == 4) return linear_tile<W, rows, 4>;
    }
    return linear_tile<W, rows, 3>;
  }
}

template <class W>
INFER_TARGET Tile<W> tile(int64_t rows, int64_t blocks) {
  if constexpr (tall_rows > 6) {
    if (rows == 8) return tile_of<W, 8>(blocks);
    if (rows == 7) return tile_of<W, 7>(blocks);
  }
  if constexpr (wide_rows > 2) {
    if (rows == 6) return tile_of<W, 6>(blocks);
    if (rows == 5) return tile_of<W, 5>(blocks);
    if (rows == 4) return tile_of<W, 4>(blocks);
    if (rows == 3) return tile_of<W, 3>(blocks);
  }
  return rows == 2 ? tile_of<W, 2>(blocks) : tile_of<W, 1>(blocks);
}

// Rows [row, row + rows) of the outputs of some blocks, in tiles of tile_rows one below another.
template <class T>
INFER_TARGET void linear_chunk(const LinearTask<T>& task, int64_t row, int64_t rows, int64_t tile_rows, int64_t block,
                               int64_t blocks, float* sums) {
  constexpr int64_t pack = sizeof(float) / sizeof(T);
  const T* w = task.packed + block * task.block_stride;
  std::memset(sums, 0, rows * linear_tile_outputs * sizeof(float));
  for (int64_t at = 0; at < task.packs; at += linear_stretch) {
    const int64_t packs = std::min(linear_stretch, task.packs - at);
    for (int64_t r = 0; r < rows; r += tile_rows) {
      const float* x = task.x + (row + r) * task.x_stride + at * pack;
      tile<T>(std::min(tile_rows, rows - r), blocks)(x, task.x_stride, w + at * linear_lanes * pack, task.block_stride,
                                                     packs, sums + r * linear_tile_outputs);
    }
  }
  const int64_t begin = block * linear_lanes, count = std::min(blocks * linear_lanes, task.outputs - begin);
  for (int64_t r = 0; r < rows; ++r) {
    T* out = task.out + (row + r) * task.out_stride + begin;
    for (int64_t i = 0; i < count; i += width) {
      VFloat value = load(sums + r * linear_tile_outputs + i);
      if (task.bias) value += load_n(task.bias + begin + i, count - i);
      store_n(out + i, value, count - i);
    }
  }
}

// Outputs of blocks [first, last) for all rows. `sums`: room for chunk_rows * linear_tile_outputs floats.
template <class T>
INFER_TARGET void linear_blocks(const LinearTask<T>& task, int64_t first, int64_t last, float* sums) {
  for (int64_t row = 0; row < task.rows; row += task.chunk_rows) {
    const int64_t rows = std::min(task.chunk_rows, task.rows - row);
    const int64_t wide = (rows + wide_rows - 1) / wide_rows, tall = (rows + tall_rows - 1) / tall_rows;
    // Tiles of about one height: a last one of few rows would cost as much as the others.
    const int64_t tile_rows = (rows + tall - 1) / tall;
    const int64_t tile_blocks = (wide == tall ? wide_vectors : tall_vectors) / block_vectors;
    for (int64_t block = first; block < last; block += tile_blocks) {
      linear_chunk(task, row, rows, tile_rows, block, std::min(tile_blocks, last - block), sums);
    }
  }
}

}  // namespace infer::INFER_ISA
