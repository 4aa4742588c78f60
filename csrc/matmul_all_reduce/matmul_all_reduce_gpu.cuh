// The row-parallel layer of decoding, in two launches that overlap:
//
//   the decode GEMM     its epilogue sends finished tiles to the other ranks as flag-in-data lines,
//                       while later tiles still stream
//   reduce_tiles        adds what has come, + bias, + residual, and, where asked, meets and
//   normalises
//
// Not one kernel: a block of the GEMM that stayed to add would hold its multiprocessor's shared
// memory. It leaves instead, and the next GEMM in the stream, which starts early, fills that memory
// with its first weights while the tiles are added. (In one kernel, W = 2, 4096 -> 8192: 59 us; the
// GEMM 43.)
//
//   one shot   every rank sends every tile to all, and all add them
//   two shots  tile t goes to rank t % W, which adds and sends the sum to all: fewer bytes
//
// Nobody waits for a particular block, only for lines: which block computes a tile, and whether a
// tile is cut along K, may differ between ranks.
#pragma once

#include "gpu/lines.cuh"
#include "matmul/matmul_gpu.cuh"

namespace commfuse::gpu {

constexpr int kTilePacks = kTileColumns / 4;  // of a row of a tile

// Where tiles travel: lines are ordered as [row][tile][pack], the second hop's behind the first's.
struct TileLines {
  Workspace workspace;
  int m, n;
  bool two_shot;

  __device__ int tiles() const { return (n + kTileColumns - 1) / kTileColumns; }
  __device__ int most_owned() const { return (tiles() + workspace.world - 1) / workspace.world; }

  __device__ char* first(const Exchange& exchange, int owner, int source, int row, int tile,
                         int pack) const {
    const int64_t at = two_shot ? int64_t{row} * most_owned() + tile / workspace.world
                                : int64_t{row} * tiles() + tile;
    return exchange.lines(owner, source) + (at * kTilePacks + pack) * kLineStride;
  }
  __device__ char* second(const Exchange& exchange, int owner, int source, int row, int tile,
                          int pack) const {
    const int64_t at = int64_t{m + row} * most_owned() + tile / workspace.world;
    return exchange.lines(owner, source) + (at * kTilePacks + pack) * kLineStride;
  }
};

// The GEMM's epilogue: round and send.
template <class T>
struct SendTiles {
  TileLines lines;
  Announcement announcement;

  struct State {
    Exchange exchange;
    bool alive;
  };

  __device__ State begin() const {
    Exchange exchange(lines.workspace, blockIdx.x, gridDim.x);
    const bool alive = exchange.begin();
    if (blockIdx.x == 0 && alive) exchange.announce_with_word(announcement);
    return {exchange, alive};
  }
  __device__ void tile(const float* tile, int first_column, State& state) const {
    if (!state.alive) return;
    const Exchange& exchange = state.exchange;
    const int rank = exchange.rank(), world = exchange.world();
    const int number = first_column / kTileColumns, pack = threadIdx.x % kTilePacks;
    for (int row = threadIdx.x / kTilePacks; row < lines.m; row += kComputeThreads / kTilePacks) {
      const float4 value = *reinterpret_cast<const float4*>(tile + row * kTilePitch + pack * 4);
      const uint2 rounded = {pack_pair<T>(value.x, value.y), pack_pair<T>(value.z, value.w)};
      if (lines.two_shot) {
        put_line(lines.first(exchange, number % world, rank, row, number, pack), rounded,
                 exchange.flag());
      } else {
        for (int p = 0; p < world; ++p) {
          put_line(lines.first(exchange, p, rank, row, number, pack), rounded, exchange.flag());
        }
      }
    }
  }
  __device__ void finish(float*, State&) const {}
};

constexpr int kReduceThreads = 256;

template <class T>
struct ReduceTiles {
  TileLines lines;
  Announcement announcement;
  const T* bias;         // [n] or null, as the following
  const T* residual;     // [m, n]
  const T* norm_weight;  // [n]
  float eps;
  T* out;  // [m, n]
  T* y;    // [m, n], with norm_weight
};

// One block's part of reduce_tiles; all its threads call every function together.
template <class T, int kWorld>
class TileReducer {
 public:
  __device__ TileReducer(const ReduceTiles<T>& a, const Exchange& exchange)
      : a_(a),
        exchange_(exchange),
        rank_(exchange.rank()),
        world_(exchange.world()),
        all_(a.lines.tiles()) {}

