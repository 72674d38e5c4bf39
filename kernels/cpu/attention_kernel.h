// Attention of one task, by tiles of keys and an online softmax (Milakov and Gimelshein, 2018; FlashAttention).
// Included once per instruction set by foreach_isa.h; no include guard.

namespace infer::INFER_ISA {

// From this many queries on, transposing a tile of keys costs less than summing across lanes for each score.
constexpr int64_t transpose_from_queries = 12;
constexpr int vectors_per_step = width == 16 ? 4 : 2;  // what the registers hold beside four queries

// Dimensions in whole vectors; zeros beyond dim.
INFER_INLINE int64_t whole_vectors(int64_t dim) { return (dim + width - 1) / width * width; }

// A row of `dim` elements as float32: in place where it is float32 already and needs no padding, else in `copy`.
template <class T>
INFER_INLINE const float* widen_row(const T* row, float* copy, int64_t dim) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (dim % width == 0) return row;
  }
  int64_t d = 0;
  for (; d + width <= dim; d += width) store(copy + d, load(row + d));
  if (d < dim) store(copy + d, load_n(row + d, dim - d));
  return copy;
}

// Pages stand anywhere in memory. While few queries work through one tile's keys, its values are asked for, and while
// they work through the values, the next tile's keys; a few lines at a time, since a core waits for about ten at once.
template <class T>
INFER_INLINE void prefetch(const T* row, int64_t dim) {
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t d = 0; d < dim; d += line) __builtin_prefetch(row + d);
}

// Points rows[j] at key tile + j for the keys in [begin, end), and at zeros for the others, whose blocks may be gone.
template <class T>
INFER_INLINE void locate_rows(const Attention<T>& a, const AttentionTask& task, const Pages<T>& pages, int64_t tile,
                              int64_t begin, int64_t end, const float* zero, const T** rows) {
  const int32_t* table = a.block_table + task.sequence * a.table_stride;
  const T* head = pages.data + task.kv_head * pages.head_stride;
  for (int64_t j = 0; j < tile_keys; ++j) rows[j] = reinterpret_cast<const T*>(zero);
  for (int64_t key = begin; key < end;) {
    const int64_t block = key / a.block_size, offset = key % a.block_size;
    const int64_t stop = std::min(end, (block + 1) * a.block_size);
    const T* row = head + table[block] * pages.block_stride + offset * pages.offset_stride;
    for (; key < stop; ++key, row += pages.offset_stride) rows[key - tile] = row;
  }
}

template <class T>
INFER_INLINE void widen_rows(const T* const* rows, float* copy, int64_t columns, int64_t dim, const float** wide) {
  for (int64_t j = 0; j < tile_keys; ++j) wide[j] = widen_row(rows[j], copy + j * columns, dim);
}

// scores[q][j] = q . rows[j] for few queries: `width` keys at a time, summed across lanes by one transposition. `copy`
// holds as many rows: small enough to stay in the first-level cache.
template <class T>
INFER_INLINE void score_rows(const float* q, int64_t queries, const T* const* rows, float* copy, int64_t dim,
                             int64_t used, int64_t columns, int64_t num_keys, float* scores, const T* const* ahead,
                             int64_t ahead_dim) {
  for (int64_t j = 0; j < num_keys; j += width) {
    const float* wide[width];
    for (int i = 0; i < width; ++i) {
      wide[i] = widen_row(rows[j + i], copy + i * columns, dim);
      prefetch(ahead[j + i], ahead_dim);
    }
    for (int64_t m = 0; m < queries; ++m) {
      VFloat products[width] = {};
      for (int64_t d = 0; d < used; d += width) {
        const VFloat x = load(q + m * columns + d);
        for (int i = 0; i < width; ++i) products[i] += x * load(wide[i] + d);
      }
      store(scores + m * tile_keys + j, sum_each(products));
    }
  }
}

INFER_INLINE void transpose_tile(const float* const* rows, int64_t used, float* out) {
  for (int64_t j = 0; j < tile_keys; j += width) {
    for (int64_t d = 0; d < used; d += width) {
      VFloat square[width];
      for (int i = 0; i < width; ++i) square[i] = load(rows[j + i] + d);
      transpose(square);
      for (int i = 0; i < width; ++i) store(out + (d + i) * tile_keys + j, square[i]);
    }
  }
}

// scores[q][j] = sum over d of q[q][d] * k_transposed[d][j], `count` queries at a time.
template <int count>
INFER_INLINE void score_tile(const float* q, const float* k_transposed, int64_t columns, int64_t dim, float* scores) {
  constexpr int64_t step = vectors_per_step * width;
  for (int64_t j = 0; j < tile_keys; j += step) {
    VFloat total[count][vectors_per_step] = {};
    for (int64_t d = 0; d < dim; ++d) {
      VFloat k[vectors_per_step];
      for (int i = 0; i < vectors_per_step; ++i) k[i] = load(k_transposed + d * tile_keys + j + i * width);
      for (int m = 0; m < count; ++m) {
        for (int i = 0; i < vectors_per_step; ++i) total[m][i] += k[i] * q[m * columns + d];
      }
    }
    for (int m = 0; m < count; ++m) {
      for (int i = 0; i < vectors_per_step; ++i) store(scores + m * tile_keys + j + i * width, total[m][i]);
    }
  }
}

