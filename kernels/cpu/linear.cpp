// packed_linear: the product of activations with weights that were packed when they were loaded.
#include <vector>

#include "linear.h"

#define INFER_KERNEL "linear_kernel.h"
#include "foreach_isa.h"

namespace infer {
namespace {

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
  // Activations may be of fewer bits than the weights; they are widened before they are multiplied anyway.
  const bool widens = x.scalar_type() == at::kBFloat16 && packed.scalar_type() == at::kFloat;
  check_tensor("packed_linear", "x", x, widens ? at::kBFloat16 : packed.scalar_type(), {rows, x.size(1)});
  if (bias) check_tensor("packed_linear", "bias", *bias, packed.scalar_type(), {outputs});
  at::Tensor out = at::empty({rows, outputs}, packed.options());
  if (rows == 0) return out;
  static thread_local std::vector<float> room;  // kept: a step makes hundreds of calls
  int64_t stride = 0;
  const float* wide = widened(x, columns, room, &stride);
  for_dtype("packed_linear", packed.scalar_type(), [&](auto type) {
    using T = decltype(type);
    TORCH_CHECK_VALUE(pack == int64_t(sizeof(float) / sizeof(T)), "packed_linear: packed has ", pack,
                      " inputs together, must have ", sizeof(float) / sizeof(T));
    const int64_t chunk_rows = linear_chunk_rows(rows, columns);
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
  m.def("packed_rows(Tensor ids, Tensor packed, int inputs) -> Tensor");
}

TORCH_LIBRARY_IMPL(infer, CPU, m) {
  m.impl("packed_linear", &infer::packed_linear);
  m.impl("packed_rows", &infer::packed_rows);
}
