// Finishing a request: the best candidate of each row, of all ranks; accepted drafts; the outputs.
#pragma once

#include "vocab_parallel_sample/sample_rounds.cuh"

namespace commfuse::gpu {

constexpr int kGroup = 4;  // lanes that share a row when a request is finished
// That a rank sends of a plain row: without log-probabilities and with them.
constexpr int kUnitsWithoutLogs = 2, kUnitsWithLogs = 4;

// A warp: adds n candidates of a request; whether they were the last.
__device__ inline bool arrive(const Work& work, int request, int n) {
  int expected = 0;
  for (int row = work.shared.plain_begin[request] + work.lane;
       row < work.shared.plain_begin[request + 1]; row += 32) {
    expected += work.blocks_of(row);
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    expected += __shfl_xor_sync(kAllLanes, expected, distance);
  }
  expected += work.rows(request) - work.plain_rows(request);
  int before = 0;
  if (work.lane == 0) {
    auto* ticket =
        reinterpret_cast<uint32_t*>(work.workspace.base[work.workspace.rank] + kTickets) + request;
    // Releases this block's candidates, which a barrier has put before it, and acquires those of
    // the blocks that came earlier.
    before = static_cast<int>(add_acquire_release(ticket, static_cast<uint32_t>(n)));
    if (before + n == expected) *ticket = 0;  // for the next call
  }
  before = __shfl_sync(kAllLanes, before, 0);
  return before + n == expected;
}

__device__ inline Candidate load_candidate(const Candidate* from) {
  Candidate candidate;
  candidate.key = __ldcg(&from->key);
  candidate.id = __ldcg(&from->id);
  candidate.logit = __ldcg(&from->logit);
  candidate.largest = __ldcg(&from->largest);
  candidate.sum = __ldcg(&from->sum);
  return candidate;
}
__device__ inline void keep_better(Candidate& mine, const Candidate& other) {
  if (replaces(other.key, other.id, mine.key, mine.id)) {
    mine.key = other.key;
    mine.id = other.id;
    mine.logit = other.logit;
  }
}
__device__ inline void add_normaliser(Candidate& mine, const Candidate& other) {
  Best sum = {kNoKey, kNobody, mine.largest, mine.sum};
  sum.add(other.largest, other.sum);
  mine.largest = sum.largest;
  mine.sum = sum.sum;
}
// Over the lanes that share a row; with both, every lane has the same bits.
__device__ inline void reduce_group(Candidate& mine) {
#pragma unroll
  for (int distance = kGroup / 2; distance > 0; distance /= 2) {
    Candidate other;
    other.key = __shfl_xor_sync(kAllLanes, mine.key, distance);
    other.id = __shfl_xor_sync(kAllLanes, mine.id, distance);
    other.logit = __shfl_xor_sync(kAllLanes, mine.logit, distance);
    other.largest = __shfl_xor_sync(kAllLanes, mine.largest, distance);
    other.sum = __shfl_xor_sync(kAllLanes, mine.sum, distance);
    keep_better(mine, other);
    add_normaliser(mine, other);
  }
}

// What a rank says of a plain row, in units of 6 bytes: key and id, and where log-probabilities are
// wanted the token's logit and the log of the normaliser.
template <int kUnits>
struct RowMessage {
  uint64_t unit[kUnits];

  __device__ __forceinline__ static RowMessage of(const Candidate& best) {
    const auto key = static_cast<uint64_t>(__double_as_longlong(best.key));
    RowMessage message;
    message.unit[0] = key & ((uint64_t{1} << kUnitBits) - 1);
    message.unit[1] = key >> kUnitBits | uint64_t{static_cast<uint32_t>(best.id)} << 16;
    if constexpr (kUnits == kUnitsWithLogs) {
      // -inf where the sum is 0.
      const uint32_t normaliser = __float_as_uint(best.largest + logf(best.sum));
      message.unit[2] = uint64_t{normaliser & 0xffffu} << 32 | __float_as_uint(best.logit);
      message.unit[3] = normaliser >> 16;
    }
    return message;
  }
  __device__ __forceinline__ Candidate candidate() const {
    const uint64_t key = unit[1] << kUnitBits | unit[0];
    Candidate candidate = {__longlong_as_double(static_cast<long long>(key)),
                           static_cast<int32_t>(unit[1] >> 16), -infinity(), -infinity(), 0};
    if constexpr (kUnits == kUnitsWithLogs) {
      candidate.logit = __uint_as_float(static_cast<uint32_t>(unit[2]));
      candidate.largest = __uint_as_float(static_cast<uint32_t>(unit[3] << 16 | unit[2] >> 32));
      candidate.sum = candidate.largest == -infinity() ? 0.0f : 1.0f;
    }
    return candidate;
  }
};

// The lanes of a group: the best of all ranks' for a plain row; the peers' come in turn to the
// lanes. False: a failure.
template <int kUnits>
__device__ inline bool exchange_group(const Work& work, int plain_row, bool mine, Candidate& best) {
  const int rank = work.exchange.rank(), world = work.exchange.world();
  const int part = work.lane % kGroup;
  const auto own = RowMessage<kUnits>::of(best);
  const int64_t place = kPlainOffset + int64_t{plain_row} * kUnits * 8;
  constexpr int kSources = kMaxRanks / kGroup;
  char* address[kUnits * kSources];
#pragma unroll
  for (int i = 0; i < kSources; ++i) {
    const int peer = part + i * kGroup;
    const bool there = mine && peer < world && peer != rank;
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      if (there) {
        put_unit(work.exchange.lines(peer, rank) + place + u * 8, own.unit[u],
                 work.exchange.short_flag());
      }
      address[i * kUnits + u] = there ? work.exchange.lines(rank, peer) + place + u * 8 : nullptr;
    }
  }
  uint64_t units[kUnits * kSources];
  const bool good = take_units<kUnits * kSources>(
      work.exchange, 0, address, [&](int i) { return part + i / kUnits * kGroup; }, units);
  Candidate merged = {kNoKey, kNobody, -infinity(), -infinity(), 0};
#pragma unroll
  for (int i = 0; i < kSources; ++i) {
    const int source = part + i * kGroup;
    if (!mine || source >= world) continue;
    RowMessage<kUnits> message = own;
    if (source != rank) memcpy(message.unit, units + i * kUnits, sizeof(message.unit));
    const Candidate other = message.candidate();
    keep_better(merged, other);
    add_normaliser(merged, other);
  }
  reduce_group(merged);
  best = merged;
  return __all_sync(kAllLanes, good);
}

