// Rotation, cache write and attention of a few new nodes as one launch (ops/attend.py), for what stands between two
// products of a layer: little work, on which the whole device waits.
//
// A cluster of 8 blocks serves one row, one key head and 16 of the queries that share it (node by node, its heads
// together). Every block rotates the queries and the new keys for itself. Its warps read blocks of 16 slots, in turns
// over the whole cluster, keep a softmax of what they saw, and join: first the warps of a block, then the blocks over
// distributed shared memory, each making an eighth of the result.
//
// Keys and values go from memory to registers as the tensor cores want them. Queries are the A operand of m16n8k16 and
// keys are B; channels are summed in any order as long as both take the same, so a thread loads 16 neighbouring bytes.
// For the mixed values, a thread loads 8 channels of 4 slots and pairs them up.
//
// A node's result is the same bits for any n, extent and company: which warp reads a slot depends on the slot alone,
// all is joined in a fixed order, and slots that a node does not see add exact zeros.
#include "softmax.cuh"

namespace {

constexpr int kBlocks = 8;    // of a cluster
constexpr int kQueries = 16;  // rows of a tile
constexpr int kSlots = 16;    // of a warp at a time
constexpr int kMostNodes = 16;
constexpr int kWarps = 4;  // of a block
constexpr int kParts = kWarps * kBlocks;

struct Arguments {
  const void* heads;        // [b, n, every, D]: queries, keys, values
  const float* rotation;    // [b, n, D / 2, 2]
  const void* head_norm;    // [queries + kv_heads, D], or null
  void* keys;               // strides in elements; channels are neighbours
  void* values;
  const int64_t* length;    // [b]
  const int64_t* ancestors; // [b, n], or null for a chain
  void* out;                // [b, n, queries, D]
  int64_t n, kv_heads, group, width;
  int64_t slot_row, slot_slot, slot_head, length_row, mask_row, mask_node;
  float eps, scale;         // `scale` of the scores, which are powers of two
};

// The same address in the shared memory of another block of the cluster, written.
__device__ __forceinline__ void push(const float* mine, int block, float v) {
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(mine));
  asm volatile("{ .reg .u32 there; mapa.shared::cluster.u32 there, %0, %1; st.shared::cluster.f32 [there], %2; }"
               :
               : "r"(at), "r"(block), "f"(v)
               : "memory");
}

__device__ __forceinline__ void push(const float* mine, int block, float v0, float v1, float v2, float v3) {
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(mine));
  asm volatile(
      "{ .reg .u32 there; mapa.shared::cluster.u32 there, %0, %1; st.shared::cluster.v4.f32 [there], {%2, %3, %4, %5}; }"
      :
      : "r"(at), "r"(block), "f"(v0), "f"(v1), "f"(v2), "f"(v3)
      : "memory");
}

// One head of a node, turned if it is a query or key: into shared memory and, where given, to the cache.
template <typename T, int D>
__device__ __forceinline__ void place(const Arguments& a, int64_t item, int64_t head, T* to, T* stored) {
  constexpr int kPairs = D / 64;
  const int lane = threadIdx.x % 32;
  const int64_t turning = (a.group + 1) * a.kv_heads;
  const T* from = static_cast<const T*>(a.heads) + (item * (turning + a.kv_heads) + head) * D;
  float x[kPairs], y[kPairs];
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const uint32_t both = __ldcg(reinterpret_cast<const uint32_t*>(from) + i * 32 + lane);
    x[i] = wide(reinterpret_cast<const T*>(&both)[0]);
    y[i] = wide(reinterpret_cast<const T*>(&both)[1]);
  }
  if (head < turning) {
    if (a.head_norm) {
      float all = 0;
#pragma unroll
      for (int i = 0; i < kPairs; ++i) all += x[i] * x[i] + y[i] * y[i];
      for (int distance = 16; distance; distance /= 2) all += __shfl_xor_sync(~0u, all, distance);
      const float size = rsqrtf(all / D + a.eps);
      const T* weights = static_cast<const T*>(a.head_norm) + head * D;
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        x[i] *= size * wide(weights[(i * 32 + lane) * 2]);
        y[i] *= size * wide(weights[(i * 32 + lane) * 2 + 1]);
      }
    }
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const float2 turn = __ldcg(reinterpret_cast<const float2*>(a.rotation) + item * (D / 2) + i * 32 + lane);
      const float real = x[i] * turn.x - y[i] * turn.y;
      y[i] = x[i] * turn.y + y[i] * turn.x;
      x[i] = real;
    }
  }
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const uint32_t both = pack(x[i], y[i], T());
    reinterpret_cast<uint32_t*>(to)[i * 32 + lane] = both;
    if (stored) reinterpret_cast<uint32_t*>(stored)[i * 32 + lane] = both;
  }
}

