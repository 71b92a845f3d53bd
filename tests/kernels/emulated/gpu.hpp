// A GPU for tests of what threads of a kernel tell and wait for: every thread is a fiber, all of them take turns on one
// thread of the CPU in an order drawn from a seed, and nothing happens sooner than it must. Words told to other blocks
// arrive in any order, and copies to shared memory when they like. It knows no warp that runs in step: threads of a
// warp meet where they shuffle, multiply and synchronize, and nowhere else.
//
// What is not here is the hardware's own order of reads that were asked for: a read is made where it stands.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define SPECDEC_PTX

using std::max;
using std::min;

struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

namespace gpu {

inline float float_of(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}
inline uint32_t bits_of(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}

// --- fibers -----------------------------------------------------------------------------------------------------------

constexpr int kWarp = 32;
constexpr size_t kStack = 32 << 10;

struct Meeting {  // threads that wait for each other
  int here = 0;
  uint64_t past = 0;
};

struct Barrier {  // of arrivals and bytes
  int arrivals = 0, missing = 0;
  int64_t bytes = 0;
  uint64_t phase = 0;

  void check() {
    if (missing == 0 && bytes == 0) ++phase, missing = arrivals;
  }
};

struct Copy {
  uint8_t* to;
  const uint8_t* from;
  uint32_t bytes, barrier;
};
struct Word {
  uint8_t* to;
  uint64_t value;
  int bytes;
};

struct Warp {
  Meeting meeting;
  uint32_t sent[2][kWarp][12];
};

struct Block {
  Meeting all, some;
  std::vector<uint8_t> memory;
  std::vector<Warp> warps;
};

struct Fiber {
  ucontext_t context;  // of its first turn; jumps need no call of the system
  jmp_buf place;
  bool begun = false;
  std::unique_ptr<char[]> stack;
  unsigned block, thread;
  bool done = false;
  std::function<bool()> ready;  // empty: it can go on
};

struct Machine {
  std::mt19937_64 random;
  ucontext_t scheduler;
  jmp_buf home;
  std::vector<Fiber> fibers;
  std::vector<Block> blocks;
  std::map<uint32_t, Barrier> barriers;
  std::vector<Copy> copies;
  std::vector<Word> words;
  std::function<void()> body;
  Fiber* running = nullptr;
  std::string error;
  unsigned grid = 0, threads = 0;

  size_t draw(size_t below) { return random() % below; }
};

inline Machine* machine = nullptr;

inline void pause_until(std::function<bool()> ready) {
  Fiber* self = machine->running;
  self->ready = std::move(ready);
  if (!_setjmp(self->place)) _longjmp(machine->home, 1);
}
inline void pause() { pause_until({}); }
// Now and then: every order of what others do meanwhile should be possible, but not every one be tried.
inline void maybe_pause() {
  if (machine->draw(4) == 0) pause();
}

inline void gather(Meeting& meeting, int count) {
  const uint64_t mine = meeting.past;
  if (++meeting.here == count) {
    meeting.here = 0, ++meeting.past;
    maybe_pause();
  } else {
    pause_until([&meeting, mine] { return meeting.past != mine; });
  }
}

inline Block& block() { return machine->blocks[machine->running->block]; }
inline Warp& warp() { return block().warps[machine->running->thread / kWarp]; }
inline int lane() { return machine->running->thread % kWarp; }

// What all lanes of the warp sent; they have all sent when it returns. Two in turn: nobody can be two ahead.
template <int N>
inline const uint32_t (*exchange(const uint32_t (&mine)[N]))[12] {
  Warp& w = warp();
  auto& sent = w.sent[w.meeting.past % 2];
  std::copy(mine, mine + N, sent[lane()]);
  gather(w.meeting, kWarp);
  return sent;
}

inline void start() {
  try {
    machine->body();
  } catch (const std::exception& error) {
    if (machine->error.empty()) machine->error = error.what();
  }
  machine->running->done = true;
  _longjmp(machine->home, 1);
}

inline void perform_something() {
  Machine& m = *machine;
  if (!m.words.empty() && (m.copies.empty() || m.draw(2))) {
    std::swap(m.words[m.draw(m.words.size())], m.words.back());
    const Word word = m.words.back();
    m.words.pop_back();
    std::memcpy(word.to, &word.value, word.bytes);
  } else if (!m.copies.empty()) {
    std::swap(m.copies[m.draw(m.copies.size())], m.copies.back());
    const Copy copy = m.copies.back();
    m.copies.pop_back();
    std::memcpy(copy.to, copy.from, copy.bytes);
    Barrier& barrier = m.barriers.at(copy.barrier);
    barrier.bytes -= copy.bytes;
    barrier.check();
  }
}

// Runs `body` as a grid. Throws when it has not ended after so many turns.
inline void run(std::function<void()> body, unsigned grid, unsigned threads, size_t shared, uint64_t seed,
                uint64_t turns) {
  Machine m;
  machine = &m;
  m.random.seed(seed);
  m.body = std::move(body), m.grid = grid, m.threads = threads;
  m.blocks.resize(grid);
  for (Block& b : m.blocks) b.memory.assign(shared + 128, 0xA5), b.warps.resize((threads + kWarp - 1) / kWarp);
  m.fibers.resize(static_cast<size_t>(grid) * threads);
  for (size_t i = 0; i < m.fibers.size(); ++i) {
    Fiber& f = m.fibers[i];
    f.block = i / threads, f.thread = i % threads, f.stack.reset(new char[kStack]);
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get(), f.context.uc_stack.ss_size = kStack, f.context.uc_link = &m.scheduler;
    makecontext(&f.context, start, 0);
  }
  std::vector<size_t> alive(m.fibers.size() / kWarp);
  for (size_t i = 0; i < alive.size(); ++i) alive[i] = i;
  for (uint64_t turn = 0; !alive.empty(); ++turn) {
    if (turn == turns) throw std::runtime_error("the kernel does not end");
    if (!m.error.empty()) throw std::runtime_error(m.error);
    if (m.draw(3) == 0) perform_something();
    const size_t place = m.draw(alive.size());
    bool any = false;
    const size_t first = m.draw(kWarp);
    for (size_t i = 0; i < kWarp; ++i) {
      Fiber& f = m.fibers[alive[place] * kWarp + (first + i) % kWarp];
      if (f.done) continue;
      any = true;
      if (f.ready && !f.ready()) continue;
      f.ready = {};
      m.running = &f;
      if (_setjmp(m.home)) continue;
      if (f.begun) _longjmp(f.place, 1);
      f.begun = true;
      swapcontext(&m.scheduler, &f.context);
    }
    if (!any) std::swap(alive[place], alive.back()), alive.pop_back();
  }
  while (!m.words.empty() || !m.copies.empty()) perform_something();
  machine = nullptr;
}

struct ThreadX {
  operator unsigned() const { return machine->running->thread; }
};
struct BlockX {
  operator unsigned() const { return machine->running->block; }
};
struct GridX {
  operator unsigned() const { return machine->grid; }
};

}  // namespace gpu

