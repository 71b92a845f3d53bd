// The layers of a Llama-like decoder and its head for a few new nodes of one row, as one launch (ops/layers.py).
//
// Decoding reads every weight once, and what costs time beside that is what memory does not deliver meanwhile: the
// starts and ends of kernels, and attention, for which most of the device waits. Here every multiprocessor runs one
// block to the end. Two of its warps do nothing but ask for weights, in the order in which they will be needed, through
// a ring in shared memory. They wait for room, never for results, so weights of the next products arrive while the
// other warps wait for the rest of the device or attend.
//
// Five phases a layer: heads, attention, output projection, gate and up, down. Blocks tell each other what they made
// through the L2 cache, and whoever needs it waits for the values themselves. Products are made in units of 16 outputs
// for all nodes, dealt out in turn over all phases. A unit's weights are the A operand of m16n8k16 and the nodes are B,
// so 8 nodes cost little more than one. Warps take 32 inputs at a time in turn, and their partial sums are added in the
// order of the warps.
//
// Straight code that is run once a phase is fetched from where the weights come from, and so is a register that was
// spilled: both must be few.
//
// Attention is made by a block for each eighth of the slots, key head and 16 queries that share it; each then joins an
// eighth of the results. There are at least 8 blocks, so whoever waits for an eighth is not in its way.
//
// A node's results are the same bits for any number of nodes and whatever stands in the others: it is a column of its
// own in every product, which warp reads a slot depends on the slot alone, and all is joined in a fixed order.
#include "softmax.cuh"

namespace {

constexpr int kWarps = 8;  // that compute
constexpr int kComputing = kWarps * 32;
constexpr int kThreads = kComputing + 128;  // a group of four warps, which is what registers move between
constexpr int kAsking = 2;                  // warps that ask for weights: one cannot ask fast enough
constexpr int kOutputs = 16;
constexpr int kMostNodes = 8;
constexpr int kStep = 32;                       // inputs of a warp at a time: 8 of each thread of a quad
constexpr int kSteps = 2;                       // of each warp in a tile
constexpr int kTile = kWarps * kStep * kSteps;  // inputs of 16 outputs that arrive together
constexpr int kGroup = 1024 / kTile;            // tiles whose inputs are asked for together
constexpr int kMostStages = 16;
constexpr int kUnderWay = 3;  // tiles of a block that were asked for and are not there: more delay all other reads
// A line of a tile, 64 bytes longer than what it holds: 8 threads read two neighbouring lines from all banks.
constexpr int kLine = kTile * 2 + 64;
constexpr int kStage = kOutputs * kLine;
constexpr int kMostPieces = 2;  // 16-byte pieces of a normed row that a thread takes

constexpr int kParts = 8;     // blocks that share the slots of a key head
constexpr int kMixing = 4;    // warps of a block that attend to different slots
constexpr int kSlots = 16;    // of a warp at a time
constexpr int kQueries = 16;  // rows of a tile of queries

struct Layer {
  const void *qkv, *qkv_bias, *out, *out_bias, *up, *up_bias, *down, *down_bias, *attention_norm, *feed_norm,
      *head_norm;
};

struct Arguments {
  const Layer* layers;
  const void* embedding;
  const int64_t* tokens;     // [n]
  const float* rotation;     // [n, D / 2, 2]
  void* slots;               // keys of the first layer, then its values, and so on; strides in elements
  const int64_t* length;     // [1]
  const int64_t* ancestors;  // [n], or null for a chain
  const void* final_norm;
  const void* head;  // null: no logits
  const void* head_bias;
  float* logits;  // [n, vocab]
  // Of every layer what its blocks tell each other, for all n: heads, mixed values, the residual stream after
  // attention, the gated product, the residual stream after that.
  void* told;
  float* partial;     // [kv_heads * tiles, kParts, lines of a tile, D / 2 + 1, 4]
  uint32_t* counter;  // [1]; all three are all ones
  int64_t n, count, hidden_size, inner_size, kv_heads, group, vocab, width, stages;
  int64_t slot_group, slot_slot, slot_head, mask_node;
  float eps, scale;  // `scale` of the scores, which are powers of two
};

// --- what threads of a block wait for --------------------------------------------------------------------------------

__device__ __forceinline__ void meet() { meet<kComputing>(); }

// The ring's next stage, and whether it was gone round an odd number of times.
struct Place {
  uint32_t stage = 0, parity = 0;
  __device__ __forceinline__ void next(uint32_t stages) {
    if (++stage == stages) stage = 0, parity ^= 1;
  }
};

struct Ring {
  uint32_t full, empty;  // barriers of the first stage
  uint8_t* data;
  uint32_t stages;
  uint32_t zero;  // 0, which the compiler does not know
};

// --- what blocks tell each other -------------------------------------------------------------------------------------
//
// Results that other blocks wait for go to memory that holds nothing but ones, to each place once. Whoever reads waits
// until what it reads is something else: so a value needs no fence, and costs one way to the L2 cache and one back. No
// number that was computed is all ones, because that is a NaN, and conversions make another one.
//
// Where all blocks read the same, all of them asking again and again would keep the values from arriving. There one
// thread of each asks for a counter, to which every block adds when it has told its part. The counter is only a hint
// when to look: what it says and what is there may arrive in any order.

constexpr uint32_t kNothing = UINT32_MAX;

__device__ __forceinline__ uint32_t most(const uint4& v) { return max(max(v.x, v.y), max(v.z, v.w)); }

// What was read at `at`, read again until it is there.
__device__ __forceinline__ void insist(uint4& v, const void* at) {
  while (most(v) == kNothing) v = peek(at);
}
__device__ __forceinline__ void insist(uint32_t& v, const void* at) {
  while (v == kNothing) v = peek_word(at);
}

// Two numbers of a layer's, in memory that other layers use too: each carries the layer.
__device__ __forceinline__ void tell(void* at, float v0, float v1, uint32_t layer) {
  tell_pairs(at, make_uint4(__float_as_uint(v0), layer, __float_as_uint(v1), layer));
}

// Waits until so many blocks have counted up. Called by all computing threads.
__device__ __forceinline__ void await(const uint32_t* counter, uint32_t target) {
  if (threadIdx.x == 0)
    while (static_cast<int32_t>(peek_word(counter) + 1 - target) < 0) continue;
  meet();
}

struct Told {
  uint4 words;

