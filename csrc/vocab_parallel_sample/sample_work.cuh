// Which rows a launch has, of which kind, and which of them a block of threads works on.
#pragma once

#include "gpu/lines.cuh"
#include "vocab_parallel_sample/sample_candidates.cuh"
#include "vocab_parallel_sample/sample_gpu.h"

namespace commfuse::gpu {

constexpr int kSegments = 16;  // rows of which a block of threads keeps candidates in the meantime
constexpr int kBins = 256;
constexpr int kListed = 1024;  // blocks of tokens of a truncated row that a list can hold
constexpr int kTeamRows = 32;  // drafts of a request that a team decides about at once

struct Shared {
  // Of this launch's requests: first row, first plain row, first team; one more behind them.
  int32_t row_begin[kMaxRequests + 1];
  int32_t plain_begin[kMaxRequests + 1];
  int32_t team_begin[kMaxRequests + 1];
  unsigned long long warp_totals[kSampleWarps];
  int32_t rows_before;                    // of the requests before this launch's
  uint32_t finishing[kMaxRequests / 32];  // requests whose last candidate this block has counted
  bool met;
  Best best[kSegments][kSampleWarps];
  float warp_largest[kSampleWarps];
  // Of a truncated row.
  unsigned long long histogram[kBins];
  int32_t listed[kListed];
  int32_t listed_count;
  uint2 packs[kMaxRanks][2];
  unsigned long long total;
  unsigned long long target;
  uint32_t prefix;
  bool found;
  // Of a request with drafts from distributions: of each row, and of the first that is refused.
  float largest[kTeamRows], draft_logit[kTeamRows], draft_probability[kTeamRows];
  int32_t refused;
  float refused_largest;
  unsigned long long refused_mass;
};

// Which rows of a request can be drawn in one pass.
struct Kind {
  bool sampled, truncated, distributed;

  __device__ Kind(const Draws& draws, int64_t request) {
    sampled = truncated = distributed = false;
    if (!draws.temperature) return;
    // No load waits for what another has brought.
    const double temperature = __ldg(draws.temperature + request);
    const int64_t top_k = __ldg(draws.top_k + request);
    const double top_p = __ldg(draws.top_p + request);
    sampled = temperature != 0;
    truncated = sampled & ((top_k > 0) | (top_p < 1));
    // Not by the pointer, which is null where a rank has no columns: ranks must agree.
    distributed = sampled & (draws.draft_rows > 0);
  }
  __device__ int plain_rows(int rows) const { return truncated ? 0 : distributed ? 1 : rows; }
  __device__ bool has_team(int rows) const { return distributed & !truncated & (rows > 1); }
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
  options.seed = static_cast<uint64_t>(__ldg(draws.seed + request));
  options.position = static_cast<uint64_t>(__ldg(draws.position + request) + row);
  if (temperature == 0) return options;
  options.greedy = false;
  options.scale = static_cast<float>(1 / temperature);
  options.exponent = options.scale * kLog2E;
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

// What a thread has read of one request; three counts of at most 2^21.
struct RequestRows {
  unsigned long long packed = 0;  // rows, plain rows, teams
  int before = 0;                 // rows of requests before this launch's, this thread's share
  bool fits = true;               // the draft length

  __device__ static int rows(unsigned long long packed) { return static_cast<int>(packed >> 42); }
  __device__ static int plain(unsigned long long packed) {
    return static_cast<int>(packed >> 21 & 0x1fffff);
  }
  __device__ static int teams(unsigned long long packed) {
    return static_cast<int>(packed & 0x1fffff);
  }
};

// A block's work: the launch, where each request's rows lie, and the block's share of them.
struct Work {
  const Draws& draws;
  const Workspace& workspace;
  const Exchange& exchange;
  Shared& shared;
  int lane, warp;
  int per_row;                      // blocks of tokens
  int rows_in_all = 0, others = 0;  // others: rows that take several passes
  int teams = 0, team_size = 0;     // blocks of threads that share a request's drafts
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

