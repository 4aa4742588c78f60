// y = x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich, "Root Mean Square Layer
// Normalization", 2019), one row.
#pragma once

#include "cpu/kernel_table.h"

namespace commfuse::COMMFUSE_ISA {

template <class T>
void rms_norm_typed(const T* x, const T* weight, float eps, int64_t n, T* y) {
  const int64_t whole = n / kLanes * kLanes;
  const int rest = static_cast<int>(n - whole);
  Vec squares = zero();
  for (int64_t i = 0; i < whole; i += kLanes) {
    const Vec v = load(x + i);
    squares = fma(v, v, squares);
  }
  if (rest) {
    const Vec v = load(x + whole, rest);
    squares = fma(v, v, squares);
  }
  const Vec scale = broadcast(1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(n) + eps));
  for (int64_t i = 0; i < whole; i += kLanes) {
    store(y + i, mul(mul(load(x + i), scale), load(weight + i)));
  }
  if (rest) {
    store(y + whole, mul(mul(load(x + whole, rest), scale), load(weight + whole, rest)), rest);
  }
}

inline void rms_norm(DType dtype, const void* x, const void* weight, float eps, int64_t n,
                     void* y) {
  switch (dtype) {
    case DType::bfloat16:
      return rms_norm_typed(static_cast<const BFloat16*>(x), static_cast<const BFloat16*>(weight),
                            eps, n, static_cast<BFloat16*>(y));
    case DType::float16:
      return rms_norm_typed(static_cast<const Float16*>(x), static_cast<const Float16*>(weight),
                            eps, n, static_cast<Float16*>(y));
    case DType::float32:
      return rms_norm_typed(static_cast<const float*>(x), static_cast<const float*>(weight), eps, n,
                            static_cast<float*>(y));
  }
}

}  // namespace commfuse::COMMFUSE_ISA
