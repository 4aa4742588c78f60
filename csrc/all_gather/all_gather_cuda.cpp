#include "all_gather/all_gather_gpu.h"
#include "gpu/tensors.h"

namespace commfuse::gpu {
namespace {

at::Tensor all_gather_of_tensor(const at::Tensor& x, int64_t handle) {
  GpuCall call(x, handle);
  const DType dtype = dtype_of_tensor(x, "x");
  const int world = call.world();
  TORCH_CHECK_VALUE(x.dim() > 0, "x has 0 dimensions; the ranks' are joined along the first one");
  if (world == 1) {
    call.communicator.check();
    return x.clone();
  }
  at::DimVector shape(x.sizes());
  shape[0] *= world;
  at::Tensor out = at::empty(shape, x.options());
  const int64_t n = x.numel(), size = static_cast<int64_t>(size_of(dtype));
  const bool by_lines = static_cast<int64_t>(x.nbytes()) <= call.gpu().thresholds.lines;
  const int64_t capacity = all_gather_capacity(call.gpu().workspace(), by_lines) / size;
  const Descriptor descriptor = describe(Op::all_gather, dtype, x.sizes());
  int64_t done = 0;
  do {
    const int64_t count = std::min(capacity, n - done);
    all_gather(call.enter(descriptor, (world - 1) * count * size), by_lines, dtype,
               offset_by(x.const_data_ptr(), done * size),
               offset_by(out.mutable_data_ptr(), done * size), n, count);
    done += count;
  } while (done < n);
  call.wrote({range_of(out)});
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(commfuse, CUDA, m) { m.impl("all_gather", &all_gather_of_tensor); }

}  // namespace commfuse::gpu
