// Products of rows with packed matrices, and the forms their inputs take.
#pragma once
#include <type_traits>

#include "interface.hpp"
#include "pool.hpp"
#include "simd.hpp"

namespace specdec {
namespace SPECDEC_ISA {

constexpr int PARTS = PANEL / W;
constexpr int TILE_ROWS = 64;      // rows of outputs held between a product and what follows it
// Channels whose weights stay in the first-level cache for the next rows. Sums of float32 are made chunk by chunk,
// which also keeps their rounding errors small.
constexpr int FLOAT_CHUNK = 128;
constexpr int INT_CHUNK = 512;
constexpr int GROUP = 32;          // channels whose weights share a scale in int8 and int4
constexpr int INPUT_GROUP = 16;    // channels whose inputs share one

inline int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }
inline int64_t panels_of(const Matrix& m) { return (m.out + PANEL - 1) / PANEL; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Inputs of a product: float32, and for int8 and int4 weights as integers; `stride` is in channels.
struct Input {
    const float* x;
    int64_t x_stride;
    int8_t* quantized;
    int64_t stride;
    // Per row and INPUT_GROUP channels: their scale, and where sums over `Bytes` start.
    float* scale;
    int32_t* start;
    float* sums;  // per row and GROUP channels: what the inputs, as quantized, add up to
    int64_t scale_stride() const { return stride / INPUT_GROUP; }
    int64_t sums_stride() const { return stride / GROUP; }
};

inline F load_tail(const float* p, int64_t count) {
    alignas(64) float buffer[W] = {};
    for (int64_t i = 0; i < count; ++i) buffer[i] = p[i];
    return load(buffer);
}

// The largest magnitude, or NaN where any value is not finite.
inline float magnitude(const float* x, int64_t count) {
    F largest = zero(), poison = zero();
    int64_t i = 0;
    for (; i + W <= count; i += W) {
        const F a = load(x + i);
        largest = max(largest, abs(a));
        poison = fma(a, zero(), poison);
    }
    if (i < count) {
        const F a = load_tail(x + i, count - i);
        largest = max(largest, abs(a));
        poison = fma(a, zero(), poison);
    }
    return top_lane(largest) + sum(poison);
}

// Below this an input is taken for zero: its reciprocal would not be finite.
constexpr float TINY = 1e-30f;

// Calls `put(place, integers)` for the values times `factor`, rounded; the last vector is filled up with zeros.
template <class Put>
inline void quantize(const float* x, int64_t count, float factor, Put put) {
    const F scale = set1(factor);
    int64_t i = 0;
    for (; i + W <= count; i += W) put(i, to_int(mul(load(x + i), scale)));
    if (i < count) put(i, to_int(mul(load_tail(x + i, count - i), scale)));
}

// Integers up to 127 with a scale for every INPUT_GROUP channels: outliers are a few channels, and what shares their scale
// is rounded with them. A scale for every 32 would save one instruction of eleven, and made the KL of SmolLM2-135M from
// its float32 0.0048 instead of 0.0031.
inline void quantize_row(const Input& in, int64_t row, int64_t count) {
    const float* x = in.x + row * in.x_stride;
    int8_t* q = in.quantized + row * in.stride;
    float *scale = in.scale + row * in.scale_stride(), *sums = in.sums + row * in.sums_stride();
    int32_t* start = in.start + row * in.scale_stride();
    for (int64_t k = 0; k < count; k += INPUT_GROUP) {
        const int64_t size = least(INPUT_GROUP, count - k), g = k / INPUT_GROUP;
        const float largest = magnitude(x + k, size);
        const bool usable = !(largest < TINY) && largest == largest;
        scale[g] = largest < TINY ? 0.0f : largest / 127.0f;
        I total = izero();
        quantize(x + k, size, usable ? 127.0f / largest : 0.0f, [&](int64_t i, I v) {
            store_int8(q + k + i, v);
            total = iadd(total, v);
        });
        const float sum_of_group = sum(to_float(total));
        start[g] = -OFFSET * static_cast<int32_t>(sum_of_group);
        const float value = scale[g] * sum_of_group;
        sums[k / GROUP] = k % GROUP == 0 ? value : sums[k / GROUP] + value;
    }
}

inline bool quantizes(const Matrix& m) { return m.format == INT8 || m.format == INT4; }

inline void prepare_row(const Matrix& m, const Input& in, int64_t row) {
    if (quantizes(m)) quantize_row(in, row, m.in);
}

struct Fp32 {
    using T = float;
    static F at(const T* p) { return load(p); }
};
struct Fp16 {
    using T = uint16_t;
    static F at(const T* p) { return load_fp16(p); }
};
struct Bf16 {
    using T = uint16_t;
    static F at(const T* p) { return load_bf16(p); }
};

// tile [R, 16] += x [R, k] w [k, 16]; the sum is one chain of fused multiply-adds per output, in the order of k.
template <class Weight, int R>
inline void micro_float(const typename Weight::T* w, int64_t k, const float* x, int64_t stride, float* tile) {
    F c[R][PARTS];
    for (int r = 0; r < R; ++r)
        for (int p = 0; p < PARTS; ++p) c[r][p] = zero();
    for (int64_t i = 0; i < k; ++i) {
        if (i * sizeof(*w) * PANEL % 64 == 0) prefetch_weights(w + i * PANEL);
        F a[PARTS];
        for (int p = 0; p < PARTS; ++p) a[p] = Weight::at(w + i * PANEL + p * W);
        for (int r = 0; r < R; ++r) {
            const F b = broadcast(x + r * stride + i);
            for (int p = 0; p < PARTS; ++p) c[r][p] = fma(a[p], b, c[r][p]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int p = 0; p < PARTS; ++p) {
            float* t = tile + r * PANEL + p * W;
            store(t, add(load(t), c[r][p]));
        }
}

// What `micro_int` must know of a format: `BYTES` of 4 channels of a panel, `SCALES` per output and GROUP.
struct Int8 {
    using T = int8_t;
    using Sum = I;
    static constexpr int BYTES = 4 * PANEL, SCALES = 1;
    static Bytes at(const T* p) { return load_bytes(p); }
    static Sum start(int32_t value) { return iset1(value); }
    static I sum(Sum c) { return c; }
};
struct Int4 {
    using T = uint8_t;
    using Sum = N;
    static constexpr int BYTES = 2 * PANEL, SCALES = 2;
    static Nibbles at(const T* p) { return load_nibbles(p); }
    static Sum start(int32_t) { return nzero(); }
    static I sum(Sum c) { return finish(c); }
};

// tile [R, 16] += the sum over `groups` groups of scale [16] * (q [R, 32] w [32, 16]), and for int4 of minimum [16] *
// sums [R]; the first product is of integers and exact. `scales [groups, SCALES, 16]`: scales, then minima.
template <class Weight, int R>
inline void micro_int(const typename Weight::T* w, int64_t groups, const Input& in, int64_t row, int64_t first,
                      const uint16_t* scales, float* tile) {
    constexpr int HALVES = GROUP / INPUT_GROUP;
    const int64_t scale_stride = in.scale_stride(), sums_stride = in.sums_stride();
    const int8_t* q = in.quantized + row * in.stride + first * GROUP;
    const float* input_scale = in.scale + row * scale_stride + first * HALVES;
    const int32_t* start = in.start + row * scale_stride + first * HALVES;
    const float* sums = in.sums + row * sums_stride + first;
    F total[R][PARTS];
    for (int r = 0; r < R; ++r)
        for (int p = 0; p < PARTS; ++p) total[r][p] = load(tile + r * PANEL + p * W);
    for (int64_t g = 0; g < groups; ++g) {
        F group[R][PARTS];
        for (int half = 0; half < HALVES; ++half) {
            typename Weight::Sum c[R][PARTS];
            for (int r = 0; r < R; ++r)
                for (int p = 0; p < PARTS; ++p) c[r][p] = Weight::start(start[r * scale_stride]);
            for (int i = 0; i < INPUT_GROUP / 4; ++i) {
                if (i * Weight::BYTES % 64 == 0) prefetch_weights(w);
                const auto a = Weight::at(w);
                for (int r = 0; r < R; ++r) {
                    const Quad b = broadcast_quad(q + r * in.stride + 4 * i);
                    for (int p = 0; p < PARTS; ++p) c[r][p] = dot4(c[r][p], a, p, b);
                }
                w += Weight::BYTES;
            }
            for (int r = 0; r < R; ++r) {
                const F s = broadcast(input_scale + r * scale_stride);
                for (int p = 0; p < PARTS; ++p) {
                    const F value = to_float(Weight::sum(c[r][p]));
                    group[r][p] = half == 0 ? mul(value, s) : fma(value, s, group[r][p]);
                }
            }
            q += INPUT_GROUP;
            ++input_scale;
            ++start;
        }
        for (int p = 0; p < PARTS; ++p) {
            const F s = load_fp16(scales + p * W);
            for (int r = 0; r < R; ++r) total[r][p] = fma(group[r][p], s, total[r][p]);
            if constexpr (Weight::SCALES == 2) {
                const F minimum = load_fp16(scales + PANEL + p * W);
                for (int r = 0; r < R; ++r)
                    total[r][p] = fma(minimum, broadcast(sums + r * sums_stride), total[r][p]);
            }
        }
        ++sums;
        scales += Weight::SCALES * PANEL;
    }
    for (int r = 0; r < R; ++r)
        for (int p = 0; p < PARTS; ++p) store(tile + r * PANEL + p * W, total[r][p]);
}

template <int LIMIT, int R = LIMIT>
struct Rows {
    template <class Function>
    static void call(int rows, Function function) {
        if (rows == R) function(std::integral_constant<int, R>());
        else if constexpr (R > 1) Rows<LIMIT, R - 1>::call(rows, function);
    }
};

// Calls `function(first, R)` for consecutive blocks of at most LIMIT rows, as even as possible.
template <int LIMIT, class Function>
inline void in_blocks(int64_t rows, Function function) {
    const int64_t blocks = (rows + LIMIT - 1) / LIMIT;
    const int64_t size = (rows + blocks - 1) / blocks;
    for (int64_t first = 0; first < rows; first += size)
        Rows<LIMIT>::call(static_cast<int>(least(size, rows - first)), [&](auto count) { function(first, count); });
}

template <class Weight>
inline void panel_float(const Matrix& m, int64_t panel, const Input& in, int64_t first, int64_t rows, float* tile) {
    const auto* w = static_cast<const typename Weight::T*>(m.data) + panel * m.columns * PANEL;
    for (int64_t k = 0; k < m.in; k += FLOAT_CHUNK)
        in_blocks<MAX_ROWS>(rows, [&](int64_t r, auto count) {
            micro_float<Weight, decltype(count)::value>(w + k * PANEL, least(FLOAT_CHUNK, m.in - k),
                                                        in.x + (first + r) * in.x_stride + k, in.x_stride,
                                                        tile + r * PANEL);
        });
}

template <class Weight>
inline void panel_int(const Matrix& m, int64_t panel, const Input& in, int64_t first, int64_t rows, float* tile) {
    constexpr int64_t TOGETHER = INT_CHUNK / GROUP, BYTES = GROUP / 4 * Weight::BYTES;
    const int64_t groups = m.columns / GROUP;
    const auto* w = static_cast<const typename Weight::T*>(m.data) + panel * groups * BYTES;
    const auto* scales = static_cast<const uint16_t*>(m.scales) + panel * groups * Weight::SCALES * PANEL;
    for (int64_t g = 0; g < groups; g += TOGETHER)
        in_blocks<MAX_ROWS_INT>(rows, [&](int64_t r, auto count) {
            micro_int<Weight, decltype(count)::value>(w + g * BYTES, least(TOGETHER, groups - g), in, first + r, g,
                                                      scales + g * Weight::SCALES * PANEL, tile + r * PANEL);
        });
}

// tile [rows, 16] = the outputs of one panel, bias included.
inline void panel_rows(const Matrix& m, int64_t panel, const Input& in, int64_t first, int64_t rows, float* tile) {
    for (int64_t i = 0; i < rows * PANEL; i += W) store(tile + i, zero());
    switch (m.format) {
        case FP32: panel_float<Fp32>(m, panel, in, first, rows, tile); break;
        case FP16: panel_float<Fp16>(m, panel, in, first, rows, tile); break;
        case BF16: panel_float<Bf16>(m, panel, in, first, rows, tile); break;
        case INT8: panel_int<Int8>(m, panel, in, first, rows, tile); break;
        default: panel_int<Int4>(m, panel, in, first, rows, tile);
    }
    if (m.bias != nullptr)
        for (int64_t r = 0; r < rows; ++r)
            for (int p = 0; p < PARTS; ++p) {
                float* t = tile + r * PANEL + p * W;
                store(t, add(load(t), load(m.bias + panel * PANEL + p * W)));
            }
}

template <class Done>
inline void one_panel(const Matrix& m, int64_t panel, const Input& in, int64_t rows, Done done) {
    alignas(64) float tile[TILE_ROWS * PANEL];
    for (int64_t first = 0; first < rows; first += TILE_ROWS) {
        const int64_t count = least(TILE_ROWS, rows - first);
        panel_rows(m, panel, in, first, count, tile);
        done(panel, first, count, tile);
    }
}

// All panels of `m`, shared among the team: `done(panel, first row, rows, tile)` receives the outputs.
template <class Done>
inline void product(Member& me, Work work, const Matrix& m, const Input& in, int64_t rows, Done done) {
    each(me, work, panels_of(m), [&](int64_t panel) { one_panel(m, panel, in, rows, done); });
}

// y [rows, out] gets, or has added to it, the outputs of a panel.
inline void put_tile(float* y, int64_t out, int64_t panel, int64_t first, int64_t rows, const float* tile, bool adds) {
    const int64_t begin = panel * PANEL, count = least(PANEL, out - begin);
    for (int64_t r = 0; r < rows; ++r) {
        float* target = y + (first + r) * out + begin;
        const float* t = tile + r * PANEL;
        if (count == PANEL) {
            for (int p = 0; p < PARTS; ++p) {
                const F value = load(t + p * W);
                store(target + p * W, adds ? add(load(target + p * W), value) : value);
            }
        } else {
            for (int64_t i = 0; i < count; ++i) target[i] = adds ? target[i] + t[i] : t[i];
        }
    }
}

// Cuts a block of memory into aligned arrays; with a null base it only measures.
struct Cutter {
    char* base;
    std::size_t used = 0;
    template <class T>
    T* take(int64_t count) {
        T* result = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
        // 64 bytes of slack: vectors may write past a row's end.
        used = static_cast<std::size_t>(round_up(static_cast<int64_t>(used + sizeof(T) * count + 64), 64));
        return result;
    }
};

inline Input take_input(Cutter& cutter, int64_t rows, int64_t columns) {
    Input in{};
    in.stride = round_up(columns, 64);
    in.quantized = cutter.take<int8_t>(rows * in.stride);
    in.scale = cutter.take<float>(rows * in.scale_stride());
    in.start = cutter.take<int32_t>(rows * in.scale_stride());
    in.sums = cutter.take<float>(rows * in.sums_stride());
    return in;
}

// Channels between the last input and the matrix' padded columns have weight zero; what they are multiplied with must be
// a number, and their sums must start at zero.
inline void clear_input(const Input& in, int64_t rows) {
    std::memset(in.quantized, 0, static_cast<std::size_t>(rows * in.stride));
    std::memset(in.scale, 0, static_cast<std::size_t>(rows * in.scale_stride()) * sizeof(float));
    std::memset(in.start, 0, static_cast<std::size_t>(rows * in.scale_stride()) * sizeof(int32_t));
    std::memset(in.sums, 0, static_cast<std::size_t>(rows * in.sums_stride()) * sizeof(float));
}

struct LinearCall {
    const Matrix* matrix;
    Input in;
    int64_t rows;
    float* y;
};

inline void linear_body(void* context, Member& me) {
    const LinearCall& call = *static_cast<const LinearCall*>(context);
    if (quantizes(*call.matrix))
        each(me, PREPARE, call.rows, [&](int64_t row) { prepare_row(*call.matrix, call.in, row); });
    const auto put = [&](int64_t panel, int64_t first, int64_t rows, const float* tile) {
        put_tile(call.y, call.matrix->out, panel, first, rows, tile, false);
    };
    product(me, OUT, *call.matrix, call.in, call.rows, put);
}

inline int32_t linear(const Matrix& matrix, const float* x, int64_t rows, float* y, int threads) {
    lock_region();
    Cutter size{nullptr};
    take_input(size, rows, matrix.columns);
    Cutter cutter{static_cast<char*>(workspace(size.used))};
    if (cutter.base == nullptr) {
        unlock_region();
        return NO_MEMORY;
    }
    LinearCall call{&matrix, take_input(cutter, rows, matrix.columns), rows, y};
    call.in.x = x;
    call.in.x_stride = matrix.in;
    if (quantizes(matrix)) clear_input(call.in, rows);
    run_parallel(threads, 2, linear_body, &call);
    unlock_region();
    return NONE;
}

}  // namespace SPECDEC_ISA
}  // namespace specdec
