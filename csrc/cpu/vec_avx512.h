// Vec: 16 float32 lanes in one AVX-512 register. See vec_plain.h for what each function means.
#pragma once

#include <immintrin.h>

#include "cpu/dtypes.h"

namespace commfuse::avx512 {

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
inline __m256i narrow(Vec a, BFloat16) {
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.v));
}
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

inline Vec broadcast_from(const float* p) { return {_mm512_set1_ps(*p)}; }
inline Vec broadcast_from(const Float16* p) { return {_mm512_set1_ps(_cvtsh_ss(p->bits))}; }
inline bool any_nan(Vec a) { return _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q) != 0; }
inline int first_lane_equal(Vec a, float value) {
  const __mmask16 equal = _mm512_cmp_ps_mask(a.v, _mm512_set1_ps(value), _CMP_EQ_OQ);
  return equal ? __builtin_ctz(equal) : -1;
}

inline float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline float maximum(Vec a) { return _mm512_reduce_max_ps(a.v); }

// Two consecutive k of 16 outputs: what one packed bfloat16 vector holds.
struct PackedBFloat16 {
  static constexpr int k_step = 2;
  using Weights = __m512bh;
  using Input = __m512bh;
  static Weights load_weights(const BFloat16* p) {
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

}  // namespace commfuse::avx512
