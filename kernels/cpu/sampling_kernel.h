// Scans of a row of logits: argmax, the race of perturbed ones, and the k largest. Included once per instruction set by
// foreach_isa.h; no include guard.

namespace infer::INFER_ISA {

typedef uint64_t VWord __attribute__((vector_size(4 * INFER_WIDTH)));  // half as many lanes as a VFloat

// Whether some lane of a comparison's result is set.
INFER_INLINE bool any(VInt mask) {
#if INFER_WIDTH == 16
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif INFER_WIDTH == 8
  return _mm256_movemask_epi8((__m256i)mask) != 0;
#else
  const VWord words = (VWord)mask;
  return (words[0] | words[1]) != 0;
#endif
}

template <int... lane>
INFER_INLINE VInt lane_numbers(std::integer_sequence<int, lane...>) {
  return VInt{lane...};
}

// The first n lanes of p; the others are -inf.
template <class T>
INFER_INLINE VFloat load_logits(const T* p, int64_t n) {
  if (n >= width) return load(p);
  const VInt lanes = lane_numbers(std::make_integer_sequence<int, width>{});
  const VFloat lowest = splat(-INFINITY);
  return lanes < static_cast<int32_t>(n) ? load_n(p, n) : lowest;
}

// The first of the columns [begin, end) that holds `value`, or a NaN where that is one; -1 where none does.
template <class T>
INFER_INLINE int64_t find(const T* row, int64_t begin, int64_t end, float value) {
  for (int64_t i = begin; i < end; i += width) {
    const VFloat v = load_n(row + i, end - i);
    const VInt found = value == value ? (v == value) : (v != v);
    if (!any(found)) continue;
    for (int64_t lane = 0; lane < width && i + lane < end; ++lane) {
      if (found[lane]) return i + lane;
    }
  }
  return -1;
}

// The largest of `n` > 0 elements and the first column that holds it. A NaN counts as larger than everything.
template <class T>
INFER_TARGET void argmax_part(const T* row, int64_t n, float* value, int64_t* column) {
  constexpr int64_t block = 1024;  // columns are looked for in the winner's block alone
  float best = -INFINITY;
  int64_t best_block = 0;
  for (int64_t begin = 0; begin < n; begin += block) {
    const int64_t end = begin + block < n ? begin + block : n;
    VFloat largest[2] = {splat(-INFINITY), splat(-INFINITY)};
    VInt broken = {};
    for (int64_t i = begin; i < end; i += 2 * width) {
      const VFloat a = load_logits(row + i, end - i);
      const VFloat b = end - i > width ? load_logits(row + i + width, end - i - width) : a;
      broken |= (a != a) | (b != b);
      largest[0] = max(a, largest[0]);
      largest[1] = max(b, largest[1]);
    }
    if (any(broken)) {
      *value = NAN;
      *column = find(row, begin, end, NAN);
      return;
    }
    const float top = max(max(largest[0], largest[1]));
    if (top > best) best = top, best_block = begin;
  }
  *value = best;
  *column = find(row, best_block, best_block + block < n ? best_block + block : n, best);
}

// One round of SplitMix64's finalizer, without and with its multiplication.
INFER_INLINE VWord shifted(VWord x, int shift) { return x ^ (x >> shift); }
INFER_INLINE VWord mixed(VWord x) {
  return shifted(shifted(shifted(x, 30) * 0xBF58476D1CE4E5B9ull, 27) * 0x94D049BB133111EBull, 31);
}

// Enters the columns [begin, end) of a row that may win the race.
//
// A column's score is logit - T log(e), with e = -log1p(-w) >= w. For 2^E <= w < 2^(E + 1), log2(w) is at least the
// line E + (w / 2^E - 1), which is what w's bits as a float are, read as an integer. So no logarithm is needed to see
// that nearly every column has lost already; the bound's own rounding is a part of the race's slack.
template <class T>
INFER_TARGET void race_part(const T* row, int64_t begin, int64_t end, Race& race) {
  // Even columns of a vector stand in one half, odd ones in the other: their upper bits then interleave in place.
  const VInt lanes = lane_numbers(std::make_integer_sequence<int, width>{});
  const VWord index = (VWord)lanes & 0xffffffffull;  // 0, 2, 4, ...
  VWord even = race.state(begin) + index * splitmix_gamma, odd = even + splitmix_gamma;
  const float scale = race.temperature() * 0.693147181f;
  float bounds[width], logits[width];
  for (int64_t i = begin; i < end; i += width) {
    const VWord a = mixed(even) >> 22, b = mixed(odd) << 10;
    even += width * splitmix_gamma;
    odd += width * splitmix_gamma;
    const VInt high = (VInt)((a & 0x7fffffffull) | (b & 0x7fffffff00000000ull));  // w * 2^31, rounded down
    const VFloat w = __builtin_convertvector(high, VFloat);
    const VFloat log2_w = __builtin_convertvector((VInt)w, VFloat) * 0x1p-23f - (127.0f + 31.0f);
    const VFloat logit = load_logits(row + i, end - i);
    const VFloat bound = logit - log2_w * scale;
    if (!any(~(bound < race.bar()))) continue;  // so that a NaN enters
    store(bounds, bound);
    store(logits, logit);
    for (int64_t lane = 0; lane < width && i + lane < end; ++lane) {
      if (!(bounds[lane] < race.bar())) race.enter(i + lane, logits[lane]);
    }
  }
}

// Offers all columns of a row that may be among the largest.
template <class T>
INFER_TARGET void largest_of_row(const T* row, int64_t n, Largest& largest) {
  float logits[width];
  for (int64_t i = 0; i < n; i += width) {
    const VFloat logit = load_n(row + i, n - i);
    if (!any(~(logit <= largest.bar()))) continue;  // so that a NaN is offered
    store(logits, logit);
    for (int64_t lane = 0; lane < width && i + lane < n; ++lane) {
      if (!(logits[lane] <= largest.bar())) largest.offer(i + lane, logits[lane]);
    }
  }
}

// out = row[columns], `n` of them.
template <class T>
INFER_TARGET void gather_row(const T* row, const int64_t* columns, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = load_n(row + columns[i], 1)[0];
}

}  // namespace infer::INFER_ISA
