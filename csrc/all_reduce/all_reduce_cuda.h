// The choice among the all-reduces between GPUs, for launchers.
#pragma once

#include "all_reduce/all_reduce_gpu.h"
#include "gpu/tensors.h"

namespace commfuse::gpu {

// A function of the size alone, the same on every rank.
inline AllReduce all_reduce_algorithm(const Attachment& gpu, int64_t bytes) {
  const auto fits = [&](AllReduce algorithm, int64_t most) {
    return bytes <= std::min(most, all_reduce_capacity(gpu.workspace(), algorithm));
  };
  if (fits(AllReduce::one_shot, gpu.thresholds.one_shot)) return AllReduce::one_shot;
  if (fits(AllReduce::two_shot, gpu.thresholds.lines)) return AllReduce::two_shot;
  return AllReduce::bulk;
}

// out[n] = sum over ranks of x[n], + residual[n] unless that is null, in as many calls as it takes;
// two ranks or more.
inline void all_reduce_all(GpuCall& call, const Descriptor& descriptor, DType dtype, const void* x,
                           const void* residual, void* out, int64_t n) {
  const int64_t size = static_cast<int64_t>(size_of(dtype)), peers = call.world() - 1;
  const AllReduce algorithm = all_reduce_algorithm(call.gpu(), n * size);
  const int64_t capacity = all_reduce_capacity(call.gpu().workspace(), algorithm) / size;
  int64_t done = 0;
  do {
    const int64_t count = std::min(capacity, n - done);
    const int64_t sent = algorithm == AllReduce::one_shot ? peers * count * size
                                                          : 2 * peers * count * size / call.world();
    all_reduce(call.enter(descriptor, sent), algorithm, dtype, offset_by(x, done * size),
               offset_by(residual, done * size), offset_by(out, done * size), count);
    done += count;
  } while (done < n);
}

}  // namespace commfuse::gpu
