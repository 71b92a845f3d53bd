// Attention of nodes over the slots of a cache, in blocks of places.
//
// A place is a slot's rank among those that a node sees. Softmax and sum are made block by block and put together in the
// order of the blocks, so a node's result depends on what it sees alone: not on where the slots lie, on other nodes, or
// on who computes which block. Few nodes: threads share the blocks, which lie one behind the other in memory. Many:
// they share the nodes, and nothing has to be kept of a block.
#pragma once
#include "product.hpp"

namespace specdec {
namespace SPECDEC_ISA {

constexpr int64_t BLOCK = 32;  // places
static_assert(BLOCK % W == 0, "a block is whole vectors");
constexpr int64_t TOGETHER_NODES = 8;  // nodes that read a block while it is in the first-level cache

// What a node sees: all slots before `start`, then those of `tail`; `count` in all.
struct Seen {
    int64_t start, count;
    const int32_t* tail;
    int64_t slot(int64_t place) const { return place < start ? place : tail[place - start]; }
};

// The largest score and the sum of e^(score - largest) of some places.
struct Softmax {
    float top, total;
};

inline Seen see(const Call& call, int64_t at, int32_t* tail) {
    const int64_t row = at / call.nodes, node = at % call.nodes;
    if (call.mask == nullptr) return {call.length[row] + node + 1, call.length[row] + node + 1, tail};
    const int64_t begin = call.mask_start[row], start = begin < 0 ? 0 : least(begin, call.extent);
    const uint8_t* mask = call.mask + at * call.mask_width;
    int64_t count = 0;
    for (int64_t i = begin < 0 ? -begin : 0; i < call.mask_width && begin + i < call.extent; ++i)
        if (mask[i] || begin + i == call.slot_index[at]) tail[count++] = static_cast<int32_t>(begin + i);
    return {start, start + count, tail};
}

// p [Q, BLOCK] = scores of the places of a block for Q queries [Q, d]. Offsets beyond the last place repeat it. A score is
// the same bits whichever queries and places are computed with it.
template <int Q>
inline void score(const float* query, const float* keys, const int64_t* offsets, int64_t count, int64_t d, float* p) {
    for (int64_t first = 0; first < count; first += W) {
        F all[Q][W / 4];
        // Four places at a time keep sums and addresses in registers.
#pragma GCC unroll 1
        for (int i = 0; i < W; i += 4) {
            const int64_t* offset = offsets + first + i;
            const float* key[4] = {keys + offset[0], keys + offset[1], keys + offset[2], keys + offset[3]};
            F c[Q][4];
            for (int q = 0; q < Q; ++q)
                for (int j = 0; j < 4; ++j) c[q][j] = zero();
            int64_t k = 0;
            for (; k + W <= d; k += W) {
                F x[Q];
                for (int q = 0; q < Q; ++q) x[q] = load(query + q * d + k);
                for (int j = 0; j < 4; ++j) {
                    const F y = load(key[j] + k);
                    for (int q = 0; q < Q; ++q) c[q][j] = fma(x[q], y, c[q][j]);
                }
            }
            if (k < d)
                for (int j = 0; j < 4; ++j) {
                    const F y = load_tail(key[j] + k, d - k);
                    for (int q = 0; q < Q; ++q) c[q][j] = fma(load_tail(query + q * d + k, d - k), y, c[q][j]);
                }
            for (int q = 0; q < Q; ++q) all[q][i / 4] = fold(c[q]);
        }
        for (int q = 0; q < Q; ++q) store(p + q * BLOCK + first, join(all[q]));
    }
}

// Scores to e^(score - largest); those of places that are not there become zero.
inline Softmax softmax(float* p, int64_t count) {
    for (int64_t j = count; j < BLOCK; ++j) p[j] = -__builtin_inff();
    F largest = load(p);
    for (int64_t j = W; j < BLOCK; j += W) largest = max(largest, load(p + j));
    const float top = top_lane(largest);
    F total = zero();
    for (int64_t j = 0; j < BLOCK; j += W) {
        const F e = exp(sub(load(p + j), set1(top)));
        store(p + j, e);
        total = add(total, e);
    }
    return {top, sum(total)};
}

// out [Q, d] = the sum over places of p [Q, BLOCK] times values, V vectors of channels from `k` on.
template <int Q, int V>
inline void mix(const float* p, const float* values, const int64_t* offsets, int64_t count, int64_t k, int64_t d,
                float* out) {
    F c[Q][V];
    for (int q = 0; q < Q; ++q)
        for (int v = 0; v < V; ++v) c[q][v] = zero();
    for (int64_t j = 0; j < count; ++j) {
        const float* value = values + offsets[j] + k;
        F weight[Q];
        for (int q = 0; q < Q; ++q) weight[q] = broadcast(p + q * BLOCK + j);
        for (int v = 0; v < V; ++v) {
            const F y = load(value + v * W);
            for (int q = 0; q < Q; ++q) c[q][v] = fma(weight[q], y, c[q][v]);
        }
    }
    for (int q = 0; q < Q; ++q)
        for (int v = 0; v < V; ++v) store(out + q * d + k + v * W, c[q][v]);
}

template <int Q>
inline void mix_all(const float* p, const float* values, const int64_t* offsets, int64_t count, int64_t d, float* out) {
    int64_t k = 0;
    for (; k + 4 * W <= d; k += 4 * W) mix<Q, 4>(p, values, offsets, count, k, d, out);
    for (; k + W <= d; k += W) mix<Q, 1>(p, values, offsets, count, k, d, out);
    for (; k < d; ++k)
        for (int q = 0; q < Q; ++q) {
            float total = 0.0f;
            for (int64_t j = 0; j < count; ++j) total += p[q * BLOCK + j] * values[offsets[j] + k];
            out[q * d + k] = total;
        }
}

// One layer of one row of the cache, and how its slots are laid out.
struct Slots {
    const float *keys, *values;
    int64_t stride, d;
};

inline int64_t blocks_of(const Seen& seen) { return (seen.count + BLOCK - 1) / BLOCK; }

// Asks for floats `begin` .. `end` - 1 of the keys and values of a layer.
inline void prefetch_slots(const Slots& slots, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += 16) prefetch_far(slots.keys + i);
    for (int64_t i = begin; i < end; i += 16) prefetch_far(slots.values + i);
}

// One block for `queries` of one node that share a key-value head: out [queries, d], softmax [queries].
inline void attend_block(const Slots& slots, int64_t kv_head, const Seen& seen, int64_t block, const float* query,
                         int64_t queries, float* out, Softmax* softmaxes) {
    const int64_t begin = block * BLOCK, count = least(BLOCK, seen.count - begin), d = slots.d;
    const float *keys = slots.keys + kv_head * d, *values = slots.values + kv_head * d;
    int64_t offsets[BLOCK];
    for (int64_t i = 0; i < BLOCK; ++i) offsets[i] = seen.slot(begin + least(i, count - 1)) * slots.stride;
    alignas(64) float p[MAX_QUERIES * BLOCK];
    in_blocks<MAX_QUERIES>(queries, [&](int64_t first, auto size) {
        constexpr int Q = decltype(size)::value;
        score<Q>(query + first * d, keys, offsets, count, d, p);
        for (int q = 0; q < Q; ++q) softmaxes[first + q] = softmax(p + q * BLOCK, count);
        mix_all<Q>(p, values, offsets, count, d, out + first * d);
    });
}

// Takes a further block into a sum over blocks.
inline void merge(Softmax& whole, float* out, const Softmax& part, const float* other, int64_t d) {
    const float top = part.top > whole.top ? part.top : whole.top;
    alignas(64) float factors[W] = {whole.top - top, part.top - top};
    store(factors, exp(load(factors)));
    const F a = set1(factors[0]), b = set1(factors[1]);
    whole = {top, whole.total * factors[0] + part.total * factors[1]};
    int64_t k = 0;
    for (; k + W <= d; k += W) store(out + k, fma(load(other + k), b, mul(load(out + k), a)));
    for (; k < d; ++k) out[k] = out[k] * factors[0] + other[k] * factors[1];
}

inline void divide(float* out, float total, int64_t d) {
    const float factor = 1.0f / total;
    for (int64_t k = 0; k < d; ++k) out[k] *= factor;
}

}  // namespace SPECDEC_ISA
}  // namespace specdec
