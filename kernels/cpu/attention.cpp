// paged_attention: cuts a batch into tasks of bounded work, which threads take one after the other.
#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "attention.h"
#include "common.h"

#define INFER_KERNEL "attention_kernel.h"
#include "foreach_isa.h"

namespace infer {
namespace {

constexpr const char* op = "paged_attention";
constexpr int64_t few_rows = 4;         // up to here, keys are cut into chunks; above, rows into blocks
constexpr int64_t block_queries = 96;   // about how many queries share one pass over the keys
constexpr int64_t block_heads = 16;     // heads of one KV head that share it, at most: else one task would have all

struct Shape {
  int64_t num_tokens, num_q, num_kv, dim, value_dim, num_seqs, block_size, num_blocks;
};

Shape check_arguments(const at::Tensor& q, const at::Tensor& k_pages, const at::Tensor& v_pages,
                      const at::Tensor& block_table, const at::Tensor& query_start, const at::Tensor& seq_lens,
                      const at::Tensor& kv_map, int64_t window, double soft_cap) {
  check_dim(op, "q", q, 3);
  check_dim(op, "k_pages", k_pages, 4);
  check_dim(op, "v_pages", v_pages, 4);
  check_dim(op, "block_table", block_table, 2);
  const auto dtype = q.scalar_type();
  const Shape s{q.size(0),           q.size(1),       k_pages.size(2), q.size(2), v_pages.size(3),
                block_table.size(0), k_pages.size(1), k_pages.size(0)};
  check_tensor(op, "q", q, dtype, q.sizes());
  check_tensor(op, "k_pages", k_pages, dtype, {s.num_blocks, s.block_size, s.num_kv, s.dim});
  check_tensor(op, "v_pages", v_pages, dtype, {s.num_blocks, s.block_size, s.num_kv, s.value_dim});
  check_tensor(op, "block_table", block_table, at::kInt, block_table.sizes());
  check_tensor(op, "query_start", query_start, at::kInt, {s.num_seqs + 1});
  check_tensor(op, "seq_lens", seq_lens, at::kInt, {s.num_seqs});
  check_tensor(op, "kv_map", kv_map, at::kInt, {s.num_q});
  TORCH_CHECK_VALUE(window >= 0, op, ": window is ", window, ", must not be negative");
  TORCH_CHECK_VALUE(soft_cap >= 0, op, ": soft_cap is ", soft_cap, ", must not be negative");
  return s;
}

// The query heads of each KV head, in one list, cut into groups of block_heads at most.
struct HeadGroups {
  struct Group {
    int64_t kv_head;
    const int32_t* heads;
    int64_t num_heads;
  };

  std::vector<int32_t> heads;
  std::vector<Group> groups;

  HeadGroups(const int32_t* kv_map, int64_t num_q, int64_t num_kv) : heads(num_q) {
    std::vector<int64_t> start(num_kv + 1, 0);
    for (int64_t h = 0; h < num_q; ++h) {
      TORCH_CHECK_INDEX(0 <= kv_map[h] && kv_map[h] < num_kv, op, ": kv_map[", h, "] is ", kv_map[h],
                        ", must be in [0, ", num_kv, ")");
      ++start[kv_map[h] + 1];
    }
    for (int64_t g = 0; g < num_kv; ++g) {
      for (int64_t at = start[g]; at < start[g] + start[g + 1]; at += block_heads) {
        groups.push_back({g, heads.data() + at, std::min(block_heads, start[g] + start[g + 1] - at)});
      }
      start[g + 1] += start[g];
    }
    for (int64_t h = 0; h < num_q; ++h) heads[start[kv_map[h]]++] = static_cast<int32_t>(h);
  }
};

// Tasks that are the chunks of one (sequence, group of heads); their partials stand one after the other.
struct Merge {
  int64_t first_task, task_stride, chunks;
  int64_t partials;  // where they begin, in floats
};

class Plan {
 public:
  std::vector<AttentionTask> tasks;
  std::vector<Merge> merges;
  int64_t partial_size = 0;  // floats
  int64_t max_queries = 0;
  bool covers_every_row = true;

