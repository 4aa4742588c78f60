// Behind vocab_parallel_argmax, vocab_parallel_sample and verify_chain on GPUs.
#pragma once

#include "gpu/tensors.h"
#include "vocab_parallel_sample/sample.h"
#include "vocab_parallel_sample/sample_gpu.h"

namespace commfuse::gpu {

// Checks shapes, dtypes and devices, and fills in Draws; the values are on the GPU, and looked at
// there.
void set_logits(Draws& draws, const at::Tensor& logits, int64_t vocab_begin, int64_t batch);
void set_sampling(Draws& draws, const SamplingTensors& sampling, const at::Tensor& logits);
void check_on_gpu(const at::Tensor& x, const at::Tensor& logits, const char* name);

// Launches once, or once for each of so many requests as a launch can take.
void draw_all(GpuCall& call, const Descriptor& descriptor, const at::Tensor& logits, Draws draws);

// Throws NoTokenError if a row was found from which no token can be drawn.
void check_rows(Attachment& attachment);

}  // namespace commfuse::gpu
