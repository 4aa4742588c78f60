// Which rows a launch has, of which kind, and which of them a block of threads works on.
#pragma once

#include "gpu/lines.cuh"
#include "vocab_parallel_sample/sample_candidates.cuh"
#include "vocab_parallel_sample/sample_gpu.h"

namespace commfuse::gpu {

constexpr int kSegments = 16;  // rows of which a block of threads keeps candidates in the meantime
constexpr int kBins = 256;

struct Shared {
  // Of this launch's requests: first row, first plain row, first other row; one more behind them.
  int32_t row_begin[kMaxRequests + 1];
  int32_t plain_begin[kMaxRequests + 1];
  unsigned long long warp_totals[kSampleWarps];
  int32_t rows_before;                    // of the requests before this launch's
  uint32_t finishing[kMaxRequests / 32];  // requests whose last candidate this block has counted
  Best best[kSegments][kSampleWarps];
  // Of another row.
  unsigned long long histogram[kBins];
  uint2 packs[kMaxRanks][4];
  unsigned long long total;
  unsigned long long target;
  float warp_largest[kSampleWarps];
  uint32_t prefix;
  bool found;
  Candidate winner;
};

// Which rows of a request can be drawn in one pass.
struct Kind {
  bool sampled, truncated, distributed;

  __device__ Kind(const Draws& draws, int64_t request) {
    sampled = draws.temperature && __ldg(draws.temperature + request) != 0;
    truncated = sampled && (__ldg(draws.top_k + request) > 0 || __ldg(draws.top_p + request) < 1);
    // Not by the pointer, which is null where a rank has no columns: ranks must agree.
    distributed = sampled && draws.draft_rows > 0;
  }
  __device__ int plain_rows(int rows) const { return truncated ? 0 : distributed ? 1 : rows; }
};

__device__ __forceinline__ int rows_of(const Draws& draws, int64_t request) {
  if (!draws.draft_lengths) return 1;
  const int64_t length = __ldg(draws.draft_lengths + request);
  return 1 + static_cast<int>(length < 0 ? 0 : length < draws.longest ? length : draws.longest);
}

__device__ __forceinline__ RowOptions options_of(const Draws& draws, int64_t request, int row) {
  RowOptions options = {1, kLog2E, kNoBound,     true,
                        0, 0,      draws.stream, static_cast<uint32_t>(draws.vocab_begin / kBlock)};
  if (!draws.temperature) return options;
  const double temperature = __ldg(draws.temperature + request);
  if (temperature == 0) return options;
  options.greedy = false;
  options.scale = static_cast<float>(1 / temperature);
  options.exponent = options.scale * kLog2E;
  options.seed = static_cast<uint64_t>(__ldg(draws.seed + request));
  options.position = static_cast<uint64_t>(__ldg(draws.position + request) + row);
  return options;
}

// How many blocks of tokens come before each block of threads: as even as possible.
struct Dealing {
  int each, more;  // the first `more` have one more

  __device__ Dealing(int blocks, int grid) : each(blocks / grid), more(blocks % grid) {}
  __device__ int begin(int block) const { return block * each + (block < more ? block : more); }
  __device__ int owner(int at) const {
    const int cut = more * (each + 1);
    return at < cut ? at / (each + 1) : more + (at - cut) / each;
  }
};

// A block's work: the launch, where each request's rows lie, and the block's share of them.
struct Work {
  const Draws& draws;
  const Workspace& workspace;
  const Exchange& exchange;
  Shared& shared;
  int lane, warp;
  int per_row;                // blocks of tokens
  int plain = 0, others = 0;  // rows
  Dealing dealing;
  int begin = 0, end = 0;  // this block's blocks of tokens
  int round = 0;           // exchanges of this block

  __device__ Work(const Draws& draws, const Workspace& workspace, const Exchange& exchange,
                  Shared& shared)
      : draws(draws),
        workspace(workspace),
        exchange(exchange),
        shared(shared),
        lane(threadIdx.x & 31),
        warp(threadIdx.x >> 5),
        per_row(static_cast<int>((draws.columns + kBlock - 1) / kBlock)),
        dealing(1, 1) {
    // A rank without columns takes part as one whose logits are all -inf.
    if (per_row == 0) per_row = 1;
  }

