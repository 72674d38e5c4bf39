// One row of act_and_mul. Included once per instruction set by foreach_isa.h; no include guard.

namespace infer::INFER_ISA {

template <Activation kind>
INFER_INLINE VFloat activate(VFloat x) {
  if constexpr (kind == Activation::silu) {
    return x * sigmoid(x);
  } else if constexpr (kind == Activation::gelu) {
    return x * normal_cdf(x);
  } else {
    // 0.5 (1 + tanh(u)) = sigmoid(2u) with u = sqrt(2 / pi) (x + 0.044715 x^3)
    return x * sigmoid(x * (1.59576912f + 0.0713548162f * x * x));
  }
}

// out = act(gate) rounded to T, times up; `n` elements.
template <class T, Activation kind>
INFER_TARGET void act_and_mul_row(const T* gate, const T* up, T* out, int64_t n) {
  for (int64_t i = 0; i < n; i += width) {
    const VFloat activated = rounded_to<T>(activate<kind>(load_n(gate + i, n - i)));
    store_n(out + i, activated * load_n(up + i, n - i), n - i);
  }
}

}  // namespace infer::INFER_ISA
