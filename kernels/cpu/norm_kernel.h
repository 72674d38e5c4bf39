// One row of rms_norm and add_rms_norm. Included once per instruction set by foreach_isa.h; no include guard.

namespace infer::INFER_ISA {

// out = (x / rms(x)) rounded to W, times weight, rounded to T; `n` elements. out may be x. W is T or float.
template <class T, class W>
INFER_INLINE void rms_norm_inline(const T* x, const W* weight, T* out, int64_t n, float eps) {
  VFloat squares[2] = {};
  int64_t i = 0;
  for (; i + 2 * width <= n; i += 2 * width) {
    const VFloat a = load(x + i), b = load(x + i + width);
    squares[0] += a * a;
    squares[1] += b * b;
  }
  for (; i < n; i += width) {
    const VFloat a = load_n(x + i, n - i);
    squares[0] += a * a;
  }
  const float scale = 1.0f / std::sqrt(sum(squares[0] + squares[1]) / static_cast<float>(n) + eps);
  for (i = 0; i < n; i += width) {
    const VFloat normed = rounded_to<W>(load_n(x + i, n - i) * scale);
    store_n(out + i, normed * load_n(weight + i, n - i), n - i);
  }
}

template <class T, class W>
INFER_TARGET void rms_norm_row(const T* x, const W* weight, T* out, int64_t n, float eps) {
  rms_norm_inline(x, weight, out, n, eps);
}

// sum = x + residual rounded to T; normed = rms_norm(sum).
template <class T, class W>
INFER_TARGET void add_rms_norm_row(const T* x, const T* residual, const W* weight, T* normed, T* sum, int64_t n,
                                   float eps) {
  for (int64_t i = 0; i < n; i += width) {
    store_n(sum + i, load_n(x + i, n - i) + load_n(residual + i, n - i), n - i);
  }
  rms_norm_inline(sum, weight, normed, n, eps);
}

}  // namespace infer::INFER_ISA
