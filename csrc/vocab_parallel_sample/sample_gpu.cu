#include "vocab_parallel_sample/sample_gpu.h"

#include "gpu/launch.cuh"
#include "vocab_parallel_sample/sample_gpu.cuh"

namespace commfuse::gpu {
namespace {

// f<kWorld>(): alone, nothing is exchanged; the lines of many ranks cost few ranks nothing.
template <class F>
void with_peers(bool alone, F f) {
  if (alone) return f.template operator()<1>();
  f.template operator()<kMaxRanks>();
}

}  // namespace

int64_t sample_row_capacity() { return (kLineBytes - kPlainOffset) / (kUnitsWithLogs * 8); }
int64_t sample_request_capacity() { return kMaxRequests; }

void sample(const CallSite& site, DType dtype, const Draws& draws) {
  // The same grid on all ranks, also where their shards are not alike: rows that take several
  // rounds are exchanged between blocks of the same number.
  const Grid grid = {site.max_blocks, kSampleThreads, site.stream};
  with_type(dtype, [&]<class T>() {
    with_peers(site.workspace.world == 1, [&]<int kWorld>() {
      launch(sample_kernel<T, kWorld>, grid, site.workspace, Announcement(site.descriptor), draws);
    });
  });
}

void load_sample() {
  for (DType dtype : {DType::bfloat16, DType::float16, DType::float32}) {
    with_type(dtype, [&]<class T>() {
      for (bool alone : {true, false}) {
        with_peers(alone, [&]<int kWorld>() { load(sample_kernel<T, kWorld>); });
      }
    });
  }
}

}  // namespace commfuse::gpu
