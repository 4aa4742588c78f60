// out = sum of the ranks' contributions in rank order, + bias, + residual: accumulated in float32,
// rounded once.
#pragma once

#include "cpu/kernel_table.h"

namespace commfuse::COMMFUSE_ISA {

// kCount: the number of sources where it is known when this is compiled, or 0: a loop over them
// costs a third more.
template <class T, int kCount>
void sum_typed(const SumArgs& a) {
  const T* const* sources = reinterpret_cast<const T* const*>(a.sources);
  const T* first = sources[0];
  const T* second = kCount == 2 ? sources[1] : nullptr;
  const T* bias = static_cast<const T*>(a.bias);
  const T* residual = static_cast<const T*>(a.residual);
  T* out = static_cast<T*>(a.out);
  // `rest`: nothing, or how many elements are left.
  const auto sum = [&](int64_t i, auto... rest) {
    Vec total = load(first + i, rest...);
    if constexpr (kCount == 2) {
      total = add(total, load(second + i, rest...));
    } else {
      for (int r = 1; r < a.count; ++r) total = add(total, load(sources[r] + i, rest...));
    }
    if (bias) total = add(total, load(bias + i, rest...));
    if (residual) total = add(total, load(residual + i, rest...));
    store(out + i, total, rest...);
  };
  int64_t i = 0;
  for (; i + kLanes <= a.n; i += kLanes) sum(i);
  if (i < a.n) sum(i, static_cast<int>(a.n - i));
}

template <class T>
void sum_of(const SumArgs& a) {
  return a.count == 2 ? sum_typed<T, 2>(a) : sum_typed<T, 0>(a);
}

inline void sum_sources(const SumArgs& a) {
  switch (a.dtype) {
    case DType::bfloat16:
      return sum_of<BFloat16>(a);
    case DType::float16:
      return sum_of<Float16>(a);
    case DType::float32:
      return sum_of<float>(a);
  }
}

}  // namespace commfuse::COMMFUSE_ISA
