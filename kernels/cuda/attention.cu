// paged_attention: a few query rows against long lists of keys in pages.
//
// After Flash-Decoding (Dao, Haziza, Massa and Sizov, 2023): the keys that a row sees are cut into splits, blocks of
// threads compute each split's softmax and weighted values by themselves, and a second kernel combines the splits. A
// split is read once for all query heads of a KV head. How keys are cut depends on their number alone, never on the
// batch or the device, so a row's result does not depend on its neighbours, to the last bit; how many blocks share the
// splits depends on shapes alone, so that a CUDA graph of the launch holds for any lengths.
#include "common.cuh"

namespace infer::cuda {
namespace {

constexpr int threads = 128, warps = threads / warp_size;
constexpr int tile = threads;     // keys whose scores are in shared memory at a time
constexpr int max_splits = 64;    // of a row's keys
constexpr int dims = head_unit;   // of a head, held by one lane
constexpr int keys_at_once = 4;   // of each lane: loads in flight
constexpr int blocks_per_sm = 32; // aimed at; resident are fewer, and some find no work

// ---- which keys belong to what

// A row of q. It sees keys [first, end) of its sequence. end is 0 for a row of no sequence or no keys, whose result is
// zeros; row is -1 where there is nothing to do at all.
struct Row {
  int row, seq, first, end;
};

// The sequence of a row, or -1: the last one that starts at or before it, if it ends behind it.
__device__ int sequence_of(const int32_t* query_start, int num_seqs, int row) {
  // In a batch of decoding sequences, row i is all of sequence i: no search.
  if (row < num_seqs && query_start[row] == row && query_start[row + 1] == row + 1) return row;
  int low = 0, high = num_seqs;  // query_start[low] <= row < query_start[high], if any sequence has it
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (query_start[middle] <= row ? low : high) = middle;
  }
  return query_start[low] <= row && row < query_start[low + 1] ? low : -1;
}

// Item `index` of the launch: a row with each_row, else a sequence.
__device__ Row find_row(const AttentionArgs& args, int index) {
  int row = index, seq = index;
  if (args.each_row) {
    seq = sequence_of(args.query_start, args.num_seqs, row);
    if (seq < 0) return {row, seq, 0, 0};
  } else {
    row = args.query_start[seq];
    if (args.query_start[seq + 1] - row != 1) return {-1, seq, 0, 0};
  }
  const int end = args.seq_lens[seq] - (args.query_start[seq + 1] - 1 - row);
  if (end <= 0) return {row, seq, 0, 0};
  return {row, seq, args.window > 0 && end > args.window ? end - args.window : 0, end};
}

// Keys of a split: a multiple of the tile, the smallest that makes no more than max_splits of them.
__host__ __device__ inline int split_size(int num_keys) { return (num_keys - 1) / (max_splits * tile) * tile + tile; }

__device__ inline int num_splits(const Row& row) {
  const int num_keys = row.end - row.first;
  return num_keys == 0 ? 0 : (num_keys - 1) / split_size(num_keys) + 1;
}

// ---- scratch: for each item, query head and split, `dim` sums of weighted values; then, likewise, the greatest score
// (in units of log 2) and the sum of weights relative to it

struct Scratch {
  float* values;
  float2* softmax;
  int splits, dim;

  __device__ int64_t at(const AttentionArgs& args, int item, int head, int split) const {
    return (int64_t(item) * args.num_q + head) * splits + split;
  }
};

// ---- the splits

// values[i] is one lane's part of the i-th of `count` sums over `lanes` neighbouring lanes. Returns sum number
// lane / (lanes / count). Each step halves the values: a lane keeps those its bit names and gives the others away.
template <int count, int lanes>
__device__ float sum_each(float (&values)[count], int lane) {
  constexpr int step = lanes / 2;
  if constexpr (count == 1) {
    float sum = values[0];
#pragma unroll
    for (int s = step; s > 0; s /= 2) sum += __shfl_xor_sync(whole_warp, sum, s);
    return sum;
  } else {
    float kept[count / 2];
    const bool upper = lane & step;
#pragma unroll
    for (int i = 0; i < count / 2; ++i) {
      const float given = upper ? values[i] : values[i + count / 2];
      kept[i] = (upper ? values[i + count / 2] : values[i]) + __shfl_xor_sync(whole_warp, given, step);
    }
    return sum_each<count / 2, step>(kept, lane);
  }
}

// The work of one block of threads on one split, for up to `heads` query heads of one KV head. `lanes` lanes share a
// key, each with `dims` dimensions of the head; the block handles threads / lanes keys at once.
template <class T, int lanes, int heads>
struct Split {
  static constexpr int width = lanes * dims, keys_per_step = threads / lanes;
  static constexpr int heads_per_warp = (heads + warps - 1) / warps;

