#include "gpu/channel_call.h"
#include "send/send_gpu.h"

namespace commfuse::gpu {
namespace {

void send_of_tensor(const at::Tensor& x, int64_t handle) {
  const ChannelCall call(x, handle);
  check_source(call.channel, "send");
  check_message(call.channel, x, "x");
  const GpuMessage message = call.enter(Op::send, x.size(0));
  send(call.site(message), all_blocks(message),
       {call.channel.shape().dtype, x.const_data_ptr(), nullptr});
  call.wrote({});
}

}  // namespace

TORCH_LIBRARY_IMPL(commfuse, CUDA, m) { m.impl("send", &send_of_tensor); }

}  // namespace commfuse::gpu
