// GEMM for few rows: y = x w^T over packed weights, which stream from memory once, in order.
//
// Every output is summed over k in the same order whatever the number of rows, so that a row's bits
// do not depend on its batch.
#pragma once

#include "cpu/kernel_table.h"
#include "cpu/math_cpu.h"

namespace commfuse::COMMFUSE_ISA {

// How weights of type T are packed and multiplied: k_step consecutive k lie together for each
// output, and take `terms` steps of the sum, each with a vector of weights and an element of x.
template <class T>
struct Packed {
  static constexpr int k_step = 1, terms = 1;
  using X = float;  // what the sum takes x as
  using Weights = Vec;
  using Input = Vec;
  static Weights load_weights(const T* p, int) { return load(p); }
  static Input load_input(const float* x) { return broadcast(*x); }
  static Vec dot(Vec acc, Input x, Weights w) { return fma(x, w, acc); }
};
#ifdef COMMFUSE_BF16_INSTRUCTIONS
template <>
struct Packed<BFloat16> : PairProducts {};
#else
template <>
struct Packed<BFloat16> : Packed<float> {
  static constexpr int k_step = 2, terms = 2;
  static Weights load_weights(const BFloat16* p, int term) { return load_half(p, term); }
};
#endif

// float32 products summed in one run: longer sums are put together from runs, since the rounding
// error of a run grows with its length, and beyond what torch's GEMM errs. The narrow types lose
// more when their result is rounded.
constexpr int64_t kFloatRun = 32;
// All rows use a chunk of a panel, in the L1 cache, while the next one arrives there.
constexpr int64_t kChunkBytes = 16 * 1024;
template <class T>
constexpr int64_t kChunkK = kChunkBytes / (kPanelColumns * static_cast<int64_t>(sizeof(T)));
// Rows whose sums are kept at once, and that share one pass over the weights.
constexpr int64_t kGroupRows = 256;

// What is fetched from memory during a stretch of k: as much in a step as a step of a whole panel
// reads, and no more once enough has been. Into all caches: a non-temporal prefetch would spare
// what they hold, but halves the bandwidth on Intel's server cores.
template <class T>
struct Prefetch {
  static constexpr int kLines =
      static_cast<int>(kPanelColumns * Packed<T>::k_step * sizeof(T) / 64);  // in a step
  const char* next;
  int64_t steps;

  void step() {
    if (steps <= 0) return;
    --steps;
    for (int i = 0; i < kLines; ++i) __builtin_prefetch(next + 64 * i);
    next += 64 * kLines;
  }
  void skip(int64_t count) {
    next += 64 * kLines * count;
    steps -= count;
  }
};

template <class T, int R>
inline void widen_rows(const T* x, int64_t x_stride, int64_t k, float* out, int64_t out_stride) {
  for (int r = 0; r < R; ++r, x += x_stride, out += out_stride) {
    int64_t i = 0;
    for (; i + kLanes <= k; i += kLanes) store(out + i, load(x + i));
    if (i < k) store(out + i, load(x + i, static_cast<int>(k - i)));
  }
}

// out[R][V] = x[R, k] times V vectors of a panel whose k-steps lie `step` elements apart; or, with
// `more`, onto what is there: float32 adds its sum to it, the narrow types go on from it.
template <class T, int R, int V>
inline void gemm_run(const typename Packed<T>::X* x, int64_t x_stride, const T* w, int64_t step,
                     int64_t k, bool more, float* out, int64_t out_stride, Prefetch<T> prefetch) {
  using P = Packed<T>;
  constexpr bool kAdds = dtype_of<T>::value == DType::float32;
  Vec acc[R][V];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) {
      acc[r][v] = more && !kAdds ? load(out + r * out_stride + v * kLanes) : zero();
    }
  }
  const auto multiply = [&](int term, auto input_of_row) {
    typename P::Weights weights[V];
    for (int v = 0; v < V; ++v) weights[v] = P::load_weights(w + v * kLanes * P::k_step, term);
    for (int r = 0; r < R; ++r) {
      const typename P::Input input = input_of_row(r);
      for (int v = 0; v < V; ++v) acc[r][v] = P::dot(acc[r][v], input, weights[v]);
    }
  };
  const int64_t whole = k / P::k_step * P::k_step;
  for (int64_t i = 0; i < whole; i += P::k_step, w += step) {
    prefetch.step();
    for (int term = 0; term < P::terms; ++term) {
      multiply(term, [&](int r) { return P::load_input(x + r * x_stride + i + term); });
    }
  }
  if (whole < k) {
    multiply(0, [&](int r) {
      const auto* last = x + r * x_stride + whole;
      if constexpr (P::terms < P::k_step) {
        return P::load_last_input(last);
      } else {
        return P::load_input(last);
      }
    });
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) {
      float* target = out + r * out_stride + v * kLanes;
      store(target, more && kAdds ? add(load(target), acc[r][v]) : acc[r][v]);
    }
  }
}

