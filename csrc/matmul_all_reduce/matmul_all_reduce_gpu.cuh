// The row-parallel layer of decoding, in two launches that overlap:
//
//   the decode GEMM     its epilogue puts finished tiles, rounded, into the slots of the ranks and
//                       publishes each with a word, while later tiles still stream
//   reduce_tiles        adds the tiles of all ranks as they come, + bias, + residual, and, where
//                       asked, meets and normalises
//
// Not one kernel: a block of the GEMM that stayed to add would hold its multiprocessor's shared
// memory. It leaves instead, and the next GEMM in the stream, which starts early, fills that memory
// with its first weights while the last tiles travel. (In one kernel, W = 2, 4096 -> 8192: 59 us;
// the GEMM 43.)
//
//   one shot   every rank sends every tile to all, and all add them
//   two shots  tile t goes to rank t % W, which adds and sends the sum to all: fewer bytes
//
// Nobody waits for a particular block, only for tiles: which block computes a tile, and whether a
// tile is cut along K, may differ between ranks. Tiles are finished roughly in the order of their
// numbers, and added in this order.
#pragma once

#include "gpu/units.cuh"
#include "matmul/matmul_gpu.cuh"

namespace commfuse::gpu {

constexpr int kTileUnits = kTileColumns / 8;  // of 16 bytes, of a row of a tile

// Where tiles travel: slots hold [tile][row][unit].
struct TileSlots {
  Workspace workspace;
  int m, n;
  bool two_shot;

  __device__ int tiles() const { return (n + kTileColumns - 1) / kTileColumns; }
  __device__ uint4* place(const Exchange& exchange, int owner, int phase, int source, int tile,
                          int row, int unit) const {
    return reinterpret_cast<uint4*>(exchange.slot(owner, phase, source)) +
           (int64_t{tile} * m + row) * kTileUnits + unit;
  }
};

// The GEMM's epilogue: round and send.
template <class T>
struct SendTiles {
  TileSlots slots;
  Announcement announcement;

  struct State {
    Exchange exchange;
    bool alive;
  };

  __device__ State begin() const {
    Exchange exchange(slots.workspace, blockIdx.x, gridDim.x);
    const bool alive = exchange.begin();
    if (blockIdx.x == 0 && alive) exchange.announce_with_word(announcement);
    return {exchange, alive};
  }
  __device__ void tile(const float* tile, int first_column, State& state) const {
    const Exchange& exchange = state.exchange;
    const int rank = exchange.rank(), world = exchange.world();
    const int number = first_column / kTileColumns, unit = threadIdx.x % kTileUnits;
    const int first = slots.two_shot ? number % world : 0, end = slots.two_shot ? first + 1 : world;
    for (int row = threadIdx.x / kTileUnits; row < slots.m && state.alive;
         row += kComputeThreads / kTileUnits) {
      const float4* value = reinterpret_cast<const float4*>(tile + row * kTilePitch + unit * 8);
      const float4 low = value[0], high = value[1];
      const uint4 rounded = {pack_pair<T>(low.x, low.y), pack_pair<T>(low.z, low.w),
                             pack_pair<T>(high.x, high.y), pack_pair<T>(high.z, high.w)};
      for (int p = first; p < end; ++p) {
        *slots.place(exchange, p, 0, rank, number, row, unit) = rounded;
      }
    }
    compute_barrier();
    const int peer = static_cast<int>(threadIdx.x);
    if (state.alive && peer >= first && peer < end) exchange.publish_tile(peer, 0, number);
  }
  __device__ void finish(float*, State&) const {}
};

constexpr int kReduceThreads = 512;

template <class T>
struct ReduceTiles {
  TileSlots slots;
  Announcement announcement;
  const T* bias;         // [n] or null, as the following
  const T* residual;     // [m, n]
  const T* norm_weight;  // [n]
  float eps;
  T* out;  // [m, n]
  T* y;    // [m, n], with norm_weight
};

// A block takes a group of tiles at a time, as many as its threads hold: every thread a unit, warps
// in whole rows. Rows are padded to a power of two.
__host__ __device__ inline int tiles_of_group(int m) {
  int rows = 1;
  while (rows < m) rows *= 2;
  return kReduceThreads / (rows * kTileUnits);
}

// One block's part of reduce_tiles; all its threads call every function together.
template <class T, int kWorld>
class TileReducer {
 public:
  __device__ TileReducer(const ReduceTiles<T>& a, const Exchange& exchange)
      : a_(a),
        exchange_(exchange),
        rank_(exchange.rank()),
        world_(exchange.world()),
        all_(a.slots.tiles()),
        group_(tiles_of_group(a.slots.m)),
        padded_rows_(kReduceThreads / kTileUnits / group_),
        row_(static_cast<int>(threadIdx.x) / kTileUnits % padded_rows_),
        unit_(threadIdx.x % kTileUnits) {}

