// The plain C interface between Python (ctypes) and the kernels. `library.py` mirrors these structures field by field.
#pragma once
#include <cstdint>

namespace specdec {

constexpr int PANEL = 16;  // outputs whose weights are interleaved

enum Format : int32_t { FP32 = 0, FP16 = 1, BF16 = 2, INT8 = 3, INT4 = 4 };

// A packed weight matrix of `out` rows and `in` columns; `columns` is `in` padded to what the format needs.
// `scales`: float16, [panels, columns / 32, 16] for int8, [panels, columns / 32, 2, 16] for int4, scales before minima.
struct Matrix {
    int32_t format;
    int64_t out;
    int64_t in;
    int64_t columns;
    const void* data;
    const void* scales;
    const float* bias;
};

struct Layer {
    const float* attention_norm;
    const float* feed_norm;
    const float* head_norm;  // [heads + kv_heads, head_size] or null
    Matrix qkv, out, gate, up, down;
};

struct Stack {
    int64_t hidden, inner, heads, kv_heads, head_size, vocab;
    float norm_eps;
    int32_t num_layers;
    const Layer* layers;
    const float* final_norm;
    const float* angles;       // [head_size / 2], or null where nothing rotates
    const void* embedding;     // [vocab, hidden], or null: rows of `head`
    int32_t embedding_format;  // FP32, FP16 or BF16
    Matrix head;
};

struct Call {
    float* slots;  // [2 * layers, rows, capacity, kv_heads, head_size]
    int64_t rows, nodes, capacity, extent;
    const int64_t* tokens;      // [rows, nodes], or null
    const float* embedded;      // [rows, nodes, hidden], read when `tokens` is null
    const int64_t* positions;   // [rows, nodes]
    const int64_t* slot_index;  // [rows, nodes]
    const int64_t* length;      // [rows]
    const uint8_t* mask;        // [rows, nodes, mask_width], or null: node i sees the slots up to length + i
    const int64_t* mask_start;  // [rows]: slots before it are seen by every node of the row
    int64_t mask_width;
    float* states;      // [rows, nodes, hidden] after the final norm, or null
    float* logits;      // [rows, nodes, vocab], or null
    int64_t* best;      // [rows, nodes] lowest id of the largest logit, or null
    float* best_value;  // [rows, nodes]
    int32_t num_layers;
    int32_t threads;
    int64_t* spent;  // [threads, NUM_WORKS] nanoseconds are added to, or null
};

// What a thread does in a forward. PREPARE: norms and the rounding of inputs. FEED: gate, up and what joins them.
enum Work : int32_t { START, PREPARE, QKV, ROTATE, ATTEND, OUT, FEED, DOWN, HEAD, WAIT, NUM_WORKS };

enum Problem : int32_t { NONE = 0, BAD_TOKEN = 1, BAD_SLOT = 2, NO_MEMORY = 3 };

struct Kernels {
    const char* name;
    int32_t (*linear)(const Matrix& matrix, const float* x, int64_t rows, float* y, int threads);
    int32_t (*stack)(const Stack& stack, const Call& call);  // 0, or what is wrong with the call
};

// Null where the build does not target the instruction set.
extern const Kernels* const kernels_avx512vnni;
extern const Kernels* const kernels_avx512;
extern const Kernels* const kernels_avx2;
extern const Kernels* const kernels_neon;
extern const Kernels* const kernels_portable;

}  // namespace specdec