  __device__ __forceinline__ void read(const void* at) { words = peek_pairs(at); }
  __device__ __forceinline__ bool is_of(uint32_t layer) const { return words.y == layer && words.w == layer; }
  __device__ __forceinline__ float first() const { return __uint_as_float(words.x); }
  __device__ __forceinline__ float second() const { return __uint_as_float(words.z); }
};

// --- products --------------------------------------------------------------------------------------------------------

// What both who asks for weights and who multiplies must know of a linear layer. `sides`: 2 where gate and up are made
// together.
struct Shape {
  const void* weight;
  int outputs, inputs, sides;

  __device__ __forceinline__ int units() const { return (outputs + kOutputs - 1) / kOutputs; }
};

// The units of a phase that are this block's: the first, and every gridDim.x-th from there. `dealt`: the block whose
// turn it is.
__device__ __forceinline__ int first_unit(int dealt) {
  const int first = static_cast<int>(blockIdx.x) - dealt;
  return first < 0 ? first + static_cast<int>(gridDim.x) : first;
}

__device__ __forceinline__ int deal(int dealt, int units) { return (dealt + units) % static_cast<int>(gridDim.x); }

// The phases of all layers, four a layer, and the head as the last.
template <int D>
__device__ __forceinline__ Shape shape_of(const Arguments& a, const Layer* layers, int phase) {
  const int hidden = static_cast<int>(a.hidden_size), inner = static_cast<int>(a.inner_size);
  const int queries = static_cast<int>(a.kv_heads * a.group) * D,
            every = queries + 2 * static_cast<int>(a.kv_heads) * D;
  if (phase == 4 * static_cast<int>(a.count)) return {a.head, static_cast<int>(a.vocab), hidden, 1};
  const Layer& layer = layers[phase / 4];
  switch (phase % 4) {
    case 0:
      return {layer.qkv, every, hidden, 1};
    case 1:
      return {layer.out, hidden, queries, 1};
    case 2:
      return {layer.up, inner, hidden, 2};
    default:
      return {layer.down, hidden, inner, 1};
  }
}

// Asks for the block's tiles of all phases, in the order in which they are used: phase by phase, unit by unit, gate
// before up, along the inputs.
template <typename T, int D>
__device__ __forceinline__ void request(const Arguments& a, const Layer* layers, int phases, const Ring& ring) {
  // Of every tile's lines each warp asks for some.
  constexpr int kLines = kOutputs / kAsking;
  const int lane = threadIdx.x % 32, asking = (threadIdx.x - kComputing) / 32, own = asking * kLines + lane;
  Place place, behind;
  int begun = 0, dealt = 0;
#pragma unroll 1
  for (int phase = 0; phase < phases; ++phase) {
    const Shape s = shape_of<D>(a, layers, phase);
#pragma unroll 1
    for (int unit = first_unit(dealt); unit < s.units(); unit += gridDim.x) {
      const int lines = max(min(s.outputs - unit * kOutputs - asking * kLines, kLines), 0);
#pragma unroll 1
      for (int side = 0; side < s.sides; ++side) {
        const T* line =
            static_cast<const T*>(s.weight) + static_cast<int64_t>(side * s.outputs + unit * kOutputs + own) * s.inputs;
#pragma unroll 1
        for (int begin = 0; begin < s.inputs; begin += kTile) {
          const uint32_t bytes = min(s.inputs - begin, kTile) * static_cast<int>(sizeof(T));
          const uint32_t full = ring.full + place.stage * 8;
          wait_for(ring.empty + place.stage * 8, place.parity ^ 1);
          if (begun == kUnderWay) {
            wait_for(ring.full + behind.stage * 8, behind.parity);
            behind.next(ring.stages);
          } else {
            ++begun;
          }
          if (lane == 0) arrive_and_announce(full, bytes * lines);
          __syncwarp();
          if (lane < lines)
            copy_bulk(shared_address(ring.data) + place.stage * kStage + own * kLine, line + begin, bytes, full);
          place.next(ring.stages);
        }
      }
    }
    dealt = deal(dealt, s.units());
  }
}

// Rows of inputs: of the embedding where `picked` says which, else what other blocks told.
template <typename T>
struct Rows {
  const T* matrix;
  int stride;
  const int64_t* picked;
  __device__ __forceinline__ const T* operator()(int row) const {
    return matrix + (picked ? picked[row] : row) * stride;
  }
};

// Normed rows, in shared memory: line by line, `normed_line` bytes each.
__device__ __forceinline__ int normed_line(int hidden) { return (hidden * 2 + 127) / 128 * 128 + 64; }

// Every thread takes the same pieces of all rows; `scales` are the norm's weights of them.
template <typename T>
__device__ __forceinline__ void norm_rows(const Rows<T>& x, const uint4 (&scales)[kMostPieces], int size, int n,
                                          float eps, uint8_t* to, float* squares) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, stride = normed_line(size), first = threadIdx.x * 8;
#pragma unroll 1
  for (int row = 0; row < n; ++row) {
    const T* line = x(row);
#pragma unroll 1
    for (int at = first; at < size; at += kComputing * 8)
      copy_piece(shared_address(to + row * stride + at * 2), line + at);
  }
  finish_copies();
#pragma unroll 1
  for (int row = 0; row < n; ++row) {
    float sum = 0;
#pragma unroll 1
    for (int at = first; at < size; at += kComputing * 8) {
      uint4* held = reinterpret_cast<uint4*>(to + row * stride + at * 2);
      uint4 v = *held;
      if (!x.picked && most(v) == kNothing) {
        insist(v, x(row) + at);
        *held = v;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 both = unpack(word(v, i), T());
        sum += both.x * both.x;
        sum += both.y * both.y;
      }
    }
#pragma unroll
    for (int distance = 16; distance; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    if (lane == 0) squares[warp * kMostNodes + row] = sum;
  }
  meet();
  float all = 0;
#pragma unroll
  for (int part = 0; part < kWarps; ++part) all += squares[part * kMostNodes + lane % kMostNodes];
  const float own = rsqrtf(all / static_cast<float>(size) + eps);
#pragma unroll 1
  for (int row = 0; row < n; ++row) {
    const float factor = __shfl_sync(~0u, own, row);
#pragma unroll
    for (int piece = 0; piece < kMostPieces; ++piece) {
      const int at = first + piece * kComputing * 8;
      if (at >= size) continue;
      uint4* held = reinterpret_cast<uint4*>(to + row * stride + at * 2);
      const uint4 v = *held;
      const auto scaled = [&](uint32_t value, uint32_t by) {
        const float2 number = unpack(value, T()), scale = unpack(by, T());
        return pack(number.x * factor * scale.x, number.y * factor * scale.y, T());
      };
      *held = make_uint4(scaled(v.x, scales[piece].x), scaled(v.y, scales[piece].y), scaled(v.z, scales[piece].z),
                         scaled(v.w, scales[piece].w));
    }
  }
  meet();
}

// What becomes of a unit's sums: told to other blocks at `out`, or `logits`.
template <typename T>
struct Finish {
  const T* bias;
  Rows<T> residual;  // where the matrix is given
  T* out;
  float* logits;
};

// The block's units of a product. Weights of the first tiles are in registers before `begin` waits for the inputs and
// returns where the first node's are; `told`: in what other blocks tell, else in
// shared memory. There is a unit.
template <typename T, typename Begin>
__device__ __forceinline__ void multiply_units(const Ring& ring, Place& place, int dealt, const Shape& s, int stride,
                                               bool told, int n, const Finish<T>& finish, float* parts,
                                               const Begin& begin) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
  const bool live = group < n;
  const uint4 none = make_uint4(0, 0, 0, 0);
  const int own = warp * kStep + quad * 8;
  const uint8_t* lines = ring.data + group * kLine + own * 2;
  const auto input_of = [&](int from, int tile, int step) { return from + tile * kTile + step * kWarps * kStep + own; };
  uint4 w[kGroup][kSteps][2];
  const auto take = [&](int from) {
#pragma unroll
    for (int tile = 0; tile < kGroup; ++tile) {
      if (from + tile * kTile >= s.inputs) break;
      wait_for(ring.full + place.stage * 8, place.parity);
#pragma unroll
      for (int step = 0; step < kSteps; ++step)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          w[tile][step][half] = input_of(from, tile, step) < s.inputs
                                    ? *reinterpret_cast<const uint4*>(lines + place.stage * kStage + half * 8 * kLine +
                                                                      step * kWarps * kStep * 2)
                                    : none;
      // Every thread gives the stage back when what it asked for is there, not before: its arrival goes to an address
      // that needs what it got.
      uint32_t got = 0;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) got |= w[tile][step][0].x | w[tile][step][1].x;
      arrive(ring.empty + place.stage * 8 + (got & ring.zero));
      place.next(ring.stages);
    }
  };
  take(0);
  const T* line = begin() + group * stride;
  uint4 x[kGroup][kSteps];
  const auto ask = [&](int from) {
#pragma unroll
    for (int tile = 0; tile < kGroup; ++tile)
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const int at = input_of(from, tile, step);
        x[tile][step] = live && at < s.inputs ? peek(line + at) : none;
      }
  };
  int turn = 0;
  bool taken = true;
