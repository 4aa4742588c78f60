// Sending rows through a channel between GPUs; knows no framework. The kernel: send_gpu.cuh.
#pragma once

#include "gpu/message.h"

namespace commfuse::gpu {

struct SendArgs {
  DType dtype;
  const void* x;         // [rows, columns] of the message, as the following
  const void* residual;  // or null: added to x, and rounded
};

// Blocks of rows of a message; the last of its launches counts it.
void send(const MessageSite& site, BlockRange range, const SendArgs& args);

void load_send();

}  // namespace commfuse::gpu
