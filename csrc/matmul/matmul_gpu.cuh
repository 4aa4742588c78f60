// Decode GEMM: y [M, N] = x [M, K] w [N, K]^T for M <= 64, bfloat16 or float16, float32 sums.
//
// Such a GEMM takes as long as its weights take to stream from memory; all else must hide behind
// that. On Hopper, one thread of a block keeps a ring of shared-memory stages full of weights with
// bulk tensor copies, and one warpgroup multiplies what has arrived. The weights are the
// tensor core's A operand (64 output columns a tile), the rows of x its B operand, so the rows are
// padded to 8, 16, 32 or 64 only and the weights are read from shared memory once whatever M is.
// Other GPUs, and K whose rows are not 16-byte aligned, take a kernel with the same structure
// from asynchronous copies and mma.sync.
//
// Which block computes which tile is in MatmulPlan. A block finishes its tiles one after the other
// and hands each to an epilogue while the ring goes on filling with the next tile's weights. The
// thread that fills the ring is also the one that claims; it says what a stage holds beside it.
//
// An epilogue is a trivially copyable functor, called by all kComputeThreads threads of the block
// together:
//
//   struct State;
//   __device__ State begin() const;
//       Before anything else, when the previous kernel has ended.
//   __device__ void tile(const float* tile, int first_column, State& state) const;
//       One finished tile, float32, in shared memory: tile[row * kTilePitch + column] for
//       row < M, column < 64, of output columns first_column + column (those >= N are zeros). All
//       threads have passed a barrier since the tile was written, and the kernel puts another
//       behind the call.
//   __device__ void finish(float* scratch, State& state) const;
//       After the block's last tile; scratch is the memory of a tile.
//
// Threads of an epilogue synchronise with compute_barrier(), never with __syncthreads(): the
// thread that issues the copies does not take part.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include <type_traits>

#include "gpu/numbers.cuh"
#include "gpu/protocol.cuh"
#include "matmul/matmul_gpu.h"

