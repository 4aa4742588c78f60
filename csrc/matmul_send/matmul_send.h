// The launcher of matmul_send, for those who call it from C++.
#pragma once

#include "runtime/tensors.h"

namespace commfuse {

void matmul_send(const at::Tensor& x, const at::Tensor& weights, int64_t n, int64_t channel,
                 const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& residual);

}  // namespace commfuse
