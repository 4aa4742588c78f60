// The launchers of matmul_all_reduce, for those who call them from C++.
#pragma once

#include <tuple>

#include "runtime/tensors.h"

namespace commfuse {

at::Tensor matmul_all_reduce(const at::Tensor& x, const at::Tensor& weights, int64_t n,
                             int64_t handle, const std::optional<at::Tensor>& bias,
                             const std::optional<at::Tensor>& residual);

std::tuple<at::Tensor, at::Tensor> matmul_all_reduce_rms_norm(
    const at::Tensor& x, const at::Tensor& weights, int64_t n, int64_t handle,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& residual,
    const at::Tensor& norm_weight, double eps);

}  // namespace commfuse
