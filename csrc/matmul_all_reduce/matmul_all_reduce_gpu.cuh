// The epilogue that makes the decode GEMM a row-parallel layer: finished tiles travel to the other
// ranks as flag-in-data lines while later tiles still stream; behind its last tile, each block adds
// its share of what has come, + bias, + residual, and, where asked, all blocks meet and normalise.
//
//   one shot   every rank sends every tile to all, and all add them
//   two shots  tile t goes to rank t % W, which adds and sends the sum to all: fewer bytes
//
// No block waits for a particular block of a peer, only for lines: which block computes a tile, and
// whether a tile is cut along K, may differ between ranks.
#pragma once

#include "gpu/lines.cuh"
#include "matmul/matmul_gpu.cuh"

namespace commfuse::gpu {

constexpr int kTilePacks = kTileColumns / 4;  // of a row of a tile

template <class T>
struct ReduceTiles {
  Workspace workspace;
  Announcement announcement;
  const T* bias;         // [n] or null, as the following
  const T* residual;     // [m, n]
  const T* norm_weight;  // [n]
  float eps;
  T* out;  // [m, n]
  T* y;    // [m, n], with norm_weight
  int m, n;
  bool two_shot;

  struct State {
    Exchange exchange;
    bool alive;  // a thread that has failed goes on to meet the others at their barriers
  };

  __device__ State begin() const {
    Exchange exchange(workspace, blockIdx.x, gridDim.x);
    const bool alive = exchange.begin();
    if (blockIdx.x == 0 && alive) exchange.announce_with_word(announcement);
    return {exchange, alive};
  }

  __device__ int tiles() const { return (n + kTileColumns - 1) / kTileColumns; }
  __device__ int most_owned() const { return (tiles() + workspace.world - 1) / workspace.world; }

  // Lines are ordered as [row][tile][pack]; the second hop's lie behind the first's.
  __device__ char* first_line(const Exchange& exchange, int owner, int source, int row, int tile,
                              int pack) const {
    const int64_t at = two_shot ? int64_t{row} * most_owned() + tile / workspace.world
                                : int64_t{row} * tiles() + tile;
    return exchange.lines(owner, source) + (at * kTilePacks + pack) * kLineStride;
  }
  __device__ char* second_line(const Exchange& exchange, int owner, int source, int row, int tile,
                               int pack) const {
    const int64_t at = int64_t{m + row} * most_owned() + tile / workspace.world;
    return exchange.lines(owner, source) + (at * kTilePacks + pack) * kLineStride;
  }

  __device__ void tile(const float* tile, int first_column, State& state) const {
    const Exchange& exchange = state.exchange;
    const int rank = exchange.rank(), world = exchange.world();
    const int number = first_column / kTileColumns, pack = threadIdx.x % kTilePacks;
    for (int row = threadIdx.x / kTilePacks; row < m; row += kComputeThreads / kTilePacks) {
      const float4 value = *reinterpret_cast<const float4*>(tile + row * kTilePitch + pack * 4);
      const uint2 rounded = {pack_pair<T>(value.x, value.y), pack_pair<T>(value.z, value.w)};
      if (!state.alive) continue;
      if (two_shot) {
        put_line(first_line(exchange, number % world, rank, row, number, pack), rounded,
                 exchange.flag());
      } else {
        for (int p = 0; p < world; ++p) {
          put_line(first_line(exchange, p, rank, row, number, pack), rounded, exchange.flag());
        }
      }
    }
  }

  __device__ void finish(float* scratch, State& state) const {
    if (workspace.world <= 2) {
      add_up<2>(state);
    } else if (workspace.world <= 4) {
      add_up<4>(state);
    } else {
      add_up<8>(state);
    }
    if (two_shot) collect(state);
    if (norm_weight) normalise(scratch, state);
    if (blockIdx.x == 0 && state.alive) {
      state.alive = state.exchange.await_words(announcement.tag);
    }
    // Before the block's generation is stored, all its threads have read it.
    compute_barrier();
    if (state.alive) state.exchange.finish(kComputeThreads);
  }

 private:
  // A stretch of [row][tile][pack], in whole rows of tiles: 16 neighbouring threads always hold the
  // packs of one.
  struct Stretch {
    int begin, end;
  };
  __device__ Stretch stretch_of(int tiles) const {
    const int total = m * tiles, each = (total + gridDim.x - 1) / gridDim.x;
    const int begin = min(total, static_cast<int>(blockIdx.x) * each);
    return {begin * kTilePacks, min(total, begin + each) * kTilePacks};
  }
  struct Place {
    int row, tile, pack;
  };
  __device__ Place place_at(int i, int tiles) const {
    const int rows_of_tiles = i / kTilePacks, row = rows_of_tiles / tiles;
    return {row, rows_of_tiles - row * tiles, i % kTilePacks};
  }
  __device__ Row<T> row_of(T* matrix, int row) const { return {matrix + int64_t{row} * n, n}; }

  // The sum of squares of a row of a tile, from the 16 threads that hold it.
  __device__ void note_squares(const Exchange& exchange, const Place& place, bool valid,
                               uint2 total) const {
    float squares = valid ? Floats<T>(total).squares() : 0;
#pragma unroll
    for (int offset = kTilePacks / 2; offset > 0; offset /= 2) {
      squares += __shfl_xor_sync(0xffffffffu, squares, offset);
    }
    if (valid && place.pack == 0) exchange.squares()[place.row * tiles() + place.tile] = squares;
  }

