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
constexpr int GROUP = 32;          // channels that share a scale in int8b and int4

inline int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }
inline int64_t panels_of(const Matrix& m) { return (m.out + PANEL - 1) / PANEL; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Inputs of a product, in the form its format wants; `stride` is in elements of each form.
struct Input {
    const float* x;
    int64_t x_stride;
    int16_t* quantized;  // int8 and int8b weights
    int8_t* groups;      // int4 weights
    int64_t stride;
    float* scale;        // per row, or per row and group for int4
    float* sums;         // per row and group: what the group's inputs, as quantized, add up to
    int64_t group_stride;
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

// One scale for the row, integers up to 32767: products of int16 cost what products of int8 do where there is no
// instruction for the latter, and 512 of them with weights up to 127 fit into an int32.
inline void quantize_row_int16(const float* x, int64_t count, int16_t* q, float* scale) {
    const float largest = magnitude(x, count);
    const bool usable = !(largest < TINY) && largest == largest;
    *scale = largest < TINY ? 0.0f : largest / 32767.0f;
    quantize(x, count, usable ? 32767.0f / largest : 0.0f, [&](int64_t i, I v) { store_int16(q + i, v); });
}

inline void quantize_row_groups(const float* x, int64_t count, int8_t* q, float* scale, float* sums) {
    for (int64_t g = 0; g * GROUP < count; ++g) {
        const float* part = x + g * GROUP;
        const int64_t size = least(GROUP, count - g * GROUP);
        const float largest = magnitude(part, size);
        const bool usable = !(largest < TINY) && largest == largest;
        scale[g] = largest < TINY ? 0.0f : largest / 127.0f;
        I total = izero();
        quantize(part, size, usable ? 127.0f / largest : 0.0f, [&](int64_t i, I v) {
            store_int8(q + g * GROUP + i, v);
            total = iadd(total, v);
        });
        sums[g] = scale[g] * sum(to_float(total));
    }
}

inline void prepare_row(const Matrix& m, const Input& in, int64_t row) {
    const float* x = in.x + row * in.x_stride;
    if (m.format == INT8 || m.format == INT8B)
        quantize_row_int16(x, m.in, in.quantized + row * in.stride, in.scale + row * in.group_stride);
    if (m.format == INT4)
        quantize_row_groups(x, m.in, in.groups + row * in.stride, in.scale + row * in.group_stride,
                            in.sums + row * in.group_stride);
}

inline bool quantizes(const Matrix& m) { return m.format == INT8 || m.format == INT8B || m.format == INT4; }

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

// The scales of int8 (per output) and int8b (per output and group).
inline F load_scale(const float* p) { return load(p); }
inline F load_scale(const uint16_t* p) { return load_fp16(p); }

// tile [R, 16] += scale [16] * (q [R, 2 pairs] w [2 pairs, 16]); the sum in brackets is exact.
template <int R, class Scale>
inline void micro_int8(const int8_t* w, int64_t pairs, const int16_t* q, int64_t stride, const Scale* scale,
                       float* tile) {
    I c[R][PARTS];
    for (int r = 0; r < R; ++r)
        for (int p = 0; p < PARTS; ++p) c[r][p] = izero();
    for (int64_t i = 0; i < pairs; ++i) {
        if (i % 2 == 0) prefetch_weights(w + i * 2 * PANEL);
        H a[PARTS];
        for (int p = 0; p < PARTS; ++p) a[p] = load_pairs(w + i * 2 * PANEL + p * 2 * W);
        for (int r = 0; r < R; ++r) {
            const H b = broadcast_pair(q + r * stride + 2 * i);
            for (int p = 0; p < PARTS; ++p) c[r][p] = dot2(c[r][p], a[p], b);
        }
    }
    for (int p = 0; p < PARTS; ++p) {
        const F s = load_scale(scale + p * W);
        for (int r = 0; r < R; ++r) {
            float* t = tile + r * PANEL + p * W;
            store(t, fma(to_float(c[r][p]), s, load(t)));
        }
    }
}

// Groups of 32 channels, whose weights are scale * (0 .. 15) + minimum; `affine [groups, 2, 16]`: scales, then minima.
template <int R>
inline void micro_int4(const uint8_t* w, int64_t groups, const int8_t* q, int64_t stride, const uint16_t* affine,
                       const float* scale, const float* sums, int64_t group_stride, float* tile) {
    F total[R][PARTS];
    for (int r = 0; r < R; ++r)
        for (int p = 0; p < PARTS; ++p) total[r][p] = load(tile + r * PANEL + p * W);
    for (int64_t g = 0; g < groups; ++g) {
        N c[R][PARTS];
        for (int r = 0; r < R; ++r)
            for (int p = 0; p < PARTS; ++p) c[r][p] = nzero();
#pragma GCC unroll 1
        for (int i = 0; i < GROUP / 4; ++i) {
            if (i % 2 == 0) prefetch_weights(w + i * 2 * PANEL);
            const Nibbles a = load_nibbles(w + i * 2 * PANEL);
            for (int r = 0; r < R; ++r) {
                const Quad b = broadcast_quad(q + r * stride + 4 * i);
                for (int p = 0; p < PARTS; ++p) c[r][p] = dot4(c[r][p], a, p, b);
            }
        }
        for (int p = 0; p < PARTS; ++p) {
            const F s = load_fp16(affine + p * W), minimum = load_fp16(affine + PANEL + p * W);
            for (int r = 0; r < R; ++r) {
                const F factor = mul(s, set1(scale[r * group_stride + g]));
                const F above = fma(to_float(finish(c[r][p])), factor, total[r][p]);
                total[r][p] = fma(minimum, set1(sums[r * group_stride + g]), above);
            }
        }
        w += GROUP * PANEL / 2;
        q += GROUP;
        affine += 2 * PANEL;
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

template <class Scale>
inline void panel_int8(const Matrix& m, int64_t panel, const Input& in, int64_t first, int64_t rows, float* tile) {
    constexpr bool GROUPED = std::is_same<Scale, uint16_t>::value;
    constexpr int64_t SIZE = GROUPED ? GROUP : INT_CHUNK;
    const int64_t groups = GROUPED ? m.columns / GROUP : 1;
    const auto* w = static_cast<const int8_t*>(m.data) + panel * m.columns * PANEL;
    const auto* scales = static_cast<const Scale*>(m.scales) + panel * groups * PANEL;
    for (int64_t k = 0; k < m.columns; k += INT_CHUNK)
        in_blocks<MAX_ROWS_INT>(rows, [&](int64_t r, auto count) {
            for (int64_t b = k; b < least(k + INT_CHUNK, m.columns); b += SIZE)
                micro_int8<decltype(count)::value>(w + b * PANEL, least(SIZE, m.columns - b) / 2,
                                                   in.quantized + (first + r) * in.stride + b, in.stride,
                                                   scales + (GROUPED ? b / SIZE * PANEL : 0), tile + r * PANEL);
        });
    for (int64_t r = 0; r < rows; ++r) {
        const F s = set1(in.scale[(first + r) * in.group_stride]);
        for (int p = 0; p < PARTS; ++p) store(tile + r * PANEL + p * W, mul(s, load(tile + r * PANEL + p * W)));
    }
}

inline void panel_int4(const Matrix& m, int64_t panel, const Input& in, int64_t first, int64_t rows, float* tile) {
    const auto* w = static_cast<const uint8_t*>(m.data) + panel * m.columns * PANEL / 2;
    const int64_t groups = m.columns / GROUP;
    const auto* scales = static_cast<const uint16_t*>(m.scales) + panel * groups * 2 * PANEL;
    for (int64_t g = 0; g < groups; g += INT_CHUNK / GROUP)
        in_blocks<MAX_ROWS_INT>(rows, [&](int64_t r, auto count) {
            micro_int4<decltype(count)::value>(
                w + g * GROUP * PANEL / 2, least(INT_CHUNK / GROUP, groups - g),
                in.groups + (first + r) * in.stride + g * GROUP, in.stride, scales + g * 2 * PANEL,
                in.scale + (first + r) * in.group_stride + g, in.sums + (first + r) * in.group_stride + g,
                in.group_stride, tile + r * PANEL);
        });
}

// tile [rows, 16] = the outputs of one panel, bias included.
inline void panel_rows(const Matrix& m, int64_t panel, const Input& in, int64_t first, int64_t rows, float* tile) {
    for (int64_t i = 0; i < rows * PANEL; i += W) store(tile + i, zero());
    switch (m.format) {
        case FP32: panel_float<Fp32>(m, panel, in, first, rows, tile); break;
        case FP16: panel_float<Fp16>(m, panel, in, first, rows, tile); break;
        case BF16: panel_float<Bf16>(m, panel, in, first, rows, tile); break;
        case INT8: panel_int8<float>(m, panel, in, first, rows, tile); break;
        case INT8B: panel_int8<uint16_t>(m, panel, in, first, rows, tile); break;
        default: panel_int4(m, panel, in, first, rows, tile);
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
inline void product(Member& me, const Matrix& m, const Input& in, int64_t rows, Done done) {
    each(me, panels_of(m), [&](int64_t panel) { one_panel(m, panel, in, rows, done); });
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
    in.group_stride = in.stride / GROUP;
    in.quantized = cutter.take<int16_t>(rows * in.stride);
    in.groups = reinterpret_cast<int8_t*>(in.quantized);
    in.scale = cutter.take<float>(rows * in.group_stride);
    in.sums = cutter.take<float>(rows * in.group_stride);
    return in;
}

inline void clear_input(const Input& in, int64_t rows) {
    std::memset(in.quantized, 0, static_cast<std::size_t>(rows * in.stride) * sizeof(int16_t));
}

struct LinearCall {
    const Matrix* matrix;
    Input in;
    int64_t rows;
    float* y;
};

inline void linear_body(void* context, Member& me) {
    const LinearCall& call = *static_cast<const LinearCall*>(context);
    if (quantizes(*call.matrix)) each(me, call.rows, [&](int64_t row) { prepare_row(*call.matrix, call.in, row); });
    product(me, *call.matrix, call.in, call.rows, [&](int64_t panel, int64_t first, int64_t rows, const float* tile) {
        put_tile(call.y, call.matrix->out, panel, first, rows, tile, false);
    });
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
