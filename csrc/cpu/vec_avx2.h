// Vec: 16 float32 lanes in two AVX2 registers. See vec_plain.h for what each function means.
#pragma once

#include <immintrin.h>

#include "cpu/dtypes.h"

namespace commfuse::avx2 {

constexpr int kTileRows = 4;  // 4 rows x 1 vector (two registers) of accumulators: 16 registers
constexpr int kTileVecs = 1;

struct Vec {
  __m256 lo, hi;
};

inline Vec zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Vec broadcast(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
inline Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline Vec div(Vec a, Vec b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline Vec fma(Vec a, Vec b, Vec c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline Vec round_even(Vec a) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, mode), _mm256_round_ps(a.hi, mode)};
}
inline __m256 times_power_of_two(__m256 a, __m256 n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}
inline Vec times_power_of_two(Vec a, Vec n) {
  return {times_power_of_two(a.lo, n.lo), times_power_of_two(a.hi, n.hi)};
}

inline __m256 widen(__m128i bits, BFloat16) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline __m256 widen(__m128i bits, Float16) { return _mm256_cvtph_ps(bits); }
inline __m128i narrow(__m256 a, BFloat16) {
  // Round to nearest even by adding half an ulp, less one where the kept bit is even. A NaN would
  // be carried into infinity by that, so it keeps its top bits and becomes quiet instead.
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i kept = _mm256_srli_epi32(bits, 16);
  const __m256i half =
      _mm256_add_epi32(_mm256_and_si256(kept, _mm256_set1_epi32(1)), _mm256_set1_epi32(0x7fff));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
  const __m256i quiet = _mm256_or_si256(kept, _mm256_set1_epi32(0x40));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  const __m256i words = _mm256_blendv_epi8(rounded, quiet, is_nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}
inline __m128i narrow(__m256 a, Float16) { return _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT); }

inline Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, Vec a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
template <class T>
inline Vec load(const T* p) {
  const __m128i* bits = reinterpret_cast<const __m128i*>(p);
  return {widen(_mm_loadu_si128(bits), T{}), widen(_mm_loadu_si128(bits + 1), T{})};
}
template <class T>
inline void store(T* p, Vec a) {
  __m128i* bits = reinterpret_cast<__m128i*>(p);
  _mm_storeu_si128(bits, narrow(a.lo, T{}));
  _mm_storeu_si128(bits + 1, narrow(a.hi, T{}));
}
template <class T>
inline Vec load(const T* p, int n) {
  T buffer[16] = {};
  __builtin_memcpy(buffer, p, static_cast<size_t>(n) * sizeof(T));
  return load(buffer);
}
template <class T>
inline void store(T* p, Vec a, int n) {
  T buffer[16];
  store(buffer, a);
  __builtin_memcpy(p, buffer, static_cast<size_t>(n) * sizeof(T));
}

inline unsigned lanes(__m256 lo, __m256 hi) {
  return static_cast<unsigned>(_mm256_movemask_ps(lo) | _mm256_movemask_ps(hi) << 8);
}
inline bool any_nan(Vec a) {
  return lanes(_mm256_cmp_ps(a.lo, a.lo, _CMP_UNORD_Q), _mm256_cmp_ps(a.hi, a.hi, _CMP_UNORD_Q));
}
inline int first_lane_equal(Vec a, float value) {
  const __m256 all = _mm256_set1_ps(value);
  const unsigned equal =
      lanes(_mm256_cmp_ps(a.lo, all, _CMP_EQ_OQ), _mm256_cmp_ps(a.hi, all, _CMP_EQ_OQ));
  return equal ? __builtin_ctz(equal) : -1;
}

inline Vec where_at_least(Vec a, float bound, Vec value) {
  const __m256 least = _mm256_set1_ps(bound);
  return {_mm256_and_ps(_mm256_cmp_ps(a.lo, least, _CMP_GE_OQ), value.lo),
          _mm256_and_ps(_mm256_cmp_ps(a.hi, least, _CMP_GE_OQ), value.hi)};
}

inline float sum(Vec a) {
  const __m256 eight = _mm256_add_ps(a.lo, a.hi);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float maximum(Vec a) {
  const __m256 eight = _mm256_max_ps(a.lo, a.hi);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

inline Vec load_half(const BFloat16* pairs, int odd) {
  const __m256i* both = reinterpret_cast<const __m256i*>(pairs);
  const __m256i a = _mm256_loadu_si256(both), b = _mm256_loadu_si256(both + 1);
  const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  return {_mm256_castsi256_ps(odd ? _mm256_and_si256(a, high) : _mm256_slli_epi32(a, 16)),
          _mm256_castsi256_ps(odd ? _mm256_and_si256(b, high) : _mm256_slli_epi32(b, 16))};
}

}  // namespace commfuse::avx2