#pragma unroll 1
  for (int unit = first_unit(dealt); unit < s.units(); unit += gridDim.x, turn ^= 1) {
    // [warp][side][node][output], of two units in turn
    float* sum_of = parts + turn * (kWarps * 2 * kMostNodes * kOutputs);
    const int row = threadIdx.x / kOutputs, local = threadIdx.x % kOutputs, output = unit * kOutputs + local;
    const bool mine = row < n && output < s.outputs;
    uint32_t residual = 0;
    if (mine && finish.residual.matrix) {
      const T* at = finish.residual(row) + output / 2 * 2;
      residual = peek_word(at);
      if (!finish.residual.picked) insist(residual, at);
    }
#pragma unroll 1
    for (int side = 0; side < s.sides; ++side) {
      float sums[4] = {}, more[4] = {};  // of which one goes on while the other waits
#pragma unroll 1
      for (int from = 0; from < s.inputs; from += kGroup * kTile) {
        if (told) ask(from);
        if (!taken) take(from);
        taken = false;
        if (told) {
          while (true) {
            uint32_t worst = 0;
#pragma unroll
            for (int tile = 0; tile < kGroup; ++tile)
#pragma unroll
              for (int step = 0; step < kSteps; ++step) worst = max(worst, most(x[tile][step]));
            if (worst != kNothing) break;
            ask(from);
          }
        } else {
#pragma unroll
          for (int tile = 0; tile < kGroup; ++tile)
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
              const int at = input_of(from, tile, step);
              x[tile][step] = live && at < s.inputs ? *reinterpret_cast<const uint4*>(line + at) : none;
            }
        }
#pragma unroll
        for (int tile = 0; tile < kGroup; ++tile) {
          if (from + tile * kTile >= s.inputs) break;
#pragma unroll
          for (int step = 0; step < kSteps; ++step) {
            const uint4 low = w[tile][step][0], high = w[tile][step][1], with = x[tile][step];
            multiply(sums, low.x, high.x, low.y, high.y, with.x, with.y, T());
            multiply(more, low.z, high.z, low.w, high.w, with.z, with.w, T());
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (quad * 2 + i % 2 < n)
          sum_of[((warp * 2 + side) * kMostNodes + quad * 2 + i % 2) * kOutputs + group + 8 * (i / 2)] =
              sums[i] + more[i];
    }
    meet();
    if (warp * (32 / kOutputs) >= n) continue;
    float made[2] = {};
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      if (side >= s.sides) continue;
#pragma unroll
      for (int part = 0; part < kWarps; ++part)
        made[side] += sum_of[((part * 2 + side) * kMostNodes + row) * kOutputs + local];
      if (finish.bias && mine) made[side] += wide(finish.bias[side * s.outputs + output]);
    }
    float value = made[0];
    if (s.sides == 2) value = value / (1.0f + expf(-value)) * made[1];
    value += local % 2 ? unpack(residual, T()).y : unpack(residual, T()).x;
    const float next = __shfl_down_sync(~0u, value, 1);
    if (!mine) continue;
    if (finish.logits)
      finish.logits[static_cast<int64_t>(row) * s.outputs + output] = value;
    else if (local % 2 == 0)
      tell_word(finish.out + row * s.outputs + output, pack(value, next, T()));
  }
}

