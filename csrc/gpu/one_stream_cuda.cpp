#include "gpu/one_stream.h"

#include "gpu/check.h"
#include "runtime/communicator.h"

namespace commfuse::gpu {

void OneStream::admit(cudaStream_t stream, const std::string& call, const char* owner) {
  if (stream_ == stream) return;
  // A capture only records; whoever replays it must order it as any other call.
  cudaStreamCaptureStatus capture;
  check(cudaStreamIsCapturing(stream, &capture));
  if (capture != cudaStreamCaptureStatusNone) return;
  if (stream_) {
    const cudaError_t status = cudaStreamQuery(*stream_);
    if (status == cudaErrorNotReady) {
      const std::string name = owner;
      throw ConcurrentUseError(
          "a second stream of calls on one " + name + ": " + call +
          " began while the calls of another CUDA stream were still running. A " + name +
          " serves one stream; synchronise it first, or make a second " + name);
    }
    check(status);
  }
  stream_ = stream;
}

}  // namespace commfuse::gpu
