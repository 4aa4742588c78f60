// A communicator's memory on this rank's GPU, and the rules for launching kernels on it.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "gpu/call_site.h"
#include "gpu/one_stream.h"
#include "runtime/communicator.h"

namespace commfuse::gpu {

// Up to which size of a message an algorithm is the fastest, bytes: a property of the GPUs, the
// same on all ranks.
struct Thresholds {
  int64_t one_shot = 64 << 10;
  int64_t lines = 1 << 20;
};

// For how many rows matmul_all_reduce sends tiles while it computes: likewise.
struct FusedRows {
  int64_t fewest = 1, most = 64;
};

class Attachment {
 public:
  // addresses: every rank's workspace, zero, as this process maps it; max_blocks: of kernels whose
  // grids must be alike. Loads all kernels.
  Attachment(Communicator& communicator, int device, const std::vector<uint64_t>& addresses,
             int64_t slot_bytes, int max_blocks);
  ~Attachment();
  Attachment(const Attachment&) = delete;

  int device() const { return device_; }
  int max_blocks() const { return max_blocks_; }
  const Workspace& workspace() const { return workspace_; }
  Thresholds thresholds;
  FusedRows fused_rows;
  int claimed_percent = 0;  // of the tiles of matmul_all_reduce's GEMM: see matmul_plan

  // Before anything of a call may touch shared memory. Throws the communicator's failure, or
  // ConcurrentUseError where another stream's calls are still running.
  void admit(const Descriptor& descriptor, cudaStream_t stream);
  // Admits, before each launch.
  CallSite enter(const Descriptor& descriptor, cudaStream_t stream, int64_t bytes_sent);

  // In host memory, as the GPU sees it: the earliest row from which no token can be drawn
  // (RowReport of vocab_parallel_sample). Taken on the stream of the calls, for whose end it waits
  // if there is one; 0: there is none.
  uint64_t* row_report() const { return row_report_on_gpu_; }
  uint64_t take_row_report(cudaStream_t stream);

  // Memory that every rank maps at addresses[rank], for tensors that are reduced in place: bytes, a
  // multiple of 16. All of it has less than 2^32 times 16 bytes (Communicator.empty checks that).
  void add_buffer(const std::vector<uint64_t>& addresses, int64_t bytes) {
    buffers_.push_back({addresses, bytes});
  }
  struct Place {
    void* peers[kMaxRanks];
    uint32_t id;  // equal on all ranks where the places are; another for every 16 bytes; not 0
  };
  // Where the peers have what lies at data here; none outside the buffers.
  std::optional<Place> find(const void* data, int64_t bytes) const;

 private:
  struct Buffer {
    std::vector<uint64_t> addresses;
    int64_t bytes;
  };

  Communicator& communicator_;
  int device_, max_blocks_;
  Workspace workspace_ = {};
  void* registered_ = nullptr;
  uint64_t* row_report_ = nullptr;
  uint64_t* row_report_on_gpu_ = nullptr;
  OneStream one_stream_;
  std::vector<Buffer> buffers_;
};

}  // namespace commfuse::gpu
