// What the launchers need of torch: dtypes and checks with messages.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "cpu/kernel_table.h"
#include "runtime/communicator.h"
#include "runtime/output_memory.h"

namespace commfuse {

inline DType dtype_of_tensor(const at::Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case at::kBFloat16:
      return DType::bfloat16;
    case at::kHalf:
      return DType::float16;
    case at::kFloat:
      return DType::float32;
    default:
      TORCH_CHECK_VALUE(false, name, " is ", x.scalar_type(), "; use bfloat16, float16 or float32");
  }
}

inline void check_matches(const at::Tensor& x, const at::Tensor& like, at::IntArrayRef shape,
                          const char* name) {
  TORCH_CHECK_VALUE(x.scalar_type() == like.scalar_type(), name, " is ", x.scalar_type(), ", not ",
                    like.scalar_type());
  TORCH_CHECK_VALUE(x.sizes() == shape, name, " has shape ", x.sizes(), ", not ", shape);
  TORCH_CHECK_VALUE(x.is_contiguous(), name, " is not contiguous");
}

inline void check_matrix(const at::Tensor& x, const char* name) {
  TORCH_CHECK_VALUE(x.dim() == 2, name, " has ", x.dim(), " dimensions, not 2 (rows, columns)");
  TORCH_CHECK_VALUE(x.is_contiguous(), name, " is not contiguous");
}

inline const void* data_or_null(const std::optional<at::Tensor>& x) {
  return x ? x->const_data_ptr() : nullptr;
}

inline Descriptor describe(Op op, DType dtype, at::IntArrayRef shape, uint32_t variant = 0) {
  Descriptor d;
  d.op = op;
  d.dtype = dtype;
  d.variant = variant;
  // The leading dimensions of a larger tensor are folded into the first.
  const size_t folded = shape.size() > 6 ? shape.size() - 6 : 0;
  d.dims = static_cast<uint8_t>(shape.size() - folded);
  for (size_t i = 0; i < d.dims; ++i) d.shape[i] = shape[i + folded];
  for (size_t i = 0; i < folded; ++i) d.shape[0] *= shape[i];
  return d;
}

}  // namespace commfuse