  struct Shared {
    alignas(16) float query[heads][width];
    alignas(16) float scores[tile][heads];  // then weights
    alignas(16) float sums[heads][width];
    int64_t offsets[tile];  // of each key of the tile in the pages
    float rescale[heads];   // of what earlier tiles gave
  };

  const AttentionArgs& args;
  Shared& shared;
  const int thread = threadIdx.x, warp = thread / warp_size;
  const int lane = thread % lanes, slot = thread / lanes, dim_at = lane * dims;
  const bool has_dims = dim_at < args.dim;

  // page[key][dim_at...] for keys base + slot + k * keys_per_step, k < keys_at_once; zeros from num_keys on.
  __device__ void load_keys(const void* pages, int64_t kv_offset, int base, int num_keys,
                            float (&out)[keys_at_once][dims]) const {
    Pack<T, dims> raw[keys_at_once];
#pragma unroll
    for (int k = 0; k < keys_at_once; ++k) {
      const int key = base + slot + k * keys_per_step;
      raw[k] = Pack<T, dims>{};
      if (has_dims && key < num_keys) {
        raw[k] = load<T, dims>(static_cast<const T*>(pages) + shared.offsets[key] + kv_offset + dim_at);
      }
    }
#pragma unroll
    for (int k = 0; k < keys_at_once; ++k) {
#pragma unroll
      for (int d = 0; d < dims; ++d) out[k][d] = to_float(raw[k].values[d]);
    }
  }

  __device__ void load_query(const Row& row, const int* head_list, int num_heads) const {
    for (int i = thread; i < heads * width; i += threads) {
      const int head = i / width, d = i % width;
      const T* q = static_cast<const T*>(args.q) + row.row * args.q_strides[0] + d;
      shared.query[head][d] =
          head < num_heads && d < args.dim ? to_float(q[head_list[head] * args.q_strides[1]]) : 0.0f;
    }
  }

  // Finds the tile's keys [begin, begin + num_keys) in the pages: one for each thread.
  __device__ void find_keys(const Row& row, int begin, int num_keys) const {
    if (thread >= num_keys) return;
    const int key = begin + thread, block = args.block_table[row.seq * args.table_stride + key / args.block_size];
    shared.offsets[thread] = block * args.page_strides[0] + key % args.block_size * args.page_strides[1];
  }

  // Scores in units of log 2, for exp2f.
  __device__ void compute_scores(int64_t kv_offset, int num_keys) const {
    constexpr float log2_e = 1.4426950408889634f;
    constexpr int lanes_per_sum = lanes / heads;
    for (int base = 0; base < num_keys; base += keys_at_once * keys_per_step) {
      float keys[keys_at_once][dims], products[keys_at_once][heads];
      load_keys(args.k_pages, kv_offset, base, num_keys, keys);
#pragma unroll
      for (int head = 0; head < heads; ++head) {
        const auto query = load<float, dims>(&shared.query[head][dim_at]);
#pragma unroll
        for (int k = 0; k < keys_at_once; ++k) {
          products[k][head] = 0.0f;
#pragma unroll
          for (int d = 0; d < dims; ++d) products[k][head] += query.values[d] * keys[k][d];
        }
      }
#pragma unroll
      for (int k = 0; k < keys_at_once; ++k) {
        float score = sum_each<heads, lanes>(products[k], lane) * args.scale;
        if (args.soft_cap > 0.0f) score = args.soft_cap * tanhf(score / args.soft_cap);
        const int key = base + slot + k * keys_per_step;
        if (lane % lanes_per_sum == 0 && key < num_keys) shared.scores[key][lane / lanes_per_sum] = score * log2_e;
      }
    }
  }

