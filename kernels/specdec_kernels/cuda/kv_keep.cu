// Moves the kept slots of every group and row to the front, in place; the definition is ops/keep.py.
//
// A block owns some vectors of every slot and walks the kept nodes in ascending order, a run at a time: each of its
// lanes asks for kBatch nodes of the run, and none is stored before all have come. Node i of a path in topological
// order is at least i, so what a run stores is past what is still to be read: node j > i lies past i.
#include "common.cuh"

namespace {

constexpr int kThreads = 256;
constexpr int kBatch = 4;
constexpr int kMostLanes = 8;

template <typename V>
__device__ __forceinline__ void keep(
    V* __restrict__ slots, const int64_t* __restrict__ base, const int64_t* __restrict__ nodes,
    const int64_t* __restrict__ count, int64_t rows, int64_t width, int64_t chunks, int64_t across, int64_t vectors,
    int64_t group_stride, int64_t row_stride, int64_t slot_stride) {
  __shared__ int32_t steps[kMostLanes * kBatch];
  const uint32_t chunk = blockIdx.x % static_cast<uint32_t>(chunks), pair = blockIdx.x / static_cast<uint32_t>(chunks);
  const uint32_t row = pair % static_cast<uint32_t>(rows), group = pair / static_cast<uint32_t>(rows);
  // Powers of two.
  const int bits = 31 - __clz(static_cast<int>(across)), lanes = kThreads >> bits, run = lanes * kBatch;
  const int thread = static_cast<int>(threadIdx.x), lane = thread >> bits;
  const int64_t vector = chunk * across + (thread & (static_cast<int>(across) - 1));
  // How many slots forward the thread's node of a run comes from. The first are asked for before how many are kept is
  // known, so that both come together.
  const auto step_of = [&](int64_t place) {
    return thread < run && place < width ? static_cast<int32_t>(nodes[row * width + place] - place) : 0;
  };
  int32_t ahead = step_of(thread);
  const int64_t kept = min(count[row], width), mine = vector < vectors ? kept : 0;
  V* to = slots + group * group_stride + row * row_stride + (base[row] + lane) * slot_stride + vector;
  const int64_t next = lanes * slot_stride;
#pragma unroll 1
  for (int64_t first = 0; first < kept; first += run, to += kBatch * next) {
    if (thread < run) steps[thread] = ahead;
    __syncthreads();
    int32_t step[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) step[i] = first + i * lanes + lane < mine ? steps[i * lanes + lane] : 0;
    V held[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      if (step[i]) held[i] = to[i * next + step[i] * slot_stride];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      if (step[i]) to[i * next] = held[i];
    ahead = step_of(first + run + thread);
  }
}

}  // namespace

// slots: groups x rows x c slots of `vectors` vectors of type V, strides in vectors; base, count: [rows]; nodes: [rows,
// width], contiguous. A block for every group, row and `chunks` of `across` vectors, a power of two from 32 to 256
// (ops/keep_cuda.py).
#define SPECDEC_KEEP(name, V)                                                                                      \
  extern "C" __global__ void __launch_bounds__(kThreads)                                                           \
      name(V* slots, const int64_t* base, const int64_t* nodes, const int64_t* count, int64_t rows, int64_t width, \
           int64_t chunks, int64_t across, int64_t vectors, int64_t group_stride, int64_t row_stride,              \
           int64_t slot_stride) {                                                                                  \
    keep<V>(slots, base, nodes, count, rows, width, chunks, across, vectors, group_stride, row_stride,             \
            slot_stride);                                                                                          \
  }

SPECDEC_KEEP(kv_keep_16, uint4)
SPECDEC_KEEP(kv_keep_8, uint64_t)
SPECDEC_KEEP(kv_keep_4, uint32_t)
SPECDEC_KEEP(kv_keep_2, uint16_t)
SPECDEC_KEEP(kv_keep_1, uint8_t)
