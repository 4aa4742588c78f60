// The launcher of recv_matmul, for those who call it from C++.
#pragma once

#include <tuple>

#include "runtime/tensors.h"

namespace commfuse {

std::tuple<at::Tensor, at::Tensor> recv_matmul(int64_t rows, int64_t channel,
                                               const at::Tensor& weights, int64_t n,
                                               const std::optional<at::Tensor>& bias,
                                               const std::optional<at::Tensor>& norm_weight,
                                               double eps);

}  // namespace commfuse
