// Unnormalised probabilities of logits, in blocks of kSampleBlock.
#pragma once

#include "cpu/kernel_table.h"
#include "cpu/math_cpu.h"

namespace commfuse::COMMFUSE_ISA {

template <class T>
void widen_typed(const T* values, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load(values + i));
  if (i < n) store(out + i, load(values + i, static_cast<int>(n - i)), static_cast<int>(n - i));
}

// A block's values, with -inf where it is shorter than the others.
template <class T>
void widen_block(const T* values, int64_t n, float* out) {
  widen_typed(values, n, out);
  for (int64_t i = n; i < kSampleBlock; ++i) out[i] = -__builtin_inff();
}

inline void widen_sample_block(DType dtype, const void* values, int64_t n, float* out) {
  switch (dtype) {
    case DType::bfloat16:
      return widen_block(static_cast<const BFloat16*>(values), n, out);
    case DType::float16:
      return widen_block(static_cast<const Float16*>(values), n, out);
    case DType::float32:
      return widen_block(static_cast<const float*>(values), n, out);
  }
}

inline Vec weight(Vec x, float largest, float scale, float bound) {
  const Vec power = mul(sub(x, broadcast(largest)), broadcast(scale));
  return where_at_least(x, bound, exponential(power));
}

inline void block_weights(const float* x, float largest, float scale, float bound, float* out) {
  for (int64_t i = 0; i < kSampleBlock; i += kLanes) {
    store(out + i, weight(load(x + i), largest, scale, bound));
  }
}

template <class T>
void block_sums_typed(const T* values, int64_t n, float scale, float bound, float* maxima,
                      float* sums) {
  for (int64_t begin = 0; begin < n; begin += kSampleBlock, ++maxima, ++sums) {
    float x[kSampleBlock];
    widen_block(values + begin, n - begin < kSampleBlock ? n - begin : kSampleBlock, x);
    Vec best = load(x);
    bool nan = any_nan(best);
    for (int64_t i = kLanes; i < kSampleBlock; i += kLanes) {
      const Vec v = load(x + i);
      nan |= any_nan(v);
      best = max(best, v);
    }
    *maxima = nan ? __builtin_nanf("") : maximum(best);
    *sums = 0;
    if (!(*maxima >= bound) || *maxima == __builtin_inff()) continue;
    Vec total = zero();
    for (int64_t i = 0; i < kSampleBlock; i += kLanes) {
      total = add(total, weight(load(x + i), *maxima, scale, bound));
    }
    *sums = sum(total);
  }
}

inline void block_sums(DType dtype, const void* values, int64_t n, float scale, float bound,
                       float* maxima, float* sums) {
  switch (dtype) {
    case DType::bfloat16:
      return block_sums_typed(static_cast<const BFloat16*>(values), n, scale, bound, maxima, sums);
    case DType::float16:
      return block_sums_typed(static_cast<const Float16*>(values), n, scale, bound, maxima, sums);
    case DType::float32:
      return block_sums_typed(static_cast<const float*>(values), n, scale, bound, maxima, sums);
  }
}

}  // namespace commfuse::COMMFUSE_ISA
