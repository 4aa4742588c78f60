// Candidates of plain rows: their blocks of tokens, dealt out evenly to the grid.
#pragma once

#include "vocab_parallel_sample/sample_scan.cuh"
#include "vocab_parallel_sample/sample_work.cuh"

namespace commfuse::gpu {

template <class T>
__device__ inline void scan_plain_rows(const Work& work) {
  int at = work.begin, row = work.begin / work.per_row,
      request = at < work.end ? work.request_of_plain(row) : 0;
  while (at < work.end) {
    const int round_row = row, round_request = request;
    int segments = 0, turn = 0;
    for (; segments < kSegments && at < work.end; ++segments) {
      while (work.shared.plain_begin[request + 1] <= row) ++request;
      const int index = work.plain_index(request, row);
      const int first = at - row * work.per_row;
      const int n = min(work.per_row - first, work.end - at);
      const RowOptions options = options_of(work.draws, work.draws.begin + request, index);
      const T* logits = work.logits_of<T>(request, index);
      const TargetWeights<false> weights;
      const Best best =
          work.draws.log_probabilities
              ? scan<T, true>(logits, work.draws.columns, first, n, turn, options, weights)
              : scan<T, false>(logits, work.draws.columns, first, n, turn, options, weights);
      if (work.lane == 0) work.shared.best[segments][work.warp] = best;
      turn += (n + 1) / 2;
      at += n;
      row += first + n == work.per_row;
    }
    __syncthreads();
    for (int segment = work.warp; segment < segments; segment += kSampleWarps) {
      const int own_row = round_row + segment;
      int own = round_request;
      while (work.shared.plain_begin[own + 1] <= own_row) ++own;
      const int index = work.plain_index(own, own_row);
      Best best = work.shared.best[segment][work.lane];
      best.reduce<true>(32);
      const RowOptions options = options_of(work.draws, work.draws.begin + own, index);
      const Candidate found =
          token_of(work.logits_of<T>(own, index), work.draws.columns, work.draws.vocab_begin, best,
                   options, TargetWeights<false>{});
      // Counted by rows and blocks, no two candidates have the same place.
      if (work.lane == 0) work.draws.candidates[own_row + blockIdx.x] = found;
    }
    __syncthreads();
  }
}

}  // namespace commfuse::gpu
