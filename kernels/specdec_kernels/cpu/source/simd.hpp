// The few vector operations that the kernels are written in, once per instruction set.
//
// `F`: W float32 lanes. `I`: W int32 lanes. Every operation rounds as IEEE 754 says; none is approximate.
//
// `dot4` adds products of 4 channels to each of W sums. Weights: `Bytes` (int8) or `Nibbles` (0 to 15) of 4 channels of 16
// outputs, in parts of W outputs. Inputs: `Quad`, the 4 channels of one row, -127 to 127. Bytes are `OFFSET` above the
// weights where the instruction wants them without sign, so sums over them start at -OFFSET times the sum of the inputs.
// Sums are exact: those over nibbles for up to 32 channels (in an `N`, which `finish` turns into an `I`).
//
// `fold` and `join` sum the lanes of W vectors, each by the same tree: `fold` takes 4 vectors, `join` the W / 4 results.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(SPECDEC_AVX2) || defined(SPECDEC_AVX512)
#include <immintrin.h>
#endif
#if defined(SPECDEC_NEON)
#include <arm_neon.h>
#endif

namespace specdec {
namespace SPECDEC_ISA {

inline int32_t load_int32(const void* p) {
    int32_t value;
    std::memcpy(&value, p, 4);
    return value;
}

// Into the second-level cache, and not through the few entries that the first keeps for what it waits for.
inline void prefetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }

// Weights are read once, in order. The second-level cache asks for them long before they are needed, the first-level
// cache shortly before. With the near one alone, products of 8 rows waited for memory as long as they computed: 30 GB/s
// of float32 on two cores of a Zen 4, 52 with both, 27 with neither.
constexpr int64_t FAR_AHEAD = 16384, NEAR_AHEAD = 1024;
inline void prefetch_weights(const void* p) {
    prefetch_far(static_cast<const char*>(p) + FAR_AHEAD);
    __builtin_prefetch(static_cast<const char*>(p) + NEAR_AHEAD, 0, 3);
}

#if defined(SPECDEC_AVX2)

constexpr int W = 8;
constexpr int MAX_QUERIES = 2;
constexpr int MAX_ROWS = 6;      // 6 x 2 accumulators, 2 weights and 1 input fill the 16 registers
constexpr int MAX_ROWS_INT = 6;  // 12 accumulators, 2 weights, 1 input, 1 product
using F = __m256;
using I = __m256i;
using N = __m256i;

inline F load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, F a) { _mm256_storeu_ps(p, a); }
inline F set1(float a) { return _mm256_set1_ps(a); }
inline F broadcast(const float* p) { return _mm256_broadcast_ss(p); }
inline F zero() { return _mm256_setzero_ps(); }
inline F add(F a, F b) { return _mm256_add_ps(a, b); }
inline F sub(F a, F b) { return _mm256_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
inline F div(F a, F b) { return _mm256_div_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
// NaN in `b` stays NaN.
inline F max(F a, F b) { return _mm256_max_ps(a, b); }
inline F min(F a, F b) { return _mm256_min_ps(a, b); }
inline F abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
inline F round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline I to_int(F a) { return _mm256_cvtps_epi32(a); }
inline F to_float(I a) { return _mm256_cvtepi32_ps(a); }
inline F zero_where_less(F a, F bound, F value) {
    return _mm256_andnot_ps(_mm256_cmp_ps(a, bound, _CMP_LT_OQ), value);
}
inline F scale_by_power(F a, F power) {
    const I bits = _mm256_slli_epi32(_mm256_add_epi32(to_int(power), _mm256_set1_epi32(127)), 23);
    return mul(a, _mm256_castsi256_ps(bits));
}
inline float sum(F a) {
    F s = _mm256_hadd_ps(a, a);
    s = _mm256_hadd_ps(s, s);
    return _mm_cvtss_f32(_mm_add_ss(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
}
inline F fold(const F* a) { return _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3])); }
inline F join(const F* a) {
    return _mm256_add_ps(_mm256_permute2f128_ps(a[0], a[1], 0x20), _mm256_permute2f128_ps(a[0], a[1], 0x31));
}
inline float top_lane(F a) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
inline F load_fp16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline F load_bf16(const uint16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline I izero() { return _mm256_setzero_si256(); }
inline I iadd(I a, I b) { return _mm256_add_epi32(a, b); }
inline I iset1(int32_t a) { return _mm256_set1_epi32(a); }
// Written out, because g++ 12 otherwise reassociates sums of integers, and spills them in the innermost loops.
inline __m256i accumulate16(__m256i c, __m256i a) {
    asm("vpaddw %1, %0, %0" : "+x"(c) : "x"(a));
    return c;
}
inline __m256i accumulate32(__m256i c, __m256i a) {
    asm("vpaddd %1, %0, %0" : "+x"(c) : "x"(a));
    return c;
}
// Low nibbles hold the first 8 outputs, high nibbles the others.
struct Nibbles {
    __m256i part[2];
};
inline Nibbles load_nibbles(const uint8_t* p) {
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m256i low = _mm256_set1_epi8(0x0f);
    return {{_mm256_and_si256(raw, low), _mm256_and_si256(_mm256_srli_epi16(raw, 4), low)}};
}
using Quad = __m256i;
inline Quad broadcast_quad(const int8_t* p) { return _mm256_set1_epi32(load_int32(p)); }
// 8 additions of 2 x 15 x 127 stay below 32768, so a group of 32 channels fits into int16.
inline N nzero() { return _mm256_setzero_si256(); }
inline N dot4(N c, const Nibbles& w, int part, Quad x) {
    return accumulate16(c, _mm256_maddubs_epi16(w.part[part], x));
}
inline I finish(N a) { return _mm256_madd_epi16(a, _mm256_set1_epi16(1)); }
constexpr int32_t OFFSET = 0;
struct Bytes {
    __m256i size[2], value[2];
};
inline Bytes load_bytes(const int8_t* p) {
    Bytes b;
    for (int i = 0; i < 2; ++i) {
        b.value[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + i);
        b.size[i] = _mm256_abs_epi8(b.value[i]);
    }
    return b;
}
// The sign of a weight moves to its input; 2 x 128 x 127 fits into int16, so nothing saturates.
inline I dot4(I c, const Bytes& w, int part, Quad x) {
    const __m256i pairs = _mm256_maddubs_epi16(w.size[part], _mm256_sign_epi8(x, w.value[part]));
    return accumulate32(c, finish(pairs));
}
inline void store_int8(int8_t* p, I a) {
    const __m256i wide = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, a), 0x08);
    const __m128i narrow = _mm256_castsi256_si128(_mm256_packs_epi16(wide, wide));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), narrow);
}

