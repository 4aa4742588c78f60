// Rows that take several passes: truncated ones, and those with a draft from a distribution.
#pragma once

#include "vocab_parallel_sample/sample_scan.cuh"
#include "vocab_parallel_sample/sample_truncation.cuh"

namespace commfuse::gpu {

// The block: the best of all ranks' candidates for a row. False: a failure.
template <int kWorld, class T, class Weights>
__device__ __noinline__ inline bool choose(Work& work, const T* logits, const RowOptions& row,
                                           const Weights& weights, Candidate* winner) {
  Best best = scan<T, false>(logits, work.draws.columns, 0, work.per_row, 0, row, weights);
  __syncthreads();  // nobody still reads what the last row's warps have found
  if (work.lane == 0) work.shared.best[0][work.warp] = best;
  __syncthreads();
  Candidate own = {kNoKey, kNobody, -infinity(), 0, 0};
  if (work.warp == 0) {
    best = work.shared.best[0][work.lane];
    best.reduce<false>(32);
    own = token_of(logits, work.draws.columns, work.draws.vocab_begin, best, row, weights);
  }
  const uint2 packs[2] = {pack_of(own.key),
                          {static_cast<uint32_t>(own.id), __float_as_uint(own.logit)}};
  if (!exchange_packs<kWorld>(work, 2, packs[threadIdx.x & 1], [&](int t, int source, uint2 pack) {
        work.shared.packs[source][t] = pack;
      })) {
    return false;
  }
  *winner = {kNoKey, kNobody, -infinity(), 0, 0};
  for (int source = 0; source < (kWorld == 1 ? 1 : work.exchange.world()); ++source) {
    const double key = __longlong_as_double(word_of(work.shared.packs[source][0]));
    const int32_t id = static_cast<int32_t>(work.shared.packs[source][1].x);
    if (!replaces(key, id, winner->key, winner->id)) continue;
    winner->key = key;
    winner->id = id;
    winner->logit = __uint_as_float(work.shared.packs[source][1].y);
  }
  return true;
}

// The block: one row that takes several passes; its token goes to shared.winner.
template <class T, int kWorld>
__device__ __noinline__ inline bool draw_row(Work& work, int request, int index) {
  const int64_t global = work.draws.begin + request;
  const Kind kind(work.draws, global);
  const T* logits = work.logits_of<T>(request, index);
  RowOptions row = options_of(work.draws, global, index);
  const bool drafted = kind.distributed && index < work.rows(request) - 1;
  int64_t draft = -1;
  const float* q = nullptr;
  if (drafted) {
    draft = work.draws.drafts[global * work.draws.longest + index];
    // Every request before this one has one row more than drafts.
    const int64_t at =
        int64_t{work.shared.rows_before} + work.shared.row_begin[request] + index - global;
    q = work.draws.draft_probabilities +
        (at < work.draws.draft_rows ? at : work.draws.draft_rows - 1) * work.draws.columns;
  }

  float largest = -infinity();
  for_logits(work, logits,
             [&](const float (&x)[kVector]) { largest = max_or_nan(largest, largest_of(x)); });
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
  {
    const uint2 packs[2] = {{__float_as_uint(largest), __float_as_uint(draft_logit)},
                            {__float_as_uint(draft_probability), 0}};
    if (!exchange_packs<kWorld>(
            work, 2, packs[threadIdx.x & 1],
            [&](int t, int source, uint2 pack) { work.shared.packs[source][t] = pack; })) {
      return false;
    }
    for (int source = 0; source < (kWorld == 1 ? 1 : work.exchange.world()); ++source) {
      largest = max_or_nan(largest, __uint_as_float(work.shared.packs[source][0].x));
      draft_logit = max_or_nan(draft_logit, __uint_as_float(work.shared.packs[source][0].y));
      draft_probability =
          max_or_nan(draft_probability, __uint_as_float(work.shared.packs[source][1].x));
    }
  }
  Candidate winner = {largest, kNobody, -infinity(), 0, 0};
  if (!is_finite(largest)) {
    if (threadIdx.x == 0) work.shared.winner = winner;
    __syncthreads();
    return true;
  }

  const int64_t top_k = work.draws.top_k[global];
  const double top_p = work.draws.top_p[global];
  if (top_k > 0 && !find_bound<kWorld>(work, logits, largest, top_k, top_p, false, row))
    return false;
  if (top_p < 1 && !find_bound<kWorld>(work, logits, largest, top_k, top_p, true, row))
    return false;

  unsigned long long mass = 0;
  bool accepted = false;
  if (drafted) {
    if (threadIdx.x == 0) work.shared.total = 0;
    __syncthreads();
    unsigned long long part = 0;
    for_logits(work, logits, [&](const float (&x)[kVector]) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if (x[i] >= row.bound) part += fixed(weight(x[i], largest, row.exponent));
      }
    });
    add_to_total(work, part);
    __syncthreads();
    const unsigned long long own_mass = work.shared.total;
    unsigned long long sum = 0;
    if (!exchange_packs<kWorld>(work, 1, pack_of(own_mass),
                                [&](int, int, uint2 pack) { sum += word_of(pack); })) {
      return false;
    }
    if (threadIdx.x == 0) work.shared.total = sum;
    __syncthreads();
    mass = work.shared.total;
    accepted = accepts(draft_logit, draft_probability, largest, row.bound, row.scale, mass,
                       row.seed, row.position);
  }

  if (!accepted) {
    const ResidualWeights residual = {q, work.draws.columns, largest,
                                      static_cast<float>(kOne / static_cast<double>(mass))};
    if (!(drafted ? choose<kWorld>(work, logits, row, residual, &winner)
                  : choose<kWorld>(work, logits, row, TargetWeights<true>{}, &winner))) {
      return false;
    }
    if (drafted && winner.key != winner.key && threadIdx.x == 0) {
      work.report(global, index, RowProblem::draft_nan);
    }
    // Where the target has nothing above the draft's distribution the two are the same, and the
    // draft was refused by rounding, or because it is no token.
    if (drafted && winner.key == kNoKey &&
        !choose<kWorld>(work, logits, row, TargetWeights<true>{}, &winner)) {
      return false;
    }
  }
  if (accepted) winner = {0, static_cast<int32_t>(draft), draft_logit, 0, 0};

  if (work.draws.log_probabilities) {
    // Lanes and warps add in a fixed order; ranks in theirs.
    Best sum = {kNoKey, kNobody, largest, 0};
    for_logits(work, logits, [&](const float (&x)[kVector]) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) sum.sum += weight(x[i], largest, kLog2E);
    });
    sum.reduce<true>(32);
    __syncthreads();
    if (work.lane == 0) work.shared.best[0][work.warp] = sum;
    __syncthreads();
    sum = work.shared.best[0][work.lane];
    sum.reduce<true>(32);
    double all = 0;
    if (!exchange_packs<kWorld>(work, 1, pack_of(double{sum.sum}), [&](int, int, uint2 pack) {
          all += __longlong_as_double(word_of(pack));
        })) {
      return false;
    }
    winner.largest = largest;
    winner.sum = static_cast<float>(all);
  }
  if (threadIdx.x == 0) work.shared.winner = winner;
  __syncthreads();
  return true;
}

// The block: other rows, its share of them. False: a failure.
template <class T, int kWorld>
__device__ inline bool draw_other_rows(Work& work) {
  for (int other = blockIdx.x; other < work.others; other += gridDim.x) {
    const int request = work.request_of_other(other);
    if (!draw_row<T, kWorld>(work, request, other - work.other_begin(request))) return false;
    if (threadIdx.x == 0)
      work.draws.candidates[work.plain + gridDim.x + other] = work.shared.winner;
    __syncthreads();
  }
  return true;
}

}  // namespace commfuse::gpu