  // What find_rows() needs of memory. What is needed behind it is asked for meanwhile.
  template <class T>
  __device__ RequestRows read_requests() const {
    RequestRows read;
    prefetch_first<T>();
    for (int64_t r = threadIdx.x; r < draws.begin; r += kSampleThreads) {
      read.before += rows_of(draws, r);
    }
    if (threadIdx.x < draws.count) {
      const int64_t request = draws.begin + threadIdx.x;
      const int rows = rows_of(draws, request);
      const Kind kind(draws, request);
      if (draws.temperature) {
        prefetch(draws.seed + request);
        prefetch(draws.position + request);
      }
      if (draws.longest > 0) prefetch(draws.drafts + request * draws.longest);
      read.packed = static_cast<unsigned long long>(rows) << 42 |
                    static_cast<unsigned long long>(kind.plain_rows(rows)) << 21 |
                    (kind.has_team(rows) ? 1 : 0);
      read.fits = !draws.draft_lengths || rows - 1 == __ldg(draws.draft_lengths + request);
    }
    return read;
  }

  // The logits with which this block begins if all drafts are as long as they can be. It does no
  // harm if they are not.
  template <class T>
  __device__ void prefetch_first() const {
    const int64_t rows = draws.count * (draws.longest + 1);
    const int64_t before = draws.begin * (draws.longest + 1);
    if (before + rows > draws.rows || draws.columns == 0) return;
    const Dealing likely(static_cast<int>(rows) * per_row, gridDim.x);
    const int end = likely.begin(blockIdx.x + 1);
    constexpr int kLine = 128 / sizeof(T), kLines = kBlock / kLine;  // lines of a block of tokens
    const int block = likely.begin(blockIdx.x) + static_cast<int>(threadIdx.x) / kLines;
    if (block >= end) return;
    const int row = block / per_row;
    const int64_t column =
        int64_t{block - row * per_row} * kBlock + static_cast<int>(threadIdx.x) % kLines * kLine;
    if (column >= draws.columns) return;
    prefetch(static_cast<const T*>(draws.logits) + (before + row) * draws.columns + column);
  }

  // The block: where each request's rows begin.
  __device__ void find_rows(const RequestRows& read) {
    const int count = static_cast<int>(draws.count);
    if (!read.fits && blockIdx.x == 0) report(draws.begin + threadIdx.x, 0, RowProblem::length);
    if (threadIdx.x == 0) shared.rows_before = 0;
    if (threadIdx.x < kMaxRequests / 32) shared.finishing[threadIdx.x] = 0;
    unsigned long long sum = read.packed;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const unsigned long long other = __shfl_up_sync(kAllLanes, sum, distance);
      if (lane >= distance) sum += other;
    }
    if (count > 32) {
      if (lane == 31) shared.warp_totals[warp] = sum;
      __syncthreads();
      unsigned long long total = shared.warp_totals[lane];
#pragma unroll
      for (int distance = 1; distance < 32; distance *= 2) {
        const unsigned long long other = __shfl_up_sync(kAllLanes, total, distance);
        if (lane >= distance) total += other;
      }
      const unsigned long long earlier = __shfl_sync(kAllLanes, total, (warp + 31) & 31);
      if (warp > 0) sum += earlier;
    }
    if (static_cast<int>(threadIdx.x) < count) {
      shared.row_begin[threadIdx.x + 1] = RequestRows::rows(sum);
      shared.plain_begin[threadIdx.x + 1] = RequestRows::plain(sum);
      shared.team_begin[threadIdx.x + 1] = RequestRows::teams(sum);
    }
    if (threadIdx.x == 0) {
      shared.row_begin[0] = shared.plain_begin[0] = shared.team_begin[0] = 0;
    }
    __syncthreads();
    if (draws.begin > 0) {
      if (read.before) atomicAdd(&shared.rows_before, read.before);
      __syncthreads();
    }
    rows_in_all = shared.row_begin[count];
    others = rows_in_all - shared.plain_begin[count];
    teams = shared.team_begin[count];
    team_size = max(1, static_cast<int>(gridDim.x) / max(1, teams));
    dealing = Dealing(rows_in_all * per_row, gridDim.x);
    begin = dealing.begin(blockIdx.x);
    end = dealing.begin(blockIdx.x + 1);
    const int64_t rows = int64_t{shared.rows_before} + rows_in_all;
    const int64_t drafts = rows - draws.begin - count;
    if ((rows > draws.rows || (draws.draft_rows > 0 && drafts > draws.draft_rows)) &&
        blockIdx.x == 0 && threadIdx.x == 0) {
      report(draws.begin + count - 1, 0, RowProblem::length);
    }
  }

