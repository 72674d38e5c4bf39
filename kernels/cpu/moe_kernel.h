// What a mixture of experts computes row by row. Included once per instruction set by foreach_isa.h; no include guard.

#include "linear_kernel.h"

namespace infer::INFER_ISA {

// out = the sum of weights[j] * y[place[j]] over those j whose place is not negative, in rising j; `n` columns.
template <class T>
INFER_TARGET void combine_row(const T* y, int64_t stride, const int64_t* place, const float* weights, int64_t count,
                              T* out, int64_t n) {
  for (int64_t i = 0; i < n; i += width) {
    VFloat sum = {};
    for (int64_t j = 0; j < count; ++j) {
      if (place[j] >= 0) sum += splat(weights[j]) * load_n(y + place[j] * stride + i, n - i);
    }
    store_n(out + i, sum, n - i);
  }
}

}  // namespace infer::INFER_ISA