  // A warp for every warps-th head: scores become weights relative to the greatest score so far, which `greatest` and
  // `total` (of weights) follow. They are the same in every lane.
  __device__ void compute_weights(int num_keys, float (&greatest)[heads_per_warp],
                                  float (&total)[heads_per_warp]) const {
    const int warp_lane = thread % warp_size;
#pragma unroll
    for (int mine = 0; mine < heads_per_warp; ++mine) {
      const int head = warp + mine * warps;
      if (head >= heads) break;
      float new_greatest = greatest[mine], sum = 0.0f;
      for (int key = warp_lane; key < num_keys; key += warp_size) {
        new_greatest = fmaxf(new_greatest, shared.scores[key][head]);
      }
      new_greatest = warp_max(new_greatest);
      // Where all scores are -inf, so are their differences to 0, and every weight is 0.
      const float reference = new_greatest == -INFINITY ? 0.0f : new_greatest;
      for (int key = warp_lane; key < num_keys; key += warp_size) {
        const float weight = exp2f(shared.scores[key][head] - reference);
        shared.scores[key][head] = weight;
        sum += weight;
      }
      const float rescale = exp2f(greatest[mine] - reference);
      if (warp_lane == 0) shared.rescale[head] = rescale;
      total[mine] = total[mine] * rescale + warp_sum(sum);
      greatest[mine] = new_greatest;
    }
  }

  __device__ void add_values(int64_t kv_offset, int num_keys, float (&sums)[heads][dims]) const {
#pragma unroll
    for (int head = 0; head < heads; ++head) {
      const float rescale = shared.rescale[head];
#pragma unroll
      for (int d = 0; d < dims; ++d) sums[head][d] *= rescale;
    }
    for (int base = 0; base < num_keys; base += keys_at_once * keys_per_step) {
      float values[keys_at_once][dims];
      load_keys(args.v_pages, kv_offset, base, num_keys, values);
#pragma unroll
      for (int k = 0; k < keys_at_once; ++k) {
        const int key = base + slot + k * keys_per_step;
        if (key >= num_keys) break;
        const auto weights = load<float, heads>(shared.scores[key]);
#pragma unroll
        for (int head = 0; head < heads; ++head) {
#pragma unroll
          for (int d = 0; d < dims; ++d) sums[head][d] += weights.values[head] * values[k][d];
        }
      }
    }
  }

  // shared.sums: the sums over the block's threads that hold the same dimensions. Always in the same order.
  __device__ void reduce(float (&sums)[heads][dims]) const {
#pragma unroll
    for (int head = 0; head < heads; ++head) {
#pragma unroll
      for (int d = 0; d < dims; ++d) {
#pragma unroll
        for (int step = lanes; step < warp_size; step *= 2) {
          sums[head][d] += __shfl_xor_sync(whole_warp, sums[head][d], step);
        }
      }
    }
    for (int turn = 0; turn < warps; ++turn) {
      if (warp == turn && thread % warp_size < lanes) {
#pragma unroll
        for (int head = 0; head < heads; ++head) {
#pragma unroll
          for (int d = 0; d < dims; ++d) {
            float& sum = shared.sums[head][dim_at + d];
            sum = (turn == 0 ? 0.0f : sum) + sums[head][d];
          }
        }
      }
      __syncthreads();
    }
  }

