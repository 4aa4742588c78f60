#include "gpu/tensors.h"
#include "reduce_scatter/reduce_scatter_gpu.h"

namespace commfuse::gpu {
namespace {

at::Tensor reduce_scatter_of_tensor(const at::Tensor& x, int64_t handle,
                                    at::OptionalIntArrayRef part_of) {
  GpuCall call(x, handle);
  const DType dtype = dtype_of_tensor(x, "x");
  const int world = call.world();
  TORCH_CHECK_VALUE(x.dim() > 0, "x has 0 dimensions; the ranks share its first one");
  const int64_t rows = x.size(0) / world;
  TORCH_CHECK_VALUE(rows * world == x.size(0), "x has ", x.size(0), " rows, which ", world,
                    " ranks cannot share evenly; use ", rows * world, " or ", (rows + 1) * world);
  if (world == 1) {
    call.communicator.check();
    return x.clone();
  }
  at::DimVector shape(x.sizes());
  shape[0] = rows;
  at::Tensor out = at::empty(shape, x.options());
  const int64_t n = out.numel(), size = static_cast<int64_t>(size_of(dtype));
  const bool by_lines = static_cast<int64_t>(x.nbytes()) <= call.gpu().thresholds.lines;
  const int64_t capacity = reduce_scatter_capacity(call.gpu().workspace(), by_lines) / size;
  const Descriptor descriptor = describe(Op::reduce_scatter, dtype, part_of.value_or(x.sizes()));
  int64_t done = 0;
  do {
    const int64_t count = std::min(capacity, n - done);
    reduce_scatter(call.enter(descriptor, (world - 1) * count * size), by_lines, dtype,
                   offset_by(x.const_data_ptr(), done * size), n,
                   offset_by(out.mutable_data_ptr(), done * size), count);
    done += count;
  } while (done < n);
  call.wrote({range_of(out)});
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(commfuse, CUDA, m) { m.impl("reduce_scatter", &reduce_scatter_of_tensor); }

}  // namespace commfuse::gpu