  // False: a failure.
  __device__ bool run() {
    add_up();
    if (a_.lines.two_shot) collect();
    if (a_.norm_weight) normalise();
    return alive_;
  }

 private:
  // A stretch of [row][tile][pack], in whole rows of tiles: 16 neighbouring threads always hold the
  // packs of one.
  struct Stretch {
    int begin, end;
  };
  __device__ Stretch stretch_of(int tiles) const {
    const int total = a_.lines.m * tiles, each = (total + gridDim.x - 1) / gridDim.x;
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
  template <class U>
  __device__ Row<U> row_of(U* matrix, int row) const {
    return {matrix + int64_t{row} * a_.lines.n, a_.lines.n};
  }

  // The sum of squares of a row of a tile, from the 16 threads that hold it.
  __device__ void note_squares(const Place& place, bool valid, uint2 total) const {
    if (!a_.norm_weight) return;
    float squares = valid ? Floats<T>(total).squares() : 0;
#pragma unroll
    for (int offset = kTilePacks / 2; offset > 0; offset /= 2) {
      squares += __shfl_xor_sync(0xffffffffu, squares, offset);
    }
    if (valid && place.pack == 0) exchange_.squares()[place.row * all_ + place.tile] = squares;
  }

  // First hop: adds what has come for the tiles that this rank adds up.
  __device__ void add_up() {
    constexpr int kBatch = 8 / kWorld;  // packs that a thread waits for at once
    // In two shots: tiles rank, rank + W, ...
    const bool two_shot = a_.lines.two_shot;
    const int owned = two_shot ? max(0, (all_ - rank_ + world_ - 1) / world_) : all_;
    const Stretch stretch = stretch_of(owned);
    for (int base = stretch.begin; base < stretch.end; base += kReduceThreads * kBatch) {
      Line lines[kBatch * kWorld];
      char* address[kBatch * kWorld];
      Place place[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int i = base + static_cast<int>(threadIdx.x) + b * kReduceThreads;
        place[b] = place_at(i, owned);
        if (two_shot) place[b].tile = place[b].tile * world_ + rank_;
#pragma unroll
        for (int s = 0; s < kWorld; ++s) {
          address[b * kWorld + s] =
              i < stretch.end && s < world_
                  ? a_.lines.first(exchange_, rank_, s, place[b].row, place[b].tile, place[b].pack)
                  : nullptr;
        }
      }
      alive_ = alive_ && take_lines<kBatch * kWorld>(
                             exchange_, 0, address, [](int l) { return l % kWorld; }, lines);
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const bool valid = alive_ && address[b * kWorld];
        const int64_t at = int64_t{place[b].tile} * kTilePacks + place[b].pack;
        uint2 total = {0, 0};
        if (valid) {
          Floats<T> sum(lines[b * kWorld].pack());
#pragma unroll
          for (int s = 1; s < kWorld; ++s) {
            if (s < world_) sum.add(lines[b * kWorld + s].pack());
          }
          if (a_.bias) sum.add(Row<const T>(a_.bias, a_.lines.n).load(at));
          if (a_.residual) {
            sum.add(row_of(a_.residual, place[b].row).load(at));
          }
          total = sum.pack();
          row_of(a_.out, place[b].row).store(at, total);
          for (int p = 0; two_shot && p < world_; ++p) {
            if (p == rank_) continue;
            put_line(
                a_.lines.second(exchange_, p, rank_, place[b].row, place[b].tile, place[b].pack),
                total, exchange_.flag());
          }
        }
        note_squares(place[b], valid, total);
      }
    }
  }

