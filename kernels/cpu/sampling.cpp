// argmax_rows and perturbed_max: the best token of each row of logits, as they are or with Gumbel noise added.
// largest: the best k of them.
#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>
#include <tuple>
#include <vector>

#include <ATen/ops/empty_like.h>

#include "common.h"

namespace infer {

constexpr uint64_t splitmix_gamma = 0x9E3779B97F4A7C15;

// The columns of a row (or of a part of it) that may have the largest logit + temperature * noise.
//
// perturbed_max_reference (infer/ops.py) is the definition: float32 arithmetic with PyTorch's own logarithms, whose last
// bits depend on how PyTorch was built. Here scores are float64, exact for this purpose, and whatever comes within
// `slack` of the best stays in the race, to be decided by those same logarithms. Nearly always that is one column.
class Race {
 public:
  struct Runner {
    int64_t column;
    float logit;
    float minus_w;  // the uniform, w = 1 - u, as the definition rounds it
    double score;
  };

  // key: the row's SplitMix64 state; start: the token id of column 0.
  Race(int64_t key, int64_t start, float temperature)
      : first_state_(static_cast<uint64_t>(key) + (static_cast<uint64_t>(start) + 1) * splitmix_gamma),
        temperature_(temperature) {}

  float temperature() const { return temperature_; }
  uint64_t state(int64_t column) const { return first_state_ + static_cast<uint64_t>(column) * splitmix_gamma; }

  // Columns whose score is surely below need not enter. Rises as they do.
  float bar() const { return bar_; }

  void enter(int64_t column, float logit) {
    if (logit == -INFINITY) return;
    uint64_t bits = state(column);
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9;
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB;
    bits = (bits ^ (bits >> 31)) & ((1ull << 53) - 1);
    // Each step rounds to float32, as in the definition: near w = 1 that moves the noise by much.
    const float minus_w = (static_cast<float>(static_cast<int64_t>(bits)) + 0.5f) * minus_unit;
    const double score = logit - temperature_ * std::log(-std::log1p(static_cast<double>(minus_w)));
    add({column, logit, minus_w, score});
  }

  // Takes over a runner of a later part of the row.
  void add(const Runner& runner) {
    if (!(runner.score < INFINITY)) {
      // A broken row: the first NaN wins, or else the first +inf.
      const bool first = std::isnan(runner.score) ? !std::isnan(best_) : best_ < INFINITY;
      if (!first) return;
      runners_.assign(1, runner);
      best_ = runner.score;
      bar_ = INFINITY;
    } else if (best_ < INFINITY && runner.score >= best_ - slack()) {
      runners_.push_back(runner);
      if (runner.score > best_) {
        best_ = runner.score;
        bar_ = static_cast<float>(best_ - slack());
      }
    }
  }

  const std::vector<Runner>& runners() const { return runners_; }

  // Those left at the end, columns rising; empty where all logits are -inf.
  std::vector<Runner> finalists() const {
    std::vector<Runner> left;
    for (const Runner& runner : runners_) {
      if (!(runner.score < best_ - slack())) left.push_back(runner);
    }
    return left;
  }

 private:
  static constexpr float minus_unit = -0x1p-53f * (1 - 0x1p-24f);

  // More than all roundings: the definition's of two scores, and of the bound by which columns are kept out. Noise is
  // under 40, the bound's under 110, and each is rounded a few times to 2^-24 of itself.
  double slack() const { return 0x1p-18 * (64.0 * temperature_ + std::abs(best_)); }

  uint64_t first_state_;
  float temperature_;
  double best_ = -INFINITY;
  float bar_ = std::numeric_limits<float>::lowest();
  std::vector<Runner> runners_;
};

// The k largest logits of a row by (value falling, column rising); a NaN counts as larger than everything.
class Largest {
 public:
  explicit Largest(int64_t k) : k_(k), room_(2 * k + 64) { ranks_.reserve(room_); }

  // What is not above it need not be offered: k logits of lower columns are at least as large. NaN before there are k.
  float bar() const { return bar_; }

  // Columns come in rising order.
  void offer(int64_t column, float logit) {
    // Integers in the order of the floats. The sum turns -0 into 0, which equals it.
    const uint32_t bits = std::bit_cast<uint32_t>(logit + 0.0f), sign = 1u << 31;
    const uint64_t order = std::isnan(logit) ? ~0u : bits & sign ? ~bits : bits | sign;
    ranks_.push_back(order << 32 | ~static_cast<uint32_t>(column));
    if (static_cast<int64_t>(ranks_.size()) < room_) return;
    keep_largest();
    const uint32_t lowest = ranks_[k_ - 1] >> 32;
    bar_ = std::bit_cast<float>(lowest & sign ? lowest ^ sign : ~lowest);
  }