// The same for x as it is stored, and any k.
template <class T, int R, int V>
inline void gemm_tile(const T* x, int64_t x_stride, const T* w, int64_t step, int64_t k, bool more,
                      float* out, int64_t out_stride, Prefetch<T> prefetch) {
  using P = Packed<T>;
  constexpr bool kWidens = sizeof(typename P::X) > sizeof(T);
  constexpr int64_t kMost = kWidens ? kChunkK<T> : kFloatRun;
  if constexpr (!kWidens && dtype_of<T>::value != DType::float32) {
    return gemm_run<T, R, V>(x, x_stride, w, step, k, more, out, out_stride, prefetch);
  }
  int64_t begin = 0;
  do {
    const int64_t length = k - begin < kMost ? k - begin : kMost;
    if constexpr (kWidens) {
      // Rows a power of two apart would meet in the same sets of the cache.
      constexpr int64_t kStride = kMost + kLanes;
      alignas(64) float wide[R * kStride];
      widen_rows<T, R>(x + begin, x_stride, length, wide, kStride);
      gemm_run<T, R, V>(wide, kStride, w, step, length, more, out, out_stride, prefetch);
    } else {
      gemm_run<T, R, V>(x + begin, x_stride, w, step, length, more, out, out_stride, prefetch);
    }
    const int64_t steps = length / P::k_step;
    w += steps * step;
    prefetch.skip(steps);
    begin += length;
    more = true;
  } while (begin < k);
}

// A row tile of a whole panel, in pieces of as many vectors as the registers hold.
template <class T, int R>
inline void gemm_panel(const T* x, int64_t x_stride, const T* w, int64_t vecs, int64_t k, bool more,
                       float* out, Prefetch<T> prefetch) {
  constexpr int64_t kStep = Packed<T>::k_step;
  const int64_t step = vecs * kLanes * kStep;
  if (vecs == kPanelVecs && kTileVecs == kPanelVecs) {
    return gemm_tile<T, R, kPanelVecs>(x, x_stride, w, step, k, more, out, kPanelColumns, prefetch);
  }
  for (int64_t v = 0; v < vecs; ++v) {
    gemm_tile<T, R, 1>(x, x_stride, w + v * kLanes * kStep, step, k, more, out + v * kLanes,
                       kPanelColumns, prefetch);
    prefetch.steps = 0;
  }
}

template <class T, int R = kTileRows>
inline void gemm_rows(int rows, const T* x, int64_t x_stride, const T* w, int64_t vecs, int64_t k,
                      bool more, float* out, Prefetch<T> prefetch) {
  if constexpr (R > 1) {
    if (rows < R) {
      return gemm_rows<T, R - 1>(rows, x, x_stride, w, vecs, k, more, out, prefetch);
    }
  }
  gemm_panel<T, R>(x, x_stride, w, vecs, k, more, out, prefetch);
}

template <class T, class Out>
inline void gemm_epilogue(const GemmArgs& a, int64_t rows, int64_t vecs, int64_t column,
                          const float* tile, Out* out) {
  const T* bias = static_cast<const T*>(a.bias);
  for (int64_t r = 0; r < rows; ++r) {
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

// Rows [0, rows) of a, at most kGroupRows.
template <class T>
void gemm_group(const GemmArgs& a, int64_t panel_begin, int64_t panel_end) {
  const T* x = static_cast<const T*>(a.x);
  const T* weights = static_cast<const T*>(a.weights);
  const int64_t k_padded = packed_k(dtype_of<T>::value, a.k);
  const int64_t tiles = (a.rows + kTileRows - 1) / kTileRows;
  float sums[kGroupRows * kPanelColumns];
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    const int64_t column = panel * kPanelColumns;
    const int64_t left = round_up(a.n, kLanes) - column;
    const int64_t vecs = (left < kPanelColumns ? left : kPanelColumns) / kLanes;
    const int64_t k_bytes = vecs * kLanes * static_cast<int64_t>(sizeof(T));
    const T* w = weights + column * k_padded;
    int64_t begin = 0;
    do {
      const int64_t length = a.k - begin < kChunkK<T> ? a.k - begin : kChunkK<T>;
      // The next chunk is fetched by the tiles of rows in turn.
      const char* next = reinterpret_cast<const char*>(w) + length * k_bytes;
      const int64_t share = (length / Packed<T>::k_step + tiles - 1) / tiles;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t row = tile * a.rows / tiles, end = (tile + 1) * a.rows / tiles;
        const Prefetch<T> prefetch{next + tile * share * 64 * Prefetch<T>::kLines, share};
        if (begin + length == a.k) own_output<T>(a, row, end - row, column, vecs);
        gemm_rows<T>(static_cast<int>(end - row), x + row * a.x_stride + begin, a.x_stride, w, vecs,
                     length, begin > 0, sums + row * kPanelColumns, prefetch);
      }
      w += length * vecs * kLanes;
      begin += length;
    } while (begin < a.k);
    if (a.out_float32) {
      gemm_epilogue<T>(a, a.rows, vecs, column, sums, static_cast<float*>(a.out));
    } else {
      gemm_epilogue<T>(a, a.rows, vecs, column, sums, static_cast<T*>(a.out));
    }
  }
}

template <class T>
void gemm_typed(const GemmArgs& a, int64_t panel_begin, int64_t panel_end) {
  const int64_t groups = (a.rows + kGroupRows - 1) / kGroupRows;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t row = g * a.rows / groups;
    GemmArgs group = a;
    group.rows = (g + 1) * a.rows / groups - row;
    group.x = static_cast<const T*>(a.x) + row * a.x_stride;
    group.out = static_cast<char*>(a.out) + row * a.out_stride * (a.out_float32 ? 4 : sizeof(T));
    gemm_group<T>(group, panel_begin, panel_end);
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