// A warp: the tokens of a request whose candidates are all there. Groups of lanes take a row
// each.
template <int kWorld>
__device__ __noinline__ inline bool finish(const Work& work, int request) {
  constexpr int kRows = 32 / kGroup;
  const int64_t global = work.draws.begin + request;
  const int count = work.rows(request), others = count - work.plain_rows(request);
  const int group = work.lane / kGroup, part = work.lane % kGroup;
  const int64_t out = global * (work.draws.longest + 1);
  bool going = true, good = true;
  for (int base = 0; good && base < count; base += kRows) {
    const int row = base + group;
    const bool valid = row < count, plain = valid && row >= others;
    const int plain_row = work.shared.plain_begin[request] + row - others;
    Candidate best = {kNoKey, kNobody, -infinity(), -infinity(), 0};
    if (plain) {
      const int first = work.dealing.owner(plain_row * work.per_row);
      const int blocks = work.blocks_of(plain_row);
#pragma unroll 4
      for (int i = part; i < blocks; i += kGroup) {
        const Candidate other = load_candidate(work.draws.candidates + plain_row + first + i);
        keep_better(best, other);
        add_normaliser(best, other);
      }
    }
    reduce_group(best);
    if constexpr (kWorld > 1) {
      good = work.draws.log_probabilities
                 ? exchange_group<kUnitsWithLogs>(work, plain_row, plain, best)
                 : exchange_group<kUnitsWithoutLogs>(work, plain_row, plain, best);
    }
    if (valid && !plain) {
      best = load_candidate(work.draws.candidates + work.plain + gridDim.x +
                            work.other_begin(request) + row);
    }
    const bool found = valid && is_finite(best.key);
    if (valid && !found && part == 0 && good) {
      work.report(global, row,
                  best.key != best.key ? RowProblem::nan
                  : best.key > 0       ? RowProblem::infinite
                                       : RowProblem::nothing);
    }
    const int64_t token = found ? best.id : -1;
    const bool right = found && row < count - 1 && work.draws.draft_lengths &&
                       token == work.draws.drafts[global * work.draws.longest + row];
    constexpr unsigned kFirstLanes = 0x11111111u;
    static_assert(kGroup == 4);
    const unsigned wrong = ~__ballot_sync(kAllLanes, right) & kFirstLanes;
    const int last = wrong ? (__ffs(wrong) - 1) / kGroup : kRows;  // the first that is not a draft
    if (valid && part == 0) {
      const bool kept = going && group <= last;
      work.draws.tokens[out + row] = kept ? token : -1;
      if (work.draws.log_probabilities) {
        work.draws.log_probabilities[out + row] =
            kept && found
                ? static_cast<float>(double{best.logit} - best.largest - std::log(double{best.sum}))
                : 0.0f;
      }
      if (going && group == last && work.draws.accepted) work.draws.accepted[global] = row;
    }
    going &= wrong == 0;
  }
  for (int64_t row = count + work.lane; row <= work.draws.longest; row += 32) {
    work.draws.tokens[out + row] = -1;
    if (work.draws.log_probabilities) work.draws.log_probabilities[out + row] = 0;
  }
  return good;
}

// The block: counts its candidates, then finishes the requests whose last ones they were. All are
// counted before a peer is waited for, and a warp finishes its requests in ascending order. Were a
// candidate counted behind a wait, two ranks could wait for each other: each for a request whose
// last candidate the other counts behind the one that it waits for.
template <int kWorld>
__device__ inline bool finish_requests(const Work& work) {
  const auto count = [&](int request, int n) {
    if (arrive(work, request, n) && work.lane == 0) {
      atomicOr(&work.shared.finishing[request / 32], 1u << request % 32);
    }
  };
  if (work.begin < work.end) {
    const int first_row = work.begin / work.per_row, last_row = (work.end - 1) / work.per_row;
    const int first = work.request_of_plain(first_row), last = work.request_of_plain(last_row);
    for (int request = first + work.warp; request <= last; request += kSampleWarps) {
      const int from = max(first_row, work.shared.plain_begin[request]);
      const int to = min(last_row + 1, work.shared.plain_begin[request + 1]);
      if (from < to) count(request, to - from);
    }
  }
  int turn = 0;
  for (int other = blockIdx.x; other < work.others; other += gridDim.x, ++turn) {
    if (turn % kSampleWarps == work.warp) count(work.request_of_other(other), 1);
  }
  // Also lets every warp read the candidates that lane 0 of another has acquired.
  __syncthreads();
  bool good = true;
  for (int request = work.warp; good && request < work.draws.count; request += kSampleWarps) {
    const bool last = work.shared.finishing[request / 32] >> request % 32 & 1;
    if (last) good = finish<kWorld>(work, request);
  }
  return good;
}

}  // namespace commfuse::gpu
