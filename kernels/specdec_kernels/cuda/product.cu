// A linear layer over a few rows with what stands around it (ops/product.py), as fast as its weights arrive.
//
// A block makes 16 outputs for all rows. Its warps share the inputs, 32 at a time in turn, and their partial sums are
// added in the order of the warps. The weights are the A operand of m16n8k16 and the rows of x are B, so 8 rows cost no
// more than one. A product of sums may take its inputs in any order as long as both operands take the same, so a thread
// loads 16 neighbouring bytes of a row and feeds them to two instructions: nothing goes through shared memory.
//
// Each row of x is a column of its own in every instruction, so its result is the same bits whatever the number of rows
// and whatever stands in the others.
//
// On sm_90 the launch may begin while the kernel before it still runs: weights do not depend on it, so the first batch
// of them is asked for before waiting.
#include "half.cuh"

namespace {

constexpr int kOutputs = 16;
constexpr int kStep = 32;  // inputs of a warp at a time: 8 of each thread of a quad
constexpr int kBatch = 4;  // steps whose weights are asked for together

struct Arguments {
  const void* x;
  const void* weight;
  const void* bias;
  const void* norm;
  const void* residual;
  void* out;
  int64_t rows, outputs, inputs;
  float eps;
};

// The L2 cache fetches 256 bytes at a time, which is what the other warps of the block ask for next: memory delivers
// neighbouring lines faster together.
__device__ __forceinline__ uint4 load_weight(const void* at) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(at));
  return v;
}

// x times the norm's weights, rounded as the operand must be; the squares of x are added to `squares`.
template <typename T>
__device__ __forceinline__ uint4 weighted(uint4 x, uint4 norm, float& squares) {
  T* taken = reinterpret_cast<T*>(&x);
  const T* scales = reinterpret_cast<const T*>(&norm);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float v = wide(taken[i]);
    squares += v * v;
    narrow(v * wide(scales[i]), &taken[i]);
  }
  return x;
}

template <typename T, typename Out, int WARPS, int TILES, bool GATED, bool NORM>
__device__ __forceinline__ void product(const Arguments& a) {
  constexpr int kSides = GATED ? 2 : 1;
  constexpr int kColumns = TILES * 8;
  __shared__ float parts[WARPS][kSides][kOutputs][kColumns];
  __shared__ float squared[NORM ? WARPS : 1][NORM ? kColumns : 1];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kOutputs;
  const T* weight = static_cast<const T*>(a.weight);
  const T* x = static_cast<const T*>(a.x);
  const uint4 none = make_uint4(0, 0, 0, 0);

  // The rows of the weight that this thread reads, and whether they are there.
  const T* line[kSides][2];
  bool there[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t output = first + group + 8 * half;
    there[half] = output < a.outputs;
#pragma unroll
    for (int side = 0; side < kSides; ++side) line[side][half] = weight + (side * a.outputs + output) * a.inputs;
  }

  float sums[kSides][TILES][4] = {};
  float squares[TILES] = {};
  const int64_t stride = static_cast<int64_t>(WARPS) * kStep;
  bool waited = false;
  for (int64_t begin = static_cast<int64_t>(warp) * kStep; begin < a.inputs || !waited; begin += stride * kBatch) {
    uint4 w[kBatch][kSides][2];
#pragma unroll
    for (int step = 0; step < kBatch; ++step) {
      const int64_t place = begin + step * stride + quad * 8;
#pragma unroll
      for (int side = 0; side < kSides; ++side)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          w[step][side][half] = there[half] && place < a.inputs ? load_weight(line[side][half] + place) : none;
    }
    if (!waited) {
      follow();
      waited = true;
    }
#pragma unroll
    for (int step = 0; step < kBatch; ++step) {
      const int64_t place = begin + step * stride + quad * 8;
      uint4 scales = none;
      if (NORM && place < a.inputs) scales = *reinterpret_cast<const uint4*>(static_cast<const T*>(a.norm) + place);
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) {
        const int64_t row = tile * 8 + group;
        uint4 taken = none;
        // Not through the read-only path: the kernel before this one may still have been writing when it began.
        if (row < a.rows && place < a.inputs) taken = __ldcg(reinterpret_cast<const uint4*>(x + row * a.inputs + place));
        if (NORM) taken = weighted<T>(taken, scales, squares[tile]);
#pragma unroll
        for (int side = 0; side < kSides; ++side) {
          const uint4 low = w[step][side][0], high = w[step][side][1];
          multiply(sums[side][tile], low.x, high.x, low.y, high.y, taken.x, taken.y, T());
          multiply(sums[side][tile], low.z, high.z, low.w, high.w, taken.z, taken.w, T());
        }
      }
    }
  }