struct {
  gpu::ThreadX x;
} static const threadIdx;
struct {
  gpu::BlockX x;
} static const blockIdx;
struct {
  gpu::GridX x;
} static const gridDim;

// --- numbers ----------------------------------------------------------------------------------------------------------

struct __half {
  _Float16 v;
};
struct __half2 {
  __half x, y;
};
struct __nv_bfloat16 {
  uint16_t v;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline uint32_t __float_as_uint(float v) { return gpu::bits_of(v); }
inline float __uint_as_float(uint32_t v) { return gpu::float_of(v); }
inline float __bfloat162float(__nv_bfloat16 v) { return gpu::float_of(uint32_t{v.v} << 16); }
inline __nv_bfloat16 __float2bfloat16(float v) {
  if (std::isnan(v)) return {0x7FFF};
  const uint32_t bits = gpu::bits_of(v);
  return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__float2bfloat16(x), __float2bfloat16(y)}; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {__bfloat162float(v.x), __bfloat162float(v.y)}; }
inline float __half2float(__half v) { return static_cast<float>(v.v); }
inline __half __float2half(float v) {
  if (!std::isnan(v)) return {static_cast<_Float16>(v)};
  const uint16_t bits = 0x7FFF;
  __half made;
  std::memcpy(&made, &bits, sizeof made);
  return made;
}
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half(x), __float2half(y)}; }
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
inline float rsqrtf(float v) { return 1.0f / std::sqrt(v); }

inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t pick) {
  const uint64_t both = uint64_t{y} << 32 | x;
  uint32_t made = 0;
  for (int i = 0; i < 4; ++i) made |= static_cast<uint32_t>(both >> (pick >> 4 * i & 7) * 8 & 0xFF) << 8 * i;
  return made;
}
template <typename V>
inline V __ldcg(const V* at) {
  return *at;
}

// --- what a warp does together ----------------------------------------------------------------------------------------

inline void __syncwarp() { gpu::exchange<1>({0}); }
inline void __syncthreads() { gpu::gather(gpu::block().all, gpu::machine->threads); }
inline float __shfl_sync(unsigned, float v, int from) {
  return gpu::float_of(gpu::exchange<1>({gpu::bits_of(v)})[from % 32][0]);
}
inline float __shfl_xor_sync(unsigned, float v, int distance) {
  return gpu::float_of(gpu::exchange<1>({gpu::bits_of(v)})[gpu::lane() ^ distance][0]);
}
inline float __shfl_down_sync(unsigned, float v, int distance) {
  const auto sent = gpu::exchange<1>({gpu::bits_of(v)});
  return gpu::float_of(sent[min(gpu::lane() + distance, 31)][0]);
}

