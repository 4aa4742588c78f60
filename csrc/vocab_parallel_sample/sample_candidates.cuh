// What competes for a row's token: blocks of tokens, by key; and by which weights their keys are
// made.
#pragma once

#include "vocab_parallel_sample/sample_logits.cuh"

namespace commfuse::gpu {

// How a row's token is drawn.
struct RowOptions {
  float scale, exponent;  // 1 / temperature, in powers of e and of 2
  float bound;            // smaller logits are not drawn
  bool greedy;
  uint64_t seed, position;
  Stream stream;
  uint32_t first_block;  // the shard's, in the whole vocabulary

  __device__ Noise noise_of(int block) const {
    return noise(seed, position, stream, first_block + static_cast<uint32_t>(block));
  }
};

constexpr int32_t kNobody = 0x7fffffff;
constexpr double kNoKey = -__builtin_huge_val();

// The best block of tokens among some, and the normaliser of all of these.
struct Best {
  double key;
  int32_t block;
  float largest, sum;

  static __device__ Best none() { return {kNoKey, kNobody, -infinity(), 0}; }

  __device__ __forceinline__ void take(double other, int32_t other_block) {
    if (replaces(other, other_block, key, block)) {
      key = other;
      block = other_block;
    }
  }
  __device__ __forceinline__ void add(float other, float other_sum) {
    if (!(other_sum > 0)) return;
    if (!(sum > 0)) {
      largest = other;
      sum = other_sum;
      return;
    }
    const float m = fmaxf(largest, other);
    // No fused operation: both lanes of a pair must get the same bits.
    sum = __fadd_rn(__fmul_rn(sum, weight(largest, m, kLog2E)),
                    __fmul_rn(other_sum, weight(other, m, kLog2E)));
    largest = m;
  }
  // Of the lanes of a warp whose numbers differ in bits below `lanes`, in every one of them.
  template <bool kNormaliser>
  __device__ __forceinline__ void reduce(int lanes) {
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
      const double other = __shfl_xor_sync(kAllLanes, key, distance);
      const int32_t other_block = __shfl_xor_sync(kAllLanes, block, distance);
      take(other, other_block);
      if constexpr (kNormaliser) {
        const float other_largest = __shfl_xor_sync(kAllLanes, largest, distance);
        const float other_sum = __shfl_xor_sync(kAllLanes, sum, distance);
        add(other_largest, other_sum);
      }
    }
  }
};

// Weights of the target, all of it or truncated; where a draft is refused, of what the target has
// above the draft's own distribution.
template <bool kTruncated>
struct TargetWeights {
  static constexpr bool kRelativeToBlock = true;
  __device__ __forceinline__ void of(const float (&x)[kVector], int64_t, float largest,
                                     const RowOptions& row, float (&w)[kVector]) const {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      w[i] = weight(x[i], largest, row.exponent);
      if (kTruncated && !(x[i] >= row.bound)) w[i] = 0;
    }
  }
};
struct ResidualWeights {
  static constexpr bool kRelativeToBlock = false;
  const float* q;
  int64_t columns;
  float largest, per_weight;  // of the row
  __device__ __forceinline__ void of(const float (&x)[kVector], int64_t column, float,
                                     const RowOptions& row, float (&w)[kVector]) const {
    Vector8<float> drafted;
    const int64_t valid = columns - column;
    drafted.load(q + column, valid < kVector ? static_cast<int>(valid) : kVector,
                 reinterpret_cast<uintptr_t>(q + column) % 16 == 0);
    float qs[kVector];
    drafted.floats(qs);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float p = x[i] >= row.bound ? weight(x[i], largest, row.exponent) * per_weight : 0.0f;
      // NaN must survive; beyond the end q is -inf.
      w[i] = i < valid ? max_or_nan(p - qs[i], 0.0f) : 0.0f;
    }
  }
};

}  // namespace commfuse::gpu
