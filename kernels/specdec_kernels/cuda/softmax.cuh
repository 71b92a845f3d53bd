// Attention to 16 slots at a time on the tensor cores: what a new highest score does to weights that are not yet divided.
#pragma once
#include "half.cuh"

namespace {

// How much a part of a sum counts whose softmax is relative to `top`, when all are put relative to `raised`; both are
// powers of two.
__device__ __forceinline__ float fade_of(float top, float raised) {
  return top == -INFINITY ? 0.0f : exp2f(top - raised);
}

// Scores of one row (`side`) become weights, which are added up, relative to the row's highest score; `raised` is that of
// the thread's own. Returns how much what was summed before counts.
__device__ __forceinline__ float weigh(float (&scores)[2][4], int side, float raised, float& highest, float& weight) {
  raised = fmaxf(raised, __shfl_xor_sync(~0u, raised, 1));
  raised = fmaxf(raised, __shfl_xor_sync(~0u, raised, 2));
  // A query that has seen nothing yet: any finite reference gives it weights of exactly 0.
  const float reference = raised == -INFINITY ? 0.0f : raised;
  const float fade = exp2f(highest - reference);
  weight *= fade;
#pragma unroll
  for (int eight = 0; eight < 2; ++eight)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float& score = scores[eight][side * 2 + i];
      score = exp2f(score - reference);
      weight += score;
    }
  highest = raised;
  return fade;
}

// What a channel of 16 slots' values adds to a sum, which fades first. A thread holds 8 channels of four slots: `v0` and
// `v1` are two neighbours of the first eight slots, `v2` and `v3` of the last eight.
template <typename T>
__device__ __forceinline__ void mix(float (&sum)[4], const float (&fade)[2], const float (&weights)[2][4],
                                    const uint4& v0, const uint4& v1, const uint4& v2, const uint4& v3, int channel) {
  sum[0] *= fade[0], sum[1] *= fade[0], sum[2] *= fade[1], sum[3] *= fade[1];
  const uint32_t pick = channel % 2 ? 0x7632 : 0x5410;
  const uint32_t low = __byte_perm(word(v0, channel / 2), word(v1, channel / 2), pick);
  const uint32_t high = __byte_perm(word(v2, channel / 2), word(v3, channel / 2), pick);
  multiply(sum, pack(weights[0][0], weights[0][1], T()), pack(weights[0][2], weights[0][3], T()),
           pack(weights[1][0], weights[1][1], T()), pack(weights[1][2], weights[1][3], T()), low, high, T());
}

}  // namespace
