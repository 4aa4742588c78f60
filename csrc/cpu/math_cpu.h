// Elementary functions on Vec, for the instruction set of the including file.
#pragma once

namespace commfuse::COMMFUSE_ISA {

// e^x to about 2 ulp for x in -87..88; beyond, the value at the border.
inline Vec exponential(Vec x) {
  x = max(min(x, broadcast(88.0f)), broadcast(-87.0f));
  const Vec n = round_even(mul(x, broadcast(1.44269504f)));
  // ln 2 in two parts: n * 0.693359375 is exact, the rest is small.
  Vec r = fma(n, broadcast(-0.693359375f), x);
  r = fma(n, broadcast(2.12194440e-4f), r);
  Vec p = broadcast(1.0f / 720);
  p = fma(p, r, broadcast(1.0f / 120));
  p = fma(p, r, broadcast(1.0f / 24));
  p = fma(p, r, broadcast(1.0f / 6));
  p = fma(p, r, broadcast(0.5f));
  p = fma(p, r, broadcast(1.0f));
  p = fma(p, r, broadcast(1.0f));
  return times_power_of_two(p, n);
}

inline Vec silu(Vec x) { return div(x, add(broadcast(1.0f), exponential(sub(zero(), x)))); }

}  // namespace commfuse::COMMFUSE_ISA