template <typename T, int D>
__device__ __forceinline__ void attend(const Arguments& a) {
  constexpr int kLoads = D / 32;   // 16-byte pieces of a slot that a quad of threads takes together
  constexpr int kHalves = D / 64;  // 16-byte pieces of a slot that 8 threads take together
  __shared__ alignas(16) T queries[kQueries][D];
  __shared__ alignas(16) T new_keys[kMostNodes][D];
  __shared__ alignas(16) T new_values[kMostNodes][D];
  // Of every warp of the cluster: its share of this block's eighth, and its softmax of every query.
  __shared__ alignas(16) float parts[kParts][kQueries * D / kBlocks];
  __shared__ float tops[kParts][kQueries], sums[kParts][kQueries];

  // The other blocks have begun when this is waited for, and their shared memory is there.
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
  const int rank = blockIdx.x % kBlocks, tile = blockIdx.x / kBlocks;
  const int64_t row = blockIdx.y / a.kv_heads, kv_head = blockIdx.y % a.kv_heads;
  const int n = static_cast<int>(a.n), heads = static_cast<int>(a.group);
  const int first = tile * kQueries, live = min(kQueries, n * heads - first);
  const int used = static_cast<int>(a.length[row * a.length_row]);
  // A node of a chain sees nothing behind itself.
  const int end = a.ancestors ? used + n : used + (first + live - 1) / heads + 1;
  T* keys = static_cast<T*>(a.keys) + row * a.slot_row + kv_head * a.slot_head;
  T* values = static_cast<T*>(a.values) + row * a.slot_row + kv_head * a.slot_head;
  const uint4 none = make_uint4(0, 0, 0, 0);

  uint4 k[2][kLoads], v[4][kHalves];
  // The committed slots, which no kernel of this forward writes.
  const auto load = [&](int start) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int slot = start + half * 8 + group;
#pragma unroll
      for (int i = 0; i < kLoads; ++i)
        k[half][i] = slot < used ? __ldcg(reinterpret_cast<const uint4*>(keys + slot * a.slot_slot + i * 32 + quad * 8)) : none;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int slot = start + (i / 2) * 8 + quad * 2 + i % 2;
#pragma unroll
      for (int half = 0; half < kHalves; ++half)
        v[i][half] = slot < used ? __ldcg(reinterpret_cast<const uint4*>(values + slot * a.slot_slot + half * 64 + group * 8)) : none;
    }
  };
  int start = (warp * kBlocks + rank) * kSlots;
  load(start);

  follow();

  const int64_t item = row * n;
  const bool writes = rank == 0 && tile == 0;
  for (int line = warp; line < live + 2 * n; line += kWarps) {
    if (line < live) {
      const int place_of = first + line;
      place<T, D>(a, item + place_of / heads, kv_head * heads + place_of % heads, queries[line], nullptr);
    } else {
      const int node = (line - live) % n;
      const bool value = line - live >= n;
      const int64_t head = (a.group + value) * a.kv_heads + kv_head;
      T* stored = (value ? values : keys) + (used + node) * a.slot_slot;
      place<T, D>(a, item + node, head, value ? new_values[node] : new_keys[node], writes ? stored : nullptr);
    }
  }
  __syncthreads();

  // Of rows `group` and `group + 8` of the tile. Rows without a query repeat the last one; nobody reads them.
  uint4 q[2][kLoads];
  int own[2];
  uint64_t sees[2];
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    const int line = min(group + 8 * side, live - 1), node = (first + line) / heads;
    own[side] = used + node;
    sees[side] = a.ancestors ? a.ancestors[row * a.mask_row + node * a.mask_node] : 0;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) q[side][i] = *reinterpret_cast<const uint4*>(&queries[line][i * 32 + quad * 8]);
  }
  const int width = static_cast<int>(a.width), window = used + n - width;
  const auto seen = [&](int slot, int side) {
    if (!a.ancestors) return slot <= own[side];
    const int bit = slot - window;
    return slot < end && (bit < 0 || slot == own[side] || (bit < width && ((sees[side] >> bit) & 1)));
  };

  float highest[2] = {-INFINITY, -INFINITY}, weight[2] = {0, 0};
  float mixed[kHalves][8][4] = {};
  for (; start < end; start += kWarps * kBlocks * kSlots) {
    if (start != (warp * kBlocks + rank) * kSlots) load(start);
    if (start + kSlots > used) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int node = start + half * 8 + group - used;
#pragma unroll
        for (int i = 0; i < kLoads; ++i)
          if (node >= 0 && node < n) k[half][i] = *reinterpret_cast<const uint4*>(&new_keys[node][i * 32 + quad * 8]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int node = start + (i / 2) * 8 + quad * 2 + i % 2 - used;
#pragma unroll
        for (int half = 0; half < kHalves; ++half)
          if (node >= 0 && node < n) v[i][half] = *reinterpret_cast<const uint4*>(&new_values[node][half * 64 + group * 8]);
      }
    }
    float scores[2][4] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        multiply(scores[half], q[0][i].x, q[1][i].x, q[0][i].y, q[1][i].y, k[half][i].x, k[half][i].y, T());
        multiply(scores[half], q[0][i].z, q[1][i].z, q[0][i].w, q[1][i].w, k[half][i].z, k[half][i].w, T());
      }
    float fade[2];
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      float raised = highest[side];
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& score = scores[half][side * 2 + i];
          // Before the window everything is seen by all.
          const int slot = start + half * 8 + quad * 2 + i;
          score = slot < window || seen(slot, side) ? score * a.scale : -INFINITY;
          raised = fmaxf(raised, score);
        }
      fade[side] = weigh(scores, side, raised, highest[side], weight[side]);
    }