#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
    for (int side = 0; side < kSides; ++side)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        parts[warp][side][group + 8 * (i / 2)][tile * 8 + quad * 2 + i % 2] = sums[side][tile][i];
    if (NORM) {
      float all = squares[tile];
      all += __shfl_xor_sync(~0u, all, 1);
      all += __shfl_xor_sync(~0u, all, 2);
      if (quad == 0) squared[warp][tile * 8 + group] = all;
    }
  }
  __syncthreads();

  for (int cell = threadIdx.x; cell < kOutputs * kColumns; cell += WARPS * 32) {
    const int64_t row = cell / kOutputs;
    const int local = cell % kOutputs;
    const int64_t output = first + local;
    if (row >= a.rows || output >= a.outputs) continue;
    float made[kSides] = {};
    float all = 0;
#pragma unroll
    for (int part = 0; part < WARPS; ++part) {
#pragma unroll
      for (int side = 0; side < kSides; ++side) made[side] += parts[part][side][local][row];
      if (NORM) all += squared[part][row];
    }
    const float scale = NORM ? rsqrtf(all / static_cast<float>(a.inputs) + a.eps) : 1.0f;
#pragma unroll
    for (int side = 0; side < kSides; ++side) {
      made[side] *= scale;
      if (a.bias) made[side] += wide(static_cast<const T*>(a.bias)[side * a.outputs + output]);
    }
    float value = made[0];
    if (GATED) value = value / (1.0f + expf(-value)) * made[kSides - 1];
    if (a.residual) value += wide(static_cast<const T*>(a.residual)[row * a.outputs + output]);
    narrow(value, static_cast<Out*>(a.out) + row * a.outputs + output);
  }
}

}  // namespace

// x [rows, inputs], weight [outputs or 2 outputs, inputs], bias, norm [inputs], residual and out [rows, outputs], all
// contiguous, 16-byte aligned and of one 16-bit type but for `out`, which may be float32. inputs % 8 == 0. A block for
// every 16 outputs. A kernel's name says its types, warps a block, tiles of 8 rows and parts (ops/product_cuda.py).
#define SPECDEC_KERNEL(name, T, Out, WARPS, TILES, GATED, NORM)                                                       \
  extern "C" __global__ void __launch_bounds__(WARPS * 32) name(const Arguments a) {                                  \
    product<T, Out, WARPS, TILES, GATED, NORM>(a);                                                                    \
  }
#define SPECDEC_PARTS(name, T, Out, WARPS, TILES)                                                                     \
  SPECDEC_KERNEL(name, T, Out, WARPS, TILES, false, false)                                                            \
  SPECDEC_KERNEL(name##_norm, T, Out, WARPS, TILES, false, true)                                                      \
  SPECDEC_KERNEL(name##_gated, T, Out, WARPS, TILES, true, false)                                                     \
  SPECDEC_KERNEL(name##_gated_norm, T, Out, WARPS, TILES, true, true)
#define SPECDEC_SHAPES(name, T, Out)                                                                                  \
  SPECDEC_PARTS(name##_8_1, T, Out, 8, 1)                                                                             \
  SPECDEC_PARTS(name##_8_2, T, Out, 8, 2)                                                                             \
  SPECDEC_PARTS(name##_16_1, T, Out, 16, 1)                                                                           \
  SPECDEC_PARTS(name##_16_2, T, Out, 16, 2)                                                                           \
  SPECDEC_KERNEL(name##_32_1, T, Out, 32, 1, false, false)                                                            \
  SPECDEC_KERNEL(name##_32_2, T, Out, 32, 2, false, false)

SPECDEC_SHAPES(product_float16_float16, __half, __half)
SPECDEC_SHAPES(product_float16_float32, __half, float)
SPECDEC_SHAPES(product_bfloat16_bfloat16, __nv_bfloat16, __nv_bfloat16)
SPECDEC_SHAPES(product_bfloat16_float32, __nv_bfloat16, float)
