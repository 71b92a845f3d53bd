// All kernels, compiled once per instruction set: the including file defines SPECDEC_ISA and one of SPECDEC_AVX2,
// SPECDEC_AVX512, SPECDEC_NEON or none.
//
// Row invariance: an output is computed by one thread, from one row, in an order of operations that depends on the
// matrix (or on the slots the node sees) alone. Blocks of rows share loaded weights and nothing else.
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
constexpr int64_t AHEAD = 2048;    // bytes; the hardware's own prefetching ends at every page

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

// ---- inputs -------------------------------------------------------------------------------------------------------

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
    alignas(64) float lanes[W], poisons[W];
    store(lanes, largest);
    store(poisons, poison);
    float result = 0.0f, total = 0.0f;
    for (int j = 0; j < W; ++j) {
        result = lanes[j] > result ? lanes[j] : result;
        total += poisons[j];
    }
    return result + total;
}

// Below this an input is taken for zero: its reciprocal would not be finite.
constexpr float TINY = 1e-30f;

template <class Store>
inline void quantize(const float* x, int64_t count, float inverse, Store put) {
    const F factor = set1(inverse);
    int64_t i = 0;
    for (; i + W <= count; i += W) put(i, to_int(mul(load(x + i), factor)));
    if (i < count) put(i, to_int(mul(load_tail(x + i, count - i), factor)));
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
        alignas(64) int16_t wide[GROUP] = {};
        quantize(part, size, usable ? 127.0f / largest : 0.0f, [&](int64_t i, I v) { store_int16(wide + i, v); });
        int32_t total = 0;
        for (int i = 0; i < GROUP; ++i) {
            total += wide[i];
            q[g * GROUP + i] = static_cast<int8_t>(wide[i]);
        }
        sums[g] = scale[g] * static_cast<float>(total);
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

// ---- products -----------------------------------------------------------------------------------------------------

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
        prefetch(reinterpret_cast<const char*>(w + i * PANEL) + AHEAD);
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
        prefetch(w + i * 2 * PANEL + AHEAD);
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

// One group of 32 channels, whose weights are scale * (0 .. 15) + minimum; `affine [2, 16]`: scales, then minima.
template <int R>
inline void micro_int4(const uint8_t* w, const int8_t* q, int64_t stride, const uint16_t* affine, const float* scale,
                       const float* sums, int64_t group_stride, float* tile) {
    N c[R][PARTS];
    for (int r = 0; r < R; ++r)
        for (int p = 0; p < PARTS; ++p) c[r][p] = nzero();
#pragma GCC unroll 1
    for (int i = 0; i < GROUP / 4; ++i) {
        prefetch(w + i * 2 * PANEL + AHEAD);
        const Nibbles a = load_nibbles(w + i * 2 * PANEL);
        for (int r = 0; r < R; ++r) {
            const Quad b = broadcast_quad(q + r * stride + 4 * i);
            for (int p = 0; p < PARTS; ++p) c[r][p] = dot4(c[r][p], a, p, b);
        }
    }
    for (int p = 0; p < PARTS; ++p) {
        const F s = load_fp16(affine + p * W), minimum = load_fp16(affine + PANEL + p * W);
        for (int r = 0; r < R; ++r) {
            float* t = tile + r * PANEL + p * W;
            const F above = fma(to_float(finish(c[r][p])), mul(s, set1(scale[r * group_stride])), load(t));
            store(t, fma(minimum, set1(sums[r * group_stride]), above));
        }
    }
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
            for (int64_t i = g; i < least(g + INT_CHUNK / GROUP, groups); ++i)
                micro_int4<decltype(count)::value>(
                    w + i * GROUP * PANEL / 2, in.groups + (first + r) * in.stride + i * GROUP, in.stride,
                    scales + i * 2 * PANEL, in.scale + (first + r) * in.group_stride + i,
                    in.sums + (first + r) * in.group_stride + i, in.group_stride, tile + r * PANEL);
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

// ---- workspace ----------------------------------------------------------------------------------------------------

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

// ---- the stack ----------------------------------------------------------------------------------------------------

inline float sum_of_squares(const float* x, int64_t count) {
    F a = zero(), b = zero();
    int64_t i = 0;
    for (; i + 2 * W <= count; i += 2 * W) {
        const F u = load(x + i), v = load(x + i + W);
        a = fma(u, u, a);
        b = fma(v, v, b);
    }
    for (; i + W <= count; i += W) {
        const F u = load(x + i);
        a = fma(u, u, a);
    }
    if (i < count) {
        const F u = load_tail(x + i, count - i);
        a = fma(u, u, a);
    }
    return sum(add(a, b));
}

inline void rms_norm(const float* x, const float* weight, int64_t count, float eps, float* y) {
    const float scale = 1.0f / __builtin_sqrtf(sum_of_squares(x, count) / static_cast<float>(count) + eps);
    const F s = set1(scale);
    int64_t i = 0;
    for (; i + W <= count; i += W) store(y + i, mul(mul(load(x + i), s), load(weight + i)));
    for (; i < count; ++i) y[i] = x[i] * scale * weight[i];
}

// The weight of an output and channel; `lane` is the output's place in its panel.
inline float unpacked(const Matrix& m, int64_t panel, int64_t lane, int64_t k) {
    const int64_t at = (panel * m.columns + k) * PANEL + lane, group = panel * (m.columns / GROUP) + k / GROUP;
    const auto* halves = static_cast<const uint16_t*>(m.scales);
    switch (m.format) {
        case FP32: return static_cast<const float*>(m.data)[at];
        case FP16: return half_to_float(static_cast<const uint16_t*>(m.data)[at]);
        case BF16: return bf16_to_float(static_cast<const uint16_t*>(m.data)[at]);
        case INT4: {
            const uint8_t byte = static_cast<const uint8_t*>(m.data)[panel * m.columns * PANEL / 2 + k / 4 * 2 * PANEL +
                                                                     lane % 8 * 4 + k % 4];
            const uint16_t* affine = halves + group * 2 * PANEL + lane;
            return static_cast<float>(lane < 8 ? byte & 15 : byte >> 4) * half_to_float(affine[0]) +
                   half_to_float(affine[PANEL]);
        }
        default: {
            const int8_t q = static_cast<const int8_t*>(m.data)[(panel * m.columns + k / 2 * 2) * PANEL + 2 * lane +
                                                                k % 2];
            return static_cast<float>(q) * (m.format == INT8 ? static_cast<const float*>(m.scales)[panel * PANEL + lane]
                                                             : half_to_float(halves[group * PANEL + lane]));
        }
    }
}

inline void unpack_row(const Matrix& m, int64_t row, float* y) {
    for (int64_t k = 0; k < m.in; ++k) y[k] = unpacked(m, row / PANEL, row % PANEL, k);
}

inline void embed_row(const Stack& s, int64_t token, float* y) {
    if (s.embedding == nullptr) return unpack_row(s.head, token, y);
    const int64_t begin = token * s.hidden;
    for (int64_t i = 0; i < s.hidden; ++i) switch (s.embedding_format) {
            case FP32: y[i] = static_cast<const float*>(s.embedding)[begin + i]; break;
            case FP16: y[i] = half_to_float(static_cast<const uint16_t*>(s.embedding)[begin + i]); break;
            default: y[i] = bf16_to_float(static_cast<const uint16_t*>(s.embedding)[begin + i]);
        }
}

// A head's channels, rotated in pairs of neighbours.
inline void rotate(float* x, const float* turn, int64_t count) {
    for (int64_t i = 0; i < count; i += 2) {
        const float a = x[i], b = x[i + 1], c = turn[i], s = turn[i + 1];
        x[i] = a * c - b * s;
        x[i + 1] = a * s + b * c;
    }
}

// What a product reads, made by one thread for itself or by all of them for each other.
struct Scratch {
    float* normed;
    Input from_normed, from_attended, from_inner;
};

struct StackCall {
    const Stack* stack;
    const Call* call;
    int64_t nodes;  // of all rows
    float *hidden, *mixed, *attended, *inner, *turns;
    Scratch* scratch;  // per thread, or one for all
    bool shared;
    float* scores;    // per thread [2, reach]
    int32_t* seen;    // per thread [2, reach]
    int64_t reach;
    float* best;      // per thread [nodes]
    int64_t* best_at;
};

// Up to so many rows, every thread prepares all inputs for itself: that takes it less time than to wait for another.
constexpr int64_t OWN_ROWS = 4;

template <class Function>
inline void prepare(const StackCall& c, Member& me, Function function) {
    if (c.shared) return each(me, c.nodes, function);
    // A late thread would prepare for a phase that is over, from what has changed since.
    if (me.team.threads > 1 && me.phase < me.team.reached->load(std::memory_order_acquire)) return;
    for (int64_t at = 0; at < c.nodes; ++at) function(at);
}

// The slots a node sees, in ascending order. Sums over them go by their place in this list, so a node's result is the
// same wherever the slots lie.
inline int64_t list_seen(const StackCall& c, int64_t row, int64_t node, int32_t* seen) {
    const Call& call = *c.call;
    const int64_t own = call.slot_index[row * call.nodes + node];
    int64_t count = 0;
    if (call.mask == nullptr) {
        for (int64_t slot = 0; slot <= call.length[row] + node; ++slot) seen[count++] = static_cast<int32_t>(slot);
        return count;
    }
    const int64_t start = call.mask_start[row];
    const uint8_t* mask = call.mask + (row * call.nodes + node) * call.mask_width;
    for (int64_t slot = 0; slot < least(start, call.extent); ++slot) seen[count++] = static_cast<int32_t>(slot);
    for (int64_t i = start < 0 ? -start : 0; i < call.mask_width && start + i < call.extent; ++i)
        if (mask[i] || start + i == own) seen[count++] = static_cast<int32_t>(start + i);
    return count;
}

// One query of a node: where its scores are, and which slots they belong to.
struct Query {
    const float* x;
    float* p;
    const int32_t* seen;
    int64_t count;
    float* out;
};

// Scores of Q queries for places j .. end - 1 of a list of slots that they share; j is a multiple of 4. A score is the
// same bits whichever queries and places are computed with it.
template <int Q>
inline void score(const Query* queries, int64_t j, int64_t end, const float* keys, int64_t stride, int64_t d) {
    const int32_t* seen = queries[0].seen;
    for (; j < end; j += 4) {
        const float* key[4];
        for (int i = 0; i < 4; ++i) key[i] = keys + seen[least(j + i, end - 1)] * stride;
        // One head's part of a slot lies far from the next slot's, too far for the hardware to foresee.
        if (j + 12 < end)
            for (int i = 8; i < 12; ++i)
                for (int64_t line = 0; line < d; line += 16) prefetch(keys + seen[j + i] * stride + line);
        F c[Q][4];
        for (int q = 0; q < Q; ++q)
            for (int i = 0; i < 4; ++i) c[q][i] = zero();
        int64_t k = 0;
        for (; k + W <= d; k += W) {
            F x[Q];
            for (int q = 0; q < Q; ++q) x[q] = load(queries[q].x + k);
            for (int i = 0; i < 4; ++i) {
                const F y = load(key[i] + k);
                for (int q = 0; q < Q; ++q) c[q][i] = fma(x[q], y, c[q][i]);
            }
        }
        if (k < d)
            for (int i = 0; i < 4; ++i) {
                const F y = load_tail(key[i] + k, d - k);
                for (int q = 0; q < Q; ++q) c[q][i] = fma(load_tail(queries[q].x + k, d - k), y, c[q][i]);
            }
        for (int q = 0; q < Q; ++q) sum4(c[q], queries[q].p + j);
    }
}

// Adds p * v of places j .. end - 1 to V vectors of channels of Q queries, in the order of the list.
template <int Q, int V>
inline void mix(const Query* queries, int64_t k, int64_t j, int64_t end, const float* values, int64_t stride) {
    const int32_t* seen = queries[0].seen;
    F c[Q][V];
    for (int q = 0; q < Q; ++q)
        for (int v = 0; v < V; ++v) c[q][v] = load(queries[q].out + k + v * W);
    for (; j < end; ++j) {
        const float* value = values + seen[j] * stride + k;
        if (j + 8 < end)
            for (int line = 0; line < V * W; line += 16) prefetch(values + seen[j + 8] * stride + k + line);
        F weight[Q];
        for (int q = 0; q < Q; ++q) weight[q] = broadcast(queries[q].p + j);
        for (int v = 0; v < V; ++v) {
            const F y = load(value + v * W);
            for (int q = 0; q < Q; ++q) c[q][v] = fma(weight[q], y, c[q][v]);
        }
    }
    for (int q = 0; q < Q; ++q)
        for (int v = 0; v < V; ++v) store(queries[q].out + k + v * W, c[q][v]);
}

template <int Q>
inline void mix_all(const Query* queries, int64_t j, int64_t end, const float* values, int64_t stride, int64_t d) {
    int64_t k = 0;
    for (; k + 4 * W <= d; k += 4 * W) mix<Q, 4>(queries, k, j, end, values, stride);
    for (; k + W <= d; k += W) mix<Q, 1>(queries, k, j, end, values, stride);
    for (; k < d; ++k)
        for (int q = 0; q < Q; ++q) {
            float total = queries[q].out[k];
            for (int64_t i = j; i < end; ++i) total += queries[q].p[i] * values[queries[0].seen[i] * stride + k];
            queries[q].out[k] = total;
        }
}

// Scores to weights whose sum is returned; what follows the last score up to a full vector becomes zero.
inline float softmax(float* p, int64_t count) {
    for (int64_t j = count; j < round_up(count, W); ++j) p[j] = -__builtin_inff();
    F largest = load(p);
    for (int64_t j = W; j < count; j += W) largest = max(largest, load(p + j));
    alignas(64) float lanes[W];
    store(lanes, largest);
    float top = lanes[0];
    for (int i = 1; i < W; ++i) top = lanes[i] > top ? lanes[i] : top;
    F total = zero();
    for (int64_t j = 0; j < count; j += W) {
        const F e = exp(sub(load(p + j), set1(top)));
        store(p + j, e);
        total = add(total, e);
    }
    return sum(total);
}

// Attention of two queries (or of the last, single one) of one row and one key-value head, which read its keys and
// values together as far as they see the same slots.
inline void attend(const StackCall& c, int64_t layer, int64_t row, int64_t kv_head, int64_t pair, float* scores,
                   int32_t* seen) {
    const Stack& s = *c.stack;
    const Call& call = *c.call;
    const int64_t d = s.head_size, stride = s.kv_heads * d, group = call.rows * call.capacity * stride;
    const int64_t sharing = s.heads / s.kv_heads, width = (s.heads + 2 * s.kv_heads) * d;
    const float* keys = call.slots + 2 * layer * group + row * call.capacity * stride + kv_head * d;
    const float* values = keys + group;
    const int64_t live = least(2, call.nodes * sharing - 2 * pair);
    Query queries[2];
    int64_t node[2];
    for (int64_t q = 0; q < live; ++q) {
        const int64_t which = 2 * pair + q, head = kv_head * sharing + which % sharing;
        node[q] = which / sharing;
        const int64_t at = row * call.nodes + node[q];
        const bool again = q == 1 && node[1] == node[0];
        int32_t* list = again ? seen : seen + q * c.reach;
        const int64_t count = again ? queries[0].count : list_seen(c, row, node[q], list);
        queries[q] = {c.mixed + at * width + head * d, scores + q * c.reach, list, count,
                      c.attended + (at * s.heads + head) * d};
        for (int64_t k = 0; k < d; ++k) queries[q].out[k] = 0.0f;
    }
    int64_t common = 0;
    if (live == 2) {
        common = least(queries[0].count, queries[1].count);
        if (call.mask != nullptr && node[0] != node[1]) {
            const int64_t most = common;
            common = least(most, call.mask_start[row] < 0 ? 0 : call.mask_start[row]);
            while (common < most && queries[0].seen[common] == queries[1].seen[common]) ++common;
        }
        score<2>(queries, 0, common / 4 * 4, keys, stride, d);
    }
    for (int64_t q = 0; q < live; ++q) score<1>(queries + q, common / 4 * 4, queries[q].count, keys, stride, d);
    float factor[2];
    for (int64_t q = 0; q < live; ++q) factor[q] = 1.0f / softmax(queries[q].p, queries[q].count);
    if (live == 2) mix_all<2>(queries, 0, common, values, stride, d);
    for (int64_t q = 0; q < live; ++q) {
        mix_all<1>(queries + q, common, queries[q].count, values, stride, d);
        for (int64_t k = 0; k < d; ++k) queries[q].out[k] *= factor[q];
    }
}

// One head of one node after the first product: norm, rotation, and for keys and values the way into the cache.
inline void finish_head(const StackCall& c, const Layer& layer, int64_t index, int64_t at, int64_t head) {
    const Stack& s = *c.stack;
    const Call& call = *c.call;
    const int64_t d = s.head_size, turning = s.heads + s.kv_heads, stride = s.kv_heads * d;
    float* x = c.mixed + at * (turning + s.kv_heads) * d + head * d;
    if (head < turning) {
        if (layer.head_norm != nullptr) rms_norm(x, layer.head_norm + head * d, d, s.norm_eps, x);
        if (s.angles != nullptr) rotate(x, c.turns + at * d, d);
    }
    if (head < s.heads) {
        const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(d));
        for (int64_t i = 0; i < d; ++i) x[i] *= scale;
        return;
    }
    const int64_t kind = head < turning ? 0 : 1, kv_head = head - (kind == 0 ? s.heads : turning);
    const int64_t row = at / call.nodes;
    float* slot = call.slots + ((2 * index + kind) * call.rows + row) * call.capacity * stride +
                  call.slot_index[at] * stride + kv_head * d;
    std::memcpy(slot, x, static_cast<std::size_t>(d) * sizeof(float));
}

inline void silu_times(const float* gate, const float* up, float* y, int64_t count) {
    for (int64_t i = 0; i < count; i += W) {
        const F g = load(gate + i);
        const F e = exp(sub(zero(), g));
        store(y + i, mul(div(g, add(set1(1.0f), e)), load(up + i)));
    }
}

// Whether `a` beats `b`: NaN beats everything, as in torch, so that a caller can see it.
inline bool beats(float a, float b) { return b == b && !(a <= b); }

inline void run_layer(const StackCall& c, int64_t index, Member& me) {
    const Stack& s = *c.stack;
    const Call& call = *c.call;
    const Layer& layer = s.layers[index];
    const Scratch& own = c.scratch[c.shared ? 0 : me.thread];
    const int64_t heads = s.heads + 2 * s.kv_heads, width = heads * s.head_size;
    prepare(c, me, [&](int64_t at) {
        rms_norm(c.hidden + at * s.hidden, layer.attention_norm, s.hidden, s.norm_eps, own.normed + at * s.hidden);
        prepare_row(layer.qkv, own.from_normed, at);
    });
    const auto put_mixed = [&](int64_t panel, int64_t first, int64_t rows, const float* tile) {
        put_tile(c.mixed, width, panel, first, rows, tile, false);
    };
    if (s.head_size % PANEL == 0) {
        // Heads are whole panels: who computes one finishes it.
        const int64_t each_head = s.head_size / PANEL;
        each(me, heads, [&](int64_t head) {
            for (int64_t p = 0; p < each_head; ++p)
                one_panel(layer.qkv, head * each_head + p, own.from_normed, c.nodes, put_mixed);
            for (int64_t at = 0; at < c.nodes; ++at) finish_head(c, layer, index, at, head);
        });
    } else {
        product(me, layer.qkv, own.from_normed, c.nodes, put_mixed);
        each(me, c.nodes * heads, [&](int64_t task) { finish_head(c, layer, index, task / heads, task % heads); });
    }
    float* scores = c.scores + 2 * me.thread * c.reach;
    int32_t* seen = c.seen + 2 * me.thread * c.reach;
    const int64_t pairs = (call.nodes * (s.heads / s.kv_heads) + 1) / 2;
    each(me, call.rows * s.kv_heads * pairs, [&](int64_t task) {
        attend(c, index, task / pairs / s.kv_heads, task / pairs % s.kv_heads, task % pairs, scores, seen);
    });
    const auto add_hidden = [&](int64_t panel, int64_t first, int64_t rows, const float* tile) {
        put_tile(c.hidden, s.hidden, panel, first, rows, tile, true);
    };
    if (quantizes(layer.out)) prepare(c, me, [&](int64_t at) { prepare_row(layer.out, own.from_attended, at); });
    product(me, layer.out, own.from_attended, c.nodes, add_hidden);
    prepare(c, me, [&](int64_t at) {
        rms_norm(c.hidden + at * s.hidden, layer.feed_norm, s.hidden, s.norm_eps, own.normed + at * s.hidden);
        prepare_row(layer.gate, own.from_normed, at);
    });
    alignas(64) float up[TILE_ROWS * PANEL];
    product(me, layer.gate, own.from_normed, c.nodes, [&](int64_t panel, int64_t first, int64_t rows, float* gate) {
        panel_rows(layer.up, panel, own.from_normed, first, rows, up);
        silu_times(gate, up, gate, rows * PANEL);
        put_tile(c.inner, s.inner, panel, first, rows, gate, false);
    });
    if (quantizes(layer.down)) prepare(c, me, [&](int64_t at) { prepare_row(layer.down, own.from_inner, at); });
    product(me, layer.down, own.from_inner, c.nodes, add_hidden);
}

inline void keep_best(const float* tile, int64_t begin, int64_t count, int64_t rows, int64_t vocab, float* best,
                      int64_t* best_at) {
    for (int64_t r = 0; r < rows; ++r) {
        const float* t = tile + r * PANEL;
        int better = best_at[r] == vocab;
        for (int i = 0; i < PANEL; ++i) better |= !(t[i] <= best[r]);
        if (!better) continue;
        for (int64_t i = 0; i < count; ++i)
            if (beats(t[i], best[r]) || best_at[r] == vocab) {
                best[r] = t[i];
                best_at[r] = begin + i;
            }
    }
}

inline void merge_best(const StackCall& c, int64_t at, int threads) {
    float value = 0.0f;
    int64_t where = c.stack->vocab;
    for (int thread = 0; thread < threads; ++thread) {
        const float v = c.best[thread * c.nodes + at];
        const int64_t w = c.best_at[thread * c.nodes + at];
        if (w == c.stack->vocab) continue;  // a thread that had no task
        const bool same = v == value || (v != v && value != value);
        if (where == c.stack->vocab || (same ? w < where : beats(v, value))) {
            value = v;
            where = w;
        }
    }
    c.call->best[at] = where;
    c.call->best_value[at] = value;
}

inline void run_head(const StackCall& c, Member& me) {
    const Stack& s = *c.stack;
    const Call& call = *c.call;
    const bool scored = call.logits != nullptr || call.best != nullptr;
    if (!scored && call.states == nullptr) return;
    const Scratch& own = c.scratch[c.shared ? 0 : me.thread];
    if (call.states != nullptr)
        each(me, c.nodes, [&](int64_t at) {
            rms_norm(c.hidden + at * s.hidden, s.final_norm, s.hidden, s.norm_eps, call.states + at * s.hidden);
        });
    if (!scored) return;
    prepare(c, me, [&](int64_t at) {
        rms_norm(c.hidden + at * s.hidden, s.final_norm, s.hidden, s.norm_eps, own.normed + at * s.hidden);
        prepare_row(s.head, own.from_normed, at);
    });
    const int64_t mine = me.thread * c.nodes, panels = panels_of(s.head);
    // A panel of the head takes a microsecond or two; eight of them keep the threads out of each other's way.
    constexpr int64_t TOGETHER = 8;
    each(me, (panels + TOGETHER - 1) / TOGETHER, [&](int64_t task) {
        for (int64_t panel = task * TOGETHER; panel < least((task + 1) * TOGETHER, panels); ++panel)
            one_panel(s.head, panel, own.from_normed, c.nodes,
                      [&](int64_t, int64_t first, int64_t rows, const float* tile) {
                          if (call.logits != nullptr) put_tile(call.logits, s.vocab, panel, first, rows, tile, false);
                          if (call.best != nullptr)
                              keep_best(tile, panel * PANEL, least(PANEL, s.vocab - panel * PANEL), rows, s.vocab,
                                        c.best + mine + first, c.best_at + mine + first);
                      });
    });
    if (call.best != nullptr && me.thread == 0)
        for (int64_t at = 0; at < c.nodes; ++at) merge_best(c, at, me.team.threads);
}

inline void stack_body(void* context, Member& me) {
    const StackCall& c = *static_cast<const StackCall*>(context);
    const Stack& s = *c.stack;
    const Call& call = *c.call;
    each(me, c.nodes, [&](int64_t at) {
        float* x = c.hidden + at * s.hidden;
        if (call.tokens != nullptr) embed_row(s, call.tokens[at], x);
        else std::memcpy(x, call.embedded + at * s.hidden, sizeof(float) * s.hidden);
        if (s.angles == nullptr) return;
        for (int64_t i = 0; i < s.head_size / 2; ++i) {
            const float angle = static_cast<float>(call.positions[at]) * s.angles[i];
            c.turns[at * s.head_size + 2 * i] = __builtin_cosf(angle);
            c.turns[at * s.head_size + 2 * i + 1] = __builtin_sinf(angle);
        }
    });
    for (int64_t index = 0; index < call.num_layers; ++index) run_layer(c, index, me);
    run_head(c, me);
}

constexpr int64_t PHASES_PER_LAYER = 10, PHASES_BESIDE = 4;

inline StackCall cut_stack(const Stack& s, const Call& call, Cutter cutter, std::size_t* used) {
    StackCall c{};
    c.stack = &s;
    c.call = &call;
    const int64_t nodes = call.rows * call.nodes, width = (s.heads + 2 * s.kv_heads) * s.head_size;
    const int64_t attended = s.heads * s.head_size;
    c.nodes = nodes;
    c.shared = nodes > OWN_ROWS;
    c.hidden = cutter.take<float>(nodes * s.hidden);
    c.mixed = cutter.take<float>(nodes * width);
    c.attended = cutter.take<float>(nodes * attended);
    c.inner = cutter.take<float>(nodes * s.inner);
    c.turns = cutter.take<float>(nodes * s.head_size);
    c.reach = round_up(call.extent + W, 64);
    c.scores = cutter.take<float>(2 * call.threads * c.reach);
    c.seen = cutter.take<int32_t>(2 * call.threads * c.reach);
    c.best = cutter.take<float>(call.threads * nodes);
    c.best_at = cutter.take<int64_t>(call.threads * nodes);
    const auto input = [&](const float* x, int64_t columns) {
        Input in = take_input(cutter, nodes, columns);
        in.x = x;
        in.x_stride = columns;
        // Padded channels have weight zero, but what they are multiplied with must be a number of the right size.
        if (in.quantized != nullptr) clear_input(in, nodes);
        return in;
    };
    const int64_t copies = c.shared ? 1 : call.threads;
    c.scratch = cutter.take<Scratch>(copies);
    for (int64_t copy = 0; copy < copies; ++copy) {
        Scratch made{};
        made.normed = cutter.take<float>(nodes * s.hidden);
        made.from_normed = input(made.normed, s.hidden);
        made.from_attended = input(c.attended, attended);
        made.from_inner = input(c.inner, s.inner);
        if (c.scratch != nullptr) c.scratch[copy] = made;
    }
    if (c.best_at != nullptr)
        for (int64_t i = 0; i < call.threads * nodes; ++i) {
            c.best[i] = -__builtin_inff();
            c.best_at[i] = s.vocab;
        }
    *used = cutter.used;
    return c;
}

// What a wrong index would read or write lies outside the caller's memory.
inline Problem find_problem(const Stack& s, const Call& call) {
    for (int64_t at = 0; at < call.rows * call.nodes; ++at) {
        if (call.tokens != nullptr && (call.tokens[at] < 0 || call.tokens[at] >= s.vocab)) return BAD_TOKEN;
        if (call.slot_index[at] < 0 || call.slot_index[at] >= call.extent) return BAD_SLOT;
    }
    for (int64_t row = 0; row < call.rows; ++row) {
        if (call.length[row] < 0 || call.length[row] + call.nodes > call.extent) return BAD_SLOT;
        if (call.mask != nullptr && call.mask_start[row] > call.extent) return BAD_SLOT;
    }
    return call.extent > call.capacity ? BAD_SLOT : NONE;
}

inline int32_t stack(const Stack& s, const Call& call) {
    const Problem problem = find_problem(s, call);
    if (problem != NONE) return problem;
    lock_region();
    std::size_t bytes = 0;
    cut_stack(s, call, Cutter{nullptr}, &bytes);
    char* base = static_cast<char*>(workspace(bytes));
    if (base == nullptr) {
        unlock_region();
        return NO_MEMORY;
    }
    StackCall c = cut_stack(s, call, Cutter{base}, &bytes);
    run_parallel(call.threads, PHASES_PER_LAYER * call.num_layers + PHASES_BESIDE, stack_body, &c);
    unlock_region();
    return NONE;
}

}  // namespace SPECDEC_ISA
}  // namespace specdec
