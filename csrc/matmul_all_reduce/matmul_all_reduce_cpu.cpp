// Row-parallel layer with its tail: out = sum over ranks of x_r w_r^T (+ bias) (+ residual), then
// RMSNorm where asked. The output columns are computed in slices; a slice is published as soon as
// it is finished, so that it travels while the next is computed.
#include "matmul_all_reduce/matmul_all_reduce.h"

#include <algorithm>

#include "matmul/gemm.h"

namespace commfuse {
namespace {

// Payload of one slice. Adding a slice that the weights have meanwhile pushed out of the caches
// goes faster in long runs: 16 KiB cost a third more. Above 64 KiB the exchange of the last slice,
// which nothing hides, would show.
constexpr int64_t kSliceBytes = 64 * 1024;

// Where the columns are cut. A function of the output's shape alone: ranks must cut alike, and
// their k may differ. No sum crosses a cut, so that a row's bits do not depend on it.
struct Slices {
  int64_t panels, count;

  Slices(int64_t rows, int64_t n, int64_t element_bytes) {
    const int64_t total = panel_count(n);
    const int64_t panel_bytes = std::max<int64_t>(1, rows * kPanelColumns * element_bytes);
    // Two at least, so that the first travels while the second is computed.
    const int64_t most = std::max<int64_t>(1, (total + 1) / 2);
    const int64_t least = (total + kMaxBlocks - 1) / kMaxBlocks;
    panels = std::max<int64_t>({1, least, std::min(kSliceBytes / panel_bytes, most)});
    count = std::max<int64_t>(1, (total + panels - 1) / panels);
  }
};

// Rows that fit the communicator's payload in one call.
void fused_rows(Communicator& communicator, const Descriptor& descriptor, GemmArgs args,
                const std::byte* bias, const std::byte* residual, std::byte* out) {
  const int world = communicator.world(), rank = communicator.rank();
  const int64_t size = static_cast<int64_t>(size_of(args.dtype)), stride = args.n * size;
  const Slices slices(args.rows, args.n, size);
  Call call(communicator, descriptor);
  const std::byte* payloads[kMaxWorld];
  for (int r = 0; r < world; ++r) payloads[r] = call.payload(r, 0);

  struct Slice {
    int64_t begin, columns;            // of the output
    int64_t row_bytes, offset, bytes;  // in the payload, where a slice lies in one piece
  };
  auto slice = [&](int64_t s) {
    const int64_t begin = s * slices.panels * kPanelColumns;
    const int64_t columns = std::min(args.n, begin + slices.panels * kPanelColumns) - begin;
    return Slice{begin, columns, columns * size, args.rows * begin * size,
                 args.rows * columns * size};
  };
  auto compute = [&](int64_t s) {
    const Slice part = slice(s);
    // Straight into the payload, where the slice's rows lie one behind the other.
    args.out = call.payload(rank, 0) + part.offset - part.begin * size;
    args.out_stride = part.columns;
    run_gemm(args, s * slices.panels, std::min(panel_count(args.n), (s + 1) * slices.panels));
    call.trace(TraceEvent::Kind::computed, static_cast<int>(s));
    call.publish(0, static_cast<int>(s), static_cast<size_t>(part.bytes));
  };
  auto reduce = [&](int64_t s) {
    const Slice part = slice(s);
    for (int64_t row = 0; row < args.rows; ++row) {
      const int64_t offset = row * stride + part.begin * size;
      const void* sources[kMaxWorld];
      for (int r = 0; r < world; ++r) sources[r] = payloads[r] + part.offset + row * part.row_bytes;
      kernels().sum({args.dtype, sources, world, bias ? bias + part.begin * size : nullptr,
                     residual ? residual + offset : nullptr, out + offset, part.columns});
    }
    call.trace(TraceEvent::Kind::reduced, static_cast<int>(s));
  };
  auto there = [&](int64_t s) {
    for (int r = 0; r < world; ++r) {
      if (r != rank && !call.arrived(r, 0, static_cast<int>(s))) return false;
    }
    return true;
  };

  int64_t reduced = 0;
  for (int64_t s = 0; s < slices.count; ++s) {
    compute(s);
    const CommunicationTimer timer(communicator);
    while (reduced < s && there(reduced)) reduce(reduced++);
  }
  const CommunicationTimer timer(communicator);
  for (; reduced < slices.count; ++reduced) {
    call.wait_all(0, static_cast<int>(reduced));
    reduce(reduced);
  }
}

// The sum before normalisation, [rows, n].
at::Tensor summed_product(const at::Tensor& x, const at::Tensor& weights, int64_t n,
                          Communicator& communicator, const std::optional<at::Tensor>& bias,
                          const std::optional<at::Tensor>& residual, bool normalised) {
  GemmArgs args = gemm_args(x, weights, n);
  if (bias) check_matches(*bias, x, {n}, "bias");
  if (residual) check_matches(*residual, x, {args.rows, n}, "residual");
  at::Tensor out = empty_output({args.rows, n}, x.scalar_type());
  args.out_stride = args.out_columns = n;

  // K is not part of what ranks must agree on: heads may be cut unevenly.
  const uint32_t variant = (bias ? 1u : 0u) | (residual ? 2u : 0u) | (normalised ? 4u : 0u);
  const Descriptor descriptor =
      describe(Op::matmul_all_reduce, args.dtype, {args.rows, n}, variant);
  const std::byte* bias_data = static_cast<const std::byte*>(data_or_null(bias));
  const std::byte* residual_data = static_cast<const std::byte*>(data_or_null(residual));
  std::byte* out_data = static_cast<std::byte*>(out.mutable_data_ptr());
  const int64_t row_bytes = n * static_cast<int64_t>(size_of(args.dtype));

  if (communicator.world() == 1) {
    const Call call(communicator, descriptor);
    args.out = out_data;
    run_gemm(args, 0, panel_count(n));
    for (int64_t row = 0; (bias || residual) && row < args.rows; ++row) {
      const void* source = out_data + row * row_bytes;
      kernels().sum({args.dtype, &source, 1, bias_data,
                     residual ? residual_data + row * row_bytes : nullptr,
                     out_data + row * row_bytes, n});
    }
    return out;
  }

  const int64_t capacity = static_cast<int64_t>(communicator.payload_bytes(0));
  TORCH_CHECK_VALUE(row_bytes <= capacity, "one row of the output has ", row_bytes,
                    " bytes, the communicator's payload ", capacity,
                    "; make it with Communicator(payload_bytes=", row_bytes, ") or more");
  const int64_t rows_per_call = row_bytes ? capacity / row_bytes : args.rows;
  int64_t row = 0;
  do {
    GemmArgs part = args;
    part.rows = std::min(rows_per_call, args.rows - row);
    part.x = static_cast<const std::byte*>(args.x) +
             row * args.k * static_cast<int64_t>(size_of(args.dtype));
    fused_rows(communicator, descriptor, part, bias_data,
               residual ? residual_data + row * row_bytes : nullptr, out_data + row * row_bytes);
    row += part.rows;
  } while (row < args.rows);
  return out;
}

}  // namespace

at::Tensor matmul_all_reduce(const at::Tensor& x, const at::Tensor& weights, int64_t n,
                             int64_t handle, const std::optional<at::Tensor>& bias,
                             const std::optional<at::Tensor>& residual) {
  return summed_product(x, weights, n, Communicator::from_handle(handle), bias, residual, false);
}

std::tuple<at::Tensor, at::Tensor> matmul_all_reduce_rms_norm(
    const at::Tensor& x, const at::Tensor& weights, int64_t n, int64_t handle,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& residual,
    const at::Tensor& norm_weight, double eps) {
  check_matches(norm_weight, x, {n}, "norm_weight");
  at::Tensor summed =
      summed_product(x, weights, n, Communicator::from_handle(handle), bias, residual, true);
  at::Tensor y = empty_output(summed.sizes(), summed.scalar_type());
  const DType dtype = dtype_of_tensor(x, "x");
  const int64_t row_bytes = n * static_cast<int64_t>(size_of(dtype));
  for (int64_t row = 0; row < summed.size(0); ++row) {
    kernels().rms_norm(dtype,
                       static_cast<const std::byte*>(summed.const_data_ptr()) + row * row_bytes,
                       norm_weight.const_data_ptr(), static_cast<float>(eps), n,
                       static_cast<std::byte*>(y.mutable_data_ptr()) + row * row_bytes);
  }
  return {y, summed};
}

TORCH_LIBRARY_IMPL(commfuse, CPU, m) {
  m.impl("matmul_all_reduce", &matmul_all_reduce);
  m.impl("matmul_all_reduce.rms_norm", &matmul_all_reduce_rms_norm);
}

}  // namespace commfuse
