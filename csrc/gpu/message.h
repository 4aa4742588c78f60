// A message under way in a channel between GPUs: what kernels at either end of it work on
// (docs/protocol.md, section 7). Both ends have memory of one layout, all zero at first, and write
// what the peer waits for into the peer's:
//
//   messages   that this end has completed
//   arrivals   parts of the current message that this end's blocks are done with
//   consumed   messages that the target has completed; in the source's memory
//   heads      [slot] words [block] number << 16 | tag, and the descriptor; in the target's memory
//   slots      [slot] payload; in the target's memory
//
// The number of a message lives on the GPU, where a replayed graph finds it; so does its slot.
#pragma once

#include <cuda_runtime_api.h>

#include "gpu/workspace.h"
#include "runtime/row_blocks.h"

namespace commfuse::gpu {

constexpr int kMessageBlocks = 256;  // of rows, each with a word; also the threads that await them

constexpr int64_t kMessages = 0;
constexpr int64_t kMessageArrivals = 128;
constexpr int64_t kConsumed = 256;
constexpr int64_t kSlotHeads = 384;
constexpr int64_t kSlotHeadBytes = round_up(kMessageBlocks * 8 + sizeof(Descriptor), 128);

constexpr int64_t message_slots_offset(int slots) {
  return round_up(kSlotHeads + slots * kSlotHeadBytes, 4096);
}

// A kernel's parameter. All kernels of a message have the same but for their range of blocks.
struct GpuMessage {
  Workspace workspace;  // of the communicator: where failures are reported
  char* own;            // this end's memory, and the other's as this rank maps it
  char* peers;
  int peer;
  int slots;
  int64_t slots_offset, slot_bytes;
  int64_t columns;
  RowBlocks blocks;
  Descriptor descriptor;  // of what this end calls
  uint16_t tag;           // equal at both ends
};

// Blocks [begin, end) of a message.
struct BlockRange {
  int begin, end;
};

// What a launch on a message needs.
struct MessageSite {
  const GpuMessage& message;
  int max_blocks;  // that surely run at the same time
  cudaStream_t stream;
  bool early = true;  // see Grid (launch.cuh)
};

}  // namespace commfuse::gpu
