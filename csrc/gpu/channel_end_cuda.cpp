#include "gpu/channel_end.h"

#include "gpu/attachment.h"
#include "matmul_send/matmul_send_gpu.h"
#include "recv/recv_gpu.h"
#include "send/send_gpu.h"

namespace commfuse::gpu {

int64_t channel_bytes(const ChannelShape& shape) {
  return message_slots_offset(shape.slots) + shape.slots * static_cast<int64_t>(shape.slot_bytes());
}

ChannelEnd::ChannelEnd(Communicator& communicator, const std::vector<uint64_t>& addresses,
                       int source, int target, const ChannelShape& shape)
    : communicator_(communicator),
      shape_(shape),
      device_(communicator.gpu()->device()),
      max_blocks_(communicator.gpu()->max_blocks()),
      workspace_(communicator.gpu()->workspace()),
      own_(reinterpret_cast<char*>(addresses[communicator.rank()])),
      peer_(communicator.rank() == source ? target : source) {
  peers_ = reinterpret_cast<char*>(addresses[peer_]);
  load_send();
  load_recv();
  load_matmul_send();
}

GpuMessage ChannelEnd::enter(Op op, int64_t rows, cudaStream_t stream) {
  const Descriptor descriptor = describe_message(op, shape_, rows);
  communicator_.check();
  one_stream_.admit(stream, descriptor.str(), "channel");
  communicator_.count_call(op == Op::send ? static_cast<uint64_t>(rows * shape_.row_bytes()) : 0);
  return {workspace_,
          own_,
          peers_,
          peer_,
          shape_.slots,
          message_slots_offset(shape_.slots),
          static_cast<int64_t>(shape_.slot_bytes()),
          shape_.columns,
          RowBlocks(rows, shape_.row_bytes(), kMessageBlocks),
          descriptor,
          message_tag(shape_, rows)};
}

}  // namespace commfuse::gpu
