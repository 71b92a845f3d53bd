// What a core can do at most: the instructions of a product on data in the first-level cache, without scales or stores,
// and reading memory. `cpu_profile.py` compiles it for one instruction set.
#include <cstddef>

#include "product.hpp"

using namespace specdec;
using namespace specdec::SPECDEC_ISA;

// Weights of 256 channels of a panel, inputs of as many rows as the kernels take at a time.
constexpr int64_t CHANNELS = 256;
alignas(64) static char weights[CHANNELS * PANEL * sizeof(float)];
alignas(64) static char inputs[8 * CHANNELS * sizeof(float)];
static volatile float sink;

// Nothing read before may be kept in a register.
static inline void forget() { asm volatile("" ::: "memory"); }

template <class Weight>
static void floats() {
    const auto* w = reinterpret_cast<const typename Weight::T*>(weights);
    const auto* x = reinterpret_cast<const float*>(inputs);
    F c[MAX_ROWS][PARTS];
    for (auto& row : c)
        for (F& sum : row) sum = zero();
    for (int64_t k = 0; k < CHANNELS; ++k) {
        F a[PARTS];
        for (int p = 0; p < PARTS; ++p) a[p] = Weight::at(w + k * PANEL + p * W);
        for (int r = 0; r < MAX_ROWS; ++r) {
            const F b = broadcast(x + r * CHANNELS + k);
            for (int p = 0; p < PARTS; ++p) c[r][p] = fma(a[p], b, c[r][p]);
        }
    }
    F all = zero();
    for (auto& row : c)
        for (F& sum : row) all = add(all, sum);
    sink = sum(all);
}

template <class Weight>
static void integers() {
    const auto* w = reinterpret_cast<const typename Weight::T*>(weights);
    const auto* q = reinterpret_cast<const int8_t*>(inputs);
    typename Weight::Sum c[MAX_ROWS_INT][PARTS];
    for (auto& row : c)
        for (auto& sum : row) sum = Weight::start(0);
    for (int64_t k = 0; k < CHANNELS; k += 4) {
        const auto a = Weight::at(w + k / 4 * Weight::BYTES);
        for (int r = 0; r < MAX_ROWS_INT; ++r) {
            const Quad b = broadcast_quad(q + r * CHANNELS + k);
            for (int p = 0; p < PARTS; ++p) c[r][p] = dot4(c[r][p], a, p, b);
        }
    }
    F all = zero();
    for (auto& row : c)
        for (auto& sum : row) all = add(all, to_float(Weight::sum(sum)));
    sink = sum(all);
}

extern "C" {

// Multiply-adds of `rounds` repetitions with weights of `format`.
int64_t peak(int32_t format, int64_t rounds) {
    for (int64_t i = 0; i < rounds; ++i) {
        switch (format) {
            case FP32: floats<Fp32>(); break;
            case FP16: floats<Fp16>(); break;
            case BF16: floats<Bf16>(); break;
            case INT8: integers<Int8>(); break;
            default: integers<Int4>();
        }
        forget();
    }
    return rounds * CHANNELS * PANEL * (format < INT8 ? MAX_ROWS : MAX_ROWS_INT);
}

// Reads `count` floats, with the prefetches of the products.
void read_memory(const float* p, int64_t count) {
    F c[4] = {zero(), zero(), zero(), zero()};
    for (int64_t i = 0; i + 4 * W <= count; i += 4 * W) {
        for (int64_t at = 0; at < 4 * W; at += 16) prefetch_weights(p + i + at);
        for (int j = 0; j < 4; ++j) c[j] = add(c[j], load(p + i + j * W));
    }
    sink = sum(add(add(c[0], c[1]), add(c[2], c[3])));
}

}  // extern "C"