// m16n8k16: the products of a row and a column are added in an order of their own, the same for all.
template <typename T>
inline void multiply(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, T) {
  const auto sent = gpu::exchange<6>({a0, a1, a2, a3, b0, b1});
  const int group = gpu::lane() / 4, quad = gpu::lane() % 4;
  const auto number = [](uint32_t v, int half) {
    T value;
    const uint16_t bits = static_cast<uint16_t>(half ? v >> 16 : v);
    std::memcpy(&value, &bits, 2);
    if constexpr (std::is_same_v<T, __half>)
      return __half2float(value);
    else
      return __bfloat162float(value);
  };
  for (int i = 0; i < 4; ++i) {
    const int row = i / 2, column = quad * 2 + i % 2;
    float sum = 0;
    for (int k = 0; k < 16; ++k) {
      const int high = k / 8, owner = k % 8 / 2, half = k % 2;
      sum += number(sent[group * 4 + owner][row + 2 * high], half) * number(sent[column * 4 + owner][4 + high], half);
    }
    c[i] += sum;
  }
}

// --- ptx.cuh ----------------------------------------------------------------------------------------------------------

namespace {

inline uint8_t* dynamic_shared() {
  uint8_t* at = gpu::block().memory.data();
  return at + (128 - reinterpret_cast<uintptr_t>(at) % 128) % 128;
}
// The block, and the place in its memory.
inline uint32_t shared_address(const void* at) {
  return gpu::machine->running->block << 24 | static_cast<uint32_t>(static_cast<const uint8_t*>(at) - dynamic_shared());
}
inline uint8_t* shared_place(uint32_t address) { return dynamic_shared() + (address & 0xFFFFFF); }

inline void init_barrier(uint32_t barrier, int arrivals) {
  gpu::Barrier& made = gpu::machine->barriers[barrier];
  made = {}, made.arrivals = made.missing = arrivals;
}
inline void publish_barriers() {}
inline void arrive(uint32_t barrier) {
  gpu::maybe_pause();
  gpu::Barrier& at = gpu::machine->barriers.at(barrier);
  if (at.missing == 0) throw std::runtime_error("more arrivals than a barrier counts");
  --at.missing, at.check();
}
inline void arrive_and_announce(uint32_t barrier, uint32_t bytes) {
  gpu::machine->barriers.at(barrier).bytes += bytes;
  arrive(barrier);
}
inline void wait_for(uint32_t barrier, uint32_t parity) {
  gpu::Barrier& at = gpu::machine->barriers.at(barrier);
  gpu::maybe_pause();
  if (at.phase % 2 == parity) gpu::pause_until([&at, parity] { return at.phase % 2 != parity; });
}
inline void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  if (to % 16 || bytes % 16 || reinterpret_cast<uintptr_t>(from) % 16) throw std::runtime_error("an odd bulk copy");
  gpu::machine->copies.push_back({shared_place(to), static_cast<const uint8_t*>(from), bytes, barrier});
  gpu::maybe_pause();
}
inline void copy_piece(uint32_t to, const void* from) {
  std::memcpy(shared_place(to), from, 16);
  gpu::maybe_pause();
}
inline void finish_copies() { gpu::maybe_pause(); }
template <int THREADS>
inline void meet() {
  gpu::gather(gpu::block().some, THREADS);
}

inline uint32_t peek_word(const void* at) {
  gpu::maybe_pause();
  return *static_cast<const uint32_t*>(at);
}
// Not all of one moment.
inline uint4 peek(const void* at) {
  const uint32_t* words = static_cast<const uint32_t*>(at);
  uint4 v;
  v.z = words[2], v.x = words[0];
  gpu::maybe_pause();
  v.w = words[3], v.y = words[1];
  return v;
}
inline uint4 peek_pairs(const void* at) {
  const uint32_t* words = static_cast<const uint32_t*>(at);
  uint4 v;
  v.z = words[2], v.w = words[3];
  gpu::maybe_pause();
  v.x = words[0], v.y = words[1];
  return v;
}
inline void tell_word(void* at, uint32_t v) {
  gpu::machine->words.push_back({static_cast<uint8_t*>(at), v, 4});
  gpu::maybe_pause();
}
inline void tell_pairs(void* at, const uint4& v) {
  uint8_t* to = static_cast<uint8_t*>(at);
  gpu::machine->words.push_back({to, uint64_t{v.y} << 32 | v.x, 8});
  gpu::machine->words.push_back({to + 8, uint64_t{v.w} << 32 | v.z, 8});
  gpu::maybe_pause();
}
inline void count_up(uint32_t* counter) {
  ++*counter;
  gpu::maybe_pause();
}
template <int COUNT>
inline void give_registers() {}
template <int COUNT>
inline void take_registers() {}

}  // namespace
