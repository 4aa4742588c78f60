// Storage types of the CPU kernels. Arithmetic is always float32; these only hold bits.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace commfuse {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

enum class DType : uint8_t { bfloat16, float16, float32 };

constexpr size_t size_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

template <class T>
struct dtype_of;
template <>
struct dtype_of<BFloat16> {
  static constexpr DType value = DType::bfloat16;
};
template <>
struct dtype_of<Float16> {
  static constexpr DType value = DType::float16;
};
template <>
struct dtype_of<float> {
  static constexpr DType value = DType::float32;
};

constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

}  // namespace commfuse
