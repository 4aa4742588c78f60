#include "gpu/attachment.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>

#include "all_gather/all_gather_gpu.h"
#include "all_reduce/all_reduce_gpu.h"
#include "all_reduce_rms_norm/all_reduce_rms_norm_gpu.h"
#include "gpu/check.h"
#include "matmul/matmul_gpu.h"
#include "matmul_all_reduce/matmul_all_reduce_gpu.h"
#include "reduce_scatter/reduce_scatter_gpu.h"
#include "vocab_parallel_sample/sample_gpu.h"

namespace commfuse::gpu {

Attachment::Attachment(Communicator& communicator, int device,
                       const std::vector<uint64_t>& addresses, int64_t slot_bytes, int max_blocks)
    : communicator_(communicator), device_(device), max_blocks_(std::min(max_blocks, kMaxGrid)) {
  const int world = communicator.world();
  if (world > kMaxRanks) {
    throw std::invalid_argument("kernels between GPUs serve at most " + std::to_string(kMaxRanks) +
                                " ranks of a host, not " + std::to_string(world));
  }
  check(cudaSetDevice(device));
  for (int r = 0; r < world; ++r) workspace_.base[r] = reinterpret_cast<char*>(addresses[r]);
  workspace_.rank = communicator.rank();
  workspace_.world = world;
  workspace_.slots_offset = gpu::slots_offset(world);
  workspace_.slot_bytes = slot_bytes;
  workspace_.timeout_ns = static_cast<uint64_t>(communicator.timeout_s() * 1e9);
  if (Segment* segment = communicator.segment()) {
    check(cudaHostRegister(segment->base(), segment->bytes(),
                           cudaHostRegisterMapped | cudaHostRegisterPortable));
    registered_ = segment->base();
    void* mapped = nullptr;
    check(cudaHostGetDevicePointer(&mapped, registered_, 0));
    const auto on_gpu = [&](const void* host) {
      return static_cast<std::byte*>(mapped) +
             (static_cast<const std::byte*>(host) - static_cast<std::byte*>(registered_));
    };
    workspace_.host_failed =
        reinterpret_cast<const uint32_t*>(on_gpu(&segment->header().error.state));
    workspace_.report =
        reinterpret_cast<GpuReport*>(on_gpu(&segment->area(communicator.rank()).gpu_report));
  } else {
    // Alone, nobody is waited for: both are there, and stay zero.
    workspace_.host_failed = reinterpret_cast<const uint32_t*>(workspace_.base[0] + kAbort);
    workspace_.report = reinterpret_cast<GpuReport*>(workspace_.base[0] + kDescriptors);
  }
  void* report = nullptr;
  check(cudaHostAlloc(&report, sizeof(uint64_t), cudaHostAllocMapped | cudaHostAllocPortable));
  row_report_ = static_cast<uint64_t*>(report);
  *row_report_ = 0;
  check(cudaHostGetDevicePointer(&report, row_report_, 0));
  row_report_on_gpu_ = static_cast<uint64_t*>(report);
  load_all_reduce();
  load_rms_norm();
  load_reduce_scatter();
  load_all_gather();
  load_matmul();
  load_matmul_all_reduce();
  load_sample();
}

Attachment::~Attachment() {
  if (registered_) cudaHostUnregister(registered_);
  if (row_report_) cudaFreeHost(row_report_);
}

uint64_t Attachment::take_row_report(cudaStream_t stream) {
  // Acquire: nothing that the kernel wrote before is looked at, but it must be read anew each time.
  const std::atomic_ref report(*row_report_);
  if (report.load(std::memory_order_acquire) == 0) return 0;
  // In the stream of the calls: the default one is not ordered with it. On both sides of the
  // clearing no kernel is at work that could report, or be told of an older report.
  check(cudaStreamSynchronize(stream));
  check(
      cudaMemsetAsync(workspace_.base[workspace_.rank] + kRowReport, 0, sizeof(uint64_t), stream));
  check(cudaStreamSynchronize(stream));
  return report.exchange(0, std::memory_order_acquire);
}

void Attachment::admit(const Descriptor& descriptor, cudaStream_t stream) {
  communicator_.check();
  one_stream_.admit(stream, descriptor.str(), "communicator");
}

CallSite Attachment::enter(const Descriptor& descriptor, cudaStream_t stream, int64_t bytes_sent) {
  admit(descriptor, stream);
  communicator_.count_call(static_cast<uint64_t>(bytes_sent));
  return {workspace_, descriptor, max_blocks_, stream};
}

std::optional<Attachment::Place> Attachment::find(const void* data, int64_t bytes) const {
  const uint64_t begin = reinterpret_cast<uint64_t>(data);
  int64_t before = 0;  // bytes of the buffers that were added before this one
  for (const Buffer& buffer : buffers_) {
    const uint64_t base = buffer.addresses[communicator_.rank()];
    if (begin < base || begin + bytes > base + buffer.bytes) {
      before += buffer.bytes;
      continue;
    }
    Place place = {};
    const uint64_t offset = begin - base;
    for (int r = 0; r < communicator_.world(); ++r) {
      place.peers[r] = reinterpret_cast<void*>(buffer.addresses[r] + offset);
    }
    place.id = static_cast<uint32_t>(1 + (before + offset) / 16);
    return place;
  }
  return std::nullopt;
}

}  // namespace commfuse::gpu
