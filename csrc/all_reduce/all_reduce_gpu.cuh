// All-reduce between GPUs, in three ways:
//
//   one-shot by lines   every rank sends everybody its message, everybody adds: one hop
//   two-shot by lines   part d of everybody goes to rank d, which adds and sends the sum: two hops
//   in bulk             the message lies in memory that all ranks map: rank d reads part d of
//                       everybody's and writes the sum over it, between two barriers. Nobody else
//                       touches part d. A message that lies elsewhere is staged.
//
// Every sum is formed in float32 in rank order, + a residual (null, or equal on all ranks), and
// rounded once.
#pragma once

#include "gpu/lines.cuh"
#include "gpu/units.cuh"

namespace commfuse::gpu {

// One-shot. The threads of all blocks deal out the packs; each sends its packs and adds what comes.
template <class T, int kWorld>
__global__ void __launch_bounds__(most_threads(kWorld), 2)
    all_reduce_one_shot(const __grid_constant__ Workspace workspace,
                        const __grid_constant__ Announcement announcement, const T* x,
                        const T* residual, T* out, int64_t n, bool successor_early) {
  Exchange exchange(workspace, blockIdx.x, gridDim.x);
  wait_for_predecessor(successor_early);
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
__global__ void __launch_bounds__(most_threads(kWorld), 2)
    all_reduce_two_shot(const __grid_constant__ Workspace workspace,
                        const __grid_constant__ Announcement announcement, const T* x,
                        const T* residual, T* out, int64_t n, bool successor_early) {
  Exchange exchange(workspace, blockIdx.x, gridDim.x);
  wait_for_predecessor(successor_early);
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

// The same n elements on every rank, in memory that all map; aligned to 16 bytes, in whole units.
struct PeerTensor {
  void* data[kMaxRanks];
};

// In bulk. Rank d alone reads part d of everybody's x and writes the sum over it, between two
// barriers. A block handles the same stretch of every part, so that its words and those of the
// blocks of its number are all it needs. Staged: `from` is copied into x first, unless it is null
// and lies there already, and the sum from x to `out` last. Such a kernel may run behind a GEMM,
// and uses half of a multiprocessor's registers.
template <class T, int kWorld, bool kStaged>
__global__ void __launch_bounds__(most_threads(kWorld), kStaged ? 2 : 1)
    all_reduce_bulk(const __grid_constant__ Workspace workspace,
                    const __grid_constant__ Announcement announcement,
                    const __grid_constant__ PeerTensor x, const T* from, const T* residual, T* out,
                    int64_t n, bool successor_early) {
  Exchange exchange(workspace, blockIdx.x, gridDim.x);
  wait_for_predecessor(successor_early);
  if (!exchange.begin_block()) return;
  if (blockIdx.x == 0) exchange.announce(announcement);
  const int rank = exchange.rank(), world = exchange.world();
  constexpr int kElements = 16 / static_cast<int>(sizeof(T));
  const int64_t units = (n + kElements - 1) / kElements, part = (units + world - 1) / world;
  const int64_t stretch = (part + gridDim.x - 1) / gridDim.x;
  const int64_t begin = min(part, blockIdx.x * stretch), end = min(part, begin + stretch);
  const auto at = [&](int r) { return reinterpret_cast<uint4*>(x.data[r]); };
  uint4* mine = at(rank);
  // What is staged is small enough for 32 bits.
  const int length = static_cast<int>(end - begin);
  const auto unit_at = [&](int i) {
    const int d = i / length;
    return d * part + begin + (i - d * length);
  };

  if (kStaged && from) {
    const Units<const T> source(from, n);
    move_units(
        world * length,
        [&](int i) { return unit_at(i) < units ? source.load(unit_at(i)) : uint4{}; },
        [&](int i, uint4 value) {
          if (unit_at(i) < units) mine[unit_at(i)] = value;
        });
  }
  exchange.publish(0, announcement.tag);
  if (!exchange.await(0, announcement.tag)) return;

  const Units<const T> addend(residual, n);
  const Units<T> to(out, n);
  const int64_t base = rank * part;
  // So many units of every rank on the way at once: left to itself, the compiler keeps each load
  // behind the stores before it, which may alias.
  constexpr int kAtOnce = kStaged ? 4 : 8, kBatch = kWorld < kAtOnce ? kAtOnce / kWorld : 1;
  const int64_t last = min(units, base + end), step = blockDim.x;
  for (int64_t first = base + begin + threadIdx.x; first < last; first += kBatch * step) {
    UnitSum<T, kWorld> sum[kBatch];
    uint4 more[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int64_t unit = first + k * step;
      if (unit >= last) continue;
      sum[k].load(world, [&](int s) { return at(s) + unit; });
      if (kStaged && residual) more[k] = addend.load(unit);
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int64_t unit = first + k * step;
      if (unit >= last) continue;
      const uint4 total = sum[k].total(world, kStaged && residual ? &more[k] : nullptr);
#pragma unroll
      for (int p = 0; p < kWorld; ++p) {
        if (p < world && !(kStaged && p == rank)) at(p)[unit] = total;
      }
      if (kStaged) to.store(unit, total);
    }
  }
  exchange.publish(1, announcement.tag);
  if (!exchange.await(1, announcement.tag)) return;

  if (kStaged) {
    const auto wanted = [&](int i) { return i / length != rank && unit_at(i) < units; };
    move_units(
        world * length, [&](int i) { return wanted(i) ? __ldcg(mine + unit_at(i)) : uint4{}; },
        [&](int i, uint4 value) {
          if (wanted(i)) to.store(unit_at(i), value);
        });
  }
  exchange.finish();
}

}  // namespace commfuse::gpu
