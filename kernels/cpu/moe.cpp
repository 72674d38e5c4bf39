// A mixture of experts: tokens sorted by the experts they go to, each expert's rows times its own packed weights, and
// the weighted sum of what came out for a token.
#include <tuple>
#include <vector>

#include "linear.h"

#define INFER_KERNEL "moe_kernel.h"
#include "foreach_isa.h"

namespace infer {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> group_rows(const at::Tensor& experts, int64_t first, int64_t count) {
  constexpr const char* op = "group_rows";
  check_dim(op, "experts", experts, 2);
  check_tensor(op, "experts", experts, at::kLong, experts.sizes());
  TORCH_CHECK_VALUE(first >= 0 && count >= 0, op, ": the experts held are ", count, " from ", first,
                    ", must not be negative");
  const int64_t tokens = experts.size(0), top_k = experts.size(1), stride = experts.stride(0);
  at::Tensor rows = at::zeros({tokens * top_k}, experts.options());
  at::Tensor starts = at::zeros({count + 1}, experts.options().dtype(at::kInt));
  at::Tensor place = at::empty({tokens, top_k}, experts.options());
  const int64_t* expert = data<int64_t>(experts);
  int64_t *row = mutable_data<int64_t>(rows), *to = mutable_data<int64_t>(place);
  int32_t* start = mutable_data<int32_t>(starts);
  const auto held = [&](int64_t e) { return first <= e && e < first + count; };
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t j = 0; j < top_k; ++j) {
      const int64_t e = expert[t * stride + j];
      if (held(e)) ++start[e - first + 1];
    }
  }
  for (int64_t e = 0; e < count; ++e) start[e + 1] += start[e];
  std::vector<int32_t> next(start, start + count);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t j = 0; j < top_k; ++j) {
      const int64_t e = expert[t * stride + j];
      to[t * top_k + j] = held(e) ? next[e - first]++ : -1;
      if (held(e)) row[to[t * top_k + j]] = t;
    }
  }
  return {rows, starts, place};
}

// Rows sorted by expert, and every expert's weights.
template <class T>
struct Groups {
  const T* x;           // rows of `inputs`
  int64_t x_stride, inputs;
  const int64_t* rows;  // of x, for each row of the result; null: the same ones
  const int32_t* starts;
  int64_t experts;
  const T* packed;
  int64_t expert_stride, block_stride, packs, columns, blocks;  // columns: inputs with the last pack's padding
  T* out;
  int64_t outputs;
};

// `count` rows from the result's `row` on, as float32 with zeros up to g.columns: in `room`, or where they are.
template <class T>
const float* gather(const Groups<T>& g, int64_t row, int64_t count, std::vector<float>& room, int64_t* stride) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (!g.rows) {
      *stride = g.x_stride;
      return g.x + row * g.x_stride;
    }
  }
  *stride = g.columns;
  if (int64_t(room.size()) < count * g.columns) room.resize(count * g.columns);
  for (int64_t i = 0; i < count; ++i) {
    const T* from = g.x + (g.rows ? g.rows[row + i] : row + i) * g.x_stride;
    float* to = room.data() + i * g.columns;
    if constexpr (sizeof(T) == sizeof(float)) {
      std::copy(from, from + g.inputs, to);
    } else {
      INFER_SELECT(widen_rows)(from, g.x_stride, 1, g.inputs, g.columns, to);
    }
  }
  return room.data();
}

// Expert e's outputs of blocks [first, last), for all its rows.
template <class T>
void expert_blocks(const Groups<T>& g, int64_t e, int64_t first, int64_t last) {
  static thread_local std::vector<float> room, sums;  // kept: a step makes hundreds of calls
  const int64_t end = g.starts[e + 1], chunk_rows = linear_chunk_rows(end - g.starts[e], g.columns);
  if (int64_t(sums.size()) < chunk_rows * linear_tile_outputs) sums.resize(chunk_rows * linear_tile_outputs);
  for (int64_t row = g.starts[e]; row < end; row += chunk_rows) {
    const int64_t count = std::min(chunk_rows, end - row);
    int64_t stride = 0;
    const float* x = gather(g, row, count, room, &stride);
    const LinearTask<T> task{x, count, stride, chunk_rows, g.packed + e * g.expert_stride, g.block_stride, g.packs,
                             nullptr, g.out + row * g.outputs, g.outputs, g.outputs};
    INFER_SELECT(linear_blocks<T>)(task, first, last, sums.data());
  }
}

constexpr int64_t tile_blocks = linear_tile_outputs / linear_lanes;

// What an expert's tile of outputs costs, in rows: its weights have to be read, however few rows there are.
template <class T>
int64_t tile_cost(const Groups<T>& g, int64_t e) {
  constexpr int64_t reading = 8;
  const int64_t rows = g.starts[e + 1] - g.starts[e];
  return rows ? rows + reading : 0;
}

// All experts' products, in as many shares of about one cost as there are threads worth having. A share ends between
// two tiles, in the middle of an expert where need be.
template <class T>
void all_experts(const Groups<T>& g) {
  const int64_t tiles = (g.blocks + tile_blocks - 1) / tile_blocks;
  int64_t total = 0;
  for (int64_t e = 0; e < g.experts; ++e) total += tiles * tile_cost(g, e);
  const int64_t products = total * linear_tile_outputs * g.columns;
  constexpr int64_t products_a_thread = 1 << 17;
  const int64_t shares = std::min<int64_t>(at::get_num_threads(), products / products_a_thread + 1);
  at::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    const int64_t from = total * begin / shares, to = total * end / shares;
    int64_t before = 0;  // cost of the experts already passed
    for (int64_t e = 0; e < g.experts && before < to; ++e) {
      const int64_t cost = tile_cost(g, e);
      if (cost == 0) continue;
      // A tile is in the share that its beginning lies in.
      const int64_t first = std::max<int64_t>(0, from - before + cost - 1) / cost;
      const int64_t last = std::min(tiles, (to - before + cost - 1) / cost);
      if (first < last) expert_blocks(g, e, first * tile_blocks, std::min(g.blocks, last * tile_blocks));
      before += tiles * cost;
    }
  });
}

