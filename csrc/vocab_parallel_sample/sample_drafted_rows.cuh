// Requests with drafts from distributions, not truncated: a team of blocks of threads for each.
// Every member decides about the drafts by itself, from the sums of the first pass, so that none
// waits for another. Only of the first row whose draft is refused are logits looked at once more,
// and the draft's probabilities at all, by each member its share.
#pragma once

#include "vocab_parallel_sample/sample_truncated_rows.cuh"

namespace commfuse::gpu {

// The block: which of up to kTeamRows drafts from row `first` on are accepted. If this is the first
// refused one, shared.refused and what belongs to it are set. False: a failure.
template <class T, int kWorld>
__device__ inline bool decide(Work& work, int request, int first, int n, bool leader) {
  const int64_t global = work.draws.begin + request;
  const int first_row = work.shared.row_begin[request] + first;
  const int t = threadIdx.x;
  // A row to as many warps as there are for each; and thread t has the t-th row in the end.
  int share = 1;
  while (share * 2 * n <= kSampleWarps) share *= 2;
  const int own = work.warp / share, part = work.warp % share * 32 + work.lane;
  const BlockSum* sums = work.sums_of(first_row + (own < n ? own : 0));
  const int blocks = own < n ? work.per_row : 0;

  int64_t draft = -1;
  float draft_logit = -infinity(), draft_probability = 0;
  if (t < n) {
    draft = __ldg(work.draws.drafts + global * work.draws.longest + first + t);
    const int64_t column = draft - work.draws.vocab_begin;
    if (column >= 0 && column < work.draws.columns) {
      Vector8<T> vector;
      vector.load(work.logits_of<T>(request, first + t) + column, 1, false);
      float x[kVector];
      vector.floats(x);
      draft_logit = x[0];
      draft_probability = __ldg(work.draft_probabilities_of(request, first + t) + column);
    }
  }
  float largest = -infinity();
#pragma unroll 4
  for (int block = part; block < blocks; block += share * 32) {
    largest = max_or_nan(largest, load_sum(sums + block).largest);
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    largest = max_or_nan(largest, __shfl_xor_sync(kAllLanes, largest, distance));
  }
  if (work.lane == 0) work.shared.warp_largest[work.warp] = largest;
  __syncthreads();
  if (t < n) {
    largest = work.shared.warp_largest[t * share];
    for (int i = 1; i < share; ++i) {
      largest = max_or_nan(largest, work.shared.warp_largest[t * share + i]);
    }
  }
  if constexpr (kWorld > 1) {
    // Two packs a row: of thread t, and of thread n + t, which gets the row's numbers from it.
    if (t < n) work.shared.draft_probability[t] = draft_probability;
    __syncthreads();
    const uint2 mine =
        t < n ? uint2{__float_as_uint(largest), __float_as_uint(draft_logit)}
              : uint2{t < 2 * n ? __float_as_uint(work.shared.draft_probability[t - n]) : 0u, 0};
    float probability = 0;
    if (!exchange_packs<kWorld>(work, 2 * n, mine, [&](int at, int, uint2 pack) {
          if (at < n) {
            largest = max_or_nan(largest, __uint_as_float(pack.x));
            draft_logit = max_or_nan(draft_logit, __uint_as_float(pack.y));
          } else {
            probability = max_or_nan(probability, __uint_as_float(pack.x));
          }
        })) {
      return false;
    }
    if (t >= n && t < 2 * n) work.shared.draft_probability[t - n] = probability;
    __syncthreads();
    if (t < n) draft_probability = work.shared.draft_probability[t];
  }
  if (t < n) work.shared.largest[t] = largest;
  __syncthreads();

  RowOptions row = options_of(work.draws, global, first + (t < n ? t : 0));
  const float row_largest = work.shared.largest[own < n ? own : 0];
  unsigned long long mass = 0;
  if (is_finite(row_largest)) {
#pragma unroll 4
    for (int block = part; block < blocks; block += share * 32) {
      mass += mass_of(load_sum(sums + block), row_largest, row.exponent);
    }
  }
  mass = warp_sum(mass);
  if (work.lane == 0) work.shared.warp_totals[work.warp] = mass;
  __syncthreads();
  mass = 0;
  if (t < n) {
    for (int i = 0; i < share; ++i) mass += work.shared.warp_totals[t * share + i];
  }
  if constexpr (kWorld > 1) {
    unsigned long long sum = 0;
    if (!exchange_packs<kWorld>(work, n, pack_of(mass),
                                [&](int, int, uint2 pack) { sum += word_of(pack); })) {
      return false;
    }
    mass = sum;
  }

  if (work.warp == 0) {
    static_assert(kTeamRows == 32);
    const bool finite = is_finite(largest);
    const bool accepted = t < n && finite &&
                          accepts(draft_logit, draft_probability, largest, kNoBound, row.scale,
                                  mass, row.seed, row.position);
    const unsigned not_accepted = __ballot_sync(kAllLanes, t < n && !accepted);
    const bool before = work.shared.refused >= 0;  // an earlier one has been refused
    __syncwarp();
    const int refused = before ? -1 : not_accepted ? __ffs(not_accepted) - 1 : kTeamRows;
    if (t == refused) {
      work.shared.refused = first + t;
      work.shared.refused_largest = largest;
      work.shared.refused_mass = mass;
    }
    if (leader && t < n) {
      // Rows behind a refused draft are not output.
      Candidate found = {0, kNobody, -infinity(), -infinity(), 0};
      if (!finite) {
        found.key = largest;
      } else if (t < refused) {
        found.key = kAccepted;
        found.id = static_cast<int32_t>(draft);
        found.logit = draft_logit;
      } else if (t == refused) {
        found.id = kOfTeam;
      }
      *work.drawn(first_row + t) = found;
    }
  }
  __syncthreads();
  return true;
}

// The block, a member of the team: a request's drafts. False: a failure.
template <class T, int kWorld>
__device__ __noinline__ inline bool judge_drafts(Work& work, int team, int member) {
  const int request = work.request_of_team(team);
  const int drafts = work.rows(request) - 1;
  if (threadIdx.x == 0) work.shared.refused = -1;
  __syncthreads();
  for (int first = 0; first < drafts; first += kTeamRows) {
    const int n = min(kTeamRows, drafts - first);
    if (!decide<T, kWorld>(work, request, first, n, member == 0)) return false;
  }
  const int refused = work.shared.refused;
  if (refused < 0 || !is_finite(work.shared.refused_largest)) return true;
  const Dealing dealing(work.per_row, work.team_size);
  const Consecutive blocks = {dealing.begin(member)};
  const ResidualWeights residual = {
      work.draft_probabilities_of(request, refused), work.draws.columns,
      work.shared.refused_largest,
      static_cast<float>(kOne / static_cast<double>(work.shared.refused_mass))};
  const RowOptions row = options_of(work.draws, work.draws.begin + request, refused);
  const Candidate found = replacement(work, work.logits_of<T>(request, refused), blocks,
                                      dealing.begin(member + 1) - blocks.first, row, residual);
  if (threadIdx.x == 0) *work.replacing(team, member) = found;
  return true;
}

// The block: its share of the teams' work. False: a failure.
template <class T, int kWorld>
__device__ inline bool judge_all_drafts(Work& work) {
  return for_teams(work, [&](int team, int member) {
    const bool good = judge_drafts<T, kWorld>(work, team, member);
    __syncthreads();
    return good;
  });
}

}  // namespace commfuse::gpu
