#include <cstring>

#include "runtime/channel.h"
#include "runtime/channel_tensors.h"

namespace commfuse {
namespace {

at::Tensor recv(int64_t rows, int64_t handle) {
  Channel& channel = Channel::from_handle(handle);
  check_target(channel, "recv");
  check_rows(channel, rows);
  at::Tensor out = empty_output({rows, channel.shape().columns}, scalar_type(channel));
  const CommunicationTimer timer(channel.communicator());
  Message message(channel, Op::recv, rows);
  std::byte* to = static_cast<std::byte*>(out.mutable_data_ptr());
  for (int b = 0; b < message.blocks().count; ++b) {
    message.wait(b);
    const size_t bytes = message.block_bytes(b);
    std::memcpy(to, message.block(b), bytes);
    to += bytes;
  }
  return out;
}

}  // namespace

// No argument is a tensor, from which torch would know the device: it is the CPU.
TORCH_LIBRARY_IMPL(commfuse, CompositeExplicitAutograd, m) { m.impl("recv", &recv); }

}  // namespace commfuse