// sums[q][:] += sum over j in [begin, end) of weights[q][j] * rows[j][:], `count` queries and `vectors` at a time.
template <int count, int vectors, class Row, class T>
INFER_INLINE void add_values_at(const float* weights, const Row* const* rows, int64_t begin, int64_t end, int64_t d,
                                int64_t columns, float* sums, const T* const* ahead, int64_t dim) {
  VFloat total[count][vectors];
  for (int m = 0; m < count; ++m) {
    for (int i = 0; i < vectors; ++i) total[m][i] = load(sums + m * columns + d + i * width);
  }
  for (int64_t j = begin; j < end; ++j) {
    if (ahead != nullptr) prefetch(ahead[j], dim);
    VFloat v[vectors];
    for (int i = 0; i < vectors; ++i) v[i] = load(rows[j] + d + i * width);
    for (int m = 0; m < count; ++m) {
      for (int i = 0; i < vectors; ++i) total[m][i] += v[i] * weights[m * tile_keys + j];
    }
  }
  for (int m = 0; m < count; ++m) {
    for (int i = 0; i < vectors; ++i) store(sums + m * columns + d + i * width, total[m][i]);
  }
}

template <int count, class Row, class T>
INFER_INLINE void add_values(const float* weights, const Row* const* rows, int64_t begin, int64_t end, int64_t used,
                             int64_t columns, float* sums, const T* const* ahead, int64_t dim) {
  constexpr int64_t step = vectors_per_step * width;
  int64_t d = 0;
  for (; d + step <= used; d += step) {
    add_values_at<count, vectors_per_step>(weights, rows, begin, end, d, columns, sums, d == 0 ? ahead : nullptr, dim);
  }
  for (; d < used; d += width) {
    add_values_at<count, 1>(weights, rows, begin, end, d, columns, sums, d == 0 ? ahead : nullptr, dim);
  }
}

// The same for all queries. Rows of `ahead`, where given, are asked for on the way.
template <class Row, class T>
INFER_INLINE void add_all_values(const AttentionScratch& s, int64_t queries, const Row* const* rows, int64_t begin,
                                 int64_t end, int64_t used, int64_t columns, const T* const* ahead, int64_t dim) {
  int64_t m = 0;
  const float* weights = s.scores;
  for (; m + 4 <= queries; m += 4, ahead = nullptr) {
    add_values<4>(weights + m * tile_keys, rows, begin, end, used, columns, s.sums + m * columns, ahead, dim);
  }
  for (; m + 3 <= queries; m += 3, ahead = nullptr) {
    add_values<3>(weights + m * tile_keys, rows, begin, end, used, columns, s.sums + m * columns, ahead, dim);
  }
  for (; m < queries; ++m, ahead = nullptr) {
    add_values<1>(weights + m * tile_keys, rows, begin, end, used, columns, s.sums + m * columns, ahead, dim);
  }
}

// Turns one query's scores of a tile into weights e^(score - maximum), for the keys [begin, end) it sees; the others
// weigh zero. A new maximum shrinks what was summed so far.
INFER_INLINE void soften(float* scores, int64_t begin, int64_t end, float soft_cap, float* maximum, float* weight,
                         float* sums, int64_t used) {
  constexpr int vectors = tile_keys / width;
  if (begin >= end) {
    for (int i = 0; i < vectors; ++i) store(scores + i * width, VFloat{});
    return;
  }
  VFloat highest = splat(-INFINITY);
  if (soft_cap > 0.0f) {
    for (int i = 0; i < vectors; ++i) {
      store(scores + i * width, tanh(load(scores + i * width) / soft_cap) * soft_cap);
    }
  }
  for (int64_t j = 0; j < begin; ++j) scores[j] = -INFINITY;
  for (int64_t j = end; j < tile_keys; ++j) scores[j] = -INFINITY;
  for (int i = 0; i < vectors; ++i) highest = max(highest, load(scores + i * width));
  const float tile_maximum = max(highest);
  if (tile_maximum > *maximum) {
    const float shrink = exp(splat(*maximum - tile_maximum))[0];
    *maximum = tile_maximum;
    *weight *= shrink;
    for (int64_t d = 0; d < used; d += width) store(sums + d, load(sums + d) * shrink);
  }
  VFloat total = {};
  for (int i = 0; i < vectors; ++i) {
    const VFloat e = exp(load(scores + i * width) - *maximum);
    store(scores + i * width, e);
    total += e;
  }
  *weight += sum(total);
}

