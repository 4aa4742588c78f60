// GEMM for few rows: y = x w^T over packed weights, which stream from memory once, in order.
//
// Every output is summed over k in the same order whatever the number of rows, so that a row's bits
// do not depend on its batch.
#pragma once

#include "cpu/kernel_table.h"
#include "cpu/math_cpu.h"

namespace commfuse::COMMFUSE_ISA {

// How weights of type T are packed and multiplied; bfloat16 has its own, in pairs of k.
template <class T>
struct Packed {
  static constexpr int k_step = 1;
  using Weights = Vec;
  using Input = Vec;
  static Weights load_weights(const T* p) { return load(p); }
  static Input load_input(const T* x) { return broadcast_from(x); }
  static Input load_last_input(const T* x) { return broadcast_from(x); }
  static Vec dot(Vec acc, Input x, Weights w) { return fma(x, w, acc); }
};
template <>
struct Packed<BFloat16> : PackedBFloat16 {};

// float32 products summed in one run: longer sums are put together from runs, since the rounding
// error of a run grows with its length, and beyond what torch's GEMM errs. The narrow types lose
// more when their result is rounded.
constexpr int64_t kFloatRun = 32;

// out[R][V] (+)= x[R, k] times V vectors of a panel whose k-steps lie `step` elements apart.
template <class T, int R, int V, bool kAdd>
inline void gemm_run(const T* x, int64_t x_stride, const T* w, int64_t step, int64_t k, float* out,
                     int64_t out_stride) {
  using P = Packed<T>;
  // With a few rows the loop waits for memory: ask for the lines some 2 KB ahead. With more, the
  // hardware prefetcher has time enough. Into all caches: a non-temporal prefetch would spare what
  // they hold, but halves the bandwidth on Intel's server cores.
  constexpr bool kPrefetch = R <= 4;
  constexpr int64_t kAhead = 2048 / sizeof(T);
  Vec acc[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) acc[r][v] = zero();
  const int64_t whole = k / P::k_step * P::k_step;
  for (int64_t i = 0; i < whole; i += P::k_step, w += step) {
    typename P::Weights weights[V];
    for (int v = 0; v < V; ++v) {
      weights[v] = P::load_weights(w + v * kLanes * P::k_step);
      if (kPrefetch) __builtin_prefetch(w + v * kLanes * P::k_step + kAhead);
    }
    for (int r = 0; r < R; ++r) {
      const typename P::Input input = P::load_input(x + r * x_stride + i);
      for (int v = 0; v < V; ++v) acc[r][v] = P::dot(acc[r][v], input, weights[v]);
    }
  }
  if (whole < k) {
    for (int r = 0; r < R; ++r) {
      const typename P::Input input = P::load_last_input(x + r * x_stride + whole);
      for (int v = 0; v < V; ++v) {
        acc[r][v] = P::dot(acc[r][v], input, P::load_weights(w + v * kLanes * P::k_step));
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) {
      float* target = out + r * out_stride + v * kLanes;
      store(target, kAdd ? add(load(target), acc[r][v]) : acc[r][v]);
    }
  }
}

// The same, written, for any k.
template <class T, int R, int V>
inline void gemm_tile(const T* x, int64_t x_stride, const T* w, int64_t step, int64_t k, float* out,
                      int64_t out_stride) {
  constexpr bool kRuns = dtype_of<T>::value == DType::float32;
  int64_t run = kRuns && k > kFloatRun ? kFloatRun : k;
  gemm_run<T, R, V, false>(x, x_stride, w, step, run, out, out_stride);
  if constexpr (kRuns) {
    for (int64_t i = run; i < k; i += run) {
      run = k - i < kFloatRun ? k - i : kFloatRun;
      gemm_run<T, R, V, true>(x + i, x_stride, w + i * step, step, run, out, out_stride);
    }
  }
}

// A row tile of a whole panel, in pieces of as many vectors as the registers hold.
template <class T, int R>
inline void gemm_panel(const T* x, int64_t x_stride, const T* w, int64_t vecs, int64_t k,
                       float* out) {
  constexpr int64_t kStep = Packed<T>::k_step;
  const int64_t step = vecs * kLanes * kStep;
  int64_t v = 0;
  if (vecs == kPanelVecs && kTileVecs == kPanelVecs) {
    return gemm_tile<T, R, kPanelVecs>(x, x_stride, w, step, k, out, kPanelColumns);
  }
  for (; v < vecs; ++v) {
    gemm_tile<T, R, 1>(x, x_stride, w + v * kLanes * kStep, step, k, out + v * kLanes,
                       kPanelColumns);
  }
}

template <class T, int R = kTileRows>
inline void gemm_rows(int rows, const T* x, int64_t x_stride, const T* w, int64_t vecs, int64_t k,
                      float* out) {
  if constexpr (R > 1) {
    if (rows < R) return gemm_rows<T, R - 1>(rows, x, x_stride, w, vecs, k, out);
  }
  gemm_panel<T, R>(x, x_stride, w, vecs, k, out);
}

template <class T, class Out>
inline void gemm_epilogue(const GemmArgs& a, int rows, int64_t vecs, int64_t column,
                          const float* tile, Out* out) {
  const T* bias = static_cast<const T*>(a.bias);
  for (int r = 0; r < rows; ++r) {
    for (int64_t v = 0; v < vecs; ++v) {
      Vec value = load(tile + r * kPanelColumns + v * kLanes);
      int64_t out_column = column + v * kLanes;
      if (bias) {
        const int64_t valid = a.n - out_column;
        value = add(value, valid >= kLanes ? load(bias + out_column)
                                           : load(bias + out_column, static_cast<int>(valid)));
      }
      if (a.activation == Activation::silu_mul) {
        // This vector is gate, the next is up.
        ++v;
        Vec up = load(tile + r * kPanelColumns + v * kLanes);
        if (bias) up = add(up, load(bias + out_column + kLanes));
        value = mul(silu(value), up);
        out_column /= 2;
      }
      const int64_t valid = a.out_columns - out_column;
      Out* target = out + r * a.out_stride + out_column;
      if (valid >= kLanes) {
        store(target, value);
      } else if (valid > 0) {
        store(target, value, static_cast<int>(valid));
      }
    }
  }
}

// Asks for the lines of a tile of the output before it is computed: where they are a payload, the
// peers' caches still hold them, and the stores would wait for each.
template <class T>
inline void own_output(const GemmArgs& a, int64_t row, int64_t rows, int64_t column, int64_t vecs) {
#if defined(__x86_64__)
  if (a.out_float32 || a.activation != Activation::none) return;
  const int64_t valid = a.out_columns - column;
  const int64_t bytes =
      (valid < vecs * kLanes ? valid : vecs * kLanes) * static_cast<int64_t>(sizeof(T));
  for (int64_t r = row; r < row + rows; ++r) {
    const char* to =
        reinterpret_cast<const char*>(static_cast<T*>(a.out) + r * a.out_stride + column);
    // Not __builtin_prefetch: without its instruction set's flag it would ask for reading.
    for (int64_t i = 0; i < bytes; i += 64) asm volatile("prefetchw %0" ::"m"(to[i]));
  }
#endif
}

template <class T>
void gemm_typed(const GemmArgs& a, int64_t panel_begin, int64_t panel_end) {
  const T* x = static_cast<const T*>(a.x);
  const T* weights = static_cast<const T*>(a.weights);
  const int64_t k_padded = packed_k(dtype_of<T>::value, a.k);
  float tile[kTileRows * kPanelColumns];
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    const int64_t column = panel * kPanelColumns;
    const int64_t left = round_up(a.n, kLanes) - column;
    const int64_t vecs = (left < kPanelColumns ? left : kPanelColumns) / kLanes;
    const T* w = weights + column * k_padded;
    for (int64_t row = 0; row < a.rows; row += kTileRows) {
      const int rows = static_cast<int>(a.rows - row < kTileRows ? a.rows - row : kTileRows);
      own_output<T>(a, row, rows, column, vecs);
      gemm_rows<T>(rows, x + row * a.x_stride, a.x_stride, w, vecs, a.k, tile);
      if (a.out_float32) {
        gemm_epilogue<T>(a, rows, vecs, column, tile,
                         static_cast<float*>(a.out) + row * a.out_stride);
      } else {
        gemm_epilogue<T>(a, rows, vecs, column, tile, static_cast<T*>(a.out) + row * a.out_stride);
      }
    }
  }
}

inline void gemm(const GemmArgs& a, int64_t panel_begin, int64_t panel_end) {
  switch (a.dtype) {
    case DType::bfloat16:
      return gemm_typed<BFloat16>(a, panel_begin, panel_end);
    case DType::float16:
      return gemm_typed<Float16>(a, panel_begin, panel_end);
    case DType::float32:
      return gemm_typed<float>(a, panel_begin, panel_end);
  }
}

}  // namespace commfuse::COMMFUSE_ISA
