// Memory on huge pages, for weights: a stream over 4 KiB pages stalls at every page for its address
// translation, and reaches half the bandwidth (measured on a Zen 4 virtual machine: 15 against
// 30 GB/s).
#pragma once

#include <ATen/core/Tensor.h>

namespace commfuse {

// An uninitialised one-dimensional tensor in huge pages, where the system grants them. Small
// tensors share pages; a page is returned when the last tensor on it is gone.
at::Tensor huge_empty(int64_t elements, const at::TensorOptions& options);

}  // namespace commfuse
