// Vec: 16 float32 lanes in one AVX-512 register. See vec_plain.h for what each function means.
//
// Compiled twice: as avx512_bf16 with the instructions for bfloat16 (COMMFUSE_BF16_INSTRUCTIONS),
// and as avx512 without them.
#pragma once

#include <immintrin.h>

#include "cpu/dtypes.h"

namespace commfuse::COMMFUSE_ISA {

constexpr int kTileRows =
    6;  // 6 rows x 4 vectors of accumulators + 4 of weights: 28 of 32 registers
constexpr int kTileVecs = 4;

struct Vec {
  __m512 v;
};

inline __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1u); }

inline Vec zero() { return {_mm512_setzero_ps()}; }
inline Vec broadcast(float value) { return {_mm512_set1_ps(value)}; }
inline Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec div(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec round_even(Vec a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline Vec times_power_of_two(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }

inline Vec widen(__m256i bits, BFloat16) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
inline Vec widen(__m256i bits, Float16) { return {_mm512_cvtph_ps(bits)}; }
#ifdef COMMFUSE_BF16_INSTRUCTIONS
inline __m256i narrow(Vec a, BFloat16) {
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.v));
}
#else
inline __m256i narrow(Vec a, BFloat16) {
  // As in vec_avx2.h.
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i kept = _mm512_srli_epi32(bits, 16);
  const __m512i half =
      _mm512_add_epi32(_mm512_and_si512(kept, _mm512_set1_epi32(1)), _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(
      _mm512_mask_or_epi32(rounded, is_nan, kept, _mm512_set1_epi32(0x40)));
}
#endif
inline __m256i narrow(Vec a, Float16) { return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT); }

inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load(const float* p, int n) { return {_mm512_maskz_loadu_ps(first_lanes(n), p)}; }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline void store(float* p, Vec a, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), a.v); }

template <class T>
inline Vec load(const T* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), T{});
}
template <class T>
inline Vec load(const T* p, int n) {
  return widen(_mm256_maskz_loadu_epi16(first_lanes(n), p), T{});
}
template <class T>
inline void store(T* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a, T{}));
}
template <class T>
inline void store(T* p, Vec a, int n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), narrow(a, T{}));
}

inline bool any_nan(Vec a) { return _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q) != 0; }
inline int first_lane_equal(Vec a, float value) {
  const __mmask16 equal = _mm512_cmp_ps_mask(a.v, _mm512_set1_ps(value), _CMP_EQ_OQ);
  return equal ? __builtin_ctz(equal) : -1;
}

inline Vec where_at_least(Vec a, float bound, Vec value) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, _mm512_set1_ps(bound), _CMP_GE_OQ), value.v)};
}

inline float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline float maximum(Vec a) { return _mm512_reduce_max_ps(a.v); }

// The even (0) or the odd (1) elements of 16 pairs.
inline Vec load_half(const BFloat16* pairs, int odd) {
  const __m512i both = _mm512_loadu_si512(pairs);
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  return {_mm512_castsi512_ps(odd ? _mm512_and_si512(both, high) : _mm512_slli_epi32(both, 16))};
}

#ifdef COMMFUSE_BF16_INSTRUCTIONS
// Products of packed bfloat16 weights: both k of a pair in one instruction.
struct PairProducts {
  static constexpr int k_step = 2, terms = 1;
  using X = BFloat16;
  using Weights = __m512bh;
  using Input = __m512bh;
  static Weights load_weights(const BFloat16* p, int) {
    return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p));
  }
  static Input load_input(const BFloat16* x) {
    int pair;
    __builtin_memcpy(&pair, x, 4);
    return reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
  }
  static Input load_last_input(const BFloat16* x) {
    return reinterpret_cast<__m512bh>(_mm512_set1_epi32(x->bits));
  }
  static Vec dot(Vec acc, Input x, Weights w) { return {_mm512_dpbf16_ps(acc.v, x, w)}; }
};
#endif

}  // namespace commfuse::COMMFUSE_ISA
