// GEMM for bfloat16 on Intel's AMX tiles: 16 rows of 32 k times 32 k of 16 outputs. The packed
// weights lie as the tiles want them: a tile is 16 pairs of k, 64 bytes each, a step apart.
//
// Tiles serve a single row, too: they stream weights as fast as memory gives them, and a row's bits
// could not be independent of its batch if few rows went another way, since TDPBF16PS rounds unlike
// any AVX-512 instruction: it sums the 16 even and the 16 odd products of a tile each from zero by
// fused multiply-adds, adds the two sums, then adds that to the accumulator.
#pragma once

#include "cpu/kernel_table.h"
#include "matmul/matmul_cpu.h"

namespace commfuse::amx {

using avx512_bf16::load;
using avx512_bf16::store;

constexpr int64_t kTileRows = 16;  // of x and of the accumulators
constexpr int64_t kTileK = 32;
// Above 16 rows the weights come from memory a chunk at a time: all rows use a chunk of 64 KB while
// the next one arrives in the L2 cache.
constexpr int64_t kChunkTiles = 16;
// Rows whose accumulators are kept at once, and that share one pass over the weights.
constexpr int64_t kGroupRows = 256;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0 to 3 accumulate, 4 and 5 hold rows of x, 6 and 7 weights.
inline void configure_tiles(int64_t rows) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    config.row_bytes[tile] = 64;
    config.rows[tile] = static_cast<uint8_t>(tile < 6 ? rows : 16);
  }
  // GCC 12's intrinsic does not say that it reads memory.
  asm volatile("ldtilecfg %0" ::"m"(config));
}

// A stretch of k: x [rows, tiles * 32] times part of a panel, into (or onto) float32 accumulators
// [rows, 64].
struct Stretch {
  const BFloat16* x;
  int64_t x_stride;
  const BFloat16* w;
  int64_t step;  // elements from one pair of k to the next
  int64_t tiles;
  float* out;
  bool add;  // onto what is there
};

constexpr int64_t kOutBytes = kPanelColumns * sizeof(float);

// What is fetched from memory during a stretch, some lines with each tile of weights.
struct Prefetch {
  const char* next;
  int lines;

  void step() {
    for (int i = 0; i < lines; ++i, next += 64) _mm_prefetch(next, _MM_HINT_T0);
  }
};

