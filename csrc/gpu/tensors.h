// What the launchers on GPUs need of torch.
#pragma once

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "gpu/attachment.h"
#include "gpu/stream_order.h"
#include "runtime/tensors.h"

namespace commfuse::gpu {

inline Range range_of(const at::Tensor& x) {
  return {x.const_data_ptr(), static_cast<int64_t>(x.nbytes())};
}

// A call on the GPU of x: its communicator, device and stream.
class GpuCall {
 public:
  GpuCall(const at::Tensor& x, int64_t handle)
      : communicator(Communicator::from_handle(handle)), guard_(x.device()) {
    TORCH_CHECK_VALUE(communicator.gpu(),
                      "the communicator has no memory on a GPU; make it with "
                      "Communicator(group, device='cuda')");
    TORCH_CHECK_VALUE(x.device().index() == gpu().device(), "x is on ", x.device(),
                      ", the communicator's memory on cuda:", gpu().device());
    TORCH_CHECK_VALUE(x.is_contiguous(), "x is not contiguous");
    stream = c10::cuda::getCurrentCUDAStream(x.device().index()).stream();
  }

  Attachment& gpu() const { return *communicator.gpu(); }
  int world() const { return communicator.world(); }
  CallSite enter(const Descriptor& descriptor, int64_t bytes_sent) {
    CallSite site = gpu().enter(descriptor, stream, bytes_sent);
    site.behind_gemm = std::exchange(behind_gemm, false);
    return site;
  }
  void wrote(std::initializer_list<Range> ranges) const {
    gpu::wrote(gpu().device(), stream, ranges);
  }

  Communicator& communicator;
  cudaStream_t stream;
  bool behind_gemm = false;  // the next launch that enters

 private:
  c10::cuda::CUDAGuard guard_;
};

inline const void* offset_by(const void* p, int64_t bytes) {
  return p ? static_cast<const char*>(p) + bytes : nullptr;
}
inline void* offset_by(void* p, int64_t bytes) { return static_cast<char*>(p) + bytes; }

}  // namespace commfuse::gpu