#elif defined(SPECDEC_AVX512)

constexpr int W = 16;
constexpr int MAX_QUERIES = 4;
constexpr int MAX_ROWS = 8;
constexpr int MAX_ROWS_INT = 8;
using F = __m512;
using I = __m512i;
using N = __m512i;

inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F a) { _mm512_storeu_ps(p, a); }
inline F set1(float a) { return _mm512_set1_ps(a); }
inline F broadcast(const float* p) { return _mm512_set1_ps(*p); }
inline F zero() { return _mm512_setzero_ps(); }
inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F div(F a, F b) { return _mm512_div_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F max(F a, F b) { return _mm512_max_ps(a, b); }
inline F min(F a, F b) { return _mm512_min_ps(a, b); }
inline F abs(F a) { return _mm512_abs_ps(a); }
inline F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline I to_int(F a) { return _mm512_cvtps_epi32(a); }
inline F to_float(I a) { return _mm512_cvtepi32_ps(a); }
inline F zero_where_less(F a, F bound, F value) {
    return _mm512_maskz_mov_ps(static_cast<__mmask16>(~_mm512_cmp_ps_mask(a, bound, _CMP_LT_OQ)), value);
}
inline F scale_by_power(F a, F power) {
    const I bits = _mm512_slli_epi32(_mm512_add_epi32(to_int(power), _mm512_set1_epi32(127)), 23);
    return mul(a, _mm512_castsi512_ps(bits));
}
inline float sum(F a) {
    const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline F fold(const F* a) {
    const F b = add(_mm512_unpacklo_ps(a[0], a[1]), _mm512_unpackhi_ps(a[0], a[1]));
    const F c = add(_mm512_unpacklo_ps(a[2], a[3]), _mm512_unpackhi_ps(a[2], a[3]));
    const __m512d low = _mm512_castps_pd(b), high = _mm512_castps_pd(c);
    return add(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)), _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
}
inline F join(const F* c) {
    F d[2];
    for (int i = 0; i < 2; ++i)
        d[i] = add(_mm512_shuffle_f32x4(c[2 * i], c[2 * i + 1], 0x88), _mm512_shuffle_f32x4(c[2 * i], c[2 * i + 1], 0xdd));
    return add(_mm512_shuffle_f32x4(d[0], d[1], 0x88), _mm512_shuffle_f32x4(d[0], d[1], 0xdd));
}
inline float top_lane(F a) { return _mm512_reduce_max_ps(a); }
inline F load_fp16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline F load_bf16(const uint16_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline I izero() { return _mm512_setzero_si512(); }
inline I iadd(I a, I b) { return _mm512_add_epi32(a, b); }
inline I iset1(int32_t a) { return _mm512_set1_epi32(a); }
struct Nibbles {
    __m512i part[1];
};
inline Nibbles load_nibbles(const uint8_t* p) {
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m256i low = _mm256_set1_epi8(0x0f);
    const __m256i high = _mm256_and_si256(_mm256_srli_epi16(raw, 4), low);
    return {{_mm512_inserti64x4(_mm512_castsi256_si512(_mm256_and_si256(raw, low)), high, 1)}};
}
using Quad = __m512i;
inline Quad broadcast_quad(const int8_t* p) { return _mm512_set1_epi32(load_int32(p)); }
inline N nzero() { return _mm512_setzero_si512(); }
#if defined(SPECDEC_VNNI)
inline N dot4(N c, const Nibbles& w, int part, Quad x) { return _mm512_dpbusd_epi32(c, w.part[part], x); }
inline I finish(N a) { return a; }
constexpr int32_t OFFSET = 128;
struct Bytes {
    __m512i part[1];
};
inline Bytes load_bytes(const int8_t* p) {
    return {{_mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128))}};
}
inline I dot4(I c, const Bytes& w, int part, Quad x) { return _mm512_dpbusd_epi32(c, w.part[part], x); }
#else
// As for AVX2.
inline __m512i accumulate16(__m512i c, __m512i a) {
    asm("vpaddw %1, %0, %0" : "+v"(c) : "v"(a));
    return c;
}
inline __m512i accumulate32(__m512i c, __m512i a) {
    asm("vpaddd %1, %0, %0" : "+v"(c) : "v"(a));
    return c;
}
inline N dot4(N c, const Nibbles& w, int part, Quad x) {
    return accumulate16(c, _mm512_maddubs_epi16(w.part[part], x));
}
inline I finish(N a) { return _mm512_madd_epi16(a, _mm512_set1_epi16(1)); }
constexpr int32_t OFFSET = 0;
struct Bytes {
    __m512i size;
    __mmask64 negative;
};
inline Bytes load_bytes(const int8_t* p) {
    const __m512i value = _mm512_loadu_si512(p);
    return {_mm512_abs_epi8(value), _mm512_movepi8_mask(value)};
}
inline I dot4(I c, const Bytes& w, int, Quad x) {
    const __m512i turned = _mm512_mask_sub_epi8(x, w.negative, _mm512_setzero_si512(), x);
    return accumulate32(c, finish(_mm512_maddubs_epi16(w.size, turned)));
}
#endif
inline void store_int8(int8_t* p, I a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(a));
}