namespace commfuse::gpu {

constexpr int kComputeThreads = 128;

// Conflict-free for the fragments' stores (rows 2 apart must lie 8 banks apart), and rows stay
// 16-byte aligned for whoever reads them.
constexpr int kTilePitch = kTileColumns + 4;

struct MatmulShape {
  int m, n, k;
  MatmulPlan plan;
  int stages;
  bool aligned;        // rows of x and w, to 16 bytes
  bool weights_early;  // they need not wait for the previous kernel
  float4* partials;    // [rest][splits][kRows / 8][kComputeThreads]
  uint32_t* counters;  // [rest] parts that have been written, and at kClaims, how often was claimed
};

// ---------------------------------------------------------------------------- PTX, one word each

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void compute_barrier() {
  asm volatile("bar.sync 1, %0;" ::"n"(kComputeThreads) : "memory");
}

// ------------------------------------------------------------------------------- finished segments

// What becomes of a segment's sums. Fragments are those of wgmma and of mma.sync alike: warp w
// holds columns 16w..16w+15 of the tile; acc[j] holds rows 8j + 2 (lane % 4) + {0, 1} of columns
// lane / 4 and lane / 4 + 8.
template <int kRows, class Epilogue>
__device__ __forceinline__ void finish_segment(float (&acc)[kRows / 8][4],
                                               const TileSegment& segment, const MatmulShape& shape,
                                               float* tile, uint32_t* flag,
                                               const Epilogue& epilogue,
                                               typename Epilogue::State& state) {
  const int thread = threadIdx.x;
  if (segment.part >= 0) {
    // Every part writes its sums; whoever comes last adds all of them in the order of k. The
    // barrier and the release (acquire) of one thread cover what the others wrote (will read).
    const int splits = shape.plan.splits, number = segment.tile - first_of_rest(shape.plan);
    float4* partials = shape.partials +
                       static_cast<int64_t>(number) * splits * (kRows / 8) * kComputeThreads +
                       thread;
    float4* own = partials + static_cast<int64_t>(segment.part) * (kRows / 8) * kComputeThreads;
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j) {
      __stcg(own + j * kComputeThreads, make_float4(acc[j][0], acc[j][1], acc[j][2], acc[j][3]));
    }
    compute_barrier();
    if (thread == 0) *flag = add_acquire_release(shape.counters + number, 1);
    compute_barrier();
    if (*flag != static_cast<uint32_t>(splits - 1)) return;
    if (thread == 0) shape.counters[number] = 0;  // for the next call
    // As many on the way at once as registers hold: 16 loads of each thread.
    constexpr int kGroup = kRows >= 32 ? 4 : kRows / 8;
    constexpr int kParts = 16 / kGroup;
#pragma unroll
    for (int first = 0; first < kRows / 8; first += kGroup) {
#pragma unroll
      for (int j = first; j < first + kGroup; ++j)
        acc[j][0] = acc[j][1] = acc[j][2] = acc[j][3] = 0;
      for (int part = 0; part < splits; part += kParts) {
        float4 values[kParts][kGroup];
#pragma unroll
        for (int i = 0; i < kParts * kGroup; ++i) {
          const int p = i / kGroup, j = i % kGroup;
          if (part + p < splits) {
            values[p][j] =
                __ldcg(partials + ((part + p) * (kRows / 8) + first + j) * kComputeThreads);
          }
        }
#pragma unroll
        for (int i = 0; i < kParts * kGroup; ++i) {
          const int p = i / kGroup, j = i % kGroup;
          if (part + p >= splits) continue;
          acc[first + j][0] += values[p][j].x;
          acc[first + j][1] += values[p][j].y;
          acc[first + j][2] += values[p][j].z;
          acc[first + j][3] += values[p][j].w;
        }
      }
    }
  }
  const int lane = thread % 32;
  const int column = thread / 32 * 16 + lane / 4;
#pragma unroll
  for (int j = 0; j < kRows / 8; ++j) {
    float* to = tile + (8 * j + 2 * (lane % 4)) * kTilePitch + column;
    to[0] = acc[j][0];
    to[kTilePitch] = acc[j][1];
    to[8] = acc[j][2];
    to[kTilePitch + 8] = acc[j][3];
  }
  compute_barrier();
  epilogue.tile(tile, segment.tile * kTileColumns, state);
  compute_barrier();
}

// The epilogue of the plain GEMM: + bias, round, store.
template <class T>
struct StoreTiles {
  T* y;           // [m, n]
  const T* bias;  // [n] or null
  int m, n;

  struct State {};
  __device__ State begin() const { return {}; }
  __device__ void tile(const float* tile, int first_column, State&) const {
    const int column = threadIdx.x % 16 * 4;
    const int64_t pack = (first_column + column) / 4;
    uint2 addend = {0, 0};
    if (bias) addend = Row<const T>(bias, n).load(pack);
    for (int row = threadIdx.x / 16; row < m; row += kComputeThreads / 16) {
      Floats<T> value(addend);
#pragma unroll
      for (int i = 0; i < 4; ++i) value.value[i] += tile[row * kTilePitch + column + i];
      Row<T>(y + static_cast<int64_t>(row) * n, n).store(pack, value.pack());
    }
  }
  __device__ void finish(float*, State&) const {}
};

// ----------------------------------------------------------------------------------------- Hopper

constexpr int kSubChunk = 64;  // k of one swizzled row of 128 bytes
constexpr int kHopperThreads = kComputeThreads + 32;
// Two blocks of so many threads leave 128 registers each. A quarter of a multiprocessor, which has
// a quarter of its registers, holds two of this kernel's five warps; with more registers the
// exchange that follows (four warps of 64 registers in every quarter) would not fit beside them. It
// would begin when the GEMM has left, and the next GEMM when the exchange has.
constexpr int kHopperRegisterThreads = 256;

template <int kRows>
struct HopperStage {
  static constexpr int kWeightBytes = kTileColumns * kChunk * 2;
  static constexpr int kInputBytes = kRows * kChunk * 2;
  static constexpr int kBytes = kWeightBytes + kInputBytes;
};

