// One head of rotary_write_kv. Included once per instruction set by foreach_isa.h; no include guard.
#include "norm_kernel.h"

namespace infer::INFER_ISA {

// Norms (where `norm` is given) and rotates one head of `dim` elements from x to out; half = rot_dim / 2 cosines and
// as many sines stand at cos_sin. `scratch` holds `dim` elements.
template <class T, class W>
INFER_TARGET void rotate_head(const T* x, const W* norm, const float* cos_sin, T* scratch, T* out, int64_t dim,
                              int64_t half, float eps) {
  if (norm != nullptr) {
    rms_norm_inline(x, norm, scratch, dim, eps);
    x = scratch;
  }
  for (int64_t i = 0; i < half; i += width) {
    const int64_t n = half - i;
    const VFloat first = load_n(x + i, n), second = load_n(x + half + i, n);
    const VFloat cos = load_n(cos_sin + i, n), sin = load_n(cos_sin + half + i, n);
    store_n(out + i, first * cos - second * sin, n);
    store_n(out + half + i, second * cos + first * sin, n);
  }
  std::memcpy(out + 2 * half, x + 2 * half, (dim - 2 * half) * sizeof(T));
}

}  // namespace infer::INFER_ISA
