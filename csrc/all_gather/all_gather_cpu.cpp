#include <cstring>

#include "runtime/slices.h"
#include "runtime/tensors.h"

namespace commfuse {
namespace {

at::Tensor all_gather(const at::Tensor& x, int64_t handle) {
  Communicator& communicator = Communicator::from_handle(handle);
  const DType dtype = dtype_of_tensor(x, "x");
  TORCH_CHECK_VALUE(x.dim() > 0, "x has 0 dimensions; the ranks' are joined along the first one");
  TORCH_CHECK_VALUE(x.is_contiguous(), "x is not contiguous");
  const int world = communicator.world(), rank = communicator.rank();
  at::DimVector shape(x.sizes());
  shape[0] *= world;
  at::Tensor out = empty_output(shape, x.scalar_type());

  const CommunicationTimer timer(communicator);
  const Descriptor descriptor = describe(Op::all_gather, dtype, x.sizes());
  const int64_t n = x.numel(), size = static_cast<int64_t>(size_of(dtype));
  const std::byte* from = static_cast<const std::byte*>(x.const_data_ptr());
  std::byte* to = static_cast<std::byte*>(out.mutable_data_ptr());
  if (world == 1) {
    const Call call(communicator, descriptor);
    std::memcpy(to, from, n * size);
    return out;
  }
  const int64_t capacity = static_cast<int64_t>(communicator.payload_bytes(0)) / size;
  int64_t done = 0;
  do {
    Call call(communicator, descriptor);
    const std::byte* mine = from + done * size;
    auto copy = [&](std::byte* target, const std::byte* source, int64_t begin, int64_t count) {
      std::memcpy(target + begin * size, source + begin * size, count * size);
    };
    const int64_t part = std::min(capacity, n - done);
    exchange_in_slices(
        call, part, size,
        [&](int64_t begin, int64_t count) { copy(call.payload(rank, 0), mine, begin, count); },
        [&](int64_t begin, int64_t count) {
          for (int r = 0; r < world; ++r) {
            copy(to + (r * n + done) * size, r == rank ? mine : call.payload(r, 0), begin, count);
          }
        });
    done += part;
  } while (done < n);
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(commfuse, CPU, m) { m.impl("all_gather", &all_gather); }

}  // namespace commfuse