  Plan(const Shape& shape, const HeadGroups& groups, const at::Tensor& block_table, const int32_t* query_start,
       const int32_t* seq_lens, int64_t window)
      : shape_(shape), groups_(groups), window_(window) {
    covers_every_row = query_start[0] == 0 && query_start[shape.num_seqs] == shape.num_tokens;
    TORCH_CHECK_INDEX(query_start[0] >= 0, op, ": query_start[0] is ", query_start[0], ", must not be negative");
    for (int64_t s = 0; s < shape.num_seqs; ++s) {
      const int64_t row = query_start[s], end = query_start[s + 1], rows = end - row;
      TORCH_CHECK_INDEX(row <= end && end <= shape.num_tokens, op, ": query_start[", s + 1, "] is ", end,
                        ", must be in [", row, ", ", shape.num_tokens, "]");
      if (rows == 0) continue;
      check_keys(s, rows, seq_lens[s], block_table);
      rows <= few_rows ? add_chunks(s, row, end, seq_lens[s]) : add_row_blocks(s, row, end, seq_lens[s]);
    }
  }

  int64_t partial_stride(const AttentionTask& task) const { return task.num_queries() * (shape_.value_dim + 2); }

  // Once all tasks are known: gives chunks their place in `memory` of partial_size floats.
  void place_partials(float* memory) {
    for (const Merge& merge : merges) {
      for (int64_t c = 0; c < merge.chunks; ++c) {
        AttentionTask& task = tasks[merge.first_task + c * merge.task_stride];
        task.partial = memory + merge.partials + c * partial_stride(task);
      }
    }
  }

 private:
  const Shape& shape_;
  const HeadGroups& groups_;
  const int64_t window_;

  int64_t first_key(int64_t position) const { return window_ > 0 ? std::max<int64_t>(0, position - window_ + 1) : 0; }

  // Every block a row of sequence s sees is in the cache.
  void check_keys(int64_t s, int64_t rows, int64_t num_keys, const at::Tensor& block_table) const {
    TORCH_CHECK_INDEX(num_keys >= rows, op, ": seq_lens[", s, "] is ", num_keys, ", must be at least its ", rows,
                      " query rows");
    const int64_t last = (num_keys - 1) / shape_.block_size, max_blocks = block_table.size(1);
    TORCH_CHECK_INDEX(last < max_blocks, op, ": seq_lens[", s, "] is ", num_keys, ", but block_table has ", max_blocks,
                      " blocks of ", shape_.block_size, " keys");
    const int32_t* table = data<int32_t>(block_table) + s * block_table.stride(0);
    for (int64_t b = first_key(num_keys - rows) / shape_.block_size; b <= last; ++b) {
      TORCH_CHECK_INDEX(0 <= table[b] && table[b] < shape_.num_blocks, op, ": block_table[", s, ", ", b, "] is ",
                        table[b], ", must be in [0, ", shape_.num_blocks, ")");
    }
  }

  void add_task(int64_t s, const HeadGroups::Group& group, int64_t row, int64_t end, int64_t position,
                int64_t key_begin, int64_t key_end) {
    tasks.push_back({.sequence = s,
                     .kv_head = group.kv_head,
                     .heads = group.heads,
                     .num_heads = group.num_heads,
                     .row_begin = row,
                     .row_end = end,
                     .first_position = position,
                     .key_begin = key_begin,
                     .key_end = key_end,
                     .partial = nullptr});
    max_queries = std::max(max_queries, tasks.back().num_queries());
  }

  // Chunk by chunk, all heads of one before the next: their keys lie side by side in a page, or are the same.
  void add_chunks(int64_t s, int64_t row, int64_t end, int64_t num_keys) {
    const int64_t position = num_keys - (end - row), first = first_key(position);
    const int64_t first_chunk = first / chunk_keys, chunks = (num_keys - 1) / chunk_keys - first_chunk + 1;
    const int64_t first_task = static_cast<int64_t>(tasks.size()), groups = static_cast<int64_t>(groups_.groups.size());
    for (int64_t c = first_chunk; c < first_chunk + chunks; ++c) {
      const int64_t key_begin = std::max(first, c * chunk_keys), key_end = std::min(num_keys, (c + 1) * chunk_keys);
      for (const auto& group : groups_.groups) add_task(s, group, row, end, position, key_begin, key_end);
    }
    if (chunks == 1) return;
    for (int64_t i = first_task; i < first_task + groups; ++i) {
      merges.push_back({.first_task = i, .task_stride = groups, .chunks = chunks, .partials = partial_size});
      partial_size += chunks * partial_stride(tasks[i]);
    }
  }