template <int kRows>
constexpr int hopper_shared_bytes(int stages) {
  constexpr int kAlignment = 1024, kBarriers = 1024;
  return kAlignment + stages * HopperStage<kRows>::kBytes +
         kRows * kTilePitch * static_cast<int>(sizeof(float)) + kBarriers;
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void barrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Not a wait for a peer: what completes these barriers are the block's own copies and warps.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%0], %1;\n"
      "@done bra over;\n"
      "bra again;\n"
      "over:\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// L2 eviction priorities, as createpolicy.fractional makes them.
constexpr uint64_t kEvictFirst = 0x12F0000000000000;
constexpr uint64_t kEvictLast = 0x14F0000000000000;

// A box of the tensor, its corner at (k, row), to shared memory; what lies outside arrives as
// zeros.
__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap& tensor, int k, int row,
                                         uint32_t barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(&tensor), "r"(k), "r"(row), "r"(barrier), "l"(policy)
      : "memory");
}

// Rows of 128 bytes, swizzled by the copy; groups of 8 rows lie 1024 bytes apart.
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t address) {
  constexpr uint64_t kSwizzle128 = 1ull << 62, kGroupStride = (1024ull >> 4) << 32,
                     kUnused = 1 << 16;
  return kSwizzle128 | kGroupStride | kUnused | ((address & 0x3FFFF) >> 4);
}

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// acc [64 columns, kRows] += weights [64, 16] x [kRows, 16]^T
#define COMMFUSE_WGMMA(SHAPE, TYPE, REGISTERS, A, B, ...)                                         \
  asm volatile("wgmma.mma_async.sync.aligned." SHAPE ".f32." TYPE "." TYPE " {" REGISTERS "}, " A \
               ", " B ", 1, 1, 1, 0, 0;"                                                          \
               : __VA_ARGS__                                                                      \
               : "l"(a), "l"(b))
#define COMMFUSE_ACC(j) "+f"(acc[j][0]), "+f"(acc[j][1]), "+f"(acc[j][2]), "+f"(acc[j][3])
#define COMMFUSE_R4 "%0,%1,%2,%3"
#define COMMFUSE_R8 COMMFUSE_R4 ",%4,%5,%6,%7"
#define COMMFUSE_R16 COMMFUSE_R8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define COMMFUSE_R32 COMMFUSE_R16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define COMMFUSE_WGMMA_ROWS(TYPE)                                                                 \
  if constexpr (kRows == 8) {                                                                     \
    COMMFUSE_WGMMA("m64n8k16", TYPE, COMMFUSE_R4, "%4", "%5", COMMFUSE_ACC(0));                   \
  } else if constexpr (kRows == 16) {                                                             \
    COMMFUSE_WGMMA("m64n16k16", TYPE, COMMFUSE_R8, "%8", "%9", COMMFUSE_ACC(0), COMMFUSE_ACC(1)); \
  } else if constexpr (kRows == 32) {                                                             \
    COMMFUSE_WGMMA("m64n32k16", TYPE, COMMFUSE_R16, "%16", "%17", COMMFUSE_ACC(0),                \
                   COMMFUSE_ACC(1), COMMFUSE_ACC(2), COMMFUSE_ACC(3));                            \
  } else {                                                                                        \
    static_assert(kRows == 64);                                                                   \
    COMMFUSE_WGMMA("m64n64k16", TYPE, COMMFUSE_R32, "%32", "%33", COMMFUSE_ACC(0),                \
                   COMMFUSE_ACC(1), COMMFUSE_ACC(2), COMMFUSE_ACC(3), COMMFUSE_ACC(4),            \
                   COMMFUSE_ACC(5), COMMFUSE_ACC(6), COMMFUSE_ACC(7));                            \
  }

template <class T, int kRows>
__device__ __forceinline__ void wgmma(float (&acc)[kRows / 8][4], uint64_t a, uint64_t b) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    COMMFUSE_WGMMA_ROWS("bf16")
  } else {
    COMMFUSE_WGMMA_ROWS("f16")
  }
}
#undef COMMFUSE_WGMMA_ROWS
#undef COMMFUSE_R32
#undef COMMFUSE_R16
#undef COMMFUSE_R8
#undef COMMFUSE_R4
#undef COMMFUSE_ACC
#undef COMMFUSE_WGMMA

