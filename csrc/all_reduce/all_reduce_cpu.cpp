#include "all_reduce/exchange.h"
#include "runtime/tensors.h"

namespace commfuse {
namespace {

void sum_into(const at::Tensor& x, void* out, int64_t handle) {
  Communicator& communicator = Communicator::from_handle(handle);
  const DType dtype = dtype_of_tensor(x, "x");
  TORCH_CHECK_VALUE(x.is_contiguous(), "x is not contiguous");
  all_reduce_sum(communicator, describe(Op::all_reduce, dtype, x.sizes()), dtype,
                 x.const_data_ptr(), nullptr, out, x.numel());
}

at::Tensor all_reduce(const at::Tensor& x, int64_t handle) {
  at::Tensor out = empty_output(x.sizes(), x.scalar_type());
  sum_into(x, out.mutable_data_ptr(), handle);
  return out;
}

void all_reduce_(const at::Tensor& x, int64_t handle) { sum_into(x, x.mutable_data_ptr(), handle); }

}  // namespace

TORCH_LIBRARY_IMPL(commfuse, CPU, m) {
  m.impl("all_reduce", &all_reduce);
  m.impl("all_reduce_", &all_reduce_);
}

}  // namespace commfuse