  // False: a failure.
  __device__ bool run() {
    for (int tile = blockIdx.x * group_; tile < all_; tile += gridDim.x * group_) add_group(tile);
    if (a_.norm_weight) normalise();
    return alive_;
  }

 private:
  // The tile of this thread, in the group that begins with `first`.
  __device__ int tile_in(int first) const {
    return first + static_cast<int>(threadIdx.x) / kTileUnits / padded_rows_;
  }
  __device__ bool holds(int tile) const { return tile < all_ && row_ < a_.slots.m; }
  __device__ bool owns(int tile) const { return !a_.slots.two_shot || tile % world_ == rank_; }
  template <class U>
  __device__ Units<U> row_of(U* matrix) const {
    return {matrix + int64_t{row_} * a_.slots.n, a_.slots.n};
  }
  __device__ int64_t unit_in_row(int tile) const { return int64_t{tile} * kTileUnits + unit_; }

  // A warp waits for those tiles of its rows that wanted(tile, source) names, one lane for each: up
  // to 4 tiles (a row has 8 units), of up to 8 sources. Its lanes may read what the others have
  // waited for.
  template <class Wanted>
  __device__ void await_tiles(int first, int phase, Wanted wanted) {
    const int lane = threadIdx.x % 32, of_warp = threadIdx.x - lane;
    const int begin = first + of_warp / kTileUnits / padded_rows_;
    const int tile = begin + lane / 8, source = lane % 8;
    const int end = first + (of_warp + 31) / kTileUnits / padded_rows_ + 1;
    bool there = alive_;
    if (there && tile < min(end, all_) && source < world_ && wanted(tile, source)) {
      there = exchange_.await_tile(source, phase, tile);
    }
    alive_ = __all_sync(0xffffffffu, there);
  }

  // The tiles that this rank adds, and then those that others have added. In this order: nobody
  // waits for a sum without having sent his own.
  __device__ void add_group(int first) {
    const int tile = tile_in(first);
    uint4 total = {};
    await_tiles(first, 0, [&](int t, int) { return owns(t); });
    if (alive_ && holds(tile) && owns(tile)) total = add(tile);
    if (a_.slots.two_shot) {
      __syncthreads();
      const int done = first + static_cast<int>(threadIdx.x) / 8, peer = threadIdx.x % 8;
      if (alive_ && done < min(first + group_, all_) && owns(done) && peer < world_ &&
          peer != rank_) {
        exchange_.publish_tile(peer, 1, done);
      }
      await_tiles(first, 1, [&](int t, int source) { return !owns(t) && source == t % world_; });
      if (alive_ && holds(tile) && !owns(tile)) {
        total = __ldcg(a_.slots.place(exchange_, rank_, 1, tile % world_, tile, row_, unit_));
        row_of(a_.out).store(unit_in_row(tile), total);
      }
    }
    if (a_.norm_weight) note_squares(tile, total);
  }