  void add_row_blocks(int64_t s, int64_t row, int64_t end, int64_t num_keys) {
    for (const auto& group : groups_.groups) {
      const int64_t block = std::max<int64_t>(1, block_queries / group.num_heads);
      for (int64_t r = row; r < end; r += block) {
        const int64_t stop = std::min(end, r + block), position = num_keys - (end - r);
        add_task(s, group, r, stop, position, first_key(position), num_keys - (end - stop));
      }
    }
  }
};

using Memory = std::unique_ptr<float[], void (*)(float*)>;

// `count` floats that begin a cache line.
Memory aligned_memory(int64_t count) {
  constexpr std::align_val_t alignment{64};
  float* memory = static_cast<float*>(::operator new(count * sizeof(float), alignment));
  return {memory, [](float* p) { ::operator delete(p, alignment); }};
}

template <class T>
void run(const Attention<T>& attention, const Plan& plan) {
  const auto attend = INFER_SELECT(attend<T>);
  const int64_t num_tasks = static_cast<int64_t>(plan.tasks.size());
  std::atomic<int64_t> next{0};
  // The range only says how many threads run: each takes the next task until none is left, so that all end together.
  at::parallel_for(0, std::min<int64_t>(num_tasks, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    const int64_t dim = attention.dim, value_dim = attention.value_dim;
    const Memory memory = aligned_memory(AttentionScratch::size(plan.max_queries, dim, value_dim));
    const AttentionScratch scratch(memory.get(), plan.max_queries, dim, value_dim);
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < num_tasks;) {
      attend(attention, plan.tasks[i], scratch);
    }
  });

  const auto merge_chunks = INFER_SELECT(merge_chunks<T>);
  const int64_t num_merges = static_cast<int64_t>(plan.merges.size()), size = attention.value_dim + 2;
  at::parallel_for(0, num_merges, 32, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Merge& merge = plan.merges[i];
      const AttentionTask& task = plan.tasks[merge.first_task];
      for (int64_t m = 0; m < task.num_queries(); ++m) {
        const int64_t row = task.row_begin + m / task.num_heads, head = task.heads[m % task.num_heads];
        merge_chunks(task.partial + m * size, merge.chunks, plan.partial_stride(task), attention.value_dim,
                     attention.out + (row * attention.num_q + head) * attention.value_dim);
      }
    }
  });
}

template <class T>
Pages<T> pages_of(const at::Tensor& pages) {
  return {data<T>(pages), pages.stride(0), pages.stride(1), pages.stride(2)};
}

at::Tensor paged_attention(const at::Tensor& q, const at::Tensor& k_pages, const at::Tensor& v_pages,
                           const at::Tensor& block_table, const at::Tensor& query_start, const at::Tensor& seq_lens,
                           const at::Tensor& kv_map, double scale, int64_t window, double soft_cap) {
  const Shape shape =
      check_arguments(q, k_pages, v_pages, block_table, query_start, seq_lens, kv_map, window, soft_cap);
  const HeadGroups groups(data<int32_t>(kv_map), shape.num_q, shape.num_kv);
  Plan plan(shape, groups, block_table, data<int32_t>(query_start), data<int32_t>(seq_lens), window);
  const std::vector<int64_t> sizes{shape.num_tokens, shape.num_q, shape.value_dim};
  at::Tensor out = plan.covers_every_row ? at::empty(sizes, q.options()) : at::zeros(sizes, q.options());
  const Memory partials = aligned_memory(plan.partial_size);
  plan.place_partials(partials.get());
  for_dtype(op, q.scalar_type(), [&](auto type) {
    using T = decltype(type);
    run<T>({.q = data<T>(q),
            .out = mutable_data<T>(out),
            .k = pages_of<T>(k_pages),
            .v = pages_of<T>(v_pages),
            .block_table = data<int32_t>(block_table),
            .q_row_stride = q.stride(0),
            .q_head_stride = q.stride(1),
            .table_stride = block_table.stride(0),
            .block_size = shape.block_size,
            .num_q = shape.num_q,
            .dim = shape.dim,
            .value_dim = shape.value_dim,
            .window = window,
            .scale = static_cast<float>(scale),
            .soft_cap = static_cast<float>(soft_cap)},
           plan);
  });
  return out;
}

}  // namespace
}  // namespace infer

TORCH_LIBRARY_FRAGMENT(infer, m) {
  m.def(
      "paged_attention(Tensor q, Tensor k_pages, Tensor v_pages, Tensor block_table, Tensor query_start, "
      "Tensor seq_lens, Tensor kv_map, float scale, int window, float soft_cap) -> Tensor");
}

TORCH_LIBRARY_IMPL(infer, CPU, m) { m.impl("paged_attention", &infer::paged_attention); }
