// Rows that are truncated by top-k or top-p, with a draft's distribution or without: a block of
// threads for each.
#pragma once

#include "vocab_parallel_sample/sample_scan.cuh"
#include "vocab_parallel_sample/sample_truncation.cuh"

namespace commfuse::gpu {

// The block: the best of n blocks of tokens of a row; the result is in every lane of warp 0.
template <class T, class BlockOf, class Weights>
__device__ inline Candidate best_of(const Work& work, const T* logits, BlockOf block_of, int n,
                                    const RowOptions& row, const Weights& weights) {
  const int64_t columns = work.draws.columns;
  Ahead<T> ahead;
  ahead.fetch(logits, columns, block_of, n, first_step(0));
  Best best = scan<T, false>(logits, columns, block_of, n, first_step(0), ahead, row, weights,
                             nullptr, [] {});
  __syncthreads();  // nobody still reads what the last row's warps have found
  if (work.lane == 0) work.shared.best[0][work.warp] = best;
  __syncthreads();
  Candidate found = {kNoKey, kNobody, -infinity(), 0, 0};
  if (work.warp == 0) {
    best = work.shared.best[0][work.lane];
    best.reduce<false>(32);
    found = token_of(logits, columns, work.draws.vocab_begin, best, row, weights);
  }
  found.largest = -infinity();
  found.sum = 0;
  return found;
}

// The block: what may replace a refused draft, of n blocks of tokens. Where they have nothing above
// the draft's distribution, a draw from the target, which is taken if that is so everywhere: the
// two are then the same, and the draft was refused by rounding, or because it is no token.
template <class T, class BlockOf>
__device__ __noinline__ inline Candidate replacement(Work& work, const T* logits, BlockOf block_of,
                                                     int n, const RowOptions& row,
                                                     const ResidualWeights& residual) {
  Candidate found = best_of(work, logits, block_of, n, row, residual);
  if (found.key != found.key) found.id = kDraftNan;
  if (!__syncthreads_or(work.warp == 0 && found.key == kNoKey)) return found;
  found = best_of(work, logits, block_of, n, row, TargetWeights<true>{});
  if (found.id != kNobody) found.id = stopgap(found.id);
  return found;
}

// The block: a row of a request whose rows are truncated; *drawn is written by thread 0. False: a
// failure.
template <class T, int kWorld>
__device__ __noinline__ inline bool draw_truncated(Work& work, int request, int index,
                                                   Candidate* drawn) {
  const int64_t global = work.draws.begin + request;
  const T* logits = work.logits_of<T>(request, index);
  const bool drafted = work.draws.draft_rows > 0 && index < work.rows(request) - 1;
  int64_t draft = -1;
  const float* q = nullptr;
  if (drafted) {
    draft = __ldg(work.draws.drafts + global * work.draws.longest + index);
    q = work.draft_probabilities_of(request, index);
  }
  const BlockSum* sums = work.sums_of(work.shared.row_begin[request] + index);
  float largest = -infinity();
  for (int block = threadIdx.x; block < work.per_row; block += kSampleThreads) {
    largest = max_or_nan(largest, load_sum(sums + block).largest);
  }
  RowOptions row = options_of(work.draws, global, index);
  const int64_t top_k = __ldg(work.draws.top_k + global);
  const double top_p = __ldg(work.draws.top_p + global);
  largest = block_largest(work, largest);
  float draft_logit = -infinity(), draft_probability = 0;
  const int64_t own = draft - work.draws.vocab_begin;
  if (drafted && own >= 0 && own < work.draws.columns) {
    Vector8<T> vector;
    vector.load(logits + own, 1, false);
    float x[kVector];
    vector.floats(x);
    draft_logit = x[0];
    draft_probability = q[own];
  }
  if constexpr (kWorld > 1) {
    const uint2 packs[2] = {{__float_as_uint(largest), __float_as_uint(draft_logit)},
                            {__float_as_uint(draft_probability), 0}};
    if (!exchange_packs<kWorld>(
            work, 2, packs[threadIdx.x & 1],
            [&](int t, int source, uint2 pack) { work.shared.packs[source][t] = pack; })) {
      return false;
    }
    for (int source = 0; source < work.exchange.world(); ++source) {
      largest = max_or_nan(largest, __uint_as_float(work.shared.packs[source][0].x));
      draft_logit = max_or_nan(draft_logit, __uint_as_float(work.shared.packs[source][0].y));
      draft_probability =
          max_or_nan(draft_probability, __uint_as_float(work.shared.packs[source][1].x));
    }
  }
  if (!is_finite(largest)) {
    if (threadIdx.x == 0) *drawn = {largest, kNobody, -infinity(), -infinity(), 0};
    return true;
  }

  unsigned long long known = 0;
  if (!list_blocks<kWorld>(work, sums, largest, top_k, top_p, row, &known)) return false;
  if (top_k > 0 && !find_bound<kWorld>(work, logits, largest, top_k, top_p, false, 0, row)) {
    return false;
  }
  if (top_p < 1 && !find_bound<kWorld>(work, logits, largest, top_k, top_p, true, known, row)) {
    return false;
  }

  const auto listed = [&](int i) { return work.listed(i); };
  Candidate found;
  if (!drafted) {
    found = best_of(work, logits, listed, work.listed_count(), row, TargetWeights<true>{});
  } else {
    if (threadIdx.x == 0) work.shared.total = 0;
    __syncthreads();
    unsigned long long part = 0;
    for_listed(work, logits, [&](const float (&x)[kVector]) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if (x[i] >= row.bound) part += fixed(weight(x[i], largest, row.exponent));
      }
    });
    add_to_total(work, part);
    __syncthreads();
    unsigned long long mass = work.shared.total;
    if constexpr (kWorld > 1) {
      unsigned long long sum = 0;
      if (!exchange_packs<kWorld>(work, 1, pack_of(mass),
                                  [&](int, int, uint2 pack) { sum += word_of(pack); })) {
        return false;
      }
      if (threadIdx.x == 0) work.shared.total = sum;
      __syncthreads();
      mass = work.shared.total;
    }
    if (accepts(draft_logit, draft_probability, largest, row.bound, row.scale, mass, row.seed,
                row.position)) {
      found = {kAccepted, static_cast<int32_t>(draft), draft_logit, -infinity(), 0};
    } else {
      const ResidualWeights residual = {q, work.draws.columns, largest,
                                        static_cast<float>(kOne / static_cast<double>(mass))};
      found = replacement(work, logits, listed, work.listed_count(), row, residual);
    }
  }
  if (threadIdx.x == 0) *drawn = found;
  return true;
}

// The block: its share of the truncated rows. False: a failure.
template <class T, int kWorld>
__device__ inline bool draw_truncated_rows(Work& work) {
  for (int other = blockIdx.x; other < work.others; other += gridDim.x) {
    const int request = work.request_of_other(other);
    if (work.has_team(request)) continue;
    const int index = other - work.other_begin(request);
    if (!draw_truncated<T, kWorld>(work, request, index,
                                   work.drawn(work.shared.row_begin[request] + index))) {
      return false;
    }
    __syncthreads();
  }
  return true;
}

}  // namespace commfuse::gpu
