// Drawing tokens from vocabulary shards in one launch, the exchange between ranks included. What is
// drawn is that of sample.h: per block of 128 tokens log(sum of weights) - log(exponential noise),
// the largest of all blocks, then a draw by weight inside that block.
//
//   plain rows      whose candidates can be found in one pass over the logits. Their blocks of
//                   tokens are dealt out evenly to the grid, whatever rows they belong to; every
//                   block of threads keeps the best candidate of each row that it sees.
//   other rows      truncated by top-k or top-p, or drafted from a distribution: several passes,
//                   and an exchange behind most of them. A row has a block of threads to itself.
//   finishing       who adds the last of a request's candidates takes the best of each row,
//                   exchanges those of plain rows with the peers, and accepts drafts.
//
// No block waits for a peer before it has computed all that others may wait for: first the plain
// rows' candidates, then other rows, which all ranks take in the same order, then finishing.
#pragma once

#include "vocab_parallel_sample/sample_finish.cuh"
#include "vocab_parallel_sample/sample_other_rows.cuh"
#include "vocab_parallel_sample/sample_plain_rows.cuh"

namespace commfuse::gpu {

template <class T, int kWorld>
__global__ void __launch_bounds__(kSampleThreads, 1)
    sample_kernel(const __grid_constant__ Workspace workspace,
                  const __grid_constant__ Announcement announcement,
                  const __grid_constant__ Draws draws) {
  __shared__ Shared shared;
  Exchange exchange(workspace, blockIdx.x, gridDim.x);
  wait_for_predecessor();
  if constexpr (kWorld > 1) {
    if (!exchange.begin_block()) return;
    if (blockIdx.x == 0) exchange.announce_with_word(announcement);
  }
  Work work(draws, workspace, exchange, shared);
  work.find_rows();
  scan_plain_rows<T>(work);
  if constexpr (kWorld > 1) {
    // Before anything is awaited that a peer which calls something else may never send.
    if (blockIdx.x == 0 && __syncthreads_or(!exchange.await_words(announcement.tag))) return;
  }
  if (!draw_other_rows<T, kWorld>(work)) return;
  const bool good = finish_requests<kWorld>(work);
  if constexpr (kWorld > 1) {
    if (__syncthreads_or(!good)) return;
    exchange.finish();
  }
}

}  // namespace commfuse::gpu
