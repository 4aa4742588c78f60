// Receiving rows from a channel between GPUs; knows no framework. The kernels: recv_gpu.cuh.
#pragma once

#include "gpu/message.h"

namespace commfuse::gpu {

struct RecvArgs {
  DType dtype;
  void* x;                  // [rows, columns] of the message, as y
  const void* norm_weight;  // [columns] or null
  float eps;
  void* y;  // RMSNorm(x) norm_weight, with norm_weight
};

// Blocks of rows of a message, as they come; the last of its launches frees the slot.
void recv(const MessageSite& site, BlockRange range, const RecvArgs& args);

// Returns, on the stream, when blocks of rows have come. A single block waits: where a GEMM
// computes meanwhile, waiting takes no multiprocessor from it.
void await_rows(const MessageSite& site, BlockRange range);

void load_recv();

}  // namespace commfuse::gpu
