// Moves the kept slots of every group and row to the front, in place; the definition is ops/keep.py.
//
// A thread owns one vector of a slot and walks the kept nodes in ascending order. Node i of a path in topological
// order is at least i, so a store to place i never hits a node that is still to be read: node j > i lies past i. That
// is why a batch may be loaded before any of it is stored, which is what keeps the memory busy.
#include "common.cuh"

namespace {

constexpr int kBatch = 8;
constexpr int kThreads = 128;

// Strides are in vectors of type V.
template <typename V>
__global__ void __launch_bounds__(kThreads)
    kv_keep(V* __restrict__ slots, const int64_t* __restrict__ base, const int64_t* __restrict__ nodes,
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

template <typename V>
cudaError_t launch(void* slots, const int64_t* base, const int64_t* nodes, const int64_t* count, int64_t groups,
                   int64_t rows, int64_t width, int64_t bytes, int64_t group_stride, int64_t row_stride,
                   int64_t slot_stride, cudaStream_t stream) {
  const int64_t size = sizeof(V);
  const int64_t chunks = (bytes / size + kThreads - 1) / kThreads;
  const int64_t blocks = groups * rows * chunks;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  kv_keep<V><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
      static_cast<V*>(slots), base, nodes, count, rows, width, chunks, bytes / size, group_stride / size,
      row_stride / size, slot_stride / size);
  return cudaGetLastError();
}

}  // namespace

// slots: groups x rows x c slots of `bytes` bytes each, their strides in bytes; base, count: [rows]; nodes: [rows,
// width], contiguous.
SPECDEC_API int specdec_kv_keep(void* slots, const int64_t* base, const int64_t* nodes, const int64_t* count,
                                int64_t groups, int64_t rows, int64_t width, int64_t bytes, int64_t group_stride,
                                int64_t row_stride, int64_t slot_stride, cudaStream_t stream) {
  if (groups * rows * width * bytes == 0) return cudaSuccess;
  // The widest vector that address, size and strides are multiples of.
  const uint64_t all = reinterpret_cast<uint64_t>(slots) | bytes | group_stride | row_stride | slot_stride;
  const auto run = all % 16 == 0  ? launch<uint4>
                   : all % 8 == 0 ? launch<uint64_t>
                   : all % 4 == 0 ? launch<uint32_t>
                   : all % 2 == 0 ? launch<uint16_t>
                                  : launch<uint8_t>;
  return run(slots, base, nodes, count, groups, rows, width, bytes, group_stride, row_stride, slot_stride, stream);
}
