// How our kernels are launched: each may start while its predecessor in the stream still runs
// (programmatic dependent launch), and waits for it inside (wait_for_predecessor).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <algorithm>

#include "cpu/dtypes.h"
#include "gpu/call_site.h"
#include "gpu/check.h"
#include "gpu/message.h"

namespace commfuse::gpu {

inline int device_attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

struct Grid {
  int blocks, threads;
  cudaStream_t stream;
  int shared_bytes = 0;
  bool early = true;  // not where the stream has waited for another one
};

// A pack (8 bytes) for each thread, if so many can run. Few threads a block for few packs: they
// then spread over more multiprocessors.
inline Grid line_grid(int64_t bytes, const CallSite& site) {
  const int64_t packs = std::max<int64_t>(1, (bytes + 7) / 8);
  int threads = 128;
  while (threads < most_threads(site.workspace.world) && threads * int64_t{site.max_blocks} < packs)
    threads *= 2;
  const int64_t blocks = std::min<int64_t>((packs + threads - 1) / threads, site.max_blocks);
  return {static_cast<int>(blocks), threads, site.stream};
}

// A unit (16 bytes) for each thread, likewise.
inline Grid bulk_grid(int64_t bytes, const CallSite& site) {
  const int threads = most_threads(site.workspace.world);
  const int64_t units = std::max<int64_t>(1, (bytes + 15) / 16);
  const int64_t blocks = std::min<int64_t>((units + threads - 1) / threads, site.max_blocks);
  return {static_cast<int>(blocks), threads, site.stream};
}

// Each block has some of a message's blocks of rows.
inline Grid message_grid(const MessageSite& site, BlockRange range, int threads) {
  const int blocks = std::min(range.end - range.begin, site.max_blocks);
  return {blocks, threads, site.stream, 0, site.early};
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Grid& grid, Arguments&&... arguments) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = static_cast<size_t>(grid.shared_bytes);
  config.stream = grid.stream;
  config.attrs = &attribute;
  static const bool supported = device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9;
  config.numAttrs = supported && grid.early ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...));
}

// Loads a kernel's code, which a lazy first launch would do while another kernel spins.
template <class... Parameters>
void load(void (*kernel)(Parameters...)) {
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel));
}

// f<T>() for the element type.
template <class F>
void with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::bfloat16:
      return f.template operator()<__nv_bfloat16>();
    case DType::float16:
      return f.template operator()<__half>();
    case DType::float32:
      return f.template operator()<float>();
  }
}

// f<kWorld>() for the least of 2, 4 and 8 that holds the ranks.
template <class F>
void with_world(int world, F f) {
  if (world <= 2) return f.template operator()<2>();
  if (world <= 4) return f.template operator()<4>();
  f.template operator()<8>();
}

}  // namespace commfuse::gpu
