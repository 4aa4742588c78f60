// y = RMSNorm(x) weight, row by row: behind an all-reduce that has added the residual, or, where
// there is one rank, behind a GEMM, with the residual.
//
// Two launches, since an all-reduce is fastest spread over all multiprocessors, and a row belongs
// to few. (Measured, W = 2, 4, 8, one row of 16 KB, us: a block that sends, adds and normalises its
// row 7.6, 12.8, 22; a cluster of blocks 5.0, 7.1, 20.7; the all-reduce alone 2.3, 3.2, 6.0. A
// multiprocessor stores some 25 bytes a clock.)
#pragma once

#include "gpu/protocol.cuh"
#include "gpu/units.cuh"

namespace commfuse::gpu {

constexpr int kNormThreads = 512;

// Of a block that normalises rows of so many bytes.
inline int norm_threads(int64_t row_bytes) {
  const int64_t units = (row_bytes + 15) / 16;
  int threads = 64;
  while (threads < kNormThreads && threads < units) threads *= 2;
  return threads;
}

// The sum of a row's squares as the blocks of reduce_tiles form it (matmul_all_reduce_gpu.cuh): of
// eight units first, then of every 32nd of these sums, then of 32 lanes. A row's bits must not
// depend on which of the two kernels the number of rows has chosen.
class SumOfSquares {
 public:
  static constexpr int kUnits = 8;      // of a sum
  static constexpr int kMostSteps = 2;  // between two calls of add()

  __device__ explicit SumOfSquares(float* shared) : shared_(shared) {}

  // All threads: of the unit at threadIdx.x + (steps so far) * blockDim.x; zero behind the row.
  __device__ void note(int step, float squares) {
#pragma unroll
    for (int offset = kUnits / 2; offset > 0; offset /= 2) {
      squares += __shfl_xor_sync(0xffffffffu, squares, offset);
    }
    const int sums = static_cast<int>(blockDim.x) / kUnits;
    if (threadIdx.x % kUnits == 0) shared_[step * sums + threadIdx.x / kUnits] = squares;
  }
  // All threads: adds what has been noted since the last time.
  __device__ void add(int steps) {
    __syncthreads();
    const int count = steps * static_cast<int>(blockDim.x) / kUnits;
    for (int i = threadIdx.x % 32; i < count; i += 32) total_ += shared_[i];
    __syncthreads();
  }
  // All threads get it.
  __device__ float total() const {
    float sum = total_;
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    return sum;
  }

 private:
  float* shared_;
  float total_ = 0;  // of this lane; the same in every warp
};

// A block: y = RMSNorm(row) weight, of n elements. load(j) is unit j of the row, and is asked again
// for what a thread cannot keep; keep(j, unit) is told each unit once.
template <class T, class Load, class Keep>
__device__ __forceinline__ void normalise_row(const T* weight, float eps, T* y, int n,
                                              float* shared, Load load, Keep keep) {
  constexpr int kHeld = SumOfSquares::kMostSteps;  // units that a thread keeps
  constexpr int kElements = 16 / static_cast<int>(sizeof(T));
  const int units = (n + kElements - 1) / kElements;
  const Units<const T> factor(weight, n);
  const Units<T> to(y, n);
  const auto at = [&](int k) { return static_cast<int>(threadIdx.x + k * blockDim.x); };

  uint4 held[kHeld], by[kHeld];
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    if (at(k) >= units) continue;
    held[k] = load(at(k));
    by[k] = factor.load(at(k));
  }
  SumOfSquares squares(shared);
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    float own = 0;
    if (at(k) < units) {
      keep(at(k), held[k]);
      own = squares_of<T>(held[k]);
    }
    squares.note(k, own);
  }
  squares.add(kHeld);
  for (int first = kHeld * blockDim.x; first < units; first += blockDim.x) {
    const int j = first + threadIdx.x;
    float own = 0;
    if (j < units) {
      const uint4 unit = load(j);
      keep(j, unit);
      own = squares_of<T>(unit);
    }
    squares.note(0, own);
    squares.add(1);
  }
  const float mean = squares.total() / static_cast<float>(n);
  const float scale = 1.0f / sqrtf(mean + eps);
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    if (at(k) < units) to.store(at(k), scaled<T>(held[k], scale, by[k]));
  }
  for (int j = at(kHeld); j < units; j += blockDim.x) {
    to.store(j, scaled<T>(load(j), scale, factor.load(j)));
  }
}

template <class T>
struct NormRows {
  const T* x;         // [rows, n]
  const T* residual;  // [rows, n] or null
  const T* weight;    // [n]
  T* y;               // [rows, n]
  T* out;             // [rows, n], x + residual, or null
  float eps;
  int n;
};

// A block for each row.
template <class T>
__global__ void __launch_bounds__(kNormThreads, 2)
    rms_norm_rows(const __grid_constant__ NormRows<T> a, bool successor_early) {
  __shared__ float shared[SumOfSquares::kMostSteps * kNormThreads / SumOfSquares::kUnits];
  wait_for_predecessor(successor_early);
  const int64_t offset = int64_t{blockIdx.x} * a.n;
  const Units<const T> from(a.x + offset, a.n);
  const Units<const T> addend(a.residual ? a.residual + offset : nullptr, a.n);
  const Units<T> sums(a.out ? a.out + offset : nullptr, a.n);
  normalise_row<T>(
      a.weight, a.eps, a.y + offset, a.n, shared,
      [&](int j) {
        UnitSum<T, 1> sum = {{from.load(j)}};
        if (!a.residual) return sum.unit[0];
        const uint4 more = addend.load(j);
        return sum.total(1, &more);
      },
      [&](int j, uint4 unit) {
        if (a.out) sums.store(j, unit);
      });
}

}  // namespace commfuse::gpu