  // Searches first(0) ... first(count) for the request to which an index belongs: the last of those
  // that begin there, which alone has any.
  template <class First>
  __device__ int search(int index, First first) const {
    int low = 0, high = static_cast<int>(draws.count);
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (first(middle) <= index ? low : high) = middle;
    }
    return low;
  }
  __device__ int request_of_row(int row) const {
    return search(row, [&](int r) { return shared.row_begin[r]; });
  }
  __device__ int request_of_team(int team) const {
    return search(team, [&](int r) { return shared.team_begin[r]; });
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
  // A request's plain rows are its last ones, and its others the first.
  __device__ int other_rows(int request) const {
    return other_begin(request + 1) - other_begin(request);
  }
  __device__ bool has_team(int request) const {
    return shared.team_begin[request + 1] > shared.team_begin[request];
  }

  // Blocks of threads that share a row.
  __device__ int blocks_of(int row) const {
    return dealing.owner((row + 1) * per_row - 1) - dealing.owner(row * per_row) + 1;
  }

  // Of the first pass, counted by rows and blocks: no two have the same place.
  __device__ Candidate* scanned(int row, int block) const { return draws.candidates + row + block; }
  // Of another row, a place for all that followed.
  __device__ Candidate* drawn(int row) const {
    return draws.candidates + rows_in_all + gridDim.x + row;
  }
  // Of a team's members, for the draft that was refused.
  __device__ Candidate* replacing(int team, int member) const {
    return draws.candidates + 2 * rows_in_all + gridDim.x + team * team_size + member;
  }
  __device__ BlockSum* sums_of(int row) const {
    return draws.sums + static_cast<int64_t>(row) * per_row;
  }

  // Blocks of tokens of a truncated row that are looked at; all, where there are more than the list
  // can hold.
  __device__ int listed_count() const {
    return shared.listed_count > kListed ? per_row : shared.listed_count;
  }
  __device__ int listed(int i) const {
    return shared.listed_count > kListed ? i : shared.listed[i];
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
  // Likewise the distribution of a row's draft.
  __device__ const float* draft_probabilities_of(int request, int row) const {
    // Every request before this one has one row more than drafts.
    const int64_t index =
        int64_t{shared.rows_before} + shared.row_begin[request] + row - draws.begin - request;
    return draws.draft_probabilities +
           (index < draws.draft_rows ? index : draws.draft_rows - 1) * draws.columns;
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

// f(team, member) for the teams of which this block is a member, until it says false; whether it
// never did. Alike on all ranks.
template <class F>
__device__ __forceinline__ bool for_teams(const Work& work, F f) {
  const int groups = static_cast<int>(gridDim.x) / work.team_size;
  const int group = static_cast<int>(blockIdx.x) / work.team_size;
  const int member = static_cast<int>(blockIdx.x) % work.team_size;
  for (int team = group; group < groups && team < work.teams; team += groups) {
    if (!f(team, member)) return false;
  }
  return true;
}

}  // namespace commfuse::gpu
