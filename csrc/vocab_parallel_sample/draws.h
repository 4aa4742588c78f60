// The arithmetic of drawing, for CPU and GPU alike: what may decide about a token.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "vocab_parallel_sample/noise.h"

namespace commfuse {

// Every finite logit takes part; -inf never does.
constexpr float kNoBound = -FLT_MAX;
// Weights relative to the row's largest, as integers: their sums are the same in any order.
constexpr double kOne = 0x1p40;

COMMFUSE_HOST_DEVICE inline uint64_t fixed(float weight) {
  return static_cast<uint64_t>(weight * static_cast<float>(kOne));
}

// Floats in the order of integers; -0 is 0.
COMMFUSE_HOST_DEVICE inline uint32_t key_of(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

COMMFUSE_HOST_DEVICE inline float value_of(uint32_t key) {
  return __builtin_bit_cast(float, key >> 31 ? key & 0x7fffffffu : ~key);
}

// Whether a candidate takes the place of another: NaN does always, so that it is noticed; among
// equals the lowest id wins.
COMMFUSE_HOST_DEVICE inline bool replaces(double key, int32_t id, double other, int32_t other_id) {
  if (other != other) return false;
  return key != key || key > other || (key == other && id < other_id);
}

// What must lie at or above the bound, of a total: top_k tokens, or top_p of the mass.
COMMFUSE_HOST_DEVICE inline uint64_t wanted_tokens(int64_t top_k, uint64_t total) {
  const uint64_t wanted = static_cast<uint64_t>(top_k);
  return wanted < total ? wanted : total;
}
COMMFUSE_HOST_DEVICE inline uint64_t wanted_mass(double top_p, uint64_t total) {
  const uint64_t wanted = static_cast<uint64_t>(std::ceil(top_p * static_cast<double>(total)));
  return wanted < 1 ? 1 : wanted < total ? wanted : total;
}

// Whether a draft is accepted that was drawn with probability q, the row's largest logit, scale and
// mass given. A draft that the target or its own distribution excludes is refused.
COMMFUSE_HOST_DEVICE inline bool accepts(float draft_logit, float q, float largest, float bound,
                                         float scale, uint64_t mass, uint64_t seed,
                                         uint64_t position) {
  if (!(draft_logit >= bound)) return false;
  const double weight = std::exp((double{draft_logit} - largest) * double{scale});
  const double target = weight * kOne / static_cast<double>(mass);
  return noise(seed, position, Stream::acceptance, 0).first * q < target && q > 0;
}

}  // namespace commfuse
