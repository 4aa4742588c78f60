#include <tuple>

#include "all_reduce/exchange.h"
#include "runtime/tensors.h"

namespace commfuse {
namespace {

std::tuple<at::Tensor, at::Tensor> all_reduce_rms_norm(const at::Tensor& x,
                                                       const std::optional<at::Tensor>& residual,
                                                       const at::Tensor& weight, double eps,
                                                       int64_t handle) {
  Communicator& communicator = Communicator::from_handle(handle);
  const DType dtype = dtype_of_tensor(x, "x");
  check_matrix(x, "x");
  const int64_t rows = x.size(0), columns = x.size(1);
  check_matches(weight, x, {columns}, "weight");
  if (residual) check_matches(*residual, x, x.sizes(), "residual");

  at::Tensor summed = empty_output(x.sizes(), x.scalar_type());
  at::Tensor y = empty_output(x.sizes(), x.scalar_type());
  all_reduce_sum(communicator,
                 describe(Op::all_reduce_rms_norm, dtype, x.sizes(), residual.has_value()), dtype,
                 x.const_data_ptr(), data_or_null(residual), summed.mutable_data_ptr(), x.numel());
  const int64_t row_bytes = columns * static_cast<int64_t>(size_of(dtype));
  const std::byte* from = static_cast<const std::byte*>(summed.const_data_ptr());
  std::byte* to = static_cast<std::byte*>(y.mutable_data_ptr());
  for (int64_t row = 0; row < rows; ++row) {
    kernels().rms_norm(dtype, from + row * row_bytes, weight.const_data_ptr(),
                       static_cast<float>(eps), columns, to + row * row_bytes);
  }
  return {y, summed};
}

}  // namespace

TORCH_LIBRARY_IMPL(commfuse, CPU, m) { m.impl("all_reduce_rms_norm", &all_reduce_rms_norm); }

}  // namespace commfuse
