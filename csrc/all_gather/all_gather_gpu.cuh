// All-gather between GPUs: everybody sends its message to everybody. Small ones by flag-in-data
// lines, large ones in bulk. Nothing is computed: bytes, whatever they stand for.
#pragma once

#include "gpu/lines.cuh"
#include "gpu/units.cuh"

namespace commfuse::gpu {

// The message of rank r goes to out + r * stride. T has the elements' size: their alignment is all
// that is known of it.
template <class T, int kWorld>
__global__ void __launch_bounds__(most_threads(kWorld))
    all_gather_by_lines(const __grid_constant__ Workspace workspace,
                        const __grid_constant__ Announcement announcement, const T* x, T* out,
                        int64_t stride, int64_t n) {
  Exchange exchange(workspace, blockIdx.x, gridDim.x);
  wait_for_predecessor();
  if (!exchange.begin_block()) return;
  const int rank = exchange.rank(), world = exchange.world();
  const Row<const T> from(x, n);
  const int64_t packs = (n + kPackElements<T> - 1) / kPackElements<T>;
  const int64_t first = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  const int64_t step = gridDim.x * int64_t{blockDim.x};
  for (int64_t i = first; i < packs; i += step) {
    const uint2 pack = from.load(i);
#pragma unroll
    for (int p = 0; p < kWorld; ++p) {
      if (p < world && p != rank) {
        put_line(exchange.lines(p, rank) + i * kLineStride, pack, exchange.flag());
      }
    }
    Row<T>(out + rank * stride, n).store(i, pack);
  }
  if (blockIdx.x == 0) exchange.announce_with_word(announcement);
  for (int64_t i = first; i < packs; i += step) {
    Line lines[kWorld];
    if (!take_from_peers<kWorld>(
            exchange, 0, [&](int s) { return exchange.lines(rank, s) + i * kLineStride; }, lines))
      return;
#pragma unroll
    for (int s = 0; s < kWorld; ++s) {
      if (s < world && s != rank) Row<T>(out + s * stride, n).store(i, lines[s].pack());
    }
  }
  if (blockIdx.x == 0 && !exchange.await_words(announcement.tag)) return;
  exchange.finish();
}

template <class T, int kWorld>
__global__ void __launch_bounds__(most_threads(kWorld))
    all_gather_in_bulk(const __grid_constant__ Workspace workspace,
                       const __grid_constant__ Announcement announcement, const T* x, T* out,
                       int64_t stride, int64_t n) {
  Exchange exchange(workspace, blockIdx.x, gridDim.x);
  wait_for_predecessor();
  if (!exchange.begin_block()) return;
  if (blockIdx.x == 0) exchange.announce(announcement);
  const int rank = exchange.rank(), world = exchange.world();
  const Units<const T> from(x, n);
  constexpr int kElements = 16 / static_cast<int>(sizeof(T));
  const int64_t units = (n + kElements - 1) / kElements;
  const int64_t stretch = (units + gridDim.x - 1) / gridDim.x;
  const int64_t begin = blockIdx.x * stretch + threadIdx.x;
  const int64_t end = min(units, (blockIdx.x + 1) * stretch);
#pragma unroll 2
  for (int64_t j = begin; j < end; j += blockDim.x) {
    const uint4 unit = from.load(j);
#pragma unroll
    for (int p = 0; p < kWorld; ++p) {
      if (p < world && p != rank) {
        reinterpret_cast<uint4*>(exchange.slot(p, 0, rank))[j] = unit;
      }
    }
    Units<T>(out + rank * stride, n).store(j, unit);
  }
  exchange.publish(0, announcement.tag);
  if (!exchange.await(0, announcement.tag)) return;
#pragma unroll
  for (int s = 0; s < kWorld; ++s) {
    if (s >= world || s == rank) continue;
    const uint4* slot = reinterpret_cast<const uint4*>(exchange.slot(rank, 0, s));
    const Units<T> to(out + s * stride, n);
#pragma unroll 4
    for (int64_t j = begin; j < end; j += blockDim.x) to.store(j, __ldcg(slot + j));
  }
  exchange.finish();
}

}  // namespace commfuse::gpu
