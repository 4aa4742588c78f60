// Vec: 16 float32 lanes in plain C++, for any processor. The other vec_*.h mean the same.
//
// load/store convert between storage types and float32 (rounding to nearest even); with a count n
// they touch only the first n elements, and the lanes behind them load as zero.
#pragma once

#include "cpu/dtypes.h"

namespace commfuse::plain {

constexpr int kTileRows = 4;
constexpr int kTileVecs = 1;
constexpr int kLanes = 16;

struct Vec {
  float v[kLanes];
};

template <class F>
inline Vec each(F f) {
  Vec r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = f(i);
  return r;
}

inline Vec zero() {
  return each([](int) { return 0.0f; });
}
inline Vec broadcast(float value) {
  return each([=](int) { return value; });
}
inline Vec add(Vec a, Vec b) {
  return each([&](int i) { return a.v[i] + b.v[i]; });
}
inline Vec sub(Vec a, Vec b) {
  return each([&](int i) { return a.v[i] - b.v[i]; });
}
inline Vec mul(Vec a, Vec b) {
  return each([&](int i) { return a.v[i] * b.v[i]; });
}
inline Vec div(Vec a, Vec b) {
  return each([&](int i) { return a.v[i] / b.v[i]; });
}
inline Vec max(Vec a, Vec b) {
  return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline Vec min(Vec a, Vec b) {
  return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
// a * b + c. Rounded once or twice, as the target does it.
inline Vec fma(Vec a, Vec b, Vec c) {
  return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
inline Vec round_even(Vec a) {
  return each([&](int i) { return __builtin_rintf(a.v[i]); });
}
// a * 2^n for whole n in -126..127.
inline Vec times_power_of_two(Vec a, Vec n) {
  return each([&](int i) {
    const uint32_t bits = static_cast<uint32_t>(static_cast<int>(n.v[i]) + 127) << 23;
    float power;
    __builtin_memcpy(&power, &bits, 4);
    return a.v[i] * power;
  });
}

inline float widen(float a) { return a; }
inline float widen(BFloat16 a) {
  const uint32_t bits = static_cast<uint32_t>(a.bits) << 16;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
inline float widen(Float16 a) {
  const uint32_t sign = static_cast<uint32_t>(a.bits & 0x8000) << 16;
  const uint32_t exponent = (a.bits >> 10) & 0x1f, mantissa = a.bits & 0x3ff;
  uint32_t bits;
  if (exponent == 0x1f) {
    bits = sign | 0x7f800000u | (mantissa << 13);
  } else if (exponent != 0) {
    bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
  } else {
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    __builtin_memcpy(&bits, &magnitude, 4);
    bits |= sign;
  }
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

inline void narrow(float a, float* out) { *out = a; }
inline void narrow(float a, BFloat16* out) {
  uint32_t bits;
  __builtin_memcpy(&bits, &a, 4);
  if (a != a) {
    out->bits = static_cast<uint16_t>((bits >> 16) | 0x40);
  } else {
    out->bits = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
}
inline void narrow(float a, Float16* out) {
  uint32_t bits;
  __builtin_memcpy(&bits, &a, 4);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint16_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    half = 0x7c00;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: a subnormal, in steps of 2^-24
    float small;
    __builtin_memcpy(&small, &magnitude, 4);
    half = static_cast<uint16_t>(__builtin_rintf(small * 0x1p24f));
  } else {
    const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
    half = static_cast<uint16_t>((rounded - (112u << 23)) >> 13);
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

template <class T>
inline Vec load(const T* p) {
  return each([&](int i) { return widen(p[i]); });
}
template <class T>
inline Vec load(const T* p, int n) {
  return each([&](int i) { return i < n ? widen(p[i]) : 0.0f; });
}
template <class T>
inline void store(T* p, Vec a) {
  for (int i = 0; i < kLanes; ++i) narrow(a.v[i], p + i);
}
template <class T>
inline void store(T* p, Vec a, int n) {
  for (int i = 0; i < n; ++i) narrow(a.v[i], p + i);
}

inline bool any_nan(Vec a) {
  bool found = false;
  for (int i = 0; i < kLanes; ++i) found |= a.v[i] != a.v[i];
  return found;
}
// The lowest lane that holds value, or -1.
inline int first_lane_equal(Vec a, float value) {
  for (int i = 0; i < kLanes; ++i)
    if (a.v[i] == value) return i;
  return -1;
}

// The lanes of value where a >= bound, and zero elsewhere, also where a is NaN.
inline Vec where_at_least(Vec a, float bound, Vec value) {
  return each([&](int i) { return a.v[i] >= bound ? value.v[i] : 0.0f; });
}

inline float sum(Vec a) {
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) a.v[i] += a.v[i + width];
  return a.v[0];
}
inline float maximum(Vec a) {
  float best = a.v[0];
  for (int i = 1; i < kLanes; ++i) best = a.v[i] > best ? a.v[i] : best;
  return best;
}

// The even (0) or the odd (1) elements of 16 pairs.
inline Vec load_half(const BFloat16* pairs, int odd) {
  return each([&](int i) { return widen(pairs[2 * i + odd]); });
}

}  // namespace commfuse::plain