#endif  // Hopper

// A place in the ring and how often it has come round.
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance(int stages) {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// (Clusters of two blocks that share what they fetch of x lose: on an H100 not all of its
// multiprocessors pair up, and a second wave of blocks follows, 37 against 25 us at M = 32.)
template <class T, int kRows, class Epilogue>
__global__ void __launch_bounds__(kHopperRegisterThreads, 2)
    matmul_hopper(const __grid_constant__ CUtensorMap weights,
                  const __grid_constant__ CUtensorMap x, const __grid_constant__ MatmulShape shape,
                  const __grid_constant__ Epilogue epilogue) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Stage = HopperStage<kRows>;
  constexpr int kSubs = kChunk / kSubChunk;
  constexpr int kWeightSub = kTileColumns * kSubChunk * 2, kInputSub = kRows * kSubChunk * 2;
  extern __shared__ uint8_t raw[];
  // The swizzle is a function of the address: stages must lie on multiples of its 1024 bytes.
  const uint32_t ring = (shared_address(raw) + 1023) & ~1023u;
  uint8_t* after_ring = raw + (ring - shared_address(raw)) + shape.stages * Stage::kBytes;
  float* tile = reinterpret_cast<float*>(after_ring);
  const uint32_t full = shared_address(tile + kRows * kTilePitch);
  const uint32_t empty = full + 8 * shape.stages;
  uint32_t* flag = reinterpret_cast<uint32_t*>(tile + kRows * kTilePitch) + 4 * shape.stages;
  // Of a stage where a claimed part begins, the part; behind the last, -1.
  int* claimed = reinterpret_cast<int*>(flag + 1);

  const MatmulPlan& plan = shape.plan;
  const int dealt = plan.claimed ? plan.rounds : plan.parts_per_block + plan.rounds;
  const bool producer = threadIdx.x == kComputeThreads;

  const auto load_weights = [&](const TileSegment& segment, int chunk, int stage) {
    barrier_expect(full + 8 * stage, Stage::kBytes);
#pragma unroll
    for (int sub = 0; sub < kSubs; ++sub) {
      copy_box(ring + stage * Stage::kBytes + sub * kWeightSub, weights,
               chunk * kChunk + sub * kSubChunk, segment.tile * kTileColumns, full + 8 * stage,
               kEvictFirst);
    }
  };
  const auto load_x = [&](int chunk, int stage) {
    const uint32_t to = ring + stage * Stage::kBytes + Stage::kWeightBytes;
#pragma unroll
    for (int sub = 0; sub < kSubs; ++sub) {
      const int k = chunk * kChunk + sub * kSubChunk;
      copy_box(to + sub * kInputSub, x, k, 0, full + 8 * stage, kEvictLast);
    }
  };

  // The weights depend on nothing: the first of them are asked for before anything else, before
  // the other warps know of the barriers even, and before the previous kernel has ended.
  int early = 0;  // stages asked for so far
  if (producer) {
    for (int s = 0; s < shape.stages; ++s) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, kComputeThreads / 32);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async;" ::: "memory");
    TileSegment segment;
    for (int i = 0; i < dealt && shape.weights_early; ++i) {
      if (!segment_at(plan, blockIdx.x, i, &segment)) continue;
      for (int c = segment.begin; c < segment.end && early < shape.stages; ++c) {
        load_weights(segment, c, early++);
      }
      if (early == shape.stages) break;
    }
  }
  __syncthreads();

  wait_for_predecessor();  // x, y and the workspace are ours from here on

  if (producer) {
    // Claims count on from zero: the previous GEMM, whose last block has set the counter back, has
    // ended, and the next one's claims wait for this one's end as these have waited.
    RingPosition at;
    int count = 0, claim = 0;
    TileSegment segment;
    for (int i = 0; i < dealt || plan.claimed; ++i) {
      const int own = claim;
      if (i >= dealt) {
        if (own >= parts_of_rest(plan)) break;
        segment = part_of_rest(plan, own);
      } else if (!segment_at(plan, blockIdx.x, i, &segment)) {
        continue;
      }
      for (int c = segment.begin; c < segment.end; ++c) {
        // As late as it may be, to leave to others what they would do earlier; the answer travels
        // while the segment's last chunk waits for its stage.
        if (plan.claimed && i >= dealt - 1 && c == segment.end - 1) {
          claim = static_cast<int>(atomicAdd(shape.counters + kClaims, 1u));
        }
        if (count++ >= early) {
          barrier_wait(empty + 8 * at.stage, at.parity ^ 1);
          if (i >= dealt && c == segment.begin) claimed[at.stage] = own;
          load_weights(segment, c, at.stage);  // its arrival at the barrier publishes the number
        }
        load_x(c, at.stage);
        at.advance(shape.stages);
      }
    }
    if (plan.claimed) {
      if (claim == last_claim(plan)) shape.counters[kClaims] = 0;  // for the next call
      barrier_wait(empty + 8 * at.stage, at.parity ^ 1);
      claimed[at.stage] = -1;
      barrier_arrive(full + 8 * at.stage);
    }
  } else if (threadIdx.x < kComputeThreads) {
    const int lane = threadIdx.x % 32;
    const auto release = [&](int stage) {
      if (lane == 0) barrier_arrive(empty + 8 * stage);
    };
    typename Epilogue::State state = epilogue.begin();
    RingPosition at;
    TileSegment segment;
    for (int i = 0; i < dealt || plan.claimed; ++i) {
      if (i >= dealt) {
        barrier_wait(full + 8 * at.stage, at.parity);
        const int part = claimed[at.stage];
        if (part < 0) break;
        segment = part_of_rest(plan, part);
        __syncwarp();  // all lanes have read the number before one of them gives the stage back
      } else if (!segment_at(plan, blockIdx.x, i, &segment)) {
        continue;
      }
      float acc[kRows / 8][4];
#pragma unroll
      for (int j = 0; j < kRows / 8; ++j) acc[j][0] = acc[j][1] = acc[j][2] = acc[j][3] = 0;
      int previous = -1;
      for (int c = segment.begin; c < segment.end; ++c) {
        barrier_wait(full + 8 * at.stage, at.parity);
        const uint32_t base = ring + at.stage * Stage::kBytes;
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < kChunk / 16; ++step) {
          const int sub = step / (kSubChunk / 16), within = step % (kSubChunk / 16) * 32;
          wgmma<T, kRows>(acc, matrix_descriptor(base + sub * kWeightSub + within),
                          matrix_descriptor(base + Stage::kWeightBytes + sub * kInputSub + within));
        }
        wgmma_commit();
        if (previous >= 0) {
          wgmma_wait<1>();
          release(previous);
        }
        previous = at.stage;
        at.advance(shape.stages);
      }
      wgmma_wait<0>();
      release(previous);
      finish_segment<kRows>(acc, segment, shape, tile, flag, epilogue, state);
    }
    epilogue.finish(tile, state);
  }