  // Writes the columns of the k largest, and begins another row.
  void take(int64_t* columns) {
    keep_largest();
    std::sort(ranks_.begin(), ranks_.end(), std::greater<>());
    for (int64_t i = 0; i < k_; ++i) columns[i] = ~static_cast<uint32_t>(ranks_[i]);
    ranks_.clear();
    bar_ = NAN;
  }

 private:
  void keep_largest() {
    std::nth_element(ranks_.begin(), ranks_.begin() + (k_ - 1), ranks_.end(), std::greater<>());
    ranks_.resize(k_);
  }

  int64_t k_, room_;
  float bar_ = NAN;
  std::vector<uint64_t> ranks_;  // the order of the value, then the complement of the column
};

}  // namespace infer

#define INFER_KERNEL "sampling_kernel.h"
#include "foreach_isa.h"

namespace infer {
namespace {

// Rows cut into parts, so that few rows keep every thread busy; part p of a row is the columns [begin(p), begin(p + 1)).
struct Parts {
  // smallest: the columns that are worth a thread of their own.
  Parts(int64_t rows, int64_t columns, int64_t smallest) : rows(rows), columns(columns) {
    const int64_t threads = at::get_num_threads(), wanted = rows > 0 ? (threads + rows - 1) / rows : 1;
    each = std::max<int64_t>(1, std::min(wanted, columns / smallest));
    grain = smallest * each / columns + 1;
  }

  int64_t begin(int64_t part) const { return columns * part / each; }

  // Calls run(row, part) for all of them, on all threads.
  template <class Run>
  void for_each(Run&& run) const {
    at::parallel_for(0, rows * each, grain, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) run(i / each, i % each);
    });
  }

  int64_t rows, columns, each, grain;
};

void check_logits(const char* op, const at::Tensor& logits) {
  check_dim(op, "logits", logits, 2);
  check_tensor(op, "logits", logits, logits.scalar_type(), logits.sizes());
  TORCH_CHECK_VALUE(logits.size(1) > 0, op, ": logits has shape ", logits.sizes(), ", must have a column");
}

// Values of rows, float32, and the columns they stand in, int64.
std::tuple<at::Tensor, at::Tensor> empty_result(const at::Tensor& logits) {
  return {at::empty({logits.size(0)}, logits.options().dtype(at::kFloat)),
          at::empty({logits.size(0)}, logits.options().dtype(at::kLong))};
}

std::tuple<at::Tensor, at::Tensor> argmax_rows(const at::Tensor& logits) {
  check_logits("argmax_rows", logits);
  auto result = empty_result(logits);
  float* values = mutable_data<float>(std::get<0>(result));
  int64_t* columns = mutable_data<int64_t>(std::get<1>(result));
  const Parts parts(logits.size(0), logits.size(1), 1 << 16);
  std::vector<float> part_values(parts.rows * parts.each);
  std::vector<int64_t> part_columns(parts.rows * parts.each);
  for_dtype("argmax_rows", logits.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto run = INFER_SELECT(argmax_part<T>);
    const T* in = data<T>(logits);
    const int64_t stride = logits.stride(0);
    parts.for_each([&](int64_t row, int64_t part) {
      const int64_t begin = parts.begin(part), i = row * parts.each + part;
      run(in + row * stride + begin, parts.begin(part + 1) - begin, &part_values[i], &part_columns[i]);
      part_columns[i] += begin;
    });
  });
  for (int64_t row = 0; row < parts.rows; ++row) {
    int64_t best = row * parts.each;
    for (int64_t i = best + 1; i < (row + 1) * parts.each; ++i) {
      const bool broken = std::isnan(part_values[i]);
      if (!std::isnan(part_values[best]) && (broken || part_values[i] > part_values[best])) best = i;
    }
    values[row] = part_values[best];
    columns[row] = part_columns[best];
  }
  return result;
}

// logit + temperature * noise of all runners: the definition's operations, by PyTorch's own kernels. Float32 [runners].
at::Tensor perturbed(const std::vector<Race::Runner>& runners, const std::vector<float>& minus_temperatures) {
  const int64_t size = runners.size();
  at::Tensor noise = at::empty({size}, at::kFloat), factors = at::empty_like(noise), logits = at::empty_like(noise);
  float *minus_w = mutable_data<float>(noise), *logit = mutable_data<float>(logits);
  for (int64_t i = 0; i < size; ++i) {
    minus_w[i] = runners[i].minus_w;
    logit[i] = runners[i].logit;
  }
  std::copy(minus_temperatures.begin(), minus_temperatures.end(), mutable_data<float>(factors));
  return noise.log1p_().neg_().log_().mul_(factors).add_(logits);
}

