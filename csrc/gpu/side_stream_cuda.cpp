#include "gpu/side_stream.h"

#include "gpu/check.h"

namespace commfuse::gpu {

SideStream::SideStream() {
  // The highest priority: what is here is short, and a GEMM beside it fills the multiprocessors.
  int least = 0, greatest = 0;
  check(cudaDeviceGetStreamPriorityRange(&least, &greatest));
  check(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, greatest));
  check(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming));
}

SideStream::~SideStream() {
  if (event_) cudaEventDestroy(event_);
  if (stream_) cudaStreamDestroy(stream_);
}

// A wait is for the event as it was last recorded: it can be recorded again at once.
void SideStream::follow(cudaStream_t main) {
  check(cudaEventRecord(event_, main));
  check(cudaStreamWaitEvent(stream_, event_, 0));
}

void SideStream::join(cudaStream_t main) {
  check(cudaEventRecord(event_, stream_));
  check(cudaStreamWaitEvent(main, event_, 0));
}

}  // namespace commfuse::gpu
