// Reduce-scatter between GPUs: chunk d of everybody goes to rank d, which adds in rank order. Small
// ones by flag-in-data lines, large ones in bulk.
#pragma once

#include "gpu/lines.cuh"
#include "gpu/units.cuh"

namespace commfuse::gpu {

// Chunk d begins at x + d * stride; n elements of each take part.
template <class T, int kWorld>
__global__ void __launch_bounds__(kLineThreads)
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

  // All loads before the first store: the compiler moves none across it.
  uint2 mine = {0, 0};
  for (int64_t i = first; i < packs; i += step) {
    uint2 pack[kWorld];
#pragma unroll
    for (int d = 0; d < kWorld; ++d) {
      if (d < world) pack[d] = chunk(d).load(i);
    }
#pragma unroll
    for (int d = 0; d < kWorld; ++d) {
      if (d < world && d != rank) {
        put_line(exchange.lines(d, rank) + i * kLineStride, pack[d], exchange.flag());
      }
      if (d == rank && i == first) mine = pack[d];
    }
  }
  if (blockIdx.x == 0) exchange.announce_with_word(announcement);
  for (int64_t i = first; i < packs; i += step) {
    const uint2 own = i == first ? mine : chunk(rank).load(i);
    Line lines[kWorld];
    if (!take_from_peers<kWorld>(
            exchange, 0, [&](int s) { return exchange.lines(rank, s) + i * kLineStride; }, lines))
      return;
    Floats<T> sum = sum_of<T, kWorld>(exchange, lines, own);
    Row<T>(out, n).store(i, sum.pack());
  }
  if (blockIdx.x == 0 && !exchange.await_words(announcement.tag)) return;
  exchange.finish();
}

template <class T, int kWorld>
__global__ void __launch_bounds__(kBulkThreads, 2)
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
  const auto chunk = [&](int d) { return Units<const T>(x + d * stride, n); };
  const auto place = [&](int owner, int source) {
    return reinterpret_cast<uint4*>(exchange.slot(owner, 0, source));
  };
  move_units<kWorld>(
      begin, end, world, rank, [&](int d, int64_t j) { return chunk(d).load(j); },
      [&](int d, int64_t j, uint4 unit) { place(d, rank)[j] = unit; });
  exchange.publish(0, announcement.tag);
  if (!exchange.await(0, announcement.tag)) return;
  add_units<T, kWorld>(
      begin, end, world,
      [&](int s, int64_t j) {
        return s == rank ? chunk(rank).load(j) : __ldcg(place(rank, s) + j);
      },
      false, [](int64_t) { return uint4{}; },
      [&](int64_t j, uint4 total) { Units<T>(out, n).store(j, total); });
  exchange.finish();
}

}  // namespace commfuse::gpu
