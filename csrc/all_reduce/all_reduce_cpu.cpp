#include "all_reduce/exchange.h"
#include "runtime/tensors.h"

namespace commfuse {
namespace {

at::Tensor all_reduce(const at::Tensor& x, int64_t handle) {
  Communicator& communicator = Communicator::from_handle(handle);
  const DType dtype = dtype_of_tensor(x, "x");
  TORCH_CHECK_VALUE(x.is_contiguous(), "x is not contiguous");
  at::Tensor out = empty_output(x.sizes(), x.scalar_type());
  all_reduce_sum(communicator, describe(Op::all_reduce, dtype, x.sizes()), dtype,
                 x.const_data_ptr(), nullptr, out.mutable_data_ptr(), x.numel());
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(commfuse, CPU, m) { m.impl("all_reduce", &all_reduce); }

}  // namespace commfuse
