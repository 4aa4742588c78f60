// Random numbers as a function of what they are for: Philox4x32-10 (Salmon et al., "Parallel Random
// Numbers: As Easy as 1, 2, 3", 2011). No state, so that a token's noise is the same on every rank,
// for every number of ranks, in every batch, and whether the token was drafted or not.
#pragma once

#include <cmath>
#include <cstdint>

#include "gpu/host_device.h"

namespace commfuse {

// Draws for different purposes must not depend on each other.
enum class Stream : uint32_t { target, draft, acceptance };

struct Noise {
  double first, second;  // uniform in (0, 1), independent

  // -log of the first, a unit exponential variable.
  COMMFUSE_HOST_DEVICE double exponential() const { return -std::log(first); }
};

COMMFUSE_HOST_DEVICE inline Noise noise(uint64_t seed, uint64_t position, Stream stream,
                                        uint32_t block) {
  uint32_t x[4] = {static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32), block,
                   static_cast<uint32_t>(stream)};
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xd2511f53} * x[0], b = uint64_t{0xcd9e8d57} * x[2];
    x[0] = static_cast<uint32_t>(b >> 32) ^ x[1] ^ key[0];
    x[1] = static_cast<uint32_t>(b);
    x[2] = static_cast<uint32_t>(a >> 32) ^ x[3] ^ key[1];
    x[3] = static_cast<uint32_t>(a);
    key[0] += 0x9e3779b9;
    key[1] += 0xbb67ae85;
  }
  // 53 bits in the middle of their interval: never 0, never 1.
  auto uniform = [](uint32_t low, uint32_t high) {
    return (static_cast<double>((uint64_t{high} << 32 | low) >> 11) + 0.5) * 0x1p-53;
  };
  return {uniform(x[0], x[1]), uniform(x[2], x[3])};
}

}  // namespace commfuse