#pragma unroll
    for (int half = 0; half < kHalves; ++half)
#pragma unroll
      for (int channel = 0; channel < 8; ++channel) {
        mix<T>(mixed[half][channel], fade, scores, v[0][half], v[1][half], v[2][half], v[3][half], channel);
      }
  }

  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
  const int mine = warp * kBlocks + rank, share = live * D / kBlocks;
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    float all = weight[side];
    all += __shfl_xor_sync(~0u, all, 1);
    all += __shfl_xor_sync(~0u, all, 2);
    const int line = group + 8 * side;
    if (line >= live) continue;
    for (int block = quad; block < kBlocks; block += 4) {
      push(&tops[mine][line], block, highest[side]);
      push(&sums[mine][line], block, all);
    }
#pragma unroll
    for (int half = 0; half < kHalves; ++half)
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int channel = 0; channel < 8; channel += 4) {
          const int cell = line * D + half * 64 + (quad * 2 + i) * 8 + channel, at = side * 2 + i;
          push(&parts[mine][cell % share], cell / share, mixed[half][channel][at], mixed[half][channel + 1][at],
               mixed[half][channel + 2][at], mixed[half][channel + 3][at]);
        }
  }
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");

  for (int i = threadIdx.x; i < share; i += kWarps * 32) {
    const int cell = rank * share + i, line = cell / D;
    float raised = -INFINITY, made = 0, all = 0;
#pragma unroll
    for (int part = 0; part < kParts; ++part) raised = fmaxf(raised, tops[part][line]);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const float counted = fade_of(tops[part][line], raised);
      made += counted * parts[part][i];
      all += counted * sums[part][line];
    }
    const int place_of = first + line;
    const int64_t head = kv_head * heads + place_of % heads;
    narrow(made / all, static_cast<T*>(a.out) + ((item + place_of / heads) * a.kv_heads * heads + head) * D + cell % D);
  }
}

}  // namespace

// A cluster for every tile of 16 queries (grid x), and every row and key head (grid y).
#define SPECDEC_ATTEND(name, T, D)                                                                                    \
  extern "C" __global__ void __cluster_dims__(kBlocks, 1, 1) __launch_bounds__(kWarps * 32) name(const Arguments a) { \
    attend<T, D>(a);                                                                                                  \
  }

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
SPECDEC_ATTEND(attend_float16_64, __half, 64)
SPECDEC_ATTEND(attend_float16_128, __half, 128)
SPECDEC_ATTEND(attend_bfloat16_64, __nv_bfloat16, 64)
SPECDEC_ATTEND(attend_bfloat16_128, __nv_bfloat16, 128)
#endif