  // The block: where each request's rows begin.
  __device__ void find_rows() {
    const int count = static_cast<int>(draws.count);
    int before = 0;
    for (int64_t r = threadIdx.x; r < draws.begin; r += kSampleThreads) before += rows_of(draws, r);
    unsigned long long mine = 0;
    if (threadIdx.x < draws.count) {
      const int64_t request = draws.begin + threadIdx.x;
      const int rows = rows_of(draws, request);
      const Kind kind(draws, request);
      mine = static_cast<unsigned long long>(rows) << 32 |
             static_cast<unsigned>(kind.plain_rows(rows));
      if (draws.draft_lengths && rows - 1 != __ldg(draws.draft_lengths + request) &&
          blockIdx.x == 0) {
        report(request, 0, RowProblem::length);
      }
    }
    if (threadIdx.x == 0) shared.rows_before = 0;
    if (threadIdx.x < kMaxRequests / 32) shared.finishing[threadIdx.x] = 0;
    unsigned long long sum = mine;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const unsigned long long other = __shfl_up_sync(kAllLanes, sum, distance);
      if (lane >= distance) sum += other;
    }
    if (lane == 31) shared.warp_totals[warp] = sum;
    __syncthreads();
    if (before) atomicAdd(&shared.rows_before, before);
    unsigned long long total = shared.warp_totals[lane];
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const unsigned long long other = __shfl_up_sync(kAllLanes, total, distance);
      if (lane >= distance) total += other;
    }
    const unsigned long long earlier = __shfl_sync(kAllLanes, total, (warp + 31) & 31);
    if (warp > 0) sum += earlier;
    if (static_cast<int>(threadIdx.x) < count) {
      shared.row_begin[threadIdx.x + 1] = static_cast<int32_t>(sum >> 32);
      shared.plain_begin[threadIdx.x + 1] = static_cast<int32_t>(sum & 0xffffffffu);
    }
    if (threadIdx.x == 0) shared.row_begin[0] = shared.plain_begin[0] = 0;
    __syncthreads();
    plain = shared.plain_begin[count];
    others = shared.row_begin[count] - plain;
    dealing = Dealing(plain * per_row, gridDim.x);
    begin = dealing.begin(blockIdx.x);
    end = dealing.begin(blockIdx.x + 1);
    if (shared.rows_before + shared.row_begin[count] > draws.rows && blockIdx.x == 0 &&
        threadIdx.x == 0) {
      report(draws.begin + count - 1, 0, RowProblem::length);
    }
  }

  // Searches first(0) ... first(count) for the request to which an index belongs.
  template <class First>
  __device__ int search(int index, First first) const {
    int low = 0, high = static_cast<int>(draws.count);
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (first(middle) <= index ? low : high) = middle;
    }
    return low;
  }
  __device__ int request_of_plain(int row) const {
    // Of requests without plain rows, which begin at the same place, the last is found: it is the
    // one that has them.
    return search(row, [&](int r) { return shared.plain_begin[r]; });
  }
  __device__ int other_begin(int request) const {
    return shared.row_begin[request] - shared.plain_begin[request];
  }
  __device__ int request_of_other(int other) const {
    return search(other, [&](int r) { return other_begin(r); });
  }
  __device__ int rows(int request) const {
    return shared.row_begin[request + 1] - shared.row_begin[request];
  }
  __device__ int plain_rows(int request) const {
    return shared.plain_begin[request + 1] - shared.plain_begin[request];
  }
  // A request's plain rows are its last ones, and its others the first.
  __device__ int plain_index(int request, int row) const {
    return rows(request) - plain_rows(request) + row - shared.plain_begin[request];
  }

  // Blocks of threads that share a plain row.
  __device__ int blocks_of(int row) const {
    return dealing.owner((row + 1) * per_row - 1) - dealing.owner(row * per_row) + 1;
  }

  __device__ int64_t row_index(int request, int row) const {
    const int64_t index = int64_t{shared.rows_before} + shared.row_begin[request] + row;
    // More rows than there are have been reported; nothing may be read beyond them.
    return index < draws.rows ? index : draws.rows - 1;
  }
  template <class T>
  __device__ const T* logits_of(int request, int row) const {
    return static_cast<const T*>(draws.logits) + row_index(request, row) * draws.columns;
  }

  __device__ void report(int64_t request, int64_t row, RowProblem problem) const {
    const uint64_t packed = RowReport::pack(request, row, draws.op, problem);
    auto* word = reinterpret_cast<unsigned long long*>(workspace.base[workspace.rank] + kRowReport);
    auto* host = reinterpret_cast<volatile unsigned long long*>(draws.report);
    atomicMax(word, static_cast<unsigned long long>(packed));
    // Several may report at once: the earliest row's must be what the host sees in the end.
    for (;;) {
      const unsigned long long worst = atomicMax(word, 0ull);
      *host = worst;
      __threadfence_system();
      if (atomicMax(word, 0ull) == worst) break;
    }
  }
};

}  // namespace commfuse::gpu