  // Second hop: the tiles that others have added up.
  __device__ void collect() {
    constexpr int kBatch = 4;
    const Stretch stretch = stretch_of(all_);
    for (int base = stretch.begin; base < stretch.end; base += kReduceThreads * kBatch) {
      Line lines[kBatch];
      char* address[kBatch];
      Place place[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int i = base + static_cast<int>(threadIdx.x) + b * kReduceThreads;
        place[b] = place_at(i, all_);
        const int owner = place[b].tile % world_;
        address[b] = i < stretch.end && owner != rank_
                         ? a_.lines.second(exchange_, rank_, owner, place[b].row, place[b].tile,
                                           place[b].pack)
                         : nullptr;
      }
      alive_ = alive_ &&
               take_lines<kBatch>(
                   exchange_, 1, address, [&](int b) { return place[b].tile % world_; }, lines);
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const bool valid = alive_ && address[b];
        const uint2 total = lines[b].pack();
        if (valid) {
          row_of(a_.out, place[b].row)
              .store(int64_t{place[b].tile} * kTilePacks + place[b].pack, total);
        }
        note_squares(place[b], valid, total);
      }
    }
  }

  __device__ void normalise() {
    __shared__ float scales[kMatmulGpuMaxRows];
    __shared__ bool met;
    if (!exchange_.meet([] { __syncthreads(); }, &met)) {
      alive_ = false;
      return;
    }
    // The scales of the rows of this block's stretch.
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const Stretch stretch = stretch_of(all_);
    const int first = place_at(stretch.begin, all_).row;
    const int end = stretch.end > stretch.begin ? place_at(stretch.end - 1, all_).row + 1 : first;
    for (int row = first + warp; row < end; row += kReduceThreads / 32) {
      float squares = 0;
      for (int t = lane; t < all_; t += 32) squares += __ldcg(exchange_.squares() + row * all_ + t);
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) {
        squares += __shfl_xor_sync(0xffffffffu, squares, offset);
      }
      const float mean = squares / static_cast<float>(a_.lines.n);
      if (lane == 0) scales[row - first] = 1.0f / sqrtf(mean + a_.eps);
    }
    __syncthreads();
    const Row<const T> factor(a_.norm_weight, a_.lines.n);
#pragma unroll 4
    for (int i = stretch.begin + threadIdx.x; i < stretch.end; i += kReduceThreads) {
      const Place place = place_at(i, all_);
      const int64_t at = int64_t{place.tile} * kTilePacks + place.pack;
      // In two shots another block may have stored it: not from the L1 cache.
      Floats<T> value(row_of(a_.out, place.row).load_uncached(at));
      value.scale(scales[place.row - first], factor.load(at));
      row_of(a_.y, place.row).store(at, value.pack());
    }
  }

  const ReduceTiles<T>& a_;
  const Exchange& exchange_;
  int rank_, world_, all_;
  bool alive_ = true;  // a thread that has failed goes on to meet the others at their barriers
};

template <class T, int kWorld>
__global__ void __launch_bounds__(kReduceThreads)
    reduce_tiles(const __grid_constant__ ReduceTiles<T> arguments) {
  Exchange exchange(arguments.lines.workspace, blockIdx.x, gridDim.x);
  wait_for_predecessor();
  if (!exchange.begin_block()) return;
  TileReducer<T, kWorld> reducer(arguments, exchange);
  bool alive = reducer.run();
  // The GEMM announced the call; its words are awaited here.
  if (blockIdx.x == 0 && alive) alive = exchange.await_words(arguments.announcement.tag);
  if (alive) exchange.finish();
}

}  // namespace commfuse::gpu