#elif defined(SPECDEC_NEON)

constexpr int W = 4;
constexpr int MAX_QUERIES = 2;
constexpr int MAX_ROWS = 4;
constexpr int MAX_ROWS_INT = 4;
using F = float32x4_t;
using I = int32x4_t;
using N = int32x4_t;

inline F load(const float* p) { return vld1q_f32(p); }
inline void store(float* p, F a) { vst1q_f32(p, a); }
inline F set1(float a) { return vdupq_n_f32(a); }
inline F broadcast(const float* p) { return vld1q_dup_f32(p); }
inline F zero() { return vdupq_n_f32(0.0f); }
inline F add(F a, F b) { return vaddq_f32(a, b); }
inline F sub(F a, F b) { return vsubq_f32(a, b); }
inline F mul(F a, F b) { return vmulq_f32(a, b); }
inline F div(F a, F b) { return vdivq_f32(a, b); }
inline F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
inline F max(F a, F b) { return vmaxq_f32(a, b); }
inline F min(F a, F b) { return vminq_f32(a, b); }
inline F abs(F a) { return vabsq_f32(a); }
inline F round(F a) { return vrndnq_f32(a); }
inline I to_int(F a) { return vcvtnq_s32_f32(a); }
inline F to_float(I a) { return vcvtq_f32_s32(a); }
inline F zero_where_less(F a, F bound, F value) {
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(value), vcltq_f32(a, bound)));
}
inline F scale_by_power(F a, F power) {
    return mul(a, vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(to_int(power), vdupq_n_s32(127)), 23)));
}
inline float sum(F a) { return vaddvq_f32(a); }
inline F load_fp16(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
inline F load_bf16(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
inline I izero() { return vdupq_n_s32(0); }
inline I iadd(I a, I b) { return vaddq_s32(a, b); }
inline I iset1(int32_t a) { return vdupq_n_s32(a); }
struct Nibbles {
    int8x16_t part[4];
};
inline Nibbles load_nibbles(const uint8_t* p) {
    const uint8x16_t a = vld1q_u8(p), b = vld1q_u8(p + 16), low = vdupq_n_u8(0x0f);
    return {{vreinterpretq_s8_u8(vandq_u8(a, low)), vreinterpretq_s8_u8(vandq_u8(b, low)),
             vreinterpretq_s8_u8(vshrq_n_u8(a, 4)), vreinterpretq_s8_u8(vshrq_n_u8(b, 4))}};
}
using Quad = int8x16_t;
inline Quad broadcast_quad(const int8_t* p) { return vreinterpretq_s8_s32(vdupq_n_s32(load_int32(p))); }
inline N nzero() { return vdupq_n_s32(0); }
// 2 x 128 x 127 fits into int16.
template <class Weights>
inline I dot4(I c, const Weights& w, int part, Quad x) {
    const int16x8_t low = vmull_s8(vget_low_s8(w.part[part]), vget_low_s8(x));
    const int16x8_t high = vmull_high_s8(w.part[part], x);
    return vaddq_s32(c, vpaddlq_s16(vpaddq_s16(low, high)));
}
inline I finish(N a) { return a; }
constexpr int32_t OFFSET = 0;
struct Bytes {
    int8x16_t part[4];
};
inline Bytes load_bytes(const int8_t* p) { return {{vld1q_s8(p), vld1q_s8(p + 16), vld1q_s8(p + 32), vld1q_s8(p + 48)}}; }
inline void store_int8(int8_t* p, I a) {
    const int16x4_t wide = vqmovn_s32(a);
    const int8x8_t narrow = vqmovn_s16(vcombine_s16(wide, wide));
    vst1_lane_s32(reinterpret_cast<int32_t*>(p), vreinterpret_s32_s8(narrow), 0);
}

#else  // portable: plain loops that any compiler turns into what its target has

constexpr int W = 4;
constexpr int MAX_QUERIES = 2;
constexpr int MAX_ROWS = 4;
constexpr int MAX_ROWS_INT = 4;
struct F {
    float v[W];
};
struct I {
    int32_t v[W];
};
using N = I;

#define SPECDEC_LANES(TYPE, EXPRESSION)             \
    TYPE r;                                         \
    for (int i = 0; i < W; ++i) r.v[i] = EXPRESSION; \
    return r

inline float half_to_float(uint16_t h);
inline F load(const float* p) { SPECDEC_LANES(F, p[i]); }
inline void store(float* p, F a) {
    for (int i = 0; i < W; ++i) p[i] = a.v[i];
}
inline F set1(float a) { SPECDEC_LANES(F, a); }
inline F broadcast(const float* p) { return set1(*p); }
inline F zero() { return set1(0.0f); }
inline F add(F a, F b) { SPECDEC_LANES(F, a.v[i] + b.v[i]); }
inline F sub(F a, F b) { SPECDEC_LANES(F, a.v[i] - b.v[i]); }
inline F mul(F a, F b) { SPECDEC_LANES(F, a.v[i] * b.v[i]); }
inline F div(F a, F b) { SPECDEC_LANES(F, a.v[i] / b.v[i]); }
// Two roundings: without hardware for it, a fused multiply-add costs a hundred times as much.
inline F fma(F a, F b, F c) { SPECDEC_LANES(F, a.v[i] * b.v[i] + c.v[i]); }
inline F max(F a, F b) { SPECDEC_LANES(F, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
inline F min(F a, F b) { SPECDEC_LANES(F, a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
inline F abs(F a) { SPECDEC_LANES(F, __builtin_fabsf(a.v[i])); }
inline F round(F a) { SPECDEC_LANES(F, __builtin_rintf(a.v[i])); }
// A NaN has no integer; any will do, because the result is multiplied with the NaN.
inline I to_int(F a) { SPECDEC_LANES(I, a.v[i] == a.v[i] ? static_cast<int32_t>(__builtin_rintf(a.v[i])) : 0); }
inline F to_float(I a) { SPECDEC_LANES(F, static_cast<float>(a.v[i])); }
inline F zero_where_less(F a, F bound, F value) { SPECDEC_LANES(F, a.v[i] < bound.v[i] ? 0.0f : value.v[i]); }
inline F scale_by_power(F a, F power) {
    const I exponent = to_int(power);
    F r;
    for (int i = 0; i < W; ++i) {
        const uint32_t bits = static_cast<uint32_t>(exponent.v[i] + 127) << 23;
        float factor;
        std::memcpy(&factor, &bits, 4);
        r.v[i] = a.v[i] * factor;
    }
    return r;
}
inline float sum(F a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
inline F load_fp16(const uint16_t* p) { SPECDEC_LANES(F, half_to_float(p[i])); }
inline F load_bf16(const uint16_t* p) {
    F r;
    for (int i = 0; i < W; ++i) {
        const uint32_t bits = static_cast<uint32_t>(p[i]) << 16;
        std::memcpy(&r.v[i], &bits, 4);
    }
    return r;
}
inline I izero() { SPECDEC_LANES(I, 0); }
inline I iadd(I a, I b) { SPECDEC_LANES(I, a.v[i] + b.v[i]); }
inline I iset1(int32_t a) { SPECDEC_LANES(I, a); }
struct Nibbles {
    int8_t part[4][16];
};
inline Nibbles load_nibbles(const uint8_t* p) {
    Nibbles r;
    for (int i = 0; i < 32; ++i) {
        r.part[i / 16][i % 16] = static_cast<int8_t>(p[i] & 15);
        r.part[2 + i / 16][i % 16] = static_cast<int8_t>(p[i] >> 4);
    }
    return r;
}
struct Quad {
    int8_t v[4];
};
inline Quad broadcast_quad(const int8_t* p) { return {{p[0], p[1], p[2], p[3]}}; }
inline N nzero() { return izero(); }
template <class Weights>
inline I dot4(I c, const Weights& w, int part, Quad x) {
    for (int i = 0; i < W; ++i)
        for (int j = 0; j < 4; ++j) c.v[i] += w.part[part][4 * i + j] * x.v[j];
    return c;
}
inline I finish(N a) { return a; }
constexpr int32_t OFFSET = 0;
struct Bytes {
    int8_t part[4][16];
};
inline Bytes load_bytes(const int8_t* p) {
    Bytes r;
    std::memcpy(r.part, p, sizeof(r.part));
    return r;
}
inline void store_int8(int8_t* p, I a) {
    for (int i = 0; i < W; ++i) p[i] = static_cast<int8_t>(a.v[i]);
}

#endif

// float16 to float32 without hardware for it; exact.
inline float half_to_float(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, mantissa = h & 0x3ff, exponent = (h >> 10) & 31;
    if (exponent == 0) {
        const float tiny = static_cast<float>(mantissa) * 5.9604644775390625e-8f;  // 2^-24
        return sign ? -tiny : tiny;
    }
    const uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | (mantissa << 13);
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline float bf16_to_float(uint16_t h) {
    const uint32_t bits = static_cast<uint32_t>(h) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

#if !defined(SPECDEC_AVX2) && !defined(SPECDEC_AVX512)
inline F fold(const F* a) {
    alignas(64) float lanes[W];
    for (int i = 0; i < W; ++i) lanes[i] = sum(a[i]);
    return load(lanes);
}
inline F join(const F* a) { return a[0]; }
inline float top_lane(F a) {
    alignas(64) float lanes[W];
    store(lanes, a);
    float top = lanes[0];
    for (int i = 1; i < W; ++i) top = lanes[i] > top ? lanes[i] : top;
    return top;
}
#endif

// e^x within 2 units in the last place (Cephes' polynomial); 0 below -87, NaN stays NaN.
inline F exp(F x) {
    const F low = set1(-87.0f), high = set1(88.0f);
    const F bounded = max(low, min(high, x));
    const F power = round(mul(bounded, set1(1.44269504088896341f)));
    F r = fma(power, set1(-0.693359375f), bounded);
    r = fma(power, set1(2.12194440e-4f), r);
    F p = set1(1.9875691500e-4f);
    p = fma(p, r, set1(1.3981999507e-3f));
    p = fma(p, r, set1(8.3334519073e-3f));
    p = fma(p, r, set1(4.1665795894e-2f));
    p = fma(p, r, set1(1.6666665459e-1f));
    p = fma(p, r, set1(5.0000001201e-1f));
    p = fma(p, mul(r, r), add(r, set1(1.0f)));
    return zero_where_less(x, low, scale_by_power(p, power));
}

}  // namespace SPECDEC_ISA
}  // namespace specdec
