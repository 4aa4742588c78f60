#include "all_reduce/all_reduce_cuda.h"

#include <ATen/ops/empty_like.h>

namespace commfuse::gpu {
namespace {

at::Tensor all_reduce_of_tensor(const at::Tensor& x, int64_t handle) {
  GpuCall call(x, handle);
  const DType dtype = dtype_of_tensor(x, "x");
  if (call.world() == 1) {
    call.communicator.check();
    return x.clone();
  }
  at::Tensor out = at::empty_like(x);
  all_reduce_all(call, describe(Op::all_reduce, dtype, x.sizes()), dtype, x.const_data_ptr(),
                 nullptr, out.mutable_data_ptr(), x.numel());
  call.wrote({range_of(out)});
  return out;
}

void all_reduce_in_place_of_tensor(const at::Tensor& x, int64_t handle) {
  GpuCall call(x, handle);
  const DType dtype = dtype_of_tensor(x, "x");
  if (call.world() == 1) return call.communicator.check();
  const int64_t bytes = static_cast<int64_t>(x.nbytes());
  const AllReduce algorithm = all_reduce_algorithm(call.gpu(), bytes);
  Descriptor descriptor = describe(Op::all_reduce, dtype, x.sizes());
  const auto place = call.gpu().find(x.const_data_ptr(), bytes);
  if (algorithm == AllReduce::bulk && place && bytes % 16 == 0 &&
      reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0) {
    // Ranks must agree on where in the shared memory it lies.
    descriptor.variant = place->id;
    const int64_t sent = 2 * (call.world() - 1) * bytes / call.world();
    all_reduce_in_place(call.enter(descriptor, sent), dtype, place->peers, x.numel());
  } else {
    void* data = x.mutable_data_ptr();
    all_reduce_all(call, descriptor, dtype, data, nullptr, data, x.numel());
  }
  call.wrote({range_of(x)});
}

}  // namespace

TORCH_LIBRARY_IMPL(commfuse, CUDA, m) {
  m.impl("all_reduce", &all_reduce_of_tensor);
  m.impl("all_reduce_", &all_reduce_in_place_of_tensor);
}

}  // namespace commfuse::gpu
