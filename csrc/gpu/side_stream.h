// A second stream beside the one that calls come from, for what overlaps with it. What runs there
// is between follow() and a last join(): to the caller, and to a graph that is captured, it is part
// of the first stream.
#pragma once

#include <cuda_runtime_api.h>

namespace commfuse::gpu {

class SideStream {
 public:
  SideStream();  // on the current device
  ~SideStream();
  SideStream(const SideStream&) = delete;

  cudaStream_t get() const { return stream_; }
  // What is launched here next comes after all that `main` has so far.
  void follow(cudaStream_t main);
  // What is launched on `main` next comes after all that is here so far.
  void join(cudaStream_t main);

 private:
  cudaStream_t stream_ = nullptr;
  cudaEvent_t event_ = nullptr;
};

}  // namespace commfuse::gpu
