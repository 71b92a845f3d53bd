// A whole forward: layers, final norm, head.
#pragma once
#include "attention.hpp"
#include "product.hpp"

namespace specdec {
namespace SPECDEC_ISA {

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
            const int64_t quad = (panel * m.columns + k / 4 * 4) * PANEL;
            const int8_t q = static_cast<const int8_t*>(m.data)[quad + 4 * lane + k % 4];
            return static_cast<float>(q) * half_to_float(halves[group * PANEL + lane]);
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
    float *normed, *attended;
    Input from_normed, from_attended, from_inner;
};

struct StackCall {
    const Stack* stack;
    const Call* call;
    int64_t nodes;  // of all rows
    float *hidden, *mixed, *inner, *turns;
    Scratch* scratch;  // per thread, or one for all
    bool shared;
    Seen* seen;        // [nodes]
    int32_t* tails;    // [nodes, mask_width]
    bool split;        // whether threads share the blocks of places; then, of every block:
    int64_t blocks;
    float* parts;       // [nodes, blocks, heads, head_size]; else per thread, of one block
    Softmax* softmaxes; // [nodes, blocks, heads]; else per thread
    float* best;      // per thread [nodes]
    int64_t* best_at;
};

// Up to so many rows, every thread prepares all inputs for itself: that takes it less time than to wait for another.
constexpr int64_t OWN_ROWS = 4;

// Floats that may be kept of blocks; what is kept leaves the cache before it is read.
constexpr int64_t MAX_PARTS = 1 << 21;

template <class Function>
inline void prepare(const StackCall& c, Member& me, Function function) {
    if (c.shared) return each(me, PREPARE, c.nodes, function);
    // A late thread would prepare for a phase that is over, from what has changed since.
    if (me.team.threads > 1 && me.phase < me.team.reached->load(std::memory_order_acquire)) return;
    for (int64_t at = 0; at < c.nodes; ++at) function(at);
    spend(me, PREPARE);
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

inline Slots slots_of(const StackCall& c, int64_t layer, int64_t row) {
    const Stack& s = *c.stack;
    const int64_t stride = s.kv_heads * s.head_size, group = c.call->rows * c.call->capacity * stride;
    const float* keys = c.call->slots + 2 * layer * group + row * c.call->capacity * stride;
    return {keys, keys + group, stride, s.head_size};
}

// One block of places for all nodes and heads of a row.
inline void attend_part(const StackCall& c, int64_t layer, int64_t row, int64_t block) {
    const Stack& s = *c.stack;
    const int64_t d = s.head_size, sharing = s.heads / s.kv_heads, width = (s.heads + 2 * s.kv_heads) * d;
    const Slots slots = slots_of(c, layer, row);
    for (int64_t kv_head = 0; kv_head < s.kv_heads; ++kv_head) {
        // The next block, in as many pieces as this one is computed in.
        const int64_t next = (block + 1) * BLOCK * slots.stride + kv_head * BLOCK * d;
        prefetch_slots(slots, next, next + BLOCK * d);
        for (int64_t node = 0; node < c.call->nodes; ++node) {
            const int64_t at = row * c.call->nodes + node, head = kv_head * sharing;
            if (block >= blocks_of(c.seen[at])) continue;
            const int64_t part = (at * c.blocks + block) * s.heads + head;
            attend_block(slots, kv_head, c.seen[at], block, c.mixed + at * width + head * d, sharing,
                         c.parts + part * d, c.softmaxes + part);
        }
    }
}

// The blocks of a node, put together.
inline void merge_parts(const StackCall& c, int64_t at, float* out) {
    const Stack& s = *c.stack;
    const int64_t d = s.head_size, blocks = blocks_of(c.seen[at]);
    for (int64_t head = 0; head < s.heads; ++head, out += d) {
        const int64_t first = at * c.blocks * s.heads + head;
        Softmax whole = c.softmaxes[first];
        std::memcpy(out, c.parts + first * d, static_cast<std::size_t>(d) * sizeof(float));
        for (int64_t block = 1; block < blocks; ++block) {
            const int64_t part = first + block * s.heads;
            merge(whole, out, c.softmaxes[part], c.parts + part * d, d);
        }
        divide(out, whole.total, d);
    }
}

// All blocks for the heads of some nodes of a row that share a key-value head.
inline void attend_whole(const StackCall& c, int64_t layer, int64_t row, int64_t kv_head, int64_t begin, int thread) {
    const Stack& s = *c.stack;
    const int64_t d = s.head_size, sharing = s.heads / s.kv_heads, width = (s.heads + 2 * s.kv_heads) * d;
    const int64_t end = least(begin + TOGETHER_NODES, c.call->nodes);
    const Slots slots = slots_of(c, layer, row);
    float* part = c.parts + thread * sharing * d;
    Softmax* of_part = c.softmaxes + thread * (1 + TOGETHER_NODES) * sharing;
    Softmax* whole = of_part + sharing;
    for (int64_t block = 0; block < c.blocks; ++block)
        for (int64_t node = begin; node < end; ++node) {
            const int64_t at = row * c.call->nodes + node, head = kv_head * sharing;
            if (block >= blocks_of(c.seen[at])) continue;
            float* out = c.scratch[0].attended + (at * s.heads + head) * d;
            Softmax* of_node = whole + (node - begin) * sharing;
            attend_block(slots, kv_head, c.seen[at], block, c.mixed + at * width + head * d, sharing,
                         block == 0 ? out : part, block == 0 ? of_node : of_part);
            for (int64_t q = 0; q < sharing; ++q) {
                if (block > 0) merge(of_node[q], out + q * d, of_part[q], part + q * d, d);
                if (block + 1 == blocks_of(c.seen[at])) divide(out + q * d, of_node[q].total, d);
            }
        }
}

inline void attend(const StackCall& c, int64_t layer, Member& me) {
    const Stack& s = *c.stack;
    const int64_t rows = c.call->rows;
    if (c.split)
        return each(me, ATTEND, rows * c.blocks, [&](int64_t task) {
            attend_part(c, layer, task / c.blocks, task % c.blocks);
        });
    const int64_t together = (c.call->nodes + TOGETHER_NODES - 1) / TOGETHER_NODES;
    each(me, ATTEND, rows * s.kv_heads * together, [&](int64_t task) {
        attend_whole(c, layer, task / together / s.kv_heads, task / together % s.kv_heads,
                     task % together * TOGETHER_NODES, me.thread);
    });
}

inline void run_layer(const StackCall& c, int64_t index, Member& me) {
    const Stack& s = *c.stack;
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
        each(me, QKV, heads, [&](int64_t head) {
            for (int64_t p = 0; p < each_head; ++p)
                one_panel(layer.qkv, head * each_head + p, own.from_normed, c.nodes, put_mixed);
            spend(me, QKV);
            for (int64_t at = 0; at < c.nodes; ++at) finish_head(c, layer, index, at, head);
            spend(me, ROTATE);
        });
    } else {
        product(me, QKV, layer.qkv, own.from_normed, c.nodes, put_mixed);
        each(me, ROTATE, c.nodes * heads, [&](int64_t task) {
            finish_head(c, layer, index, task / heads, task % heads);
        });
    }
    attend(c, index, me);
    const auto add_hidden = [&](int64_t panel, int64_t first, int64_t rows, const float* tile) {
        put_tile(c.hidden, s.hidden, panel, first, rows, tile, true);
    };
    if (c.split || quantizes(layer.out))
        prepare(c, me, [&](int64_t at) {
            if (c.split) merge_parts(c, at, own.attended + at * s.heads * s.head_size);
            spend(me, ATTEND);
            prepare_row(layer.out, own.from_attended, at);
        });
    product(me, OUT, layer.out, own.from_attended, c.nodes, add_hidden);
    prepare(c, me, [&](int64_t at) {
        rms_norm(c.hidden + at * s.hidden, layer.feed_norm, s.hidden, s.norm_eps, own.normed + at * s.hidden);
        prepare_row(layer.gate, own.from_normed, at);
    });
    alignas(64) float up[TILE_ROWS * PANEL];
    const auto join = [&](int64_t panel, int64_t first, int64_t rows, float* gate) {
        panel_rows(layer.up, panel, own.from_normed, first, rows, up);
        silu_times(gate, up, gate, rows * PANEL);
        put_tile(c.inner, s.inner, panel, first, rows, gate, false);
    };
    product(me, FEED, layer.gate, own.from_normed, c.nodes, join);
    if (quantizes(layer.down)) prepare(c, me, [&](int64_t at) { prepare_row(layer.down, own.from_inner, at); });
    product(me, DOWN, layer.down, own.from_inner, c.nodes, add_hidden);
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
        each(me, PREPARE, c.nodes, [&](int64_t at) {
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
    each(me, HEAD, (panels + TOGETHER - 1) / TOGETHER, [&](int64_t task) {
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
    spend(me, HEAD);
}

inline void stack_body(void* context, Member& me) {
    const StackCall& c = *static_cast<const StackCall*>(context);
    const Stack& s = *c.stack;
    const Call& call = *c.call;
    if (call.spent != nullptr) {
        me.spent = call.spent + me.thread * NUM_WORKS;
        me.since = nanoseconds();
    }
    each(me, START, c.nodes, [&](int64_t at) {
        c.seen[at] = see(call, at, c.tails + at * call.mask_width);
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
    c.inner = cutter.take<float>(nodes * s.inner);
    c.turns = cutter.take<float>(nodes * s.head_size);
    c.seen = cutter.take<Seen>(nodes);
    c.tails = cutter.take<int32_t>(nodes * call.mask_width);
    c.blocks = (call.extent + BLOCK - 1) / BLOCK;
    const int64_t parts = nodes * c.blocks * s.heads, sharing = s.heads / s.kv_heads;
    c.split = !c.shared || parts * s.head_size <= MAX_PARTS;
    c.parts = cutter.take<float>((c.split ? parts : call.threads * sharing) * s.head_size);
    c.softmaxes = cutter.take<Softmax>(c.split ? parts : call.threads * (1 + TOGETHER_NODES) * sharing);
    c.best = cutter.take<float>(call.threads * nodes);
    c.best_at = cutter.take<int64_t>(call.threads * nodes);
    const auto input = [&](const float* x, int64_t columns) {
        Input in = take_input(cutter, nodes, columns);
        in.x = x;
        in.x_stride = columns;
        if (in.quantized != nullptr) clear_input(in, nodes);
        return in;
    };
    const int64_t copies = c.shared ? 1 : call.threads;
    c.scratch = cutter.take<Scratch>(copies);
    for (int64_t copy = 0; copy < copies; ++copy) {
        Scratch made{};
        made.normed = cutter.take<float>(nodes * s.hidden);
        made.from_normed = input(made.normed, s.hidden);
        made.attended = cutter.take<float>(nodes * attended);
        made.from_attended = input(made.attended, attended);
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
