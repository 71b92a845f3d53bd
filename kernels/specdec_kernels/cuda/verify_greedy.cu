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

template <typename T>
__device__ __forceinline__ void largest(const T* __restrict__ logits, int64_t row_stride, int64_t node_stride,
                                        int64_t nodes, int64_t vocabulary, int64_t share,
                                        uint64_t* __restrict__ words) {
  constexpr int kLanes = 16 / sizeof(T);
  follow();
  const int64_t line = blockIdx.x;
  // Ids are 32 bits of a word.
  const int begin = static_cast<int>(min(blockIdx.y * share, vocabulary));
  const int end = static_cast<int>(min(begin + share, vocabulary));
  const T* row = logits + (line / nodes) * row_stride + (line % nodes) * node_stride;
  uint64_t best = 0;
  if (begin < end) {
    // Up to the first address that is a multiple of 16, then 16 bytes at a time, then what is left.
    const int past = static_cast<int>(reinterpret_cast<uintptr_t>(row + begin) / sizeof(T) % kLanes);
    const int first = min(begin + (past ? kLanes - past : 0), end), vectors = (end - first) / kLanes;
    const int thread = static_cast<int>(threadIdx.x);
    const auto see = [&](int from, int to) {
      if (from + thread < to) best = max(best, word_of(wide(row[from + thread]), from + thread));
    };
    see(begin, first);
    see(first + vectors * kLanes, end);
    if (thread < vectors) {
      // The first of the thread's vectors that holds its largest value; which of its lanes is seen in the end. Past
      // the last vector it sees that one again.
      const uint4* pieces = reinterpret_cast<const uint4*>(row + first);
      const int last = vectors - 1;
      float most = -INFINITY;
      int where = thread;
#pragma unroll 1
      for (int i = thread; i < vectors; i += kBatch * kThreads) {
        uint4 loaded[kBatch];
#pragma unroll
        for (int part = 0; part < kBatch; ++part) loaded[part] = __ldg(pieces + min(i + part * kThreads, last));
#pragma unroll
        for (int part = 0; part < kBatch; ++part) {
          const float other = largest_of(loaded[part], T());
          if (!(other <= most) && most == most) most = other, where = min(i + part * kThreads, last);
        }
      }
      const uint4 held = __ldg(pieces + where);
      const T* lanes = reinterpret_cast<const T*>(&held);
      int found = 0;
#pragma unroll
      for (int lane = kLanes - 1; lane >= 0; --lane) {
        const float value = wide(lanes[lane]);
        if (value == most || (value != value && most != most)) found = lane;
      }
      best = max(best, word_of(most, first + where * kLanes + found));
    }
  }
  __shared__ uint64_t of_warp[kThreads / kWarp];
  best = largest_word(best, kWarp);
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = best;
  __syncthreads();
  if (threadIdx.x < kWarp) {
    best = largest_word(threadIdx.x < kThreads / kWarp ? of_warp[threadIdx.x] : 0, kWarp);
    if (threadIdx.x == 0) words[line * gridDim.y + blockIdx.y] = best;
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
// node, for its token, choice and next node.
extern "C" __global__ void __launch_bounds__(kThreads)
    walk(const uint64_t* __restrict__ words, int64_t splits, Ids tokens, Ids parents, const uint8_t* __restrict__ valid,
         int64_t valid_row, int64_t valid_node, int64_t count_nodes, int64_t chain, int64_t* __restrict__ path,
         int64_t* __restrict__ count, int64_t* __restrict__ next_token, float* __restrict__ accept_prob) {
  const int nodes = static_cast<int>(count_nodes), parts = static_cast<int>(splits);
  extern __shared__ int64_t memory[];
  int64_t* token = memory;
  int32_t* choice = reinterpret_cast<int32_t*>(token + nodes);
  int32_t* next = choice + nodes;
  const int64_t row = blockIdx.x;
  // What the first kernel does not write was there before that began.
  for (int node = threadIdx.x; node < nodes; node += kThreads) token[node] = tokens.at(row, node), next[node] = nodes;
  follow();
  // As many threads share a node's words as it has, up to a warp.
  int span = 1;
  while (span < min(parts, kWarp)) span *= 2;
  const int part = threadIdx.x % span, together = kThreads / span;
#pragma unroll 4
  for (int begin = 0; begin < nodes; begin += together) {
    const int node = begin + threadIdx.x / span;
    uint64_t best = 0;
    if (node < nodes)
      for (int i = part; i < parts; i += span) best = max(best, words[(row * nodes + node) * splits + i]);
    best = largest_word(best, span);
    if (node < nodes && part == 0) choice[node] = static_cast<int32_t>(~static_cast<uint32_t>(best));
  }
  __syncthreads();
  for (int node = threadIdx.x; node < nodes; node += kThreads) {
    path[row * nodes + node] = -1;
    accept_prob[row * nodes + node] = 0;
    // A child stands behind its parent.
    const int64_t parent = chain ? node - 1 : parents.at(row, node);
    if (parent >= 0 && parent < node && valid[row * valid_row + node * valid_node] && token[node] == choice[parent])
      atomicMin(next + parent, node);
  }
  __syncthreads();
  if (threadIdx.x > 0) return;
  int node = 0, depth = 0;
  // Written after the padding: the barrier above orders the two.
  for (int child = next[node]; child < nodes; child = next[node]) {
    path[row * nodes + depth] = child;
    accept_prob[row * nodes + child] = 1;
    node = child;
    ++depth;
  }
  count[row] = depth;
  next_token[row] = choice[node];
}