// --- attention -------------------------------------------------------------------------------------------------------

template <typename T, int D>
struct Mixing {
  alignas(16) T heads[kQueries + 2 * kMostNodes][D];  // queries, new keys, new values, one after the other
  alignas(16) float rotation[kMostNodes * D];
  float tops[kMixing][kQueries], sums[kMixing][kQueries];
};

// One eighth of the slots for one key head and 16 of its queries, and of the results from all of them. `told`: the
// heads, which are waited for once the committed slots have been asked for; `to_tell`: the mixed values.
template <typename T, int D>
__device__ __forceinline__ void attend(const Arguments& a, const Layer& layer, int index, int job, int used,
                                       Mixing<T, D>& m, float* parts, const T* told, T* to_tell) {
  constexpr int kLoads = D / 32;   // 16-byte pieces of a slot that a quad of threads takes together
  constexpr int kHalves = D / 64;  // 16-byte pieces of a slot that 8 threads take together
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
  const int n = static_cast<int>(a.n), heads = static_cast<int>(a.group), kv_heads = static_cast<int>(a.kv_heads);
  const int rank = job % kParts, join = job / kParts, tile = join / kv_heads, kv_head = join % kv_heads;
  const int first = tile * kQueries, live = min(kQueries, n * heads - first);
  // A query's node; exact for the queries of 8 nodes that up to 362 heads share.
  const uint32_t inverse = (1u << 20) / heads + 1;
  const auto node_of = [&](int line) { return static_cast<int>((first + line) * inverse >> 20); };
  // A node of a chain sees nothing behind itself.
  const int end = a.ancestors ? used + n : used + node_of(live - 1) + 1;
  T* keys = static_cast<T*>(a.slots) + 2 * index * a.slot_group + kv_head * a.slot_head;
  T* values = keys + a.slot_group;
  const uint4 none = make_uint4(0, 0, 0, 0);

  // A warp attends to its slots with 64 channels of the values.
  const int slice = warp % kMixing, half = warp / kMixing;
  const bool mixes = half < kHalves;
  uint4 k[2][kLoads], v[4];
  // The committed slots, which nothing of this forward writes.
  const auto load = [&](int start) {
#pragma unroll
    for (int eight = 0; eight < 2; ++eight) {
      const int slot = start + eight * 8 + group;
#pragma unroll
      for (int i = 0; i < kLoads; ++i)
        k[eight][i] =
            slot < used ? __ldcg(reinterpret_cast<const uint4*>(keys + slot * a.slot_slot + i * 32 + quad * 8)) : none;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int slot = start + (i / 2) * 8 + quad * 2 + i % 2;
      v[i] = slot < used ? __ldcg(reinterpret_cast<const uint4*>(values + slot * a.slot_slot + half * 64 + group * 8))
                         : none;
    }
  };
  constexpr int kStride = kParts * kMixing * kSlots;
  int start = (slice * kParts + rank) * kSlots;
  if (mixes) load(start);

  // Queries, then new keys, then new values: lines of their heads, of which a thread takes 8 channels at a time.
  constexpr int kLanes = D / 8;
  const int lines = live + 2 * n, turning = (heads + 1) * kv_heads, every = turning + kv_heads;
#pragma unroll 1
  for (int i = threadIdx.x; i < (lines * kLanes + 31) / 32 * 32; i += kComputing) {
    const int line = min(i / kLanes, lines - 1), at = i % kLanes * 8, added = line - live;
    const int node = added < 0 ? node_of(line) : added < n ? added : added - n;
    const int head =
        added < 0 ? kv_head * heads + first + line - node * heads : (heads + (added >= n)) * kv_heads + kv_head;
    const T* from = told + (node * every + head) * D + at;
    uint4 v = peek(from);
    insist(v, from);
    if (layer.head_norm) {
      float all = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 both = unpack(word(v, j), T());
        all += both.x * both.x + both.y * both.y;
      }
#pragma unroll
      for (int distance = kLanes / 2; distance; distance /= 2) all += __shfl_xor_sync(~0u, all, distance);
      const float size = rsqrtf(all / D + a.eps);
      const auto scaled = [&](uint32_t value, uint32_t by) {
        const float2 number = unpack(value, T()), scale = unpack(by, T());
        return pack(number.x * size * scale.x, number.y * size * scale.y, T());
      };
      if (added < n) {
        const uint4 by = *reinterpret_cast<const uint4*>(static_cast<const T*>(layer.head_norm) + head * D + at);
        v = make_uint4(scaled(v.x, by.x), scaled(v.y, by.y), scaled(v.z, by.z), scaled(v.w, by.w));
      }
    }
    if (added < n) {
      const float4* by = reinterpret_cast<const float4*>(m.rotation + node * D + at);
      const float4 low = by[0], high = by[1];
      const auto turned = [&](uint32_t value, float real, float imaginary) {
        const float2 number = unpack(value, T());
        return pack(number.x * real - number.y * imaginary, number.x * imaginary + number.y * real, T());
      };
      v = make_uint4(turned(v.x, low.x, low.y), turned(v.y, low.z, low.w), turned(v.z, high.x, high.y),
                     turned(v.w, high.z, high.w));
    }
    if (i >= lines * kLanes) break;
    *reinterpret_cast<uint4*>(&m.heads[line][at]) = v;
    if (added >= 0 && rank == 0 && tile == 0)
      *reinterpret_cast<uint4*>((added < n ? keys : values) + (used + node) * a.slot_slot + at) = v;
  }
  meet();

  // Of rows `group` and `group + 8` of the tile. Rows without a query repeat the last one; nobody reads them.
  if (mixes) {
    const T* query[2] = {m.heads[min(group, live - 1)] + quad * 8, m.heads[min(group + 8, live - 1)] + quad * 8};
    // The slots of the window that it sees; before that everything is seen by all.
    uint64_t sees[2];
    const int width = static_cast<int>(a.width), window = used + n - width;
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int line = min(group + 8 * side, live - 1), node = node_of(line), own = width - n + node;
      const uint64_t itself = uint64_t{1} << own;
      sees[side] = a.ancestors ? itself | (a.ancestors[node * a.mask_node] & (~uint64_t{0} >> (64 - width)))
                               : itself | (itself - 1);
    }

    float highest[2] = {-INFINITY, -INFINITY}, weight[2] = {0, 0};
    float mixed[8][4] = {};
