// The largest of n values and the lowest index that holds it.
#pragma once

#include "cpu/kernel_table.h"

namespace commfuse::COMMFUSE_ISA {

template <class T>
void argmax_typed(const T* values, int64_t n, float* score, int64_t* index) {
  const int64_t whole = n / kLanes * kLanes;
  const int rest = static_cast<int>(n - whole);
  // The tail's missing lanes repeat its first value, so that they can win only where it does.
  Vec tail = zero();
  if (rest) {
    T padded[kLanes];
    for (int i = 0; i < kLanes; ++i) padded[i] = values[whole + (i < rest ? i : 0)];
    tail = load(padded);
  }
  Vec best = rest ? tail : load(values);
  bool nan = any_nan(best);
  for (int64_t i = 0; i < whole; i += kLanes) {
    const Vec v = load(values + i);
    nan |= any_nan(v);
    best = max(best, v);
  }
  *score = maximum(best);
  *index = -1;
  if (nan) {
    *score = __builtin_nanf("");
    return;
  }
  for (int64_t i = 0; i < whole; i += kLanes) {
    if (const int lane = first_lane_equal(load(values + i), *score); lane >= 0) {
      *index = i + lane;
      return;
    }
  }
  *index = whole + first_lane_equal(tail, *score);
}

inline void argmax(DType dtype, const void* values, int64_t n, float* score, int64_t* index) {
  switch (dtype) {
    case DType::bfloat16:
      return argmax_typed(static_cast<const BFloat16*>(values), n, score, index);
    case DType::float16:
      return argmax_typed(static_cast<const Float16*>(values), n, score, index);
    case DType::float32:
      return argmax_typed(static_cast<const float*>(values), n, score, index);
  }
}

}  // namespace commfuse::COMMFUSE_ISA