// Up to 16 rows. Every tile of weights is preceded by the prefetch of as much, 4 KB ahead.
template <int V>
inline void multiply_rows(const Stretch& s, Prefetch prefetch) {
  const int64_t x_bytes = s.x_stride * 2, w_bytes = s.step * 2;
  if (s.add) {
    _tile_loadd(0, s.out, kOutBytes);
    if constexpr (V > 1) _tile_loadd(1, s.out + kLanes, kOutBytes);
    if constexpr (V > 2) _tile_loadd(2, s.out + 2 * kLanes, kOutBytes);
    if constexpr (V > 3) _tile_loadd(3, s.out + 3 * kLanes, kOutBytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t tile = 0; tile < s.tiles; ++tile) {
    const BFloat16* w = s.w + tile * (kTileK / 2) * s.step;
    _tile_loadd(4, s.x + tile * kTileK, x_bytes);
    prefetch.step();
    _tile_loadd(6, w, w_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (V > 1) {
      prefetch.step();
      _tile_loadd(7, w + 2 * kLanes, w_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (V > 2) {
      prefetch.step();
      _tile_loadd(6, w + 4 * kLanes, w_bytes);
      _tile_dpbf16ps(2, 4, 6);
    }
    if constexpr (V > 3) {
      prefetch.step();
      _tile_loadd(7, w + 6 * kLanes, w_bytes);
      _tile_dpbf16ps(3, 4, 7);
    }
  }
  _tile_stored(0, s.out, kOutBytes);
  if constexpr (V > 1) _tile_stored(1, s.out + kLanes, kOutBytes);
  if constexpr (V > 2) _tile_stored(2, s.out + 2 * kLanes, kOutBytes);
  if constexpr (V > 3) _tile_stored(3, s.out + 3 * kLanes, kOutBytes);
}

inline void multiply_rows(const Stretch& s, int64_t vecs, Prefetch prefetch) {
  switch (vecs) {
    case 1:
      return multiply_rows<1>(s, prefetch);
    case 2:
      return multiply_rows<2>(s, prefetch);
    case 3:
      return multiply_rows<3>(s, prefetch);
    default:
      return multiply_rows<4>(s, prefetch);
  }
}

// Two tiles of rows, those of the second at x_below, and two vectors: what is loaded is used twice.
inline void multiply_square(const Stretch& s, const BFloat16* x_below, Prefetch& prefetch) {
  const int64_t x_bytes = s.x_stride * 2, w_bytes = s.step * 2;
  float* below = s.out + kTileRows * kPanelColumns;
  if (s.add) {
    _tile_loadd(0, s.out, kOutBytes);
    _tile_loadd(1, s.out + kLanes, kOutBytes);
    _tile_loadd(2, below, kOutBytes);
    _tile_loadd(3, below + kLanes, kOutBytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t tile = 0; tile < s.tiles; ++tile) {
    const BFloat16* w = s.w + tile * (kTileK / 2) * s.step;
    prefetch.step();
    _tile_loadd(4, s.x + tile * kTileK, x_bytes);
    _tile_loadd(6, w, w_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, w + 2 * kLanes, w_bytes);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, x_below + tile * kTileK, x_bytes);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, s.out, kOutBytes);
  _tile_stored(1, s.out + kLanes, kOutBytes);
  _tile_stored(2, below, kOutBytes);
  _tile_stored(3, below + kLanes, kOutBytes);
}

// The first row of a tile. Where the rows are no multiple of 16, the last tile begins 16 before the
// end and computes some rows again, alike.
inline int64_t first_row(int64_t tile, int64_t rows) {
  const int64_t row = tile * kTileRows, last = rows > kTileRows ? rows - kTileRows : 0;
  return row < last ? row : last;
}

// Any number of rows of a group; a tile's accumulators lie at 16 times its number.
inline void multiply(const Stretch& s, int64_t rows, int64_t vecs) {
  const char* w = reinterpret_cast<const char*>(s.w);
  if (rows <= kTileRows) return multiply_rows(s, vecs, {w + 4096, 16});
  // The lines of the next chunk, evenly over this one.
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  const int64_t passes = (tiles + 1) / 2 * (kPanelVecs / 2);
  Prefetch prefetch{w + s.tiles * kTileK * s.step, static_cast<int>((64 + passes - 1) / passes)};
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const auto part = [&](int64_t v) {
      Stretch part = s;
      part.x += first_row(tile, rows) * s.x_stride;
      part.w += v * 2 * kLanes;
      part.out += tile * kTileRows * kPanelColumns + v * kLanes;
      return part;
    };
    if (vecs == kPanelVecs && tile + 1 < tiles) {
      const BFloat16* below = s.x + first_row(tile + 1, rows) * s.x_stride;
      for (int64_t v = 0; v < vecs; v += 2) multiply_square(part(v), below, prefetch);
      ++tile;
    } else {
      multiply_rows(part(0), vecs, prefetch);
    }
  }
}

// Rows [0, rows) of a, at most kGroupRows.
inline void gemm_group(const GemmArgs& a, int64_t panel_begin, int64_t panel_end) {
  const BFloat16* x = static_cast<const BFloat16*>(a.x);
  const BFloat16* weights = static_cast<const BFloat16*>(a.weights);
  const int64_t k_padded = packed_k(DType::bfloat16, a.k);
  const int64_t k_tiles = a.k / kTileK, k_whole = k_tiles * kTileK;
  const bool tail = k_whole < a.k || a.k == 0;
  alignas(64) BFloat16 x_tail[kGroupRows * kTileK], w_tail[kTileK * kPanelColumns];
  alignas(64) float acc[kGroupRows * kPanelColumns];
  if (tail) {
    for (int64_t row = 0; row < a.rows; ++row) {
      BFloat16* padded = x_tail + row * kTileK;
      __builtin_memset(padded, 0, kTileK * sizeof(BFloat16));
      __builtin_memcpy(padded, x + row * a.x_stride + k_whole,
                       static_cast<size_t>(a.k - k_whole) * sizeof(BFloat16));
    }
    __builtin_memset(w_tail, 0, sizeof w_tail);
  }
  const int64_t chunk_tiles = a.rows > kTileRows ? kChunkTiles : k_tiles;
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    const int64_t column = panel * kPanelColumns;
    const int64_t left = round_up(a.n, kLanes) - column;
    const int64_t vecs = (left < kPanelColumns ? left : kPanelColumns) / kLanes;
    const int64_t step = vecs * kLanes * 2;
    const BFloat16* w = weights + column * k_padded;
    avx512_bf16::own_output<BFloat16>(a, 0, a.rows, column, vecs);
    for (int64_t tile = 0; tile < k_tiles; tile += chunk_tiles) {
      const int64_t tiles = k_tiles - tile < chunk_tiles ? k_tiles - tile : chunk_tiles;
      multiply({x + tile * kTileK, a.x_stride, w + tile * (kTileK / 2) * step, step, tiles, acc,
                tile > 0},
               a.rows, vecs);
    }
    if (tail) {
      __builtin_memcpy(w_tail, w + k_whole / 2 * step,
                       static_cast<size_t>((k_padded - k_whole) / 2 * step) * sizeof(BFloat16));
      multiply({x_tail, kTileK, w_tail, step, 1, acc, k_tiles > 0}, a.rows, vecs);
    }
    for (int64_t tile = 0; tile * kTileRows < a.rows; ++tile) {
      const int64_t row = first_row(tile, a.rows);
      const int rows = static_cast<int>(a.rows - row < kTileRows ? a.rows - row : kTileRows);
      const float* from = acc + tile * kTileRows * kPanelColumns;
      if (a.out_float32) {
        avx512_bf16::gemm_epilogue<BFloat16>(a, rows, vecs, column, from,
                                             static_cast<float*>(a.out) + row * a.out_stride);
      } else {
        avx512_bf16::gemm_epilogue<BFloat16>(a, rows, vecs, column, from,
                                             static_cast<BFloat16*>(a.out) + row * a.out_stride);
      }
    }
  }
}

// As the table's gemm, of bfloat16.
inline void gemm_bfloat16(const GemmArgs& a, int64_t panel_begin, int64_t panel_end) {
  const int64_t groups = (a.rows + kGroupRows - 1) / kGroupRows;
  const int64_t group_rows = round_up((a.rows + groups - 1) / groups, 2 * kTileRows);
  for (int64_t row = 0; row < a.rows; row += group_rows) {
    GemmArgs group = a;
    group.rows = a.rows - row < group_rows ? a.rows - row : group_rows;
    group.x = static_cast<const BFloat16*>(a.x) + row * a.x_stride;
    group.out = static_cast<char*>(a.out) + row * a.out_stride * (a.out_float32 ? 4 : 2);
    configure_tiles(group.rows < kTileRows ? group.rows : kTileRows);
    gemm_group(group, panel_begin, panel_end);
  }
  // Frees the state that the kernel would otherwise save at every switch of tasks.
  _tile_release();
}

}  // namespace commfuse::amx
