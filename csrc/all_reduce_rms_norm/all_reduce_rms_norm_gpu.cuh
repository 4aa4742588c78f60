// residual' = residual + sum over ranks of x; y = RMSNorm(residual') weight, between GPUs. A row is
// normalised while it is in the registers of those who have added it:
//
//   by lines   a cluster of blocks handles a row: every rank sends every row to everybody, as
//              flag-in-data lines, in one hop
//   by rows    a block handles a row of every rank: row g W + d goes to rank d, which adds and
//   sends
//              the sum, in two hops through slots, and every rank normalises all rows
#pragma once

#include "gpu/cluster.cuh"
#include "gpu/lines.cuh"
#include "gpu/units.cuh"

namespace commfuse::gpu {

// Threads of a block at most; together with the registers of a thread.
constexpr int kLineThreads = 256, kRowThreads = 512;

// The sums of kCount values over the block, in a fixed order; all threads call and get them.
template <int kCount>
__device__ __forceinline__ void block_sums(float (&values)[kCount]) {
  __shared__ float partial[32][kCount], total[kCount];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const auto warp_sum = [](float value) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      value += __shfl_xor_sync(0xffffffffu, value, offset);
    }
    return value;
  };
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float sum = warp_sum(values[i]);
    if (lane == 0) partial[warp][i] = sum;
  }
  __syncthreads();
  const int warps = blockDim.x / 32;
  for (int i = warp; i < kCount; i += warps) {
    const float sum = warp_sum(lane < warps ? partial[lane][i] : 0);
    if (lane == 0) total[i] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = total[i];
}

__device__ __forceinline__ float norm_scale(float squares, int n, float eps) {
  return 1.0f / sqrtf(squares / static_cast<float>(n) + eps);
}

// One shot; rows [rows, n]; residual may be null. Each block of a cluster has a stretch of the row.
template <class T, int kWorld>
__global__ void __launch_bounds__(kLineThreads, 3)
    all_reduce_rms_norm_by_lines(const __grid_constant__ Workspace workspace,
                                 const __grid_constant__ Announcement announcement, const T* x,
                                 const T* residual, const T* weight, float eps, T* y, T* out,
                                 int rows, int n) {
  constexpr int kHeld = 2;  // packs of a row that a thread keeps; more are read again
  __shared__ float partial[2];
  const Cluster cluster;
  Exchange exchange(workspace, blockIdx.x, gridDim.x);
  wait_for_predecessor();
  const int clusters = gridDim.x / cluster.size(), first_row = blockIdx.x / cluster.size();
  const int packs = (n + kPackElements<T> - 1) / kPackElements<T>;
  const int stretch = (packs + cluster.size() - 1) / cluster.size();
  const int begin = cluster.rank() * stretch, end = min(packs, begin + stretch);
  const auto at = [&](int k) { return static_cast<int>(begin + threadIdx.x + k * blockDim.x); };
  const auto of_row = [&]<class U>(U* matrix, int row) {
    return Row<U>(matrix + int64_t{row} * n, n);
  };

  // All that the first row needs is on the way before anything is waited for.
  const Row<const T> factor(weight, n);
  uint2 mine[kHeld] = {}, addend[kHeld] = {}, scale_by[kHeld] = {};
  const auto load_row = [&](int row) {
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      if (at(k) >= end) continue;
      mine[k] = of_row(x, row).load(at(k));
      if (residual) addend[k] = of_row(residual, row).load(at(k));
    }
  };
  if (first_row < rows) load_row(first_row);
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    if (at(k) < end) scale_by[k] = factor.load(at(k));
  }
  // A block that has failed goes on to meet the others of its cluster.
  bool alive = exchange.begin_block();
  const int rank = exchange.rank(), world = exchange.world();
  const auto line = [&](int owner, int source, int row, int pack) {
    return exchange.lines(owner, source) + (int64_t{row} * packs + pack) * kLineStride;
  };
  const auto send = [&](int row, int pack, uint2 value) {
#pragma unroll
    for (int p = 0; p < kWorld; ++p) {
      if (p < world && p != rank) put_line(line(p, rank, row, pack), value, exchange.flag());
    }
  };

  for (int row = first_row; row < rows && alive; row += clusters) {
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      if (at(k) < end) send(row, at(k), row == first_row ? mine[k] : of_row(x, row).load(at(k)));
    }
    for (int j = at(kHeld); j < end; j += blockDim.x) send(row, j, of_row(x, row).load(j));
  }
  if (blockIdx.x == 0 && alive) exchange.announce_with_word(announcement);

  for (int row = first_row, i = 0; row < rows; row += clusters, ++i) {
    if (row != first_row) load_row(row);
    const Row<T> to = of_row(out, row), normalised = of_row(y, row);
    float squares[1] = {0};
    const auto add = [&](int pack, uint2 own, uint2 more) {
      Line lines[kWorld];
      alive = alive && take_from_peers<kWorld>(
                           exchange, 0, [&](int s) { return line(rank, s, row, pack); }, lines);
      Floats<T> sum = sum_of<T, kWorld>(exchange, lines, own);
      if (residual) sum.add(more);
      const uint2 total = sum.pack();
      if (alive) to.store(pack, total);
      squares[0] += Floats<T>(total).squares();
      return total;
    };
    uint2 held[kHeld];
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      if (at(k) < end) held[k] = add(at(k), mine[k], addend[k]);
    }
    for (int j = at(kHeld); j < end; j += blockDim.x) {
      uint2 more = {};
      if (residual) more = of_row(residual, row).load(j);
      add(j, of_row(x, row).load(j), more);
    }
    block_sums(squares);
    // In turns, so that nobody's is overwritten before all have read it.
    const float scale = norm_scale(cluster.sum(squares[0], &partial[i % 2]), n, eps);
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      if (!alive || at(k) >= end) continue;
      Floats<T> value(held[k]);
      value.scale(scale, scale_by[k]);
      normalised.store(at(k), value.pack());
    }
    // Whoever stored a pack of the row loads it again: no other thread's stores are read.
    for (int j = at(kHeld); j < end && alive; j += blockDim.x) {
      Floats<T> value(to.load(j));
      value.scale(scale, factor.load(j));
      normalised.store(j, value.pack());
    }
  }
  cluster.sync();  // nobody leaves while others read his sum
  if (!alive) return;
  if (blockIdx.x == 0 && !exchange.await_words(announcement.tag)) return;
  exchange.finish();
}

