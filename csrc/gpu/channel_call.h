// What the launchers of ops on channels between GPUs need of torch.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <initializer_list>
#include <vector>

#include "gpu/channel_end.h"
#include "gpu/stream_order.h"
#include "gpu/tensors.h"
#include "runtime/channel_tensors.h"

namespace commfuse::gpu {

// A message by an op on the GPU of `on`: its channel, device and stream.
class ChannelCall {
 public:
  ChannelCall(const at::Tensor& on, int64_t handle)
      : channel(Channel::from_handle(handle)), guard_(on.device()) {
    TORCH_CHECK_VALUE(channel.gpu(), "the channel is between ranks on the CPU, the tensors are on ",
                      on.device());
    TORCH_CHECK_VALUE(on.device().index() == end().device(), "the tensors are on ", on.device(),
                      ", the channel on cuda:", end().device());
    stream = c10::cuda::getCurrentCUDAStream(on.device().index()).stream();
  }

  ChannelEnd& end() const { return *channel.gpu(); }
  GpuMessage enter(Op op, int64_t rows) const { return end().enter(op, rows, stream); }
  MessageSite site(const GpuMessage& message) const {
    return {message, end().max_blocks(), stream};
  }
  MessageSite site_beside(const GpuMessage& message) const {
    return {message, end().max_blocks(), end().side().get(), false};
  }
  void wrote(std::initializer_list<Range> ranges) const {
    gpu::wrote(end().device(), stream, ranges);
  }

  Channel& channel;
  cudaStream_t stream;

 private:
  c10::cuda::CUDAGuard guard_;
};

inline BlockRange all_blocks(const GpuMessage& message) { return {0, message.blocks.count}; }

// Parts of a message that are multiplied one after the other by torch's GEMM, so that one travels
// while the next is computed. With fewer rows, reading the weights would take longer than
// multiplying by them; more parts than this leave little more uncovered. The two ends need not
// agree.
inline std::vector<BlockRange> gemm_parts(const RowBlocks& blocks) {
  constexpr int64_t kFewestRows = 256, kMost = 8;
  const int64_t wanted = std::clamp<int64_t>(blocks.rows / kFewestRows, 1, kMost);
  const int parts = static_cast<int>(std::min<int64_t>(wanted, blocks.count));
  std::vector<BlockRange> ranges;
  for (int p = 0; p < parts; ++p) {
    ranges.push_back({blocks.count * p / parts, blocks.count * (p + 1) / parts});
  }
  return ranges;
}

// Rows of y [rows, n] = x [rows, k] w^T + bias, by torch's GEMM.
inline void multiply_rows(const GpuMessage& message, BlockRange range, const at::Tensor& x,
                          const at::Tensor& w, const std::optional<at::Tensor>& bias,
                          const at::Tensor& y) {
  const int64_t first = message.blocks.begin(range.begin);
  const int64_t rows = message.blocks.begin(range.end) - first;
  const at::AutoDispatchBelowADInplaceOrView no_autograd;  // which refuses out=
  at::Tensor to = y.narrow(0, first, rows);
  const at::Tensor from = x.narrow(0, first, rows);
  if (bias) {
    at::addmm_out(to, *bias, from, w.t());
  } else {
    at::mm_out(to, from, w.t());
  }
}

}  // namespace commfuse::gpu