void check_groups(const char* op, const at::Tensor& x, const std::optional<at::Tensor>& rows,
                  const at::Tensor& starts, int64_t experts, int64_t num_rows) {
  check_tensor(op, "starts", starts, at::kInt, {experts + 1});
  const int32_t* start = data<int32_t>(starts);
  TORCH_CHECK_INDEX(start[0] == 0 && start[experts] <= num_rows && std::is_sorted(start, start + experts + 1), op,
                    ": starts must rise from 0 to the ", num_rows, " rows at most");
  if (!rows) return;
  check_tensor(op, "rows", *rows, at::kLong, {num_rows});
  const int64_t* row = data<int64_t>(*rows);
  for (int64_t i = 0; i < start[experts]; ++i) {
    TORCH_CHECK_INDEX(0 <= row[i] && row[i] < x.size(0), op, ": rows[", i, "] is ", row[i], ", must be in [0, ",
                      x.size(0), ")");
  }
}

at::Tensor packed_grouped_linear(const at::Tensor& x, const std::optional<at::Tensor>& rows, const at::Tensor& starts,
                                 const at::Tensor& packed, int64_t outputs) {
  constexpr const char* op = "packed_grouped_linear";
  check_dim(op, "x", x, 2);
  check_dim(op, "packed", packed, 5);
  const int64_t experts = packed.size(0), blocks = packed.size(1), packs = packed.size(2), pack = packed.size(4);
  const int64_t columns = packs * pack, num_rows = rows ? rows->numel() : x.size(0);
  TORCH_CHECK_VALUE(packed.is_contiguous() && packed.size(3) == linear_lanes, op, ": packed has shape ",
                    packed.sizes(), ", must be contiguous with ", linear_lanes, " lanes");
  TORCH_CHECK_VALUE((outputs + linear_lanes - 1) / linear_lanes == blocks && outputs > 0, op, ": ", outputs,
                    " outputs do not fill ", blocks, " blocks of ", linear_lanes);
  TORCH_CHECK_VALUE(x.size(1) <= columns && columns < x.size(1) + pack, op, ": x has ", x.size(1),
                    " columns, the weights ", columns);
  check_tensor(op, "x", x, packed.scalar_type(), x.sizes());
  check_groups(op, x, rows, starts, experts, num_rows);
  at::Tensor out = at::empty({num_rows, outputs}, x.options());
  for_dtype(op, packed.scalar_type(), [&](auto type) {
    using T = decltype(type);
    TORCH_CHECK_VALUE(pack == int64_t(sizeof(float) / sizeof(T)), op, ": packed has ", pack,
                      " inputs together, must have ", sizeof(float) / sizeof(T));
    all_experts(Groups<T>{data<T>(x), x.stride(0), x.size(1), rows ? data<int64_t>(*rows) : nullptr,
                          data<int32_t>(starts), experts, data<T>(packed), packed.stride(0), packed.stride(1), packs,
                          columns, blocks, mutable_data<T>(out), outputs});
  });
  return out;
}

at::Tensor combine_rows(const at::Tensor& y, const at::Tensor& place, const at::Tensor& weights) {
  constexpr const char* op = "combine_rows";
  check_dim(op, "y", y, 2);
  check_dim(op, "place", place, 2);
  const int64_t tokens = place.size(0), top_k = place.size(1), n = y.size(1);
  check_tensor(op, "y", y, y.scalar_type(), y.sizes());
  check_tensor(op, "place", place, at::kLong, {tokens, top_k});
  check_tensor(op, "weights", weights, at::kFloat, {tokens, top_k});
  at::Tensor out = at::empty({tokens, n}, y.options());
  const int64_t* from = data<int64_t>(place);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t j = 0; j < top_k; ++j) {
      const int64_t row = from[t * place.stride(0) + j];
      TORCH_CHECK_INDEX(-1 <= row && row < y.size(0), op, ": place[", t, ", ", j, "] is ", row, ", must be in [-1, ",
                        y.size(0), ")");
    }
  }
  for_dtype(op, y.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto run = INFER_SELECT(combine_row<T>);
    T* to = mutable_data<T>(out);
    at::parallel_for(0, tokens, grain_size(top_k * n), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        run(data<T>(y), y.stride(0), from + t * place.stride(0), data<float>(weights) + t * weights.stride(0), top_k,
            to + t * n, n);
      }
    });
  });
  return out;
}

}  // namespace
}  // namespace infer

TORCH_LIBRARY_FRAGMENT(infer, m) {
  m.def("group_rows(Tensor experts, int first, int count) -> (Tensor, Tensor, Tensor)");
  m.def("packed_grouped_linear(Tensor x, Tensor? rows, Tensor starts, Tensor packed, int outputs) -> Tensor");
  m.def("combine_rows(Tensor y, Tensor place, Tensor weights) -> Tensor");
}

TORCH_LIBRARY_IMPL(infer, CPU, m) {
  m.impl("group_rows", &infer::group_rows);
  m.impl("packed_grouped_linear", &infer::packed_grouped_linear);
  m.impl("combine_rows", &infer::combine_rows);
}