// Two shots; slots hold [group][unit], group g being rows g W to g W + W - 1.
template <class T, int kWorld>
__global__ void __launch_bounds__(kRowThreads)
    all_reduce_rms_norm_by_rows(const __grid_constant__ Workspace workspace,
                                const __grid_constant__ Announcement announcement, const T* x,
                                const T* residual, const T* weight, float eps, T* y, T* out,
                                int rows, int n) {
  Exchange exchange(workspace, blockIdx.x, gridDim.x);
  wait_for_predecessor();
  if (!exchange.begin_block()) return;
  if (blockIdx.x == 0) exchange.announce(announcement);
  const int rank = exchange.rank(), world = exchange.world();
  constexpr int kElements = 16 / static_cast<int>(sizeof(T));
  const int units = (n + kElements - 1) / kElements, first = threadIdx.x;
  constexpr int kHeld = 2;  // units of a row that a thread keeps; more are read again
  const auto at = [&](int k) { return static_cast<int>(threadIdx.x + k * blockDim.x); };
  const int groups = (rows + world - 1) / world;
  const auto of_row = [&]<class U>(U* matrix, int row) {
    return Units<U>(matrix + int64_t{row} * n, n);
  };
  const auto place = [&](int owner, int phase, int source, int group) {
    return reinterpret_cast<uint4*>(exchange.slot(owner, phase, source)) + int64_t{group} * units;
  };

  for (int group = blockIdx.x; group < groups; group += gridDim.x) {
    // The last group may be short.
    const int members = min(world, rows - group * world);
    move_units<kWorld>(
        first, units, members, rank,
        [&](int d, int64_t j) { return of_row(x, group * world + d).load(j); },
        [&](int d, int64_t j, uint4 unit) { place(d, 0, rank, group)[j] = unit; });
  }
  exchange.publish(0, announcement.tag);
  if (!exchange.await(0, announcement.tag)) return;

  for (int group = blockIdx.x; group < groups; group += gridDim.x) {
    const int row = group * world + rank;
    if (row >= rows) continue;
    add_units<T, kWorld>(
        first, units, world,
        [&](int s, int64_t j) {
          return s == rank ? of_row(x, row).load(j) : __ldcg(place(rank, 0, s, group) + j);
        },
        residual != nullptr, [&](int64_t j) { return of_row(residual, row).load(j); },
        [&](int64_t j, uint4 total) {
#pragma unroll
          for (int p = 0; p < kWorld; ++p) {
            if (p < world && p != rank) place(p, 1, rank, group)[j] = total;
          }
          of_row(out, row).store(j, total);
        });
  }
  exchange.publish(1, announcement.tag);
  const Units<const T> factor(weight, n);
  uint4 scale_by[kHeld];
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    if (at(k) < units) scale_by[k] = factor.load(at(k));
  }
  if (!exchange.await(1, announcement.tag)) return;

  for (int group = blockIdx.x; group < groups; group += gridDim.x) {
    const int base = group * world, members = min(world, rows - base);
    // Whoever stored a unit of this rank's own row loads it again.
    const auto take = [&](int d, int64_t j) {
      return d == rank ? of_row(out, base + d).load(j) : __ldcg(place(rank, 1, d, group) + j);
    };
    const auto put = [&](int d, int64_t j, uint4 unit, float scale, uint4 by) {
      of_row(y, base + d).store(j, scaled<T>(unit, scale, by));
    };
    uint4 held[kHeld][kWorld];
    float squares[kWorld] = {};
    const auto note = [&](int d, int64_t j, uint4 unit) {
      if (d != rank) of_row(out, base + d).store(j, unit);
      squares[d] += squares_of<T>(unit);
    };
#pragma unroll
    for (int i = 0; i < kHeld * kWorld; ++i) {
      const int k = i / kWorld, d = i % kWorld;
      if (d < members && at(k) < units) held[k][d] = take(d, at(k));
    }
#pragma unroll
    for (int i = 0; i < kHeld * kWorld; ++i) {
      const int k = i / kWorld, d = i % kWorld;
      if (d < members && at(k) < units) note(d, at(k), held[k][d]);
    }
    for (int j = at(kHeld); j < units; j += blockDim.x) {
#pragma unroll
      for (int d = 0; d < kWorld; ++d) {
        if (d < members) note(d, j, take(d, j));
      }
    }
    block_sums(squares);
#pragma unroll
    for (int d = 0; d < kWorld; ++d) {
      if (d >= members) continue;
      const float scale = norm_scale(squares[d], n, eps);
#pragma unroll
      for (int k = 0; k < kHeld; ++k) {
        if (at(k) < units) put(d, at(k), held[k][d], scale, scale_by[k]);
      }
      for (int j = at(kHeld); j < units; j += blockDim.x) {
        put(d, j, of_row(out, base + d).load(j), scale, factor.load(j));
      }
    }
  }
  exchange.finish();
}

// y = RMSNorm(x) weight, row by row: behind an all-reduce in bulk.
template <class T>
__global__ void __launch_bounds__(512)
    rms_norm_rows(const T* x, const T* weight, float eps, T* y, int rows, int n) {
  wait_for_predecessor();
  const int packs = (n + kPackElements<T> - 1) / kPackElements<T>;
  const Row<const T> factor(weight, n);
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    const Row<const T> from(x + int64_t{row} * n, n);
    const Row<T> to(y + int64_t{row} * n, n);
    float squares[1] = {0};
    for (int j = threadIdx.x; j < packs; j += blockDim.x)
      squares[0] += Floats<T>(from.load(j)).squares();
    block_sums(squares);
    const float scale = norm_scale(squares[0], n, eps);
    for (int j = threadIdx.x; j < packs; j += blockDim.x) {
      Floats<T> value(from.load(j));
      value.scale(scale, factor.load(j));
      to.store(j, value.pack());
    }
  }
}

}  // namespace commfuse::gpu