  __device__ void run(const Row& row, int item, int split, int kv_head, const int* head_list, int num_heads,
                      const Scratch& scratch) const {
    float sums[heads][dims] = {}, greatest[heads_per_warp], total[heads_per_warp];
#pragma unroll
    for (int mine = 0; mine < heads_per_warp; ++mine) greatest[mine] = -INFINITY, total[mine] = 0.0f;
    const int size = split_size(row.end - row.first), begin = row.first + split * size;
    const int end = begin + size < row.end ? begin + size : row.end;
    const int64_t kv_offset = kv_head * args.page_strides[2];
    load_query(row, head_list, num_heads);
    for (int tile_begin = begin; tile_begin < end; tile_begin += tile) {
      const int num_keys = end - tile_begin < tile ? end - tile_begin : tile;
      find_keys(row, tile_begin, num_keys);
      __syncthreads();
      compute_scores(kv_offset, num_keys);
      __syncthreads();
      compute_weights(num_keys, greatest, total);
      __syncthreads();
      add_values(kv_offset, num_keys, sums);
      __syncthreads();  // before the next tile takes the offsets and scores, or the next split the query
    }
    reduce(sums);
#pragma unroll
    for (int mine = 0; mine < heads_per_warp; ++mine) {
      const int head = warp + mine * warps;
      if (head >= num_heads || thread % warp_size != 0) break;
      scratch.softmax[scratch.at(args, item, head_list[head], split)] = make_float2(greatest[mine], total[mine]);
    }
    for (int i = thread; i < num_heads * width; i += threads) {
      const int head = i / width, d = i % width;
      if (d >= args.dim) continue;
      scratch.values[scratch.at(args, item, head_list[head], split) * args.dim + d] = shared.sums[head][d];
    }
    // The next call writes shared.sums only after the barriers of its own tiles.
  }
};

// The query heads of one KV head, in rising order, by the first warp. Returns how many there are, in every thread.
__device__ int list_heads(const AttentionArgs& args, int kv_head, int (&list)[max_query_heads]) {
  __shared__ int count;
  if (threadIdx.x < warp_size) {
    int listed = 0;
    for (int base = 0; base < args.num_q; base += warp_size) {
      const int head = base + threadIdx.x;
      const bool mine = head < args.num_q && args.kv_map[head] == kv_head;
      const unsigned votes = __ballot_sync(whole_warp, mine);
      if (mine) list[listed + __popc(votes & ((1u << threadIdx.x) - 1))] = head;
      listed += __popc(votes);
    }
    if (threadIdx.x == 0) count = listed;
  }
  __syncthreads();
  return count;
}

// blockIdx: x the item (row or sequence), y the KV head, z the first of the splits, every gridDim.z-th of which it does.
template <class T, int lanes, int heads>
__global__ void __launch_bounds__(threads, heads > 4 ? 3 : 4) attend_splits(AttentionArgs args, Scratch scratch, int first_item) {
  __shared__ typename Split<T, lanes, heads>::Shared shared;
  __shared__ int head_list[max_query_heads];
  const Row row = find_row(args, first_item + blockIdx.x);
  const int splits = num_splits(row);
  if (int(blockIdx.z) >= splits) return;
  const int num_heads = list_heads(args, blockIdx.y, head_list);
  const Split<T, lanes, heads> work{args, shared};
  for (int split = blockIdx.z; split < splits; split += gridDim.z) {
    // More heads than are taken at once: the split is read again, mostly from the L2 cache.
    for (int at = 0; at < num_heads; at += heads) {
      const int taken = num_heads - at < heads ? num_heads - at : heads;
      work.run(row, blockIdx.x, split, blockIdx.y, head_list + at, taken, scratch);
    }
  }
}

// ---- the combination

template <class T>
__device__ void write_zeros(const AttentionArgs& args, int row, int head) {
  T* out = static_cast<T*>(args.out) + (int64_t(row) * args.num_q + head) * args.dim;
  for (int d = threadIdx.x; d < args.dim; d += blockDim.x) out[d] = from_float<T>(0.0f);
}

// blockIdx: x the item, y the query head.
template <class T>
__global__ void __launch_bounds__(threads) combine_splits(AttentionArgs args, Scratch scratch, int first_item) {
  const int head = blockIdx.y, last = args.query_start[args.num_seqs];
  if (!args.each_row) {  // rows of no sequence are no item
    for (int row = last + first_item + blockIdx.x; row < args.num_rows; row += args.num_seqs) {
      write_zeros<T>(args, row, head);
    }
  }
  const Row row = find_row(args, first_item + blockIdx.x);
  if (row.row < 0) return;
  const int splits = num_splits(row);
  if (splits == 0) return write_zeros<T>(args, row.row, head);
  const float2* softmax = scratch.softmax + scratch.at(args, blockIdx.x, head, 0);
  const float* values = scratch.values + scratch.at(args, blockIdx.x, head, 0) * args.dim;
  float greatest = -INFINITY;
  for (int split = 0; split < splits; ++split) greatest = fmaxf(greatest, softmax[split].x);
  const float reference = greatest == -INFINITY ? 0.0f : greatest;
  T* out = static_cast<T*>(args.out) + (int64_t(row.row) * args.num_q + head) * args.dim;
  for (int d = threadIdx.x; d < args.dim; d += blockDim.x) {
    float sum = 0.0f, total = 0.0f;
#pragma unroll 4
    for (int split = 0; split < splits; ++split) {
      const float factor = exp2f(softmax[split].x - reference);
      sum += factor * values[split * args.dim + d];
      total += factor * softmax[split].y;
    }
    out[d] = from_float<T>(sum / total);
  }
}

// ---- on the host

// The most splits of any row, by the widest block table row.
int most_splits(const AttentionArgs& args) {
  const int64_t splits = ceil_div(int64_t(args.max_blocks) * args.block_size, tile);
  return splits < 1 ? 1 : splits > max_splits ? max_splits : static_cast<int>(splits);
}

int num_items(const AttentionArgs& args) { return args.each_row ? args.num_rows : args.num_seqs; }

int64_t floats_per_item(const AttentionArgs& args) {
  return int64_t(args.num_q) * most_splits(args) * (args.dim + sizeof(float2) / sizeof(float));
}

// Items of one launch: what 128 MiB of scratch holds.
int items_at_once(const AttentionArgs& args) {
  const int64_t items = (int64_t(128) << 20) / sizeof(float) / floats_per_item(args);
  return items < 1 ? 1 : items < num_items(args) ? static_cast<int>(items) : num_items(args);
}

template <class T, int lanes, int heads>
cudaError_t launch_attention(const AttentionArgs& args, int num_sms, cudaStream_t stream) {
  const int items = items_at_once(args), splits = most_splits(args);
  const Scratch scratch{args.scratch + int64_t(2) * items * args.num_q * splits,
                        reinterpret_cast<float2*>(args.scratch), splits, args.dim};
  for (int first = 0; first < num_items(args); first += items) {
    const int count = num_items(args) - first < items ? num_items(args) - first : items;
    const int64_t wanted = ceil_div(int64_t(blocks_per_sm) * num_sms, int64_t(count) * args.num_kv);
    const dim3 grid(count, args.num_kv, wanted < splits ? wanted : splits);
    cudaError_t error = launch(attend_splits<T, lanes, heads>, grid, threads, stream, args, scratch, first);
    if (error != cudaSuccess) return error;
    error = launch(combine_splits<T>, dim3(count, args.num_q), threads, stream, args, scratch, first);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template <class T, int lanes>
cudaError_t choose_heads(const AttentionArgs& args, int num_sms, cudaStream_t stream) {
  const int64_t group = ceil_div(args.num_q, args.num_kv);  // of query heads, on average
  if (group == 1) return launch_attention<T, lanes, 1>(args, num_sms, stream);
  if (group <= 4) return launch_attention<T, lanes, 4>(args, num_sms, stream);
  return launch_attention<T, lanes, 8>(args, num_sms, stream);
}

}  // namespace

int64_t attention_scratch_floats(const AttentionArgs& args) { return items_at_once(args) * floats_per_item(args); }

cudaError_t paged_attention(const AttentionArgs& args, cudaStream_t stream) {
  if (num_items(args) == 0 || args.num_q == 0 || args.dim == 0) return cudaSuccess;
  int device = 0, num_sms = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  return for_dtype(args.dtype, [&](auto type) {
    using T = decltype(type);
    if (args.dim <= 8 * dims) return choose_heads<T, 8>(args, num_sms, stream);
    if (args.dim <= 16 * dims) return choose_heads<T, 16>(args, num_sms, stream);
    return choose_heads<T, 32>(args, num_sms, stream);
  });
}

}  // namespace infer::cuda
