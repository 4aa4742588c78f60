// Drawing tokens from vocabulary shards in one launch, the exchange between ranks included. What is
// drawn is that of sample.h: per block of 128 tokens log(sum of weights) - log(exponential noise),
// the largest of all blocks, then a draw by weight inside that block.
//
//   first pass      blocks of tokens of all rows are dealt out evenly to the grid. Of plain rows,
//                   greedy ones and those drawn from the whole target, every block of threads
//                   keeps the best candidate that it sees; of the others the sums of each block of
//                   tokens, which all blocks of threads wait for.
//   truncated rows  by top-k or top-p: a block of threads each, which looks again at the few blocks
//                   of tokens that can hold what is drawn. Ranks exchange behind most steps.
//   drafts          from distributions: a team of blocks of threads for each request.
//   finishing       who adds the last of a request's candidates takes the best of each row,
//                   exchanges it with the peers, and accepts drafts.
//
// No block waits for a peer before it has computed all that others may wait for: first its share of
// the first pass, then truncated rows and drafts, which all ranks take in the same order, then
// finishing.
#pragma once

#include "vocab_parallel_sample/sample_dealt_rows.cuh"
#include "vocab_parallel_sample/sample_drafted_rows.cuh"
#include "vocab_parallel_sample/sample_finish.cuh"

namespace commfuse::gpu {

template <class T, int kWorld>
__global__ void __launch_bounds__(kSampleThreads, 1)
    sample_kernel(const __grid_constant__ Workspace workspace,
                  const __grid_constant__ Announcement announcement,
                  const __grid_constant__ Draws draws) {
  __shared__ Shared shared;
  Exchange exchange(workspace, blockIdx.x, gridDim.x);
  wait_for_predecessor();
  Work work(draws, workspace, exchange, shared);
  const RequestRows requests = work.read_requests<T>();
  if constexpr (kWorld > 1) {
    if (!exchange.begin_block()) return;
    if (blockIdx.x == 0) exchange.announce_with_word(announcement);
  } else {
    exchange.begin();  // alone, nobody fails
  }
  work.find_rows(requests);
  scan_rows<T>(work);
  if (work.others > 0 && !exchange.meet([] { __syncthreads(); }, &shared.met)) return;
  if constexpr (kWorld > 1) {
    // Before anything is awaited that a peer which calls something else may never send.
    if (blockIdx.x == 0 && __syncthreads_or(!exchange.await_words(announcement.tag))) return;
  }
  if (work.others > 0) {
    if (!draw_truncated_rows<T, kWorld>(work) || !judge_all_drafts<T, kWorld>(work)) return;
  }
  const bool good = finish_requests<kWorld>(work);
  if (kWorld > 1 && __syncthreads_or(!good)) return;
  exchange.finish();
}

}  // namespace commfuse::gpu
