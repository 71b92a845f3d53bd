// Greedy verification: the largest logit of every node, and the walk from the root that follows them. The definition is
// verify_greedy in ops/verify.py: ties go to the lowest id, and a NaN counts as the largest.
//
// The first kernel gives each row of the vocabulary to `splits` blocks, which read it 16 bytes at a time and leave their
// best as one 64-bit word: the float's bits in sortable order above, the complement of the index below, so that the
// largest word is the answer. The second kernel, one warp a row of the batch, joins the words and walks.
#include "common.cuh"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;

__device__ float widen(float value) { return value; }
__device__ float widen(__half value) { return __half2float(value); }
__device__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

struct Best {
  float value = -INFINITY;
  uint32_t index = UINT32_MAX;

  // Indices come in ascending order.
  __device__ void see(float other, uint32_t where) {
    const bool first_nan = other != other && value == value;
    if (other > value || first_nan || index == UINT32_MAX) {
      value = other;
      index = where;
    }
  }

  __device__ uint64_t word() const {
    if (index == UINT32_MAX) return 0;
    const uint32_t bits = __float_as_uint(value == 0 ? 0.0f : value);
    const uint32_t order = value != value ? UINT32_MAX : (bits & 0x80000000u) ? ~bits : bits | 0x80000000u;
    return (static_cast<uint64_t>(order) << 32) | ~index;
  }
};

__device__ uint64_t warp_max(uint64_t word) {
  for (int distance = kWarp / 2; distance; distance /= 2) {
    const uint64_t other = __shfl_xor_sync(0xFFFFFFFFu, word, distance);
    word = other > word ? other : word;
  }
  return word;
}

template <typename T>
__device__ __forceinline__ void largest(const T* __restrict__ logits, int64_t row_stride, int64_t node_stride,
                                        int64_t nodes, int64_t vocabulary, int64_t share,
                                        uint64_t* __restrict__ words) {
  constexpr int kLanes = 16 / sizeof(T);
  const int64_t line = blockIdx.x;
  const int64_t begin = blockIdx.y * share;
  const int64_t end = min(begin + share, vocabulary);
  const T* row = logits + (line / nodes) * row_stride + (line % nodes) * node_stride;
  Best best;
  if (begin < end) {
    // Up to the first address that is a multiple of 16, then 16 bytes at a time, then what is left.
    const int64_t past = (reinterpret_cast<uintptr_t>(row + begin) / sizeof(T)) % kLanes;
    const int64_t first = min(begin + (past ? kLanes - past : 0), end);
    const int64_t vectors = (end - first) / kLanes;
    for (int64_t i = begin + threadIdx.x; i < first; i += kThreads) best.see(widen(row[i]), i);
    const uint4* wide = reinterpret_cast<const uint4*>(row + first);
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < vectors; i += kThreads) {
      const uint4 loaded = __ldg(wide + i);
      const T* lanes = reinterpret_cast<const T*>(&loaded);
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) best.see(widen(lanes[lane]), first + i * kLanes + lane);
    }
    for (int64_t i = first + vectors * kLanes + threadIdx.x; i < end; i += kThreads) best.see(widen(row[i]), i);
  }
  __shared__ uint64_t of_warp[kThreads / kWarp];
  const uint64_t mine = warp_max(best.word());
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = mine;
  __syncthreads();
  if (threadIdx.x < kWarp) {
    const uint64_t all = warp_max(threadIdx.x < kThreads / kWarp ? of_warp[threadIdx.x] : 0);
    if (threadIdx.x == 0) words[line * gridDim.y + blockIdx.y] = all;
  }
}

// A tensor [rows, nodes] of 32 or 64-bit integers.
struct Ids {
  const void* data;
  int64_t row_stride, node_stride, bytes;

  __device__ int64_t at(int64_t row, int64_t node) const {
    const int64_t place = row * row_stride + node * node_stride;
    return bytes == 8 ? static_cast<const int64_t*>(data)[place] : static_cast<const int32_t*>(data)[place];
  }
};

}  // namespace

// logits: [rows, nodes, vocabulary], the last axis dense, other strides in elements. A block for every node and split,
// which reads `share` logits (ops/verify_cuda.py). words: [rows, nodes, splits].
#define SPECDEC_LARGEST(name, T)                                                                                      \
  extern "C" __global__ void __launch_bounds__(kThreads)                                                              \
      name(const T* logits, int64_t row_stride, int64_t node_stride, int64_t nodes, int64_t vocabulary, int64_t share,\
           uint64_t* words) {                                                                                         \
    largest<T>(logits, row_stride, node_stride, nodes, vocabulary, share, words);                                     \
  }

SPECDEC_LARGEST(largest_float32, float)
SPECDEC_LARGEST(largest_float16, __half)
SPECDEC_LARGEST(largest_bfloat16, __nv_bfloat16)

// valid: [rows, nodes] of bytes. path, accept_prob: [rows, nodes]; count, next_token: [rows]. Shared memory: 20 bytes a
// node, for its token, choice, parent and validity.
extern "C" __global__ void __launch_bounds__(kWarp)
    walk(const uint64_t* __restrict__ words, int64_t splits, Ids tokens, Ids parents, const uint8_t* __restrict__ valid,
         int64_t valid_row, int64_t valid_node, int64_t count_nodes, int64_t chain, int64_t* __restrict__ path,
         int64_t* __restrict__ count, int64_t* __restrict__ next_token, float* __restrict__ accept_prob) {
  const int nodes = static_cast<int>(count_nodes);
  extern __shared__ int64_t memory[];
  int64_t* token = memory;
  int32_t* choice = reinterpret_cast<int32_t*>(token + nodes);
  int32_t* parent = choice + nodes;
  int32_t* exists = parent + nodes;
  const int64_t row = blockIdx.x;
  for (int node = threadIdx.x; node < nodes; node += kWarp) {
    const uint64_t* parts = words + (row * nodes + node) * splits;
    uint64_t best = parts[0];
    for (int part = 1; part < splits; ++part) best = max(best, parts[part]);
    choice[node] = static_cast<int32_t>(~static_cast<uint32_t>(best));
    token[node] = tokens.at(row, node);
    parent[node] = chain ? node - 1 : static_cast<int32_t>(parents.at(row, node));
    exists[node] = node > 0 && valid[row * valid_row + node * valid_node];
    path[row * nodes + node] = -1;
    accept_prob[row * nodes + node] = 0;
  }
  __syncwarp();
  int node = 0, depth = 0;
  for (;;) {
    // The first child that carries the choice; a child stands behind its parent.
    int child = nodes;
    const int stop = chain ? min(node + 2, nodes) : nodes;
    for (int i = node + 1 + threadIdx.x; i < stop && child == nodes; i += kWarp)
      if (exists[i] && parent[i] == node && token[i] == choice[node]) child = i;
    for (int distance = kWarp / 2; distance; distance /= 2)
      child = min(child, __shfl_xor_sync(0xFFFFFFFFu, child, distance));
    if (child == nodes) break;
    // Written after the padding: the barrier above orders the two.
    if (threadIdx.x == 0) {
      path[row * nodes + depth] = child;
      accept_prob[row * nodes + child] = 1;
    }
    node = child;
    ++depth;
  }
  if (threadIdx.x == 0) {
    count[row] = depth;
    next_token[row] = choice[node];
  }
}
