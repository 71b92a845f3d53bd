// Greedy verification: the largest logit of every node, and the walk from the root that follows them. The definition is
// verify_greedy in ops/verify.py: ties go to the lowest id, and a NaN counts as the largest.
//
// The first kernel gives each row of the vocabulary to `splits` blocks, which read it 16 bytes at a time and leave their
// best as one 64-bit word: the float's bits in sortable order above, the complement of the index below, so that the
// largest word is the answer. The second kernel, one block a row of the batch, joins the words, finds for every node the
// first child that carries its choice, and follows these. Either may start while the kernel ahead of it ends.
#include "half.cuh"

namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kBlocks = 4;  // at once on a multiprocessor
constexpr int kBatch = 8;   // vectors that a thread asks for at once

// A larger word for a larger value, with NaN as the largest and zeros alike, and among these for a lower index.
__device__ uint64_t word_of(float value, uint32_t index) {
  const uint32_t bits = __float_as_uint(value == 0 ? 0.0f : value);
  const uint32_t order = value != value ? UINT32_MAX : (bits & 0x80000000u) ? ~bits : bits | 0x80000000u;
  return (static_cast<uint64_t>(order) << 32) | ~index;
}

// The largest of what 16 bytes hold, or NaN where one is.
__device__ float nan_max(float a, float b) {
#if __CUDA_ARCH__ >= 800
  float c;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
#else
  return a != a ? a : b != b ? b : fmaxf(a, b);
#endif
}
__device__ __half2 nan_max(__half2 a, __half2 b) { return __hmax2_nan(a, b); }
__device__ __nv_bfloat162 nan_max(__nv_bfloat162 a, __nv_bfloat162 b) { return __hmax2_nan(a, b); }

__device__ float largest_of(const uint4& v, float) {
  return nan_max(nan_max(__uint_as_float(v.x), __uint_as_float(v.y)),
                 nan_max(__uint_as_float(v.z), __uint_as_float(v.w)));
}
template <typename Pair>
__device__ float largest_pair(const uint4& v) {
  const Pair* pairs = reinterpret_cast<const Pair*>(&v);
  const Pair both = nan_max(nan_max(pairs[0], pairs[1]), nan_max(pairs[2], pairs[3]));
  return nan_max(wide(both.x), wide(both.y));
}
__device__ float largest_of(const uint4& v, __half) { return largest_pair<__half2>(v); }
__device__ float largest_of(const uint4& v, __nv_bfloat16) { return largest_pair<__nv_bfloat162>(v); }

// The largest word of neighbouring threads, a power of two of them.
__device__ uint64_t largest_word(uint64_t word, int threads) {
  for (int distance = threads / 2; distance; distance /= 2)
    word = max(word, __shfl_xor_sync(0xFFFFFFFFu, word, distance));
  return word;
}

// The largest word of a warp.
__device__ uint64_t largest_word(uint64_t word) {
#if __CUDA_ARCH__ >= 800
  const uint32_t high = word >> 32, highest = __reduce_max_sync(0xFFFFFFFFu, high);
  const uint32_t low = __reduce_max_sync(0xFFFFFFFFu, high == highest ? static_cast<uint32_t>(word) : 0);
  return (static_cast<uint64_t>(highest) << 32) | low;
#else
  return largest_word(word, kWarp);
#endif
}