std::tuple<at::Tensor, at::Tensor> perturbed_max(const at::Tensor& logits, const at::Tensor& temperatures,
                                                 const at::Tensor& keys, int64_t start) {
  check_logits("perturbed_max", logits);
  const int64_t rows = logits.size(0);
  check_tensor("perturbed_max", "temperatures", temperatures, at::kFloat, {rows});
  check_tensor("perturbed_max", "keys", keys, at::kLong, {rows});
  const Parts parts(rows, logits.size(1), 1 << 13);
  std::vector<Race> races;
  races.reserve(rows * parts.each);
  for (int64_t i = 0; i < rows * parts.each; ++i) {
    const int64_t row = i / parts.each;
    races.emplace_back(data<int64_t>(keys)[row], start, data<float>(temperatures)[row]);
  }
  for_dtype("perturbed_max", logits.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto run = INFER_SELECT(race_part<T>);
    const T* in = data<T>(logits);
    const int64_t stride = logits.stride(0);
    parts.for_each([&](int64_t row, int64_t part) {
      run(in + row * stride, parts.begin(part), parts.begin(part + 1), races[row * parts.each + part]);
    });
  });

  std::vector<Race::Runner> finalists;
  std::vector<float> minus_temperatures;
  std::vector<int64_t> ends;  // row r's finalists are [ends[r - 1], ends[r])
  for (int64_t row = 0; row < rows; ++row) {
    Race& race = races[row * parts.each];
    for (int64_t part = 1; part < parts.each; ++part) {
      for (const Race::Runner& runner : races[row * parts.each + part].runners()) race.add(runner);
    }
    for (const Race::Runner& runner : race.finalists()) finalists.push_back(runner);
    minus_temperatures.resize(finalists.size(), -race.temperature());
    ends.push_back(finalists.size());
  }

  const at::Tensor scores = perturbed(finalists, minus_temperatures);
  const float* score = data<float>(scores);
  auto result = empty_result(logits);
  float* values = mutable_data<float>(std::get<0>(result));
  int64_t* columns = mutable_data<int64_t>(std::get<1>(result));
  for (int64_t row = 0, i = 0; row < rows; ++row) {
    values[row] = -INFINITY;
    columns[row] = 0;
    for (const int64_t first = i; i < ends[row]; ++i) {
      if (i > first && !(score[i] > values[row])) continue;  // the lowest column of equals
      values[row] = score[i];
      columns[row] = finalists[i].column;
    }
  }
  return result;
}

std::tuple<at::Tensor, at::Tensor> largest(const at::Tensor& logits, int64_t k) {
  check_logits("largest", logits);
  const int64_t rows = logits.size(0), width = logits.size(1), stride = logits.stride(0);
  TORCH_CHECK_VALUE(k > 0 && k <= width, "largest: k is ", k, ", must be in [1, ", width, "]");
  at::Tensor values = at::empty({rows, k}, logits.options().dtype(at::kFloat));
  at::Tensor columns = at::empty({rows, k}, logits.options().dtype(at::kLong));
  for_dtype("largest", logits.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto run = INFER_SELECT(largest_of_row<T>);
    const auto gather = INFER_SELECT(gather_row<T>);
    const T* in = data<T>(logits);
    float* value = mutable_data<float>(values);
    int64_t* column = mutable_data<int64_t>(columns);
    at::parallel_for(0, rows, grain_size(width), [&](int64_t begin, int64_t end) {
      Largest found(k);
      for (int64_t row = begin; row < end; ++row) {
        run(in + row * stride, width, found);
        found.take(column + row * k);
        gather(in + row * stride, column + row * k, value + row * k, k);
      }
    });
  });
  return {values, columns};
}

}  // namespace
}  // namespace infer

TORCH_LIBRARY_FRAGMENT(infer, m) {
  m.def("argmax_rows(Tensor logits) -> (Tensor, Tensor)");
  m.def("perturbed_max(Tensor logits, Tensor temperatures, Tensor keys, int start) -> (Tensor, Tensor)");
  m.def("largest(Tensor logits, int k) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(infer, CPU, m) {
  m.impl("argmax_rows", &infer::argmax_rows);
  m.impl("perturbed_max", &infer::perturbed_max);
  m.impl("largest", &infer::largest);
}