#endif
}

// -------------------------------------------------------------------------------------- other GPUs

constexpr int kPlainStages = 6;

template <int kRows>
constexpr int plain_shared_bytes() {
  return 16 + kPlainStages * (kTileColumns + kRows) * kSubChunk * 2 +
         kRows * kTilePitch * static_cast<int>(sizeof(float)) + 16;
}

// 16 bytes to shared memory without going through registers; zeros where not valid.
__device__ __forceinline__ void copy_16(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from));
}

template <class T>
__device__ __forceinline__ void mma(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// The same work in the same order from stages of 64 k. The rows of a stage are swizzled as on
// Hopper: 16-byte piece p of row r lies at place p ^ (r % 8), so that neither copies nor ldmatrix
// conflict.
template <class T, int kRows, class Epilogue>
__global__ void __launch_bounds__(kComputeThreads)
    matmul_plain(const T* __restrict__ weights, const T* __restrict__ x,
                 const __grid_constant__ MatmulShape shape,
                 const __grid_constant__ Epilogue epilogue) {
  constexpr int kStageRows = kTileColumns + kRows, kStageBytes = kStageRows * kSubChunk * 2;
  constexpr int kSubs = kChunk / kSubChunk;
  extern __shared__ __align__(16) uint8_t raw[];
  const uint32_t ring = shared_address(raw);
  float* tile = reinterpret_cast<float*>(raw + kPlainStages * kStageBytes);
  uint32_t* flag = reinterpret_cast<uint32_t*>(tile + kRows * kTilePitch);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int segments = shape.plan.parts_per_block + shape.plan.rounds;
  wait_for_predecessor();
  typename Epilogue::State state = epilogue.begin();

  const auto load = [&](const TileSegment& segment, int sub_chunk, int stage) {
    for (int i = thread; i < kStageRows * 8; i += kComputeThreads) {
      const int row = i / 8, piece = i % 8;
      const int k = sub_chunk * kSubChunk + piece * 8;
      const bool is_weight = row < kTileColumns;
      const int source_row = is_weight ? segment.tile * kTileColumns + row : row - kTileColumns;
      const bool valid = k < shape.k && source_row < (is_weight ? shape.n : shape.m);
      const T* from =
          (is_weight ? weights : x) + (valid ? static_cast<int64_t>(source_row) * shape.k + k : 0);
      const int offset = stage * kStageBytes + row * (kSubChunk * 2) + ((piece ^ (row & 7)) * 16);
      if (shape.aligned) {
        copy_16(ring + offset, from, valid);
      } else {
        alignas(16) uint16_t values[8] = {};
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          if (valid && k + e < shape.k) values[e] = reinterpret_cast<const uint16_t*>(from)[e];
        }
        *reinterpret_cast<uint4*>(raw + offset) = *reinterpret_cast<const uint4*>(values);
      }
    }
  };

  // The loads run kPlainStages - 1 stages ahead of the sums, over the ends of segments too.
  int next_i = -1, next = 0, next_end = 0, next_stage = 0;
  TileSegment next_segment;
  const auto load_next = [&]() {
    while (next >= next_end && next_i < segments) {
      if (++next_i < segments && segment_at(shape.plan, blockIdx.x, next_i, &next_segment)) {
        next = next_segment.begin * kSubs;
        next_end = next_segment.end * kSubs;
      }
    }
    if (next < next_end) {
      load(next_segment, next++, next_stage);
      if (++next_stage == kPlainStages) next_stage = 0;
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  for (int s = 0; s < kPlainStages - 1; ++s) load_next();

  int stage = 0;
  TileSegment segment;
  for (int i = 0; i < segments; ++i) {
    if (!segment_at(shape.plan, blockIdx.x, i, &segment)) continue;
    float acc[kRows / 8][4];
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j) acc[j][0] = acc[j][1] = acc[j][2] = acc[j][3] = 0;
    for (int c = segment.begin * kSubs; c < segment.end * kSubs; ++c) {
      asm volatile("cp.async.wait_group %0;" ::"n"(kPlainStages - 2) : "memory");
      __syncthreads();  // the stage has arrived for all, and the one before is free
      load_next();
      const uint32_t base = ring + stage * kStageBytes;
      if (++stage == kPlainStages) stage = 0;
      const auto place = [&](int row, int piece) {
        return base + row * (kSubChunk * 2) + ((piece ^ (row & 7)) * 16);
      };
#pragma unroll
      for (int step = 0; step < kSubChunk / 32; ++step) {  // two mma deep
        uint32_t a[2][4];
        load_matrices(a[0], place(warp * 16 + lane % 16, step * 4 + lane / 16));
        load_matrices(a[1], place(warp * 16 + lane % 16, step * 4 + 2 + lane / 16));
#pragma unroll
        for (int j = 0; j < kRows / 8; ++j) {
          uint32_t b[4];
          load_matrices(b, place(kTileColumns + 8 * j + lane % 8, step * 4 + lane / 8));
          mma<T>(acc[j], a[0], b[0], b[1]);
          mma<T>(acc[j], a[1], b[2], b[3]);
        }
      }
    }
    finish_segment<kRows>(acc, segment, shape, tile, flag, epilogue, state);
  }
  epilogue.finish(tile, state);
}

}  // namespace commfuse::gpu
