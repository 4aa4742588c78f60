// The first pass over all rows, their blocks of tokens dealt out evenly to the grid: candidates of
// plain rows, and sums of the others' blocks of tokens.
#pragma once

#include "vocab_parallel_sample/sample_scan.cuh"
#include "vocab_parallel_sample/sample_work.cuh"

namespace commfuse::gpu {

// A row's part of a block's share.
struct Segment {
  int request, row;
  int first, n;  // blocks of tokens

  // The one that begins `at` the at-th of all blocks of tokens; `request` is this one or an earlier
  // one.
  __device__ Segment(const Work& work, int at, int request) : request(request) {
    row = at / work.per_row;
    first = at - row * work.per_row;
    n = min(work.per_row - first, work.end - at);
    while (work.shared.row_begin[this->request + 1] <= row) ++this->request;
  }
  __device__ int index(const Work& work) const { return row - work.shared.row_begin[request]; }
};

template <class T>
__device__ inline void scan_rows(const Work& work) {
  if (work.begin == work.end) return;
  const TargetWeights<false> weights;
  const int64_t columns = work.draws.columns;
  Segment next(work, work.begin, work.request_of_row(work.begin / work.per_row));
  Ahead<T> ahead;
  int at = work.begin, turn = 0;
  const auto fetch = [&] {
    ahead.fetch(work.logits_of<T>(next.request, next.index(work)), columns, Consecutive{next.first},
                next.n, first_step(turn));
  };
  fetch();
  while (at < work.end) {
    const Segment round = next;
    int segments = 0;
    for (; segments < kSegments && at < work.end; ++segments) {
      const Segment own = next;
      const int index = own.index(work), j = first_step(turn);
      at += own.n;
      turn += (own.n + 1) / 2;
      const auto go_on = [&] {
        if (at == work.end) return;
        next = Segment(work, at, own.request);
        fetch();
      };
      const RowOptions row = options_of(work.draws, work.draws.begin + own.request, index);
      const T* logits = work.logits_of<T>(own.request, index);
      BlockSum* sums = index < work.other_rows(own.request) ? work.sums_of(own.row) : nullptr;
      const Consecutive blocks = {own.first};
      const Best best =
          work.draws.log_probabilities
              ? scan<T, true>(logits, columns, blocks, own.n, j, ahead, row, weights, sums, go_on)
              : scan<T, false>(logits, columns, blocks, own.n, j, ahead, row, weights, sums, go_on);
      if (work.lane == 0) work.shared.best[segments][work.warp] = best;
    }
    __syncthreads();
    for (int segment = work.warp; segment < segments; segment += kSampleWarps) {
      const int row = round.row + segment;
      int request = round.request;
      while (work.shared.row_begin[request + 1] <= row) ++request;
      const int index = row - work.shared.row_begin[request];
      Best best = work.shared.best[segment][work.lane];
      if (work.draws.log_probabilities) {
        best.reduce<true>(32);
      } else {
        best.reduce<false>(32);
      }
      const RowOptions options = options_of(work.draws, work.draws.begin + request, index);
      const Candidate found = token_of(work.logits_of<T>(request, index), columns,
                                       work.draws.vocab_begin, best, options, weights);
      if (work.lane == 0) *work.scanned(row, blockIdx.x) = found;
    }
    __syncthreads();
  }
}

}  // namespace commfuse::gpu