  // First hop: adds what has come for the tiles that this rank adds up.
  template <int kWorld>
  __device__ void add_up(State& state) const {
    const Exchange& exchange = state.exchange;
    const int rank = exchange.rank(), world = exchange.world();
    constexpr int kBatch = 8 / kWorld;  // packs that a thread waits for at once
    // In two shots: tiles rank, rank + W, ...
    const int owned = two_shot ? max(0, (tiles() - rank + world - 1) / world) : tiles();
    const Stretch stretch = stretch_of(owned);
    for (int base = stretch.begin; base < stretch.end; base += kComputeThreads * kBatch) {
      Line lines[kBatch * kWorld];
      char* address[kBatch * kWorld];
      Place place[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int i = base + static_cast<int>(threadIdx.x) + b * kComputeThreads;
        place[b] = place_at(i, owned);
        if (two_shot) place[b].tile = place[b].tile * world + rank;
#pragma unroll
        for (int s = 0; s < kWorld; ++s) {
          address[b * kWorld + s] =
              i < stretch.end && s < world
                  ? first_line(exchange, rank, s, place[b].row, place[b].tile, place[b].pack)
                  : nullptr;
        }
      }
      state.alive =
          state.alive && take_lines<kBatch * kWorld>(
                             exchange, 0, address, [](int l) { return l % kWorld; }, lines);
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const bool valid = state.alive && address[b * kWorld];
        const int64_t at = int64_t{place[b].tile} * kTilePacks + place[b].pack;
        uint2 total = {0, 0};
        if (valid) {
          Floats<T> sum(lines[b * kWorld].pack());
#pragma unroll
          for (int s = 1; s < kWorld; ++s) {
            if (s < world) sum.add(lines[b * kWorld + s].pack());
          }
          if (bias) sum.add(Row<const T>(bias, n).load(at));
          if (residual) {
            sum.add(Row<const T>(residual + int64_t{place[b].row} * n, n).load(at));
          }
          total = sum.pack();
          row_of(out, place[b].row).store(at, total);
          for (int p = 0; two_shot && p < world; ++p) {
            if (p == rank) continue;
            put_line(second_line(exchange, p, rank, place[b].row, place[b].tile, place[b].pack),
                     total, exchange.flag());
          }
        }
        if (norm_weight) note_squares(exchange, place[b], valid, total);
      }
    }
  }

  // Second hop: the tiles that others have added up.
  __device__ void collect(State& state) const {
    const Exchange& exchange = state.exchange;
    const int rank = exchange.rank(), world = exchange.world(), all = tiles();
    constexpr int kBatch = 4;
    const Stretch stretch = stretch_of(all);
    for (int base = stretch.begin; base < stretch.end; base += kComputeThreads * kBatch) {
      Line lines[kBatch];
      char* address[kBatch];
      Place place[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int i = base + static_cast<int>(threadIdx.x) + b * kComputeThreads;
        place[b] = place_at(i, all);
        const int owner = place[b].tile % world;
        address[b] =
            i < stretch.end && owner != rank
                ? second_line(exchange, rank, owner, place[b].row, place[b].tile, place[b].pack)
                : nullptr;
      }
      state.alive = state.alive &&
                    take_lines<kBatch>(
                        exchange, 1, address, [&](int b) { return place[b].tile % world; }, lines);
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const bool valid = state.alive && address[b];
        const uint2 total = lines[b].pack();
        if (valid) {
          row_of(out, place[b].row)
              .store(int64_t{place[b].tile} * kTilePacks + place[b].pack, total);
        }
        if (norm_weight) note_squares(exchange, place[b], valid, total);
      }
    }
  }

  __device__ void normalise(float* scratch, State& state) const {
    const Exchange& exchange = state.exchange;
    bool* met = reinterpret_cast<bool*>(scratch + kMatmulGpuMaxRows);
    if (!exchange.meet([] { compute_barrier(); }, met)) {
      state.alive = false;
      return;
    }
    // The scales of the rows of this block's stretch.
    const int all = tiles(), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const Stretch stretch = stretch_of(all);
    const int first = place_at(stretch.begin, all).row;
    const int end = stretch.end > stretch.begin ? place_at(stretch.end - 1, all).row + 1 : first;
    for (int row = first + warp; row < end; row += kComputeThreads / 32) {
      float squares = 0;
      for (int t = lane; t < all; t += 32) squares += __ldcg(exchange.squares() + row * all + t);
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) {
        squares += __shfl_xor_sync(0xffffffffu, squares, offset);
      }
      if (lane == 0) scratch[row - first] = 1.0f / sqrtf(squares / static_cast<float>(n) + eps);
    }
    compute_barrier();
    const Row<const T> factor(norm_weight, n);
#pragma unroll 4
    for (int i = stretch.begin + threadIdx.x; i < stretch.end; i += kComputeThreads) {
      const Place place = place_at(i, all);
      const int64_t at = int64_t{place.tile} * kTilePacks + place.pack;
      // In two shots another block may have stored it: not from the L1 cache.
      Floats<T> value(row_of(out, place.row).load_uncached(at));
      value.scale(scratch[place.row - first], factor.load(at));
      row_of(y, place.row).store(at, value.pack());
    }
  }
};

}  // namespace commfuse::gpu
