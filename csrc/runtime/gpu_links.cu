#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#include "runtime/gpu_links.h"

namespace commfuse {
namespace {

void check(cudaError_t status) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status));
  }
}

int attribute(cudaDeviceP2PAttr which, int from, int to) {
  int value = 0;
  check(cudaDeviceGetP2PAttribute(&value, which, from, to));
  return value;
}

}  // namespace

std::vector<GpuLink> gpu_links() {
  int count = 0;
  check(cudaGetDeviceCount(&count));
  std::vector<GpuLink> links;
  for (int from = 0; from < count; ++from) {
    for (int to = 0; to < count; ++to) {
      if (from == to) continue;
      links.push_back({from, to, attribute(cudaDevP2PAttrAccessSupported, from, to) != 0,
                       attribute(cudaDevP2PAttrNativeAtomicSupported, from, to) != 0,
                       attribute(cudaDevP2PAttrPerformanceRank, from, to)});
    }
  }
  return links;
}

}  // namespace commfuse
