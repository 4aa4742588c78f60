// out = sum of the ranks' contributions in rank order, + bias, + residual: accumulated in float32,
// rounded once.
#pragma once

#include "cpu/kernel_table.h"

namespace commfuse::COMMFUSE_ISA {

template <class T>
void sum_typed(const SumArgs& a) {
  const T* const* sources = reinterpret_cast<const T* const*>(a.sources);
  const T* bias = static_cast<const T*>(a.bias);
  const T* residual = static_cast<const T*>(a.residual);
  T* out = static_cast<T*>(a.out);
  int64_t i = 0;
  for (; i + kLanes <= a.n; i += kLanes) {
    Vec total = load(sources[0] + i);
    for (int r = 1; r < a.count; ++r) total = add(total, load(sources[r] + i));
    if (bias) total = add(total, load(bias + i));
    if (residual) total = add(total, load(residual + i));
    store(out + i, total);
  }
  if (i < a.n) {
    const int rest = static_cast<int>(a.n - i);
    Vec total = load(sources[0] + i, rest);
    for (int r = 1; r < a.count; ++r) total = add(total, load(sources[r] + i, rest));
    if (bias) total = add(total, load(bias + i, rest));
    if (residual) total = add(total, load(residual + i, rest));
    store(out + i, total, rest);
  }
}

inline void sum_sources(const SumArgs& a) {
  switch (a.dtype) {
    case DType::bfloat16:
      return sum_typed<BFloat16>(a);
    case DType::float16:
      return sum_typed<Float16>(a);
    case DType::float32:
      return sum_typed<float>(a);
  }
}

}  // namespace commfuse::COMMFUSE_ISA