template <class T>
INFER_INLINE void attend_tile(const Attention<T>& a, const AttentionTask& task, const AttentionScratch& s,
                              int64_t tile) {
  const int64_t queries = task.num_queries();
  const int64_t columns = AttentionScratch::padded(a.dim), used = whole_vectors(a.dim);
  const int64_t value_columns = AttentionScratch::padded(a.value_dim), value_used = whole_vectors(a.value_dim);
  const int64_t begin = std::max(tile, task.key_begin), end = std::min(tile + tile_keys, task.key_end);
  const bool few = queries < transpose_from_queries, more = end < task.key_end;
  const T *k_pages[tile_keys], *v_pages[tile_keys], *next_pages[tile_keys];
  const float* wide[tile_keys];
  locate_rows(a, task, a.k, tile, begin, end, s.zero, k_pages);
  locate_rows(a, task, a.v, tile, begin, end, s.zero, v_pages);
  if (few) {
    score_rows(s.q, queries, k_pages, s.k, a.dim, used, columns, end - tile, s.scores, v_pages,
               a.value_dim);
  } else {
    widen_rows(k_pages, s.k, columns, a.dim, wide);
    transpose_tile(wide, used, s.k_transposed);
    int64_t m = 0;
    for (; m + 4 <= queries; m += 4) {
      score_tile<4>(s.q + m * columns, s.k_transposed, columns, a.dim, s.scores + m * tile_keys);
    }
    for (; m < queries; ++m) {
      score_tile<1>(s.q + m * columns, s.k_transposed, columns, a.dim, s.scores + m * tile_keys);
    }
  }
  for (int64_t m = 0; m < queries; ++m) {
    const int64_t position = task.first_position + m / task.num_heads;
    const int64_t first = a.window > 0 ? std::max(begin, position - a.window + 1) : begin;
    const int64_t stop = std::min(end, position + 1);
    soften(s.scores + m * tile_keys, first - tile, stop - tile, a.soft_cap, s.maximum + m, s.weight + m,
           s.sums + m * value_columns, value_used);
  }
  const T* const* ahead = few && more ? next_pages : nullptr;
  if (ahead != nullptr) {
    locate_rows(a, task, a.k, end, end, std::min(end + tile_keys, task.key_end), s.zero, next_pages);
  }
  if (few && a.value_dim % width == 0) {
    add_all_values(s, queries, v_pages, begin - tile, end - tile, value_used, value_columns, ahead, a.dim);
  } else {
    widen_rows(v_pages, s.v, value_columns, a.value_dim, wide);
    add_all_values(s, queries, wide, begin - tile, end - tile, value_used, value_columns, ahead, a.dim);
  }
}

template <class T>
INFER_TARGET void attend(const Attention<T>& a, const AttentionTask& task, const AttentionScratch& s) {
  const int64_t queries = task.num_queries(), columns = AttentionScratch::padded(a.dim);
  const int64_t value_columns = AttentionScratch::padded(a.value_dim), value_used = whole_vectors(a.value_dim);
  for (int64_t m = 0; m < queries; ++m) {
    const int64_t row = task.row_begin + m / task.num_heads, head = task.heads[m % task.num_heads];
    const T* q = a.q + row * a.q_row_stride + head * a.q_head_stride;
    for (int64_t d = 0; d < a.dim; d += width) store(s.q + m * columns + d, load_n(q + d, a.dim - d) * a.scale);
    for (int64_t d = 0; d < value_used; d += width) store(s.sums + m * value_columns + d, VFloat{});
    s.maximum[m] = -INFINITY;
    s.weight[m] = 0.0f;
  }
  for (int64_t tile = task.key_begin / tile_keys * tile_keys; tile < task.key_end; tile += tile_keys) {
    attend_tile(a, task, s, tile);
  }
  for (int64_t m = 0; m < queries; ++m) {
    const float* sums = s.sums + m * value_columns;
    if (task.partial != nullptr) {
      float* partial = task.partial + m * (a.value_dim + 2);
      std::memcpy(partial, sums, a.value_dim * sizeof(float));
      partial[a.value_dim] = s.maximum[m];
      partial[a.value_dim + 1] = s.weight[m];
      continue;
    }
    const int64_t row = task.row_begin + m / task.num_heads, head = task.heads[m % task.num_heads];
    T* out = a.out + (row * a.num_q + head) * a.value_dim;
    for (int64_t d = 0; d < a.value_dim; d += width) store_n(out + d, load(sums + d) / s.weight[m], a.value_dim - d);
  }
}

// out = the attention of one query whose keys were attended in `chunks` parts, `stride` floats apart.
template <class T>
INFER_TARGET void merge_chunks(const float* partials, int64_t chunks, int64_t stride, int64_t dim, T* out) {
  float maximum = -INFINITY, weight = 0.0f;
  for (int64_t c = 0; c < chunks; ++c) maximum = std::max(maximum, partials[c * stride + dim]);
  for (int64_t c = 0; c < chunks; ++c) {
    weight += partials[c * stride + dim + 1] * exp(splat(partials[c * stride + dim] - maximum))[0];
  }
  for (int64_t d = 0; d < dim; d += width) {
    VFloat total = {};
    for (int64_t c = 0; c < chunks; ++c) {
      const float* partial = partials + c * stride;
      total += load_n(partial + d, dim - d) * exp(splat(partial[dim] - maximum));
    }
    store_n(out + d, total / weight, dim - d);
  }
}

}  // namespace infer::INFER_ISA