#pragma unroll 1
    for (bool again = false; start < end; start += kStride, again = true) {
      if (again) load(start);
      if (start + kSlots > used) {
#pragma unroll
        for (int eight = 0; eight < 2; ++eight) {
          const int node = start + eight * 8 + group - used;
#pragma unroll
          for (int i = 0; i < kLoads; ++i)
            if (node >= 0 && node < n)
              k[eight][i] = *reinterpret_cast<const uint4*>(&m.heads[live + node][i * 32 + quad * 8]);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int node = start + (i / 2) * 8 + quad * 2 + i % 2 - used;
          if (node >= 0 && node < n)
            v[i] = *reinterpret_cast<const uint4*>(&m.heads[live + n + node][half * 64 + group * 8]);
        }
      }
      float scores[2][4] = {};
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const uint4 low = *reinterpret_cast<const uint4*>(query[0] + i * 32),
                    high = *reinterpret_cast<const uint4*>(query[1] + i * 32);
#pragma unroll
        for (int eight = 0; eight < 2; ++eight) {
          multiply(scores[eight], low.x, high.x, low.y, high.y, k[eight][i].x, k[eight][i].y, T());
          multiply(scores[eight], low.z, high.z, low.w, high.w, k[eight][i].z, k[eight][i].w, T());
        }
      }
      float fade[2];
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        float raised = highest[side];
#pragma unroll
        for (int eight = 0; eight < 2; ++eight)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float& score = scores[eight][side * 2 + i];
            const int bit = start + eight * 8 + quad * 2 + i - window;
            score = bit < 0 || (bit < 64 && (sees[side] >> bit & 1)) ? score * a.scale : -INFINITY;
            raised = fmaxf(raised, score);
          }
        fade[side] = weigh(scores, side, raised, highest[side], weight[side]);
      }
