// Moves the kept slots of every group and row to the front, in place; the definition is ops/keep.py.
//
// A thread owns one vector of a slot and walks the kept nodes in ascending order. Node i of a path in topological
// order is at least i, so a store to place i never hits a node that is still to be read: node j > i lies past i. That
// is why a batch may be loaded before any of it is stored, which is what keeps the memory busy.
#include "common.cuh"

namespace {

constexpr int kBatch = 8;
constexpr int kThreads = 128;

template <typename V>
__device__ __forceinline__ void keep(
    V* __restrict__ slots, const int64_t* __restrict__ base, const int64_t* __restrict__ nodes,
    const int64_t* __restrict__ count, int64_t rows, int64_t width, int64_t chunks, int64_t vectors,
    int64_t group_stride, int64_t row_stride, int64_t slot_stride) {
  const int64_t pair = blockIdx.x / chunks;
  const int64_t row = pair % rows;
  const int64_t vector = (blockIdx.x % chunks) * kThreads + threadIdx.x;
  if (vector >= vectors) return;
  const int64_t kept = min(count[row], width);
  const int64_t* path = nodes + row * width;
  V* start = slots + (pair / rows) * group_stride + row * row_stride + base[row] * slot_stride + vector;
  for (int64_t first = 0; first < kept; first += kBatch) {
    V held[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      if (first + i < kept && path[first + i] != first + i) held[i] = start[path[first + i] * slot_stride];
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      if (first + i < kept && path[first + i] != first + i) start[(first + i) * slot_stride] = held[i];
  }
}

}  // namespace

// slots: groups x rows x c slots of `vectors` vectors of type V, strides in vectors; base, count: [rows]; nodes: [rows,
// width], contiguous. A block for every group, row and `chunks` of 128 vectors (ops/keep_cuda.py).
#define SPECDEC_KEEP(name, V)                                                                                         \
  extern "C" __global__ void __launch_bounds__(kThreads)                                                              \
      name(V* slots, const int64_t* base, const int64_t* nodes, const int64_t* count, int64_t rows, int64_t width,    \
           int64_t chunks, int64_t vectors, int64_t group_stride, int64_t row_stride, int64_t slot_stride) {          \
    keep<V>(slots, base, nodes, count, rows, width, chunks, vectors, group_stride, row_stride, slot_stride);          \
  }

SPECDEC_KEEP(kv_keep_16, uint4)
SPECDEC_KEEP(kv_keep_8, uint64_t)
SPECDEC_KEEP(kv_keep_4, uint32_t)
SPECDEC_KEEP(kv_keep_2, uint16_t)
SPECDEC_KEEP(kv_keep_1, uint8_t)
