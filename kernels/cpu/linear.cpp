// packed_linear and packed_head_linear: products of activations with weights that were packed when they were loaded.
#include <algorithm>
#include <vector>

#include "common.h"

namespace infer {

constexpr int linear_lanes = 16;          // outputs of a block; infer/quant.py packs by it
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
  int64_t out_stride, outputs;
};

}  // namespace infer

#define INFER_KERNEL "linear_kernel.h"
#include "foreach_isa.h"

namespace infer {
namespace {

// Rows that the weights pass at a time.
int64_t chunk_rows_of(int64_t rows, int64_t columns) {
  constexpr int64_t least_chunk = 48;  // under that, the weights would pass too often
  const int64_t fitting = linear_chunk_bytes / (columns * int64_t(sizeof(float))) / 8 * 8;
  return std::min(rows, std::max(fitting, least_chunk));
}

// x as float32 rows of `columns` elements, zeros after its own: in `room`, or x itself where it is that already.
const float* widened(const at::Tensor& x, int64_t columns, std::vector<float>& room, int64_t* stride) {
  if (x.scalar_type() == at::kFloat) {
    *stride = x.stride(0);
    return data<float>(x);
  }
  *stride = columns;
  room.resize(x.size(0) * columns);
  INFER_SELECT(widen_rows)(data<Bf16>(x), x.stride(0), x.size(0), x.size(1), columns, room.data());
  return room.data();
}

at::Tensor packed_linear(const at::Tensor& x, const at::Tensor& packed, const std::optional<at::Tensor>& bias,
                         int64_t outputs) {
  check_dim("packed_linear", "x", x, 2);
  check_dim("packed_linear", "packed", packed, 4);
  const int64_t rows = x.size(0), blocks = packed.size(0), packs = packed.size(1), pack = packed.size(3);
  const int64_t columns = packs * pack;
  TORCH_CHECK_VALUE(packed.is_contiguous() && packed.size(2) == linear_lanes, "packed_linear: packed has shape ",
                    packed.sizes(), ", must be contiguous with ", linear_lanes, " lanes");
  TORCH_CHECK_VALUE((outputs + linear_lanes - 1) / linear_lanes == blocks && outputs > 0, "packed_linear: ", outputs,
                    " outputs do not fill ", blocks, " blocks of ", linear_lanes);
  TORCH_CHECK_VALUE(x.size(1) <= columns && columns < x.size(1) + pack, "packed_linear: x has ", x.size(1),
                    " columns, the weights ", columns);
  check_tensor("packed_linear", "x", x, packed.scalar_type(), {rows, x.size(1)});
  if (bias) check_tensor("packed_linear", "bias", *bias, packed.scalar_type(), {outputs});
  at::Tensor out = at::empty({rows, outputs}, x.options());
  if (rows == 0) return out;
  static thread_local std::vector<float> room;  // kept: a step makes hundreds of calls
  int64_t stride = 0;
  const float* wide = widened(x, columns, room, &stride);
  for_dtype("packed_linear", packed.scalar_type(), [&](auto type) {
    using T = decltype(type);
    TORCH_CHECK_VALUE(pack == int64_t(sizeof(float) / sizeof(T)), "packed_linear: packed has ", pack,
                      " inputs together, must have ", sizeof(float) / sizeof(T));
    const int64_t chunk_rows = chunk_rows_of(rows, columns);
    const LinearTask<T> task{wide, rows, stride, chunk_rows, data<T>(packed), packed.stride(0), packs,
                             bias ? data<T>(*bias) : nullptr, mutable_data<T>(out), outputs, outputs};
    const auto run = INFER_SELECT(linear_blocks<T>);
    at::parallel_for(0, blocks, grain_size(rows * columns * linear_lanes / 8), [&](int64_t begin, int64_t end) {
      static thread_local std::vector<float> memory;  // kept
      memory.resize(chunk_rows * linear_tile_outputs);
      run(task, begin, end, memory.data());
    });
  });
  return out;
}

at::Tensor packed_head_linear(const at::Tensor& x, const at::Tensor& packed, int64_t outputs) {
  constexpr const char* op = "packed_head_linear";
  check_dim(op, "x", x, 3);
  check_dim(op, "packed", packed, 5);
  const int64_t rows = x.size(0), heads = packed.size(0), blocks = packed.size(1), packs = packed.size(2);
  const int64_t pack = packed.size(4), columns = packs * pack;
  TORCH_CHECK_VALUE(packed.is_contiguous() && packed.size(3) == linear_lanes, op, ": packed has shape ",
                    packed.sizes(), ", must be contiguous with ", linear_lanes, " lanes");
  TORCH_CHECK_VALUE((outputs + linear_lanes - 1) / linear_lanes == blocks && outputs > 0, op, ": ", outputs,
                    " outputs do not fill ", blocks, " blocks of ", linear_lanes);
  TORCH_CHECK_VALUE(x.size(2) <= columns && columns < x.size(2) + pack, op, ": x has ", x.size(2),
                    " columns, the weights ", columns);
  check_tensor(op, "x", x, packed.scalar_type(), {rows, heads, x.size(2)});
  at::Tensor out = at::empty({rows, heads, outputs}, x.options());
  if (rows == 0) return out;
  for_dtype(op, packed.scalar_type(), [&](auto type) {
    using T = decltype(type);
    TORCH_CHECK_VALUE(pack == int64_t(sizeof(float) / sizeof(T)), op, ": packed has ", pack,
                      " inputs together, must have ", sizeof(float) / sizeof(T));
    const int64_t chunk_rows = chunk_rows_of(rows, columns);
    const auto run = INFER_SELECT(linear_blocks<T>);
    // Items are the blocks of all heads, one head after another: a thread's share may begin and end within a head.
    at::parallel_for(0, heads * blocks, grain_size(rows * columns * linear_lanes / 8), [&](int64_t begin, int64_t end) {
      static thread_local std::vector<float> memory, room;  // kept
      memory.resize(chunk_rows * linear_tile_outputs);
      for (int64_t at = begin; at < end;) {
        const int64_t head = at / blocks, stop = std::min(end, (head + 1) * blocks);
        int64_t stride = 0;
        const float* wide = widened(x.select(1, head), columns, room, &stride);
        const LinearTask<T> task{wide, rows, stride, chunk_rows, data<T>(packed) + head * packed.stride(0),
                                 packed.stride(1), packs, nullptr, mutable_data<T>(out) + head * outputs,
                                 heads * outputs, outputs};
        run(task, at - head * blocks, stop - head * blocks, memory.data());
        at = stop;
      }
    });
  });
  return out;
}

at::Tensor packed_rows(const at::Tensor& ids, const at::Tensor& packed, int64_t inputs) {
  constexpr const char* op = "packed_rows";
  check_dim(op, "ids", ids, 1);
  check_dim(op, "packed", packed, 4);
  check_tensor(op, "ids", ids, at::kLong, ids.sizes());
  const int64_t groups = packed.size(1), together = packed.size(3);
  TORCH_CHECK_VALUE(packed.is_contiguous() && packed.size(2) == linear_lanes, op, ": packed has shape ",
                    packed.sizes(), ", must be contiguous with ", linear_lanes, " lanes");
  TORCH_CHECK_VALUE(inputs <= groups * together && groups * together < inputs + together, op, ": inputs is ", inputs,
                    ", the weights have ", groups * together);
  at::Tensor out = at::empty({ids.size(0), inputs}, packed.options());
  for_dtype(op, packed.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const int64_t* id = data<int64_t>(ids);
    T* to = mutable_data<T>(out);
    for (int64_t row = 0; row < ids.size(0); ++row, to += inputs) {
      TORCH_CHECK_INDEX(0 <= id[row] && id[row] < packed.size(0) * linear_lanes, op, ": ids[", row, "] is ", id[row],
                        ", must be in [0, ", packed.size(0) * linear_lanes, ")");
      const T* from = data<T>(packed) + id[row] / linear_lanes * packed.stride(0) + id[row] % linear_lanes * together;
      for (int64_t i = 0; i < inputs; ++i) to[i] = from[i / together * linear_lanes * together + i % together];
    }
  });
  return out;
}

}  // namespace
}  // namespace infer

TORCH_LIBRARY_FRAGMENT(infer, m) {
  m.def("packed_linear(Tensor x, Tensor packed, Tensor? bias, int outputs) -> Tensor");
  m.def("packed_head_linear(Tensor x, Tensor packed, int outputs) -> Tensor");
  m.def("packed_rows(Tensor ids, Tensor packed, int inputs) -> Tensor");
}

TORCH_LIBRARY_IMPL(infer, CPU, m) {
  m.impl("packed_linear", &infer::packed_linear);
  m.impl("packed_head_linear", &infer::packed_head_linear);
  m.impl("packed_rows", &infer::packed_rows);
}