#pragma unroll
      for (int channel = 0; channel < 8; ++channel) {
        mix<T>(mixed[channel], fade, scores, v[0], v[1], v[2], v[3], channel);
      }
    }

#pragma unroll
    for (int side = 0; side < 2; ++side) {
      float all = weight[side];
      all += __shfl_xor_sync(~0u, all, 1);
      all += __shfl_xor_sync(~0u, all, 2);
      const int line = group + 8 * side;
      if (line >= live) continue;
      if (quad == 0 && half == 0) m.tops[slice][line] = highest[side], m.sums[slice][line] = all;
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int channel = 0; channel < 8; channel += 4) {
          const int at = side * 2 + i;
          *reinterpret_cast<float4*>(parts + (slice * kQueries + line) * D + half * 64 + (quad * 2 + i) * 8 + channel) =
              make_float4(mixed[channel][at], mixed[channel + 1][at], mixed[channel + 2][at], mixed[channel + 3][at]);
        }
    }
  }
  meet();

  // The block's part: relative to its highest score, not divided. Of every line its values in pairs, then top and sum.
  constexpr int kPairsLine = D / 2 + 1;
  const int most = min(kQueries, n * heads);
  float* partial = a.partial + static_cast<int64_t>(join) * kParts * most * kPairsLine * 4;
  const auto place_of = [&](int part, int line, int pair) {
    return partial + ((part * most + line) * kPairsLine + pair) * 4;
  };