template <typename T>
__device__ __forceinline__ void largest(const T* __restrict__ logits, int64_t row_stride, int64_t node_stride,
                                        int64_t nodes, int64_t vocabulary, int64_t share,
                                        uint64_t* __restrict__ words) {
  constexpr int kLanes = 16 / sizeof(T);
  const uint32_t line = blockIdx.x, of_row = static_cast<uint32_t>(nodes);
  // Ids are 32 bits of a word.
  const int begin = static_cast<int>(min(blockIdx.y * share, vocabulary));
  const int end = static_cast<int>(min(begin + share, vocabulary));
  const T* row = logits + (line / of_row) * row_stride + (line % of_row) * node_stride;
  // Up to the first address that is a multiple of 16, then 16 bytes at a time, then what is left.
  const int past = static_cast<int>(reinterpret_cast<uintptr_t>(row + begin) / sizeof(T) % kLanes);
  const int first = min(begin + (past ? kLanes - past : 0), end), vectors = (end - first) / kLanes;
  const int thread = static_cast<int>(threadIdx.x);
  // A thread for each number that is in no vector.
  const int ahead = first - begin, single = begin + thread + (thread < ahead ? 0 : vectors * kLanes);
  const uint4* pieces = reinterpret_cast<const uint4*>(row + first) + thread;
  follow(pieces);
  const float alone = single < end ? wide(row[single]) : 0.0f;
  uint64_t best = 0;
  if (thread < vectors) {
    // The first of the thread's vectors that holds its largest value. Past the last vector it sees that one again.
    const int last = vectors - 1 - thread;
    float most = -INFINITY;
    int where = 0;
    uint4 held = {};
#pragma unroll 1
    for (int i = 0; i <= last; i += kBatch * kThreads) {
      uint4 loaded[kBatch];
#pragma unroll
      for (int part = 0; part < kBatch; ++part) loaded[part] = __ldg(pieces + min(i + part * kThreads, last));
#pragma unroll
      for (int part = 0; part < kBatch; ++part) {
        const float other = largest_of(loaded[part], T());
        if (!(other <= most) && most == most) most = other, where = min(i + part * kThreads, last), held = loaded[part];
      }
    }
    const T* lanes = reinterpret_cast<const T*>(&held);
    int found = 0;
#pragma unroll
    for (int lane = kLanes - 1; lane >= 0; --lane) {
      const float value = wide(lanes[lane]);
      if (value == most || (value != value && most != most)) found = lane;
    }
    best = word_of(most, first + (thread + where) * kLanes + found);
  }
  if (single < end) best = max(best, word_of(alone, single));
  __shared__ uint64_t of_warp[kThreads / kWarp];
  best = largest_word(best);
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = best;
  __syncthreads();
  if (threadIdx.x < kWarp) {
    best = largest_word(threadIdx.x < kThreads / kWarp ? of_warp[threadIdx.x] : 0);
    if (threadIdx.x == 0) words[static_cast<int64_t>(line) * gridDim.y + blockIdx.y] = best;
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
#define SPECDEC_LARGEST(name, T)                                                                                       \
  extern "C" __global__ void __launch_bounds__(kThreads, kBlocks)                                                      \
      name(const T* logits, int64_t row_stride, int64_t node_stride, int64_t nodes, int64_t vocabulary, int64_t share, \
           uint64_t* words) {                                                                                          \
    largest<T>(logits, row_stride, node_stride, nodes, vocabulary, share, words);                                      \
  }

SPECDEC_LARGEST(largest_float32, float)
SPECDEC_LARGEST(largest_float16, __half)
SPECDEC_LARGEST(largest_bfloat16, __nv_bfloat16)

// valid: [rows, nodes] of bytes. path, accept_prob: [rows, nodes]; count, next_token: [rows]. Shared memory: 16 bytes a
// node.
extern "C" __global__ void __launch_bounds__(kThreads)
    walk(const uint64_t* __restrict__ words, int64_t splits, Ids tokens, Ids parents, const uint8_t* __restrict__ valid,
         int64_t valid_row, int64_t valid_node, int64_t count_nodes, int64_t chain, int64_t* __restrict__ path,
         int64_t* __restrict__ count, int64_t* __restrict__ next_token, float* __restrict__ accept_prob) {
  const int nodes = static_cast<int>(count_nodes), parts = static_cast<int>(splits);
  extern __shared__ int32_t memory[];
  // Of every node: the choice that it needs, -1 where none will do, and of which node; its own; the next node.
  int32_t *needs = memory, *above = needs + nodes, *choice = above + nodes, *next = choice + nodes;
  const int64_t row = blockIdx.x;
  // The first kernel neither writes what is read here nor reads what is written, and all before it has ended.
#pragma unroll 1
  for (int node = threadIdx.x; node < nodes; node += kThreads) {
    path[row * nodes + node] = -1;
    accept_prob[row * nodes + node] = 0;
    // A child stands behind its parent.
    const int64_t parent = chain ? node - 1 : parents.at(row, node), token = tokens.at(row, node);
    const bool can = parent >= 0 && parent < node && valid[row * valid_row + node * valid_node];
    needs[node] = can && token >= 0 && token <= INT32_MAX ? static_cast<int32_t>(token) : -1;
    above[node] = can ? static_cast<int32_t>(parent) : 0;
    next[node] = nodes;
  }
  // As many threads share a node as it has words, of which there are no more than threads of a warp.
  const int bits = 32 - __clz(parts - 1), span = 1 << bits, part = threadIdx.x % span, from = threadIdx.x >> bits;
  const uint64_t* mine = words + row * nodes * parts + part;
  follow(mine);
#pragma unroll 1
  for (int node = from; node - from < nodes; node += kThreads >> bits) {
    const uint64_t best = largest_word(node < nodes && part < parts ? mine[node * parts] : 0, span);
    if (node < nodes && part == 0) choice[node] = static_cast<int32_t>(~static_cast<uint32_t>(best));
  }
  __syncthreads();
#pragma unroll 1
  for (int node = threadIdx.x; node < nodes; node += kThreads)
    if (needs[node] >= 0 && needs[node] == choice[above[node]]) atomicMin(next + above[node], node);
  __syncthreads();
  if (threadIdx.x > 0) return;
  int node = 0, depth = 0;
  // Written after the padding: the barriers above order the two.
#pragma unroll 1
  for (int child = next[node]; child < nodes; child = next[node]) {
    path[row * nodes + depth] = child;
    accept_prob[row * nodes + child] = 1;
    node = child;
    ++depth;
  }
  count[row] = depth;
  next_token[row] = choice[node];
}
