// Reduce-scatter between GPUs: chunk d of everybody goes to rank d, which adds in rank order. Small
// ones by flag-in-data lines, large ones in bulk.
#pragma once

#include "gpu/lines.cuh"
#include "gpu/units.cuh"

namespace commfuse::gpu {

// Chunk d begins at x + d * stride; n elements of each take part.
template <class T, int kWorld>
__global__ void __launch_bounds__(most_threads(kWorld))
    reduce_scatter_by_lines(const __grid_constant__ Workspace workspace,
                            const __grid_constant__ Announcement announcement, const T* x,
                            int64_t stride, T* out, int64_t n) {
  Exchange exchange(workspace, blockIdx.x, gridDim.x);
  wait_for_predecessor();
  if (!exchange.begin_block()) return;
  const int rank = exchange.rank(), world = exchange.world();
  const int64_t packs = (n + kPackElements<T> - 1) / kPackElements<T>;
  const int64_t first = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  const int64_t step = gridDim.x * int64_t{blockDim.x};
  const auto chunk = [&](int d) { return Row<const T>(x + d * stride, n); };

  for (int64_t i = first; i < packs; i += step) {
#pragma unroll
    for (int d = 0; d < kWorld; ++d) {
      if (d < world && d != rank) {
        put_line(exchange.lines(d, rank) + i * kLineStride, chunk(d).load(i), exchange.flag());
      }
    }
  }
  if (blockIdx.x == 0) exchange.announce_with_word(announcement);
  for (int64_t i = first; i < packs; i += step) {
    const uint2 own = chunk(rank).load(i);
    Line lines[kWorld];
    if (!take_from_peers<kWorld>(
            exchange, 0, [&](int s) { return exchange.lines(rank, s) + i * kLineStride; }, lines))
      return;
    Floats<T> sum = sum_of<T>(exchange, lines, own);
    Row<T>(out, n).store(i, sum.pack());
  }
  if (blockIdx.x == 0 && !exchange.await_words(announcement.tag)) return;
  exchange.finish();
}

template <class T, int kWorld>
__global__ void __launch_bounds__(most_threads(kWorld))
    reduce_scatter_in_bulk(const __grid_constant__ Workspace workspace,
                           const __grid_constant__ Announcement announcement, const T* x,
                           int64_t stride, T* out, int64_t n) {
  Exchange exchange(workspace, blockIdx.x, gridDim.x);
  wait_for_predecessor();
  if (!exchange.begin_block()) return;
  if (blockIdx.x == 0) exchange.announce(announcement);
  const int rank = exchange.rank(), world = exchange.world();
  constexpr int kElements = 16 / static_cast<int>(sizeof(T));
  const int64_t units = (n + kElements - 1) / kElements;
  const int64_t stretch = (units + gridDim.x - 1) / gridDim.x;
  const int64_t begin = blockIdx.x * stretch + threadIdx.x;
  const int64_t end = min(units, (blockIdx.x + 1) * stretch);
#pragma unroll
  for (int i = 0; i < kWorld; ++i) {
    if (i >= world) break;
    const int d = (rank + i) % world;
    const Units<const T> from(x + d * stride, n);
    uint4* slot = reinterpret_cast<uint4*>(exchange.slot(d, 0, rank));
#pragma unroll 4
    for (int64_t j = begin; j < end; j += blockDim.x) slot[j] = from.load(j);
  }
  exchange.publish(0, announcement.tag);
  if (!exchange.await(0, announcement.tag)) return;
#pragma unroll 2
  for (int64_t j = begin; j < end; j += blockDim.x) {
    UnitSum<T, kWorld> sum;
    sum.load(world,
             [&](int s) { return reinterpret_cast<const uint4*>(exchange.slot(rank, 0, s)) + j; });
    Units<T>(out, n).store(j, sum.total(world));
  }
  exchange.finish();
}

}  // namespace commfuse::gpu
