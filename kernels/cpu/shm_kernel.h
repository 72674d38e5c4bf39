// The sum of an all-reduce. Included once per instruction set by foreach_isa.h; no include guard.

namespace infer::INFER_ISA {

INFER_INLINE VFloat load(const Fp16* p) {
#if INFER_WIDTH == 16
  __m256i bits;
  std::memcpy(&bits, p, sizeof bits);
  return (VFloat)_mm512_cvtph_ps(bits);
#else
  VFloat v;
  for (int lane = 0; lane < width; ++lane) v[lane] = static_cast<float>(at::Half(p[lane].bits, at::Half::from_bits()));
  return v;
#endif
}

INFER_INLINE void store(Fp16* p, VFloat v) {
#if INFER_WIDTH == 16
  const __m256i bits = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(p, &bits, sizeof bits);
#else
  for (int lane = 0; lane < width; ++lane) p[lane].bits = at::Half(v[lane]).x;
#endif
}

// out[i] = parts[0][i] + parts[1][i] + ... in float32 and in this order, rounded to T once; `out` may be one of them.
// Every lane is an addition of its own, so that the result does not depend on the width.
template <class T>
INFER_TARGET void sum_in_order(const T* const* parts, int64_t count, T* out, int64_t n) {
  int64_t i = 0;
  for (; i + width <= n; i += width) {
    VFloat total = load(parts[0] + i);
    for (int64_t r = 1; r < count; ++r) total += load(parts[r] + i);
    store(out + i, total);
  }
  if (i == n) return;
  T lanes[width] = {};
  VFloat total = {};
  for (int64_t r = 0; r < count; ++r) {
    std::memcpy(lanes, parts[r] + i, (n - i) * sizeof(T));
    total = r == 0 ? load(lanes) : total + load(lanes);
  }
  store(lanes, total);
  std::memcpy(out + i, lanes, (n - i) * sizeof(T));
}

}  // namespace infer::INFER_ISA
