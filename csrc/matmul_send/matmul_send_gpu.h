// The decode GEMM that computes into a channel's slot; knows no framework. The epilogue:
// matmul_send_gpu.cuh.
#pragma once

#include "gpu/message.h"
#include "matmul/matmul_gpu.h"

namespace commfuse::gpu {

struct MatmulSendArgs {
  MatmulGpuArgs matmul;
  const void* bias;      // [n] or null
  const void* residual;  // [m, n] or null
};

// A message of x w^T + bias, rounded, + residual, rounded.
void matmul_send(const MessageSite& site, const MatmulSendArgs& args);

void load_matmul_send();

}  // namespace commfuse::gpu
