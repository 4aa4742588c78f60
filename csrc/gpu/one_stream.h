// That calls come from one stream: those of a second one would run beside the first one's.
#pragma once

#include <cuda_runtime_api.h>

#include <optional>
#include <string>

namespace commfuse::gpu {

class OneStream {
 public:
  // Throws ConcurrentUseError, which names `owner` ("communicator") and the call, where another
  // stream's calls are still running.
  void admit(cudaStream_t stream, const std::string& call, const char* owner);

 private:
  std::optional<cudaStream_t> stream_;
};

}  // namespace commfuse::gpu
