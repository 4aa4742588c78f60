#include <cstring>

#include "runtime/slices.h"
#include "runtime/tensors.h"

namespace commfuse {
namespace {

at::Tensor reduce_scatter(const at::Tensor& x, int64_t handle, at::OptionalIntArrayRef part_of) {
  Communicator& communicator = Communicator::from_handle(handle);
  const DType dtype = dtype_of_tensor(x, "x");
  TORCH_CHECK_VALUE(x.dim() > 0, "x has 0 dimensions; the ranks share its first one");
  TORCH_CHECK_VALUE(x.is_contiguous(), "x is not contiguous");
  const int world = communicator.world(), rank = communicator.rank();
  const int64_t rows = x.size(0) / world;
  TORCH_CHECK_VALUE(rows * world == x.size(0), "x has ", x.size(0), " rows, which ", world,
                    " ranks cannot share evenly; use ", rows * world, " or ", (rows + 1) * world);
  at::DimVector shape(x.sizes());
  shape[0] = rows;
  at::Tensor out = empty_output(shape, x.scalar_type());

  const CommunicationTimer timer(communicator);
  const Descriptor descriptor = describe(Op::reduce_scatter, dtype, part_of.value_or(x.sizes()));
  const int64_t n = out.numel(), size = static_cast<int64_t>(size_of(dtype));
  const std::byte* from = static_cast<const std::byte*>(x.const_data_ptr());
  std::byte* to = static_cast<std::byte*>(out.mutable_data_ptr());
  if (world == 1) {
    const Call call(communicator, descriptor);
    const void* source = from;
    kernels().sum({dtype, &source, 1, nullptr, nullptr, to, n});
    return out;
  }
  const int64_t capacity = static_cast<int64_t>(communicator.payload_bytes(0)) / size / world;
  int64_t done = 0;
  do {
    Call call(communicator, descriptor);
    const int64_t part = std::min(capacity, n - done);
    // What this rank has for rank d, and what rank s gives to it: parts of chunk d of their x. The
    // part for a rank itself stays empty in its payload.
    auto mine = [&](int d) { return from + (d * n + done) * size; };
    auto given = [&](int s, int d) { return call.payload(s, 0) + d * part * size; };
    exchange_in_slices(
        call, part, size,
        [&](int64_t begin, int64_t count) {
          for (int d = 0; d < world; ++d) {
            if (d == rank) continue;
            std::memcpy(given(rank, d) + begin * size, mine(d) + begin * size, count * size);
          }
        },
        [&](int64_t begin, int64_t count) {
          const void* sources[kMaxWorld];
          for (int s = 0; s < world; ++s) {
            sources[s] = (s == rank ? mine(rank) : given(s, rank)) + begin * size;
          }
          kernels().sum(
              {dtype, sources, world, nullptr, nullptr, to + (done + begin) * size, count});
        });
    done += part;
  } while (done < n);
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(commfuse, CPU, m) { m.impl("reduce_scatter", &reduce_scatter); }

}  // namespace commfuse
