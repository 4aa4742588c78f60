// Logits as a block of threads reads them: a lane takes eight at once, and sixteen lanes share a
// block of tokens.
#pragma once

#include "cpu/kernel_table.h"
#include "gpu/elementary.cuh"
#include "gpu/numbers.cuh"
#include "vocab_parallel_sample/draws.h"

namespace commfuse::gpu {

constexpr int kSampleThreads = 1024;
constexpr int kSampleWarps = kSampleThreads / 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kVector = 8;  // logits that a lane reads at once: 16 lanes share a block of tokens
constexpr int kBlock = static_cast<int>(kSampleBlock);
constexpr float kLog2E = 1.44269504f;

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }
__device__ __forceinline__ bool is_finite(float x) { return fabsf(x) <= FLT_MAX; }
__device__ __forceinline__ bool is_finite(double x) { return fabs(x) <= DBL_MAX; }

template <class T>
constexpr uint32_t kMinusInfinity = std::is_same_v<T, float>    ? 0xff800000u
                                    : std::is_same_v<T, __half> ? 0xfc00u
                                                                : 0xff80u;

// Eight consecutive logits as they lie in memory; -inf beyond the end of a row.
template <class T>
struct Vector8 {
  uint4 unit[sizeof(T) / 2];

  __device__ __forceinline__ void load(const T* p, int valid, bool aligned) {
    if (aligned && valid >= kVector) {
#pragma unroll
      for (size_t i = 0; i < sizeof(T) / 2; ++i)
        unit[i] = __ldg(reinterpret_cast<const uint4*>(p) + i);
      return;
    }
    using Bits = std::conditional_t<sizeof(T) == 2, unsigned short, unsigned int>;
    Bits elements[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      elements[i] = i < valid ? reinterpret_cast<const Bits*>(p)[i] : kMinusInfinity<T>;
    }
    memcpy(unit, elements, sizeof(elements));
  }
  __device__ __forceinline__ void floats(float (&x)[kVector]) const {
#pragma unroll
    for (size_t i = 0; i < sizeof(T) / 2; ++i) {
      const uint32_t word[4] = {unit[i].x, unit[i].y, unit[i].z, unit[i].w};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if constexpr (std::is_same_v<T, float>) {
          x[4 * i + k] = __uint_as_float(word[k]);
        } else {
          const float2 pair = unpack_pair<T>(word[k]);
          x[2 * k] = pair.x;
          x[2 * k + 1] = pair.y;
        }
      }
    }
  }
};

__device__ __forceinline__ float largest_of(const float (&x)[kVector]) {
  float m = x[0];
#pragma unroll
  for (int i = 1; i < kVector; ++i) m = max_or_nan(m, x[i]);
  return m;
}

__device__ __forceinline__ float weight(float x, float largest, float exponent) {
  return exp2_approximate((x - largest) * exponent);
}

// Sums and maxima over the 16 lanes that share a block of tokens.
__device__ __forceinline__ float half_warp_largest(float m) {
#pragma unroll
  for (int distance = 8; distance > 0; distance /= 2) {
    m = max_or_nan(m, __shfl_xor_sync(kAllLanes, m, distance));
  }
  return m;
}
__device__ __forceinline__ float half_warp_sum(float s) {
#pragma unroll
  for (int distance = 8; distance > 0; distance /= 2) s += __shfl_xor_sync(kAllLanes, s, distance);
  return s;
}

}  // namespace commfuse::gpu