#pragma unroll 1
  for (int cell = threadIdx.x; cell < live * (D / 2); cell += kComputing) {
    const int line = cell / (D / 2), pair = cell % (D / 2);
    float raised = -INFINITY, all = 0;
    float2 sum = make_float2(0, 0);
#pragma unroll
    for (int part = 0; part < kMixing; ++part) raised = fmaxf(raised, m.tops[part][line]);
#pragma unroll
    for (int part = 0; part < kMixing; ++part) {
      const float counted = fade_of(m.tops[part][line], raised);
      const float2 from = *reinterpret_cast<const float2*>(parts + (part * kQueries + line) * D + pair * 2);
      sum.x += counted * from.x, sum.y += counted * from.y;
      all += counted * m.sums[part][line];
    }
    tell(place_of(rank, line, pair), sum.x, sum.y, index);
    if (pair == 0) tell(place_of(rank, line, D / 2), raised, all, index);
  }
  // An eighth of the results.
  const int share = live * (D / 2) / kParts;
#pragma unroll 1
  for (int i = threadIdx.x; i < share; i += kComputing) {
    const int cell = rank * share + i, line = cell / (D / 2), pair = cell % (D / 2);
    const float *value = place_of(0, line, pair), *softmax = place_of(0, line, D / 2);
    const int next = most * kPairsLine * 4;
    Told values[kParts], weights[kParts];
    bool there;
    do {
      there = true;
#pragma unroll
      for (int part = 0; part < kParts; ++part)
        values[part].read(value + part * next), weights[part].read(softmax + part * next);
#pragma unroll
      for (int part = 0; part < kParts; ++part)
        there = there && values[part].is_of(index) && weights[part].is_of(index);
    } while (!there);
    float raised = -INFINITY, all = 0;
    float2 sum = make_float2(0, 0);
#pragma unroll
    for (int part = 0; part < kParts; ++part) raised = fmaxf(raised, weights[part].first());
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const float counted = fade_of(weights[part].first(), raised);
      sum.x += counted * values[part].first(), sum.y += counted * values[part].second();
      all += counted * weights[part].second();
    }
    const int node = node_of(line), head = kv_head * heads + first + line - node * heads;
    tell_word(to_tell + (node * kv_heads * heads + head) * D + pair * 2, pack(sum.x / all, sum.y / all, T()));
  }
}

// --- the whole -------------------------------------------------------------------------------------------------------

// What a block keeps in shared memory besides the ring, normed rows, parts and pointers, in that order behind it.
template <typename T, int D>
struct alignas(128) Block {
  Mixing<T, D> mixing;
  float squares[kWarps * kMostNodes];
  uint64_t barriers[2 * kMostStages];
};

