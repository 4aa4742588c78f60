// All-reduce between GPUs, in four ways:
//
//   one-shot by lines   every rank sends everybody its message, everybody adds: one hop
//   two-shot by lines   part d of everybody goes to rank d, which adds and sends the sum: two hops
//   two-shot in bulk    the same through slots and words, whose bytes are the message's own
//   in place            x lies in memory that all ranks map: rank d reads part d of everybody's x
//                       and writes the sum into everybody's x, between two barriers. Nobody else
//                       touches part d, and nothing is staged.
//
// Every sum is formed in float32 in rank order, + a residual (null, or equal on all ranks), and
// rounded once.
#pragma once

#include "gpu/lines.cuh"
#include "gpu/units.cuh"

namespace commfuse::gpu {

// One-shot. The threads of all blocks deal out the packs; each sends its packs and adds what comes.
template <class T, int kWorld>
__global__ void __launch_bounds__(1024)
    all_reduce_one_shot(const __grid_constant__ Workspace workspace,
                        const __grid_constant__ Announcement announcement, const T* x,
                        const T* residual, T* out, int64_t n) {
  Exchange exchange(workspace, blockIdx.x, gridDim.x);
  wait_for_predecessor();
  const Row<const T> from(x, n), addend(residual, n);
  const Row<T> to(out, n);
  const int64_t packs = (n + kPackElements<T> - 1) / kPackElements<T>;
  const int64_t first = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  const int64_t stride = gridDim.x * int64_t{blockDim.x};
  uint2 mine = {0, 0};
  if (first < packs) mine = from.load(first);
  if (!exchange.begin_block()) return;
  const int rank = exchange.rank(), world = exchange.world();

  for (int64_t i = first; i < packs; i += stride) {
    const uint2 pack = i == first ? mine : from.load(i);
#pragma unroll
    for (int p = 0; p < kWorld; ++p) {
      if (p < world && p != rank) {
        put_line(exchange.lines(p, rank) + i * kLineStride, pack, exchange.flag());
      }
    }
  }
  if (blockIdx.x == 0) exchange.announce_with_word(announcement);
  for (int64_t i = first; i < packs; i += stride) {
    const uint2 own = i == first ? mine : from.load(i);
    uint2 more = {0, 0};
    if (residual) more = addend.load(i);
    Line lines[kWorld];
    if (!take_from_peers<kWorld>(
            exchange, 0, [&](int s) { return exchange.lines(rank, s) + i * kLineStride; }, lines))
      return;
    Floats<T> sum = sum_of<T>(exchange, lines, own);
    if (residual) sum.add(more);
    to.store(i, sum.pack());
  }
  if (blockIdx.x == 0 && !exchange.await_words(announcement.tag)) return;
  exchange.finish();
}

// Two-shot by lines. Pack d * part + j belongs to part d; one thread handles pack j of all parts.
template <class T, int kWorld>
__global__ void __launch_bounds__(1024)
    all_reduce_two_shot(const __grid_constant__ Workspace workspace,
                        const __grid_constant__ Announcement announcement, const T* x,
                        const T* residual, T* out, int64_t n) {
  Exchange exchange(workspace, blockIdx.x, gridDim.x);
  wait_for_predecessor();
  if (!exchange.begin_block()) return;
  const int rank = exchange.rank(), world = exchange.world();
  const Row<const T> from(x, n), addend(residual, n);
  const Row<T> to(out, n);
  const int64_t packs = (n + kPackElements<T> - 1) / kPackElements<T>;
  const int64_t part = (packs + world - 1) / world;
  const int64_t first = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  const int64_t stride = gridDim.x * int64_t{blockDim.x};

  for (int64_t j = first; j < part; j += stride) {
#pragma unroll
    for (int d = 0; d < kWorld; ++d) {
      if (d < world && d != rank) {
        put_line(exchange.lines(d, rank) + j * kLineStride, from.load(d * part + j),
                 exchange.flag());
      }
    }
  }
  if (blockIdx.x == 0) exchange.announce_with_word(announcement);
  for (int64_t j = first; j < part; j += stride) {
    const uint2 own = from.load(rank * part + j);
    uint2 more = {0, 0};
    if (residual) more = addend.load(rank * part + j);
    Line lines[kWorld];
    if (!take_from_peers<kWorld>(
            exchange, 0, [&](int s) { return exchange.lines(rank, s) + j * kLineStride; }, lines))
      return;
    Floats<T> sum = sum_of<T>(exchange, lines, own);
    if (residual) sum.add(more);
    const uint2 total = sum.pack();
#pragma unroll
    for (int p = 0; p < kWorld; ++p) {
      if (p < world && p != rank) {
        put_line(exchange.lines(p, rank) + (part + j) * kLineStride, total, exchange.flag());
      }
    }
    to.store(rank * part + j, total);
  }
  for (int64_t j = first; j < part; j += stride) {
    Line lines[kWorld];
    if (!take_from_peers<kWorld>(
            exchange, 1, [&](int d) { return exchange.lines(rank, d) + (part + j) * kLineStride; },
            lines))
      return;
#pragma unroll
    for (int d = 0; d < kWorld; ++d) {
      if (d < world && d != rank) to.store(d * part + j, lines[d].pack());
    }
  }
  if (blockIdx.x == 0 && !exchange.await_words(announcement.tag)) return;
  exchange.finish();
}

// Two-shot in bulk. A block handles the same stretch of every part, so that its words and those of
// the blocks of its number are all it needs.
template <class T, int kWorld>
__global__ void __launch_bounds__(512)
    all_reduce_bulk(const __grid_constant__ Workspace workspace,
                    const __grid_constant__ Announcement announcement, const T* x,
                    const T* residual, T* out, int64_t n) {
  Exchange exchange(workspace, blockIdx.x, gridDim.x);
  wait_for_predecessor();
  if (!exchange.begin_block()) return;
  if (blockIdx.x == 0) exchange.announce(announcement);
  const int rank = exchange.rank(), world = exchange.world();
  const Units<const T> from(x, n), addend(residual, n);
  const Units<T> to(out, n);
  constexpr int kElements = 16 / static_cast<int>(sizeof(T));
  const int64_t part = ((n + kElements - 1) / kElements + world - 1) / world;
  const int64_t stretch = (part + gridDim.x - 1) / gridDim.x;
  const int64_t begin = blockIdx.x * stretch + threadIdx.x;
  const int64_t end = min(part, (blockIdx.x + 1) * stretch);
  const auto place = [&](int owner, int phase, int source) {
    return reinterpret_cast<uint4*>(exchange.slot(owner, phase, source));
  };

#pragma unroll
  for (int i = 0; i < kWorld; ++i) {
    // Each rank begins with another peer, so that no memory has to take all ranks' stores at once.
    const int d = (rank + i) % world;
    if (i >= world) break;
    uint4* slot = place(d, 0, rank);
#pragma unroll 4
    for (int64_t j = begin; j < end; j += blockDim.x) slot[j] = from.load(d * part + j);
  }
  exchange.publish(0, announcement.tag);
  if (!exchange.await(0, announcement.tag)) return;

#pragma unroll 2
  for (int64_t j = begin; j < end; j += blockDim.x) {
    UnitSum<T, kWorld> sum;
    sum.load(world, [&](int s) { return place(rank, 0, s) + j; });
    uint4 more;
    if (residual) more = addend.load(rank * part + j);
    const uint4 total = sum.total(world, residual ? &more : nullptr);
#pragma unroll
    for (int p = 0; p < kWorld; ++p) {
      if (p < world && p != rank) place(p, 1, rank)[j] = total;
    }
    to.store(rank * part + j, total);
  }
  exchange.publish(1, announcement.tag);
  if (!exchange.await(1, announcement.tag)) return;

#pragma unroll
  for (int d = 0; d < kWorld; ++d) {
    if (d >= world || d == rank) continue;
    const uint4* slot = place(rank, 1, d);
#pragma unroll 4
    for (int64_t j = begin; j < end; j += blockDim.x) to.store(d * part + j, __ldcg(slot + j));
  }
  exchange.finish();
}

struct PeerTensor {
  void* data[kMaxRanks];  // the same tensor on every rank, as this rank maps it
};

// In place; n elements are whole units, aligned to 16 bytes. The words of phase 1 are the barrier
// that a tensor read in place needs: nobody writes to it again before all have read.
template <class T, int kWorld>
__global__ void __launch_bounds__(512)
    all_reduce_in_place(const __grid_constant__ Workspace workspace,
                        const __grid_constant__ Announcement announcement,
                        const __grid_constant__ PeerTensor x, int64_t n) {
  Exchange exchange(workspace, blockIdx.x, gridDim.x);
  wait_for_predecessor();
  if (!exchange.begin_block()) return;
  if (blockIdx.x == 0) exchange.announce(announcement);
  exchange.publish(0, announcement.tag);
  const int rank = exchange.rank(), world = exchange.world();
  constexpr int kElements = 16 / static_cast<int>(sizeof(T));
  const int64_t units = n / kElements, part = (units + world - 1) / world;
  const int64_t stretch = (part + gridDim.x - 1) / gridDim.x;
  const int64_t base = rank * part;
  const int64_t begin = base + blockIdx.x * stretch + threadIdx.x;
  const int64_t end = min(units, base + min(part, (blockIdx.x + 1) * stretch));
  if (!exchange.await(0, announcement.tag)) return;

#pragma unroll 2
  for (int64_t j = begin; j < end; j += blockDim.x) {
    UnitSum<T, kWorld> sum;
    sum.load(world, [&](int s) { return reinterpret_cast<const uint4*>(x.data[s]) + j; });
    const uint4 total = sum.total(world);
#pragma unroll
    for (int i = 0; i < kWorld; ++i) {
      if (i < world) reinterpret_cast<uint4*>(x.data[i])[j] = total;
    }
  }
  exchange.publish(1, announcement.tag);
  if (!exchange.await(1, announcement.tag)) return;
  exchange.finish();
}

}  // namespace commfuse::gpu
