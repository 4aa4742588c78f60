// Attention of single tokens over a KV cache, with grouped query heads (Ainslie et al., "GQA",
// 2023) and rotary embeddings (Su et al., "RoFormer", 2021; rotate-half layout).
//
// K is cached packed as the GEMM's weights are, 16 positions a vector, so that scores need no sums
// across lanes; V is cached in rows. A token's result depends on its own sequence alone.
#pragma once

#include "all_reduce_rms_norm/rms_norm_cpu.h"
#include "cpu/kernel_table.h"
#include "matmul/matmul_cpu.h"

namespace commfuse::COMMFUSE_ISA {

template <class T>
inline void rotate_head(T* head, const void* norm, const AttentionArgs& a, int64_t position) {
  if (norm) rms_norm_typed(head, static_cast<const T*>(norm), a.eps, a.head_dim, head);
  const int64_t half = a.head_dim / 2;
  const float* cos = a.cos + position * half;
  const float* sin = a.sin + position * half;
  for (int64_t i = 0; i < half; i += kLanes) {
    const int n = static_cast<int>(half - i < kLanes ? half - i : kLanes);
    const Vec x = load(head + i, n), y = load(head + half + i, n);
    const Vec c = load(cos + i, n), s = load(sin + i, n);
    store(head + i, sub(mul(x, c), mul(y, s)), n);
    store(head + half + i, add(mul(y, c), mul(x, s)), n);
  }
}

template <class T>
inline T* cached_head(const AttentionArgs& a, void* cache, int64_t sequence, int64_t kv_head) {
  return static_cast<T*>(cache) + (sequence * a.kv_heads + kv_head) * a.max_length * a.head_dim;
}

template <class T>
void attention_append_typed(const AttentionArgs& a, T* qkv, int64_t sequence, int64_t position) {
  constexpr int64_t kStep = Packed<T>::k_step;
  const int64_t dim = a.head_dim;
  T* k = qkv + a.heads * dim;
  const T* v = k + a.kv_heads * dim;
  for (int64_t h = 0; h < a.heads; ++h) rotate_head(qkv + h * dim, a.q_norm, a, position);
  for (int64_t h = 0; h < a.kv_heads; ++h) {
    rotate_head(k + h * dim, a.k_norm, a, position);
    T* block = cached_head<T>(a, a.k_cache, sequence, h) + position / kLanes * kLanes * dim;
    const int64_t lane = position % kLanes;
    for (int64_t d = 0; d < dim; ++d) {
      block[(d / kStep * kLanes + lane) * kStep + d % kStep] = k[h * dim + d];
    }
    __builtin_memcpy(cached_head<T>(a, a.v_cache, sequence, h) + position * dim, v + h * dim,
                     static_cast<size_t>(dim) * sizeof(T));
  }
}

// p[0..length) = softmax(p * scale); lanes behind length become 0.
inline void softmax_row(float* p, int64_t length, int64_t padded, float scale) {
  for (int64_t i = length; i < padded; ++i) p[i] = -__builtin_inff();
  Vec best = load(p);
  for (int64_t i = kLanes; i < padded; i += kLanes) best = max(best, load(p + i));
  const Vec shift = broadcast(-maximum(best) * scale);
  Vec total = zero();
  for (int64_t i = 0; i < padded; i += kLanes) {
    const Vec e = exponential(fma(load(p + i), broadcast(scale), shift));
    store(p + i, e);
  }
  for (int64_t i = length; i < padded; ++i) p[i] = 0.0f;
  for (int64_t i = 0; i < padded; i += kLanes) total = add(total, load(p + i));
  const Vec inverse = broadcast(1.0f / sum(total));
  for (int64_t i = 0; i < padded; i += kLanes) store(p + i, mul(load(p + i), inverse));
}

// out[R, dim] = p[R, length] v[length, dim], 64 columns at a time.
template <class T, int R>
inline void weigh_values(const float* p, int64_t p_stride, const T* v, int64_t length, int64_t dim,
                         T* out) {
  constexpr int kVecs = kTileVecs;
  for (int64_t column = 0; column < dim;) {
    const int64_t left = (dim - column) / kLanes;
    const int vecs = static_cast<int>(left < kVecs ? left : kVecs);
    Vec acc[R][kVecs];
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < kVecs; ++j) acc[r][j] = zero();
    for (int64_t i = 0; i < length; ++i) {
      Vec values[kVecs];
      for (int j = 0; j < kVecs; ++j)
        values[j] = j < vecs ? load(v + i * dim + column + j * kLanes) : zero();
      for (int r = 0; r < R; ++r) {
        const Vec weight = broadcast(p[r * p_stride + i]);
        for (int j = 0; j < kVecs; ++j) acc[r][j] = fma(weight, values[j], acc[r][j]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < vecs; ++j) store(out + r * dim + column + j * kLanes, acc[r][j]);
    column += vecs * kLanes;
  }
}

template <class T, int R = kTileRows>
inline void attend_heads(int rows, const T* q, const T* k, const T* v, int64_t length, int64_t dim,
                         float scale, float* scratch, T* out) {
  if constexpr (R > 1) {
    if (rows < R) return attend_heads<T, R - 1>(rows, q, k, v, length, dim, scale, scratch, out);
  }
  constexpr int64_t kAhead = 2048;  // bytes
  const int64_t padded = round_up(length, kLanes);
  for (int64_t i = 0; i < padded; i += kLanes) {
    const T* block = k + i * dim;
    gemm_tile<T, R, 1>(q, dim, block, kLanes * Packed<T>::k_step, dim, false, scratch + i, padded,
                       {reinterpret_cast<const char*>(block) + kAhead, 1});
  }
  for (int r = 0; r < R; ++r) softmax_row(scratch + r * padded, length, padded, scale);
  weigh_values<T, R>(scratch, padded, v, length, dim, out);
}

template <class T>
void attention_token_typed(const AttentionArgs& a, const T* qkv, int64_t sequence, int64_t position,
                           int64_t kv_head, float* scratch, T* out) {
  // The first and the last KV head of a rank may serve only part of a group.
  const int64_t first_group = a.head_offset / a.group;
  int64_t begin = (first_group + kv_head) * a.group - a.head_offset;
  int64_t end = begin + a.group;
  begin = begin < 0 ? 0 : begin;
  end = end > a.heads ? a.heads : end;
  const T* k = cached_head<T>(a, a.k_cache, sequence, kv_head);
  const T* v = cached_head<T>(a, a.v_cache, sequence, kv_head);
  for (int64_t h = begin; h < end; h += kTileRows) {
    const int rows = static_cast<int>(end - h < kTileRows ? end - h : kTileRows);
    attend_heads<T>(rows, qkv + h * a.head_dim, k, v, position + 1, a.head_dim, a.scale, scratch,
                    out + h * a.head_dim);
  }
}

inline void attention_append(const AttentionArgs& a, void* qkv, int64_t sequence,
                             int64_t position) {
  switch (a.dtype) {
    case DType::bfloat16:
      return attention_append_typed(a, static_cast<BFloat16*>(qkv), sequence, position);
    case DType::float16:
      return attention_append_typed(a, static_cast<Float16*>(qkv), sequence, position);
    case DType::float32:
      return attention_append_typed(a, static_cast<float*>(qkv), sequence, position);
  }
}

inline void attention_token(const AttentionArgs& a, const void* qkv, int64_t sequence,
                            int64_t position, int64_t kv_head, float* scratch, void* out) {
  switch (a.dtype) {
    case DType::bfloat16:
      return attention_token_typed(a, static_cast<const BFloat16*>(qkv), sequence, position,
                                   kv_head, scratch, static_cast<BFloat16*>(out));
    case DType::float16:
      return attention_token_typed(a, static_cast<const Float16*>(qkv), sequence, position, kv_head,
                                   scratch, static_cast<Float16*>(out));
    case DType::float32:
      return attention_token_typed(a, static_cast<const float*>(qkv), sequence, position, kv_head,
                                   scratch, static_cast<float*>(out));
  }
}

}  // namespace commfuse::COMMFUSE_ISA