template <typename T, int D>
__device__ __forceinline__ void layers(const Arguments& a) {
  constexpr int kPartBytes = kMixing * kQueries * D * 4;
  static_assert(kPartBytes >= 2 * kWarps * 2 * kMostNodes * kOutputs * 4, "two units fit");
  const int count = static_cast<int>(a.count), n = static_cast<int>(a.n), hidden_size = static_cast<int>(a.hidden_size);
  uint8_t* memory = dynamic_shared();
  Block<T, D>& block = *reinterpret_cast<Block<T, D>*>(memory);
  const Ring ring = {shared_address(block.barriers), shared_address(block.barriers + kMostStages),
                     memory + sizeof(Block<T, D>), static_cast<uint32_t>(a.stages),
                     static_cast<uint32_t>(a.stages >> 32)};
  uint8_t* normed = ring.data + ring.stages * kStage;
  float* parts = reinterpret_cast<float*>(normed + n * normed_line(hidden_size));
  Layer* table = reinterpret_cast<Layer*>(parts + kPartBytes / 4);
#pragma unroll 1
  for (int i = threadIdx.x; i < count * static_cast<int>(sizeof(Layer) / 8); i += kThreads)
    reinterpret_cast<uint64_t*>(table)[i] = reinterpret_cast<const uint64_t*>(a.layers)[i];
#pragma unroll 1
  for (int i = threadIdx.x; i < n * D; i += kThreads) block.mixing.rotation[i] = a.rotation[i];
  if (threadIdx.x == 0) {
#pragma unroll 1
    for (uint32_t stage = 0; stage < ring.stages; ++stage) {
      init_barrier(ring.full + stage * 8, kAsking);
      init_barrier(ring.empty + stage * 8, kComputing);
    }
    publish_barriers();
  }
  __syncthreads();

  const int phases = 4 * count + (a.head != nullptr);
  Place place;
  int dealt = 0;
  if (threadIdx.x >= kComputing) {
    give_registers<40>();
    if (threadIdx.x >= kComputing + 32 * kAsking) return;
    request<T, D>(a, table, phases, ring);
    return;
  }
  take_registers<232>();

  const int tiles = (n * static_cast<int>(a.group) + kQueries - 1) / kQueries;
  const int jobs = tiles * static_cast<int>(a.kv_heads) * kParts, used = static_cast<int>(a.length[0]);
  const int inner_size = static_cast<int>(a.inner_size), queries = static_cast<int>(a.kv_heads * a.group) * D;
  const int every = queries + 2 * static_cast<int>(a.kv_heads) * D;
  const int64_t layer_size = static_cast<int64_t>(n) * (every + queries + 2 * hidden_size + inner_size);
  Rows<T> stream = {static_cast<const T*>(a.embedding), hidden_size, a.tokens};
  uint32_t target = 0;
#pragma unroll 1
  for (int phase = 0; phase < phases; ++phase) {
    const Shape shape = shape_of<D>(a, table, phase);
    const int index = phase / 4, part = index == count ? 4 : phase % 4;
    const Layer& layer = table[index == count ? 0 : index];
    T* heads = static_cast<T*>(a.told) + index * layer_size;
    T *mixed = heads + n * every, *between = mixed + n * queries, *inner = between + n * hidden_size,
      *after = inner + n * inner_size;
    const auto given = [](const void* at) { return static_cast<const T*>(at); };
    Finish<T> finish = {};
    const T *norm = nullptr, *x = nullptr;
    switch (part) {
      case 0:
        finish.bias = given(layer.qkv_bias), norm = given(layer.attention_norm), finish.out = heads;
        break;
      case 1:
        finish.bias = given(layer.out_bias), x = mixed, finish.residual = stream, finish.out = between;
        break;
      case 2:
        finish.bias = given(layer.up_bias), norm = given(layer.feed_norm), finish.out = inner;
        break;
      case 3:
        finish.bias = given(layer.down_bias), x = inner, finish.residual = stream, finish.out = after;
        break;
      default:
        finish.bias = given(a.head_bias), norm = given(a.final_norm), finish.logits = a.logits;
    }
    // A block without a unit need not wait for its inputs.
    if (first_unit(dealt) < shape.units()) {
      const int stride = norm ? normed_line(hidden_size) / static_cast<int>(sizeof(T)) : shape.inputs;
      multiply_units<T>(ring, place, dealt, shape, stride, norm == nullptr, n, finish, parts, [&] {
        if (!norm) {
          await(a.counter, target);
          return x;
        }
        uint4 scales[kMostPieces];
#pragma unroll
        for (int piece = 0; piece < kMostPieces; ++piece) {
          const int at = (piece * kComputing + threadIdx.x) * 8;
          if (at < hidden_size) scales[piece] = *reinterpret_cast<const uint4*>(norm + at);
        }
        await(a.counter, target);
        norm_rows<T>(stream, scales, hidden_size, n, a.eps, normed, block.squares);
        return reinterpret_cast<const T*>(normed);
      });
    }
    dealt = deal(dealt, shape.units());
    if (part == 0) {
      // What the last unit left in shared memory has been read.
      meet();
#pragma unroll 1
      for (int job = blockIdx.x; job < jobs; job += gridDim.x) {
        attend<T, D>(a, layer, index, job, used, block.mixing, parts, heads, mixed);
        meet();
        if (threadIdx.x == 0) count_up(a.counter);
      }
      target += jobs;
    }
    if (part == 1) stream = {between, hidden_size, nullptr};
    if (part == 3) stream = {after, hidden_size, nullptr};
    if (part > 0) {
      meet();
      if (threadIdx.x == 0) count_up(a.counter);
      target += gridDim.x;
    }
  }
}

}  // namespace

#define SPECDEC_LAYERS(name, T, D) \
  extern "C" __global__ void __launch_bounds__(kThreads, 1) name(const Arguments a) { layers<T, D>(a); }

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
SPECDEC_LAYERS(layers_float16_64, __half, 64)
SPECDEC_LAYERS(layers_float16_128, __half, 128)
SPECDEC_LAYERS(layers_bfloat16_64, __nv_bfloat16, 64)
SPECDEC_LAYERS(layers_bfloat16_128, __nv_bfloat16, 128)
#endif
