// The CPU kernels as a table of functions, one table per instruction set, chosen at run time.
#pragma once

#include "cpu/dtypes.h"

namespace commfuse {

// Packed weights: panels of 64 outputs, each [K rounded up to k_step][vectors][16][k_step], where
// k_step is 2 for bfloat16 and 1 otherwise, and the last panel has fewer vectors where N ends. A
// GEMM therefore reads its weights as one sequential stream.
constexpr int64_t kLanes = 16;
constexpr int64_t kPanelVecs = 4;
constexpr int64_t kPanelColumns = kLanes * kPanelVecs;

// Tokens that share one draw of noise; shards of a vocabulary are cut at multiples of it.
constexpr int64_t kSampleBlock = 128;

constexpr int64_t packed_k(DType dtype, int64_t k) {
  return dtype == DType::bfloat16 ? round_up(k, 2) : k;
}
constexpr int64_t packed_elements(DType dtype, int64_t n, int64_t k) {
  return round_up(n, kLanes) * packed_k(dtype, k);
}
constexpr int64_t panel_count(int64_t n) { return round_up(n, kPanelColumns) / kPanelColumns; }

enum class Activation : uint8_t {
  none,
  // Rows of gate and up weights alternate in groups of 16; out = silu(gate) * up has half as many
  // columns.
  silu_mul,
};

struct GemmArgs {
  DType dtype;       // of x, weights, bias
  const void* x;     // [rows, k], row stride x_stride
  int64_t x_stride;  // elements
  int64_t rows;
  const void* weights;  // packed [n, k]
  int64_t n, k;
  const void* bias;  // [n] or null
  Activation activation;
  void* out;            // [rows, out_columns], row stride out_stride
  int64_t out_stride;   // elements
  int64_t out_columns;  // n, or the width of gate (n / 2 less its padding) for silu_mul
  bool out_float32;     // out is float32 instead of dtype
};

struct SumArgs {
  DType dtype;
  const void* const* sources;  // count pointers, added in this order
  int count;
  const void* bias;      // or null
  const void* residual;  // or null
  void* out;
  int64_t n;
};

struct AttentionArgs {
  DType dtype;
  void* k_cache;     // [sequences, kv_heads, max_length / 16, head_dim / k_step, 16, k_step]
  void* v_cache;     // [sequences, kv_heads, max_length, head_dim]
  const float* cos;  // [max_length, head_dim / 2]
  const float* sin;
  int64_t max_length;  // a multiple of 16
  int64_t head_dim;    // a multiple of 16
  int64_t heads, kv_heads;
  int64_t head_offset;  // global index of the first query head
  int64_t group;        // query heads per KV head in the whole model
  float scale;
  const void* q_norm;  // [head_dim] or null (Qwen3)
  const void* k_norm;
  float eps;
};

struct KernelTable {
  const char* name;
  void (*gemm)(const GemmArgs&, int64_t panel_begin, int64_t panel_end);
  void (*sum)(const SumArgs&);
  // y = x / rms(x) * weight over n elements.
  void (*rms_norm)(DType, const void* x, const void* weight, float eps, int64_t n, void* y);
  // Normalises and rotates the heads of one token's qkv row in place, appends its K and V.
  void (*attention_append)(const AttentionArgs&, void* qkv, int64_t sequence, int64_t position);
  // Attention of one token's query heads that share one KV head over positions 0..position.
  void (*attention_token)(const AttentionArgs&, const void* qkv, int64_t sequence, int64_t position,
                          int64_t kv_head, float* scratch, void* out);
  // The largest of n values and its lowest index; NaN (index of the first) if there is one.
  void (*argmax)(DType, const void* values, int64_t n, float* score, int64_t* index);
  // Of each block of kSampleBlock logits, the last may be shorter: its largest, or NaN if there is
  // one, and the sum of e^((x - largest) * scale) over all x >= bound. bound is finite.
  void (*block_sums)(DType, const void* values, int64_t n, float scale, float bound, float* maxima,
                     float* sums);
  // The n values of a block in float32, followed by -inf.
  void (*widen_sample_block)(DType, const void* values, int64_t n, float* out);
  // e^((x - largest) * scale) where x >= bound, 0 elsewhere, for the kSampleBlock values of a
  // block.
  void (*block_weights)(const float* x, float largest, float scale, float bound, float* out);
  // Reads memory and does nothing else: the bandwidth that a GEMM could reach.
  float (*read_memory)(const void* data, size_t bytes);
};

namespace amx {
// The only entry that is not avx512_bf16's. A pointer: GCC would take the definition, compiled for
// more than this declaration, for another version of a function.
extern void (*const gemm)(const GemmArgs&, int64_t panel_begin, int64_t panel_end);
}  // namespace amx
namespace avx512_bf16 {
extern const KernelTable table;
}
namespace avx512 {
extern const KernelTable table;
}
namespace avx2 {
extern const KernelTable table;
}
namespace plain {
extern const KernelTable table;
}

// The table for this processor, or the one named by COMMFUSE_CPU_ISA (amx, avx512_bf16,
// avx512_fma, avx512, avx2, plain).
// Throws std::invalid_argument if the name is unknown or the processor cannot run it.
const KernelTable& kernels();

}  // namespace commfuse
