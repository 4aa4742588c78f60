#include "send/send.h"

#include <cstring>

#include "runtime/channel_tensors.h"

namespace commfuse {

void send(const at::Tensor& x, int64_t handle) {
  Channel& channel = Channel::from_handle(handle);
  check_source(channel, "send");
  check_message(channel, x, "x");
  const CommunicationTimer timer(channel.communicator());
  Message message(channel, Op::send, x.size(0));
  const std::byte* from = static_cast<const std::byte*>(x.const_data_ptr());
  for (int b = 0; b < message.blocks().count; ++b) {
    const size_t bytes = message.block_bytes(b);
    std::memcpy(message.block(b), from, bytes);
    message.publish(b);
    from += bytes;
  }
}

TORCH_LIBRARY_IMPL(commfuse, CPU, m) { m.impl("send", &send); }

}  // namespace commfuse
