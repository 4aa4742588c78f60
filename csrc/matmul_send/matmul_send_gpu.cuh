// The last GEMM of a pipeline stage in decoding: its epilogue puts finished tiles straight into the
// next stage's slot, while later tiles still stream. All rows are finished with the last tile,
// which publishes them. A full slot is waited for at the first finished tile, not before the GEMM.
#pragma once

#include "gpu/message.cuh"
#include "matmul/matmul_gpu.cuh"

namespace commfuse::gpu {

template <class T>
struct PutTiles {
  GpuMessage message;
  const T* bias;      // [n] or null
  const T* residual;  // [m, n] or null
  int m, n;

  struct State {
    MessageEnd end;
    bool alive;
    bool slot_is_free;
  };

  __device__ State begin() const {
    MessageEnd end(message);
    const bool alive = end.begin();
    return {end, alive, false};
  }
  __device__ void tile(const float* tile, int first_column, State& state) const {
    if (!state.slot_is_free) {
      const bool free = state.alive && (threadIdx.x % 32 != 0 || state.end.await_free());
      state.alive = __all_sync(0xffffffffu, free);
      __syncwarp();  // the other lanes' stores come after the acquire
      state.slot_is_free = true;
    }
    const int column = threadIdx.x % 16 * 4;
    const int64_t pack = (first_column + column) / 4;
    uint2 addend = {0, 0};
    if (bias) addend = Row<const T>(bias, n).load(pack);
    for (int row = threadIdx.x / 16; row < m && state.alive; row += kComputeThreads / 16) {
      Floats<T> value(addend);
#pragma unroll
      for (int i = 0; i < 4; ++i) value.value[i] += tile[row * kTilePitch + column + i];
      if (residual) {
        value = Floats<T>(value.pack());
        value.add(Row<const T>(residual + static_cast<int64_t>(row) * n, n).load(pack));
      }
      Row<T>(state.end.template sent_row<T>(row), n).store(pack, value.pack());
    }
    compute_barrier();
    // A warp that has failed has stored nothing; the abort word then says so.
    if (threadIdx.x == 0 && state.alive && state.end.alive()) {
      state.end.finish_sent_part((n + kTileColumns - 1) / kTileColumns);
    }
  }
  __device__ void finish(float*, State&) const {}
};

}  // namespace commfuse::gpu
