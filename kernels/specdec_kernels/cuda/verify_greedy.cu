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
// Choice, token, parent and validity of a node in the shared memory of a walk; 48 KiB are always there.
constexpr int64_t kMostNodes = (48 << 10) / 20;

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
__global__ void __launch_bounds__(kThreads)
    largest(const T* __restrict__ logits, int64_t row_stride, int64_t node_stride, int64_t nodes, int64_t vocabulary,
            int64_t share, uint64_t* __restrict__ words) {
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
  int64_t row_stride, node_stride;
  int bytes;

  __device__ int64_t at(int64_t row, int64_t node) const {
    const int64_t place = row * row_stride + node * node_stride;
    return bytes == 8 ? static_cast<const int64_t*>(data)[place] : static_cast<const int32_t*>(data)[place];
  }
};

__global__ void __launch_bounds__(kWarp)
    walk(const uint64_t* __restrict__ words, int splits, Ids tokens, Ids parents, const uint8_t* __restrict__ valid,
         int64_t valid_row, int64_t valid_node, int nodes, bool chain, int64_t* __restrict__ path,
         int64_t* __restrict__ count, int64_t* __restrict__ next_token, float* __restrict__ accept_prob) {
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

template <typename T>
void launch_largest(const void* logits, int64_t row_stride, int64_t node_stride, int64_t rows, int64_t nodes,
                    int64_t vocabulary, int splits, uint64_t* words, cudaStream_t stream) {
  constexpr int64_t kLanes = 16 / sizeof(T);
  // A share of whole vectors, so that all but the first block of a row begin as aligned as the row does.
  const int64_t share = ((vocabulary + splits - 1) / splits + kLanes - 1) / kLanes * kLanes;
  largest<T><<<dim3(static_cast<unsigned>(rows * nodes), splits), kThreads, 0, stream>>>(
      static_cast<const T*>(logits), row_stride, node_stride, nodes, vocabulary, share, words);
}

}  // namespace

// logits: [rows, nodes, vocabulary] of float32 (kind 0), float16 (1) or bfloat16 (2), the last axis dense; tokens and
// parents: [rows, nodes] of 4 or 8 bytes; valid: [rows, nodes] of bytes; strides in elements. words: room for
// rows * nodes * splits. path, accept_prob: [rows, nodes]; count, next_token: [rows].
SPECDEC_API int specdec_verify_greedy(const void* logits, int64_t kind, int64_t logits_row, int64_t logits_node,
                                      const void* tokens, int64_t token_bytes, int64_t tokens_row, int64_t tokens_node,
                                      const void* parents, int64_t parent_bytes, int64_t parents_row,
                                      int64_t parents_node, const uint8_t* valid, int64_t valid_row,
                                      int64_t valid_node, int64_t rows, int64_t nodes, int64_t vocabulary,
                                      int64_t splits, int64_t chain, uint64_t* words, int64_t* path, int64_t* count,
                                      int64_t* next_token, float* accept_prob, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  if (rows * nodes > INT32_MAX || nodes > kMostNodes || vocabulary > INT32_MAX || vocabulary < 1 || splits < 1 ||
      splits > 65535)
    return cudaErrorInvalidValue;
  const int parts = static_cast<int>(splits);
  if (kind == 0)
    launch_largest<float>(logits, logits_row, logits_node, rows, nodes, vocabulary, parts, words, stream);
  else if (kind == 1)
    launch_largest<__half>(logits, logits_row, logits_node, rows, nodes, vocabulary, parts, words, stream);
  else
    launch_largest<__nv_bfloat16>(logits, logits_row, logits_node, rows, nodes, vocabulary, parts, words, stream);
  const cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess) return status;
  walk<<<static_cast<unsigned>(rows), kWarp, static_cast<size_t>(nodes * 20), stream>>>(
      words, parts, Ids{tokens, tokens_row, tokens_node, static_cast<int>(token_bytes)},
      Ids{parents, parents_row, parents_node, static_cast<int>(parent_bytes)}, valid, valid_row, valid_node,
      static_cast<int>(nodes), chain != 0, path, count, next_token, accept_prob);
  return cudaGetLastError();
}
