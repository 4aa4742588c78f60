#include "all_reduce_rms_norm/all_reduce_rms_norm_cuda.h"

#include <ATen/ops/empty_like.h>

#include <tuple>

namespace commfuse::gpu {

namespace {

std::tuple<at::Tensor, at::Tensor> all_reduce_rms_norm_of_tensors(
    const at::Tensor& x, const std::optional<at::Tensor>& residual, const at::Tensor& weight,
    double eps, int64_t handle) {
  GpuCall call(x, handle);
  const DType dtype = dtype_of_tensor(x, "x");
  check_matrix(x, "x");
  check_matches(weight, x, {x.size(1)}, "weight");
  if (residual) check_matches(*residual, x, x.sizes(), "residual");
  RMSNormArgs args = {};
  args.dtype = dtype;
  args.weight = weight.const_data_ptr();
  args.eps = static_cast<float>(eps);
  args.rows = x.size(0);
  args.n = x.size(1);
  TORCH_CHECK_VALUE(args.rows <= INT32_MAX && args.n <= INT32_MAX, "x is too large: ", x.sizes());
  args.x = x.const_data_ptr();
  args.residual = data_or_null(residual);
  at::Tensor y = at::empty_like(x), out = at::empty_like(x);
  args.y = y.mutable_data_ptr();
  args.out = out.mutable_data_ptr();
  if (call.world() == 1) {
    call.communicator.check();
    rms_norm(args, call.stream);
  } else {
    all_reduce_rms_norm_all(
        call, describe(Op::all_reduce_rms_norm, dtype, x.sizes(), residual.has_value()), args);
  }
  call.wrote({range_of(y), range_of(out)});
  return {y, out};
}

}  // namespace

TORCH_LIBRARY_IMPL(commfuse, CUDA, m) {
  m.impl("all_reduce_rms_norm", &all_reduce_rms_norm_of_tensors);
}

}  // namespace commfuse::gpu