  __device__ uint4 add(int tile) const {
    UnitSum<T, kWorld> sum;
    sum.load(world_,
             [&](int s) { return a_.slots.place(exchange_, rank_, 0, s, tile, row_, unit_); });
    const int64_t at = unit_in_row(tile);
    uint4 addend = {};
    if (a_.residual) addend = row_of(a_.residual).load(at);
    if (a_.bias) {
      const uint4 bias = Units<const T>(a_.bias, a_.slots.n).load(at);
      // Rounded together, as for an all-reduce behind a GEMM, which takes one addend: the number of
      // rows decides which of the two ways is gone, and must not show in the bits.
      addend = a_.residual ? UnitSum<T, 1>{{addend}}.total(1, &bias) : bias;
    }
    const uint4 total = sum.total(world_, a_.bias || a_.residual ? &addend : nullptr);
    row_of(a_.out).store(at, total);
    for (int p = 0; a_.slots.two_shot && p < world_; ++p) {
      if (p != rank_) *a_.slots.place(exchange_, p, 1, rank_, tile, row_, unit_) = total;
    }
    return total;
  }

  // The sum of squares of a row of a tile, from the threads that hold it; total is zero elsewhere.
  __device__ void note_squares(int tile, uint4 total) const {
    float squares = squares_of<T>(total);
#pragma unroll
    for (int offset = kTileUnits / 2; offset > 0; offset /= 2) {
      squares += __shfl_xor_sync(0xffffffffu, squares, offset);
    }
    if (holds(tile) && unit_ == 0) exchange_.squares()[row_ * all_ + tile] = squares;
  }

  __device__ void normalise() {
    __shared__ float scales[kMatmulGpuMaxRows];
    __shared__ bool met;
    if (!exchange_.meet([] { __syncthreads(); }, &met)) {
      alive_ = false;
      return;
    }
    const int lane = threadIdx.x % 32;
    for (int row = threadIdx.x / 32; row < a_.slots.m; row += kReduceThreads / 32) {
      float squares = 0;
      for (int t = lane; t < all_; t += 32) squares += __ldcg(exchange_.squares() + row * all_ + t);
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) {
        squares += __shfl_xor_sync(0xffffffffu, squares, offset);
      }
      const float mean = squares / static_cast<float>(a_.slots.n);
      if (lane == 0) scales[row] = 1.0f / sqrtf(mean + a_.eps);
    }
    __syncthreads();
    const Units<const T> factor(a_.norm_weight, a_.slots.n);
    for (int first = blockIdx.x * group_; first < all_; first += gridDim.x * group_) {
      const int tile = tile_in(first);
      if (!alive_ || !holds(tile)) continue;
      // Every thread loads again what it has stored itself.
      const int64_t at = unit_in_row(tile);
      const uint4 unit = row_of(a_.out).load(at), by = factor.load(at);
      row_of(a_.y).store(at, scaled<T>(unit, scales[row_], by));
    }
  }

  const ReduceTiles<T>& a_;
  const Exchange& exchange_;
  int rank_, world_, all_;
  int group_, padded_rows_, row_, unit_;
  bool alive_ = true;  // a warp that has failed goes on to meet the others at their barriers
};

template <class T, int kWorld>
__global__ void __launch_bounds__(kReduceThreads, 2)
    reduce_tiles(const __grid_constant__ ReduceTiles<T> arguments) {
  Exchange exchange(arguments.slots.workspace, blockIdx.x, gridDim.x);
  wait_for_predecessor(true);
  if (!exchange.begin_block()) return;
  // The GEMM announced the call; its words are awaited here.
  bool alive = true;
  if (blockIdx.x == 0) alive = exchange.await_words(arguments.announcement.tag);
  alive = !__syncthreads_or(!alive);
  if (alive && TileReducer<T, kWorld>(arguments, exchange).run()) exchange.finish();
}

}  // namespace commfuse::gpu
