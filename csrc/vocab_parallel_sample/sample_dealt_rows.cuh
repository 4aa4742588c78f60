// The first pass over all rows, their blocks of tokens dealt out evenly to the grid: candidates of
// plain rows, and sums of the others' blocks of tokens.
#pragma once

#include "vocab_parallel_sample/sample_scan.cuh"
#include "vocab_parallel_sample/sample_work.cuh"

namespace commfuse::gpu {

template <class T>
__device__ inline void scan_rows(const Work& work) {
  const TargetWeights<false> weights;
  int at = work.begin, row = work.begin / work.per_row,
      request = at < work.end ? work.request_of_row(row) : 0;
  while (at < work.end) {
    const int round_row = row, round_request = request;
    int segments = 0, turn = 0;
    for (; segments < kSegments && at < work.end; ++segments) {
      while (work.shared.row_begin[request + 1] <= row) ++request;
      const int index = row - work.shared.row_begin[request];
      const Consecutive blocks = {at - row * work.per_row};
      const int n = min(work.per_row - blocks.first, work.end - at);
      const auto options = [&] {
        return options_of(work.draws, work.draws.begin + request, index);
      };
      const T* logits = work.logits_of<T>(request, index);
      BlockSum* sums = index < work.other_rows(request) ? work.sums_of(row) : nullptr;
      const int64_t columns = work.draws.columns;
      const Best best =
          work.draws.log_probabilities
              ? scan<T, true>(logits, columns, blocks, n, turn, options, weights, sums)
              : scan<T, false>(logits, columns, blocks, n, turn, options, weights, sums);
      if (work.lane == 0) work.shared.best[segments][work.warp] = best;
      turn += (n + 1) / 2;
      at += n;
      row += blocks.first + n == work.per_row;
    }
    __syncthreads();
    for (int segment = work.warp; segment < segments; segment += kSampleWarps) {
      const int own_row = round_row + segment;
      int own = round_request;
      while (work.shared.row_begin[own + 1] <= own_row) ++own;
      const int index = own_row - work.shared.row_begin[own];
      Best best = work.shared.best[segment][work.lane];
      best.reduce<true>(32);
      const RowOptions options = options_of(work.draws, work.draws.begin + own, index);
      const Candidate found = token_of(work.logits_of<T>(own, index), work.draws.columns,
                                       work.draws.vocab_begin, best, options, weights);
      if (work.lane == 0) *work.scanned(own_row, blockIdx.x) = found;
    }
    __syncthreads();
  }
}

}  // namespace commfuse::gpu
