// Vectors of INFER_WIDTH float32 lanes over the compilers' vector extensions, and the functions ops need of them.
// Included once per instruction set by foreach_isa.h; no include guard.

namespace infer::INFER_ISA {

constexpr int width = INFER_WIDTH;
typedef float VFloat __attribute__((vector_size(4 * INFER_WIDTH)));
typedef int32_t VInt __attribute__((vector_size(4 * INFER_WIDTH)));
typedef uint32_t VUint __attribute__((vector_size(4 * INFER_WIDTH)));
typedef uint16_t VUshort __attribute__((vector_size(2 * INFER_WIDTH)));

INFER_INLINE VFloat splat(float x) { return x - VFloat{}; }

// ---- memory: whole vectors, and the first n lanes (others read as zero)

INFER_INLINE VFloat load(const float* p) {
  VFloat v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

INFER_INLINE VFloat load(const Bf16* p) {
  VUshort bits;
  std::memcpy(&bits, p, sizeof bits);
#if INFER_WIDTH == 16  // GCC converts in halves where one instruction does
  const VUint wide = (VUint)_mm512_cvtepu16_epi32((__m256i)bits);
#elif INFER_WIDTH == 8
  const VUint wide = (VUint)_mm256_cvtepu16_epi32((__m128i)bits);
#else
  const VUint wide = __builtin_convertvector(bits, VUint);
#endif
  return (VFloat)(wide << 16);
}

template <class T>
INFER_INLINE VFloat load_n(const T* p, int64_t n) {
  if (n >= width) return load(p);
  T lanes[width] = {};
  std::memcpy(lanes, p, n * sizeof(T));
  return load(lanes);
}

INFER_INLINE void store(float* p, VFloat v) { std::memcpy(p, &v, sizeof v); }

// The bits of v rounded to the nearest bfloat16, ties to even, in the upper halves. NaN stays NaN.
INFER_INLINE VUint round_bf16(VFloat v) {
  const VUint bits = (VUint)v;
  const VUint rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const VUint nan = bits * 0 + 0x7fc00000;
  return v == v ? rounded : nan;
}

INFER_INLINE void store(Bf16* p, VFloat v) {
#if INFER_WIDTH == 16
  const VUshort bits = (VUshort)_mm512_cvtepi32_epi16((__m512i)(round_bf16(v) >> 16));
#else
  const VUshort bits = __builtin_convertvector(round_bf16(v) >> 16, VUshort);
#endif
  std::memcpy(p, &bits, sizeof bits);
}

template <class T>
INFER_INLINE void store_n(T* p, VFloat v, int64_t n) {
  if (n >= width) return store(p, v);
  T lanes[width];
  store(lanes, v);
  std::memcpy(p, lanes, n * sizeof(T));
}

// v as it would read back after a store to T: where PyTorch casts in between, so do we.
template <class T>
INFER_INLINE VFloat rounded_to(VFloat v) {
  if constexpr (sizeof(T) == sizeof(Bf16)) {
    return (VFloat)(round_bf16(v) & 0xffff0000u);
  } else {
    return v;
  }
}

// ---- across lanes

// (a, b) -> lanes of both whose index has bit `step` clear (low) or set (high), b's in the lanes with the bit set.
template <int step, int... lane>
INFER_INLINE VFloat take_low(VFloat a, VFloat b, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(a, b, ((lane & step) ? width + lane - step : lane)...);
}

template <int step, int... lane>
INFER_INLINE VFloat take_high(VFloat a, VFloat b, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(a, b, ((lane & step) ? width + lane : lane + step)...);
}

// Transposes a width x width matrix held in `rows` (Eklundh's method: swap ever smaller quadrants).
template <int step = width / 2>
INFER_INLINE void transpose(VFloat* rows) {
  constexpr auto lanes = std::make_integer_sequence<int, width>{};
  for (int i = 0; i < width; ++i) {
    if (i & step) continue;
    const VFloat a = rows[i], b = rows[i + step];
    rows[i] = take_low<step>(a, b, lanes);
    rows[i + step] = take_high<step>(a, b, lanes);
  }
  if constexpr (step > 1) transpose<step / 2>(rows);
}

// Lane i of the result is the sum over the lanes of rows[i]. Overwrites rows.
template <int step = width / 2>
INFER_INLINE VFloat sum_each(VFloat* rows) {
  constexpr auto lanes = std::make_integer_sequence<int, width>{};
  for (int i = 0; i < step; ++i) {
    const VFloat a = rows[i], b = rows[i + step];
    rows[i] = take_low<step>(a, b, lanes) + take_high<step>(a, b, lanes);
  }
  if constexpr (step > 1) return sum_each<step / 2>(rows);
  return rows[0];
}

INFER_INLINE VFloat max(VFloat a, VFloat b) { return a > b ? a : b; }

template <int step = width / 2>
INFER_INLINE float sum(VFloat v) {
  constexpr auto lanes = std::make_integer_sequence<int, width>{};
  v += take_high<step>(v, v, lanes);
  if constexpr (step > 1) return sum<step / 2>(v);
  return v[0];
}

template <int step = width / 2>
INFER_INLINE float max(VFloat v) {
  constexpr auto lanes = std::make_integer_sequence<int, width>{};
  v = max(v, take_high<step>(v, v, lanes));
  if constexpr (step > 1) return max<step / 2>(v);
  return v[0];
}

// ---- functions, with a relative error of about 1e-7

// e^x by 2^n e^r with |r| <= ln(2) / 2 and the Taylor series of e^r. Under -87.3, where results would be subnormal, 0.
INFER_INLINE VFloat exp(VFloat x) {
  const VFloat lowest = splat(-87.33f), highest = splat(88.72f);
  const VFloat clamped = x < lowest ? lowest : (x > highest ? highest : x);
  // Adding 1.5 * 2^23 leaves round(x / ln 2) in the low bits of the mantissa.
  const VFloat shifted = clamped * 1.44269504f + 12582912.0f;
  const VFloat n = shifted - 12582912.0f;
  const VFloat r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  VFloat p = splat(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // n reaches 128, one above the largest exponent: scale by 2^(n / 2) twice.
  const VInt exponent = (VInt)shifted - 0x4b400000;
  const VInt half = exponent >> 1;
  p = p * (VFloat)((half + 127) << 23) * (VFloat)((exponent - half + 127) << 23);
  const VFloat infinity = splat(INFINITY);
  return x < lowest ? VFloat{} : (x > highest ? infinity : p);
}

INFER_INLINE VFloat sigmoid(VFloat x) { return 1.0f / (1.0f + exp(-x)); }

INFER_INLINE VFloat tanh(VFloat x) {
  const VFloat square = x * x;
  const VFloat wide = 1.0f - 2.0f / (1.0f + exp(x * 2.0f));
  // Taylor series: 1 - 2 / (1 + e^2x) cancels near zero.
  VFloat narrow = splat(62.0f / 2835);
  narrow = narrow * square - 17.0f / 315;
  narrow = narrow * square + 2.0f / 15;
  narrow = narrow * square - 1.0f / 3;
  narrow = x + x * square * narrow;
  return square < 0.04f ? narrow : wide;
}

// The normal distribution function erfc(-x / sqrt 2) / 2, with erfc by the Chebyshev fit of Numerical Recipes (6.2).
INFER_INLINE VFloat normal_cdf(VFloat x) {
  const VFloat z = (x < 0.0f ? -x : x) * 0.70710678f;
  const VFloat t = 1.0f / (1.0f + 0.5f * z);
  VFloat p = splat(0.17087277f);
  p = p * t - 0.82215223f;
  p = p * t + 1.48851587f;
  p = p * t - 1.13520398f;
  p = p * t + 0.27886807f;
  p = p * t - 0.18628806f;
  p = p * t + 0.09678418f;
  p = p * t + 0.37409196f;
  p = p * t + 1.00002368f;
  p = p * t - 1.26551223f;
  const VFloat tail = 0.5f * t * exp(p - z * z);
  return x < 0.0f ? tail : 1.0f - tail;
}

}  // namespace infer::INFER_ISA
