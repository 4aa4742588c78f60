// One end of a channel between GPUs: its memory, and the rules for launching kernels on it. Apart
// from where failures are reported it shares nothing with the communicator's collectives: its calls
// may come from another stream than theirs.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "gpu/message.h"
#include "gpu/one_stream.h"
#include "gpu/side_stream.h"
#include "runtime/channel.h"

namespace commfuse::gpu {

// Of each rank of the communicator: memory that all of them map, though only two use it.
int64_t channel_bytes(const ChannelShape& shape);

class ChannelEnd {
 public:
  // addresses: of every rank's memory, zero, as this process maps it. The current device is the
  // communicator's. Loads all kernels.
  ChannelEnd(Communicator& communicator, const std::vector<uint64_t>& addresses, int source,
             int target, const ChannelShape& shape);
  ChannelEnd(const ChannelEnd&) = delete;

  int device() const { return device_; }
  int max_blocks() const { return max_blocks_; }
  SideStream& side() { return side_; }

  // A message begins. Throws the communicator's failure, or ConcurrentUseError where another
  // stream's messages are still under way.
  GpuMessage enter(Op op, int64_t rows, cudaStream_t stream);

 private:
  Communicator& communicator_;
  ChannelShape shape_;
  int device_, max_blocks_;
  Workspace workspace_;
  char* own_;
  char* peers_;
  int peer_;
  OneStream one_stream_;
  SideStream side_;
};

}  // namespace commfuse::gpu
