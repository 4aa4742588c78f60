// The fused kernel for few rows; else a GEMM of torch's and our all-reduce.
#include <ATen/ops/add.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/linear.h>

#include "all_reduce_rms_norm/all_reduce_rms_norm_cuda.h"
#include "matmul/matmul_cuda.h"
#include "matmul_all_reduce/matmul_all_reduce_cuda.h"

namespace commfuse::gpu {
namespace {

struct Tail {
  const std::optional<at::Tensor>& bias;
  const std::optional<at::Tensor>& residual;
  const at::Tensor* norm_weight;  // or null
  double eps;
};

// Fused or not: a row's bits must not depend on the number of rows, which decides about that.
MatmulGpuArgs gemm_of(GpuCall& call, const at::Tensor& x, const at::Tensor& w) {
  const Attachment& gpu = call.gpu();
  return matmul_args(x, w, gpu.max_blocks(), gpu.claimed_percent, call.stream);
}

RMSNormArgs norm_of(DType dtype, const at::Tensor& x, const std::optional<at::Tensor>& residual,
                    const Tail& tail, at::Tensor& out, at::Tensor& y) {
  RMSNormArgs args = {};
  args.dtype = dtype;
  args.x = x.const_data_ptr();
  args.residual = data_or_null(residual);
  args.weight = tail.norm_weight->const_data_ptr();
  args.eps = static_cast<float>(tail.eps);
  args.y = y.mutable_data_ptr();
  args.out = out.mutable_data_ptr();
  args.rows = x.size(0);
  args.n = x.size(1);
  return args;
}

// {out, y}; y is undefined without norm_weight.
std::pair<at::Tensor, at::Tensor> unfused(GpuCall& call, const Descriptor& descriptor, DType dtype,
                                          const at::Tensor& x, const at::Tensor& w,
                                          const Tail& tail) {
  at::Tensor product;
  if (matmul_serves(x) && w.size(0) > 0) {
    // An all-reduce in bulk then has nothing to stage. Nobody reads there: the last such call of
    // this stream ended with a barrier.
    call.gpu().admit(descriptor, call.stream);
    const int64_t bytes = x.size(0) * w.size(0) * static_cast<int64_t>(size_of(dtype));
    const Workspace& workspace = call.gpu().workspace();
    if (all_reduce_algorithm(call.gpu(), bytes) == AllReduce::bulk &&
        bytes <= all_reduce_capacity(workspace, AllReduce::bulk)) {
      product =
          at::from_blob(workspace.staging(workspace.rank), {x.size(0), w.size(0)}, x.options());
    } else {
      product = at::empty({x.size(0), w.size(0)}, x.options());
    }
    matmul(gemm_of(call, x, w), nullptr, product.mutable_data_ptr(), call.stream);
    call.wrote({range_of(product)});  // also in the staging area: stream_order.h counts records
    call.behind_gemm = true;
  } else {
    product = at::linear(x, w);
  }
  std::optional<at::Tensor> addend = tail.residual;
  if (tail.bias)
    addend = addend ? at::add(*addend, *tail.bias) : tail.bias->expand_as(product).contiguous();
  at::Tensor out = at::empty_like(product), y;
  if (!tail.norm_weight) {
    all_reduce_all(call, descriptor, dtype, product.const_data_ptr(), data_or_null(addend),
                   out.mutable_data_ptr(), product.numel());
  } else {
    y = at::empty_like(product);
    all_reduce_rms_norm_all(call, descriptor, norm_of(dtype, product, addend, tail, out, y));
  }
  return {out, y};
}

// On one rank, likewise.
std::pair<at::Tensor, at::Tensor> alone(GpuCall& call, DType dtype, const at::Tensor& x,
                                        const at::Tensor& w, const Tail& tail) {
  call.communicator.check();
  at::Tensor product;
  const bool ours = matmul_serves(x) && w.size(0) > 0;
  if (ours) {  // as on several ranks, bits do not depend on the batch
    product = at::empty({x.size(0), w.size(0)}, x.options());
    matmul(gemm_of(call, x, w), data_or_null(tail.bias), product.mutable_data_ptr(), call.stream);
  } else {
    product = at::linear(x, w, tail.bias);
  }
  if (!tail.norm_weight) {
    if (tail.residual) product.add_(*tail.residual);
    return {product, {}};
  }
  if (ours) call.wrote({range_of(product)});  // it may still be at work when the next one starts
  at::Tensor out = at::empty_like(product), y = at::empty_like(product);
  rms_norm(norm_of(dtype, product, tail.residual, tail, out, y), call.stream, ours);
  return {out, y};
}

std::pair<at::Tensor, at::Tensor> summed_product(const at::Tensor& x, const at::Tensor& w,
                                                 int64_t n, int64_t handle, const Tail& tail) {
  GpuCall call(x, handle);
  const DType dtype = dtype_of_tensor(x, "x");
  check_matrix(x, "x");
  check_matches(w, x, {n, x.size(1)}, "w");
  const int64_t m = x.size(0);
  if (tail.bias) check_matches(*tail.bias, x, {n}, "bias");
  if (tail.residual) check_matches(*tail.residual, x, {m, n}, "residual");
  if (tail.norm_weight) check_matches(*tail.norm_weight, x, {n}, "norm_weight");
  // K is not part of what ranks must agree on: heads may be cut unevenly.
  const uint32_t variant =
      (tail.bias ? 1u : 0u) | (tail.residual ? 2u : 0u) | (tail.norm_weight ? 4u : 0u);
  const Descriptor descriptor = describe(Op::matmul_all_reduce, dtype, {m, n}, variant);
  const int64_t bytes = m * n * static_cast<int64_t>(size_of(dtype));
  const bool two_shot = call.world() > 2 && bytes > call.gpu().thresholds.one_shot;
  const bool fused = sends_tiles(call.gpu(), dtype, m, n);
  TORCH_CHECK_VALUE(x.size(1) > 0, "x has 0 columns; every rank needs a part of K");

  std::pair<at::Tensor, at::Tensor> result;
  auto& [out, y] = result;
  if (!fused && call.world() > 1) {
    result = unfused(call, descriptor, dtype, x, w, tail);
  } else if (!fused) {
    result = alone(call, dtype, x, w, tail);
  } else {
    out = at::empty({m, n}, x.options());
    if (tail.norm_weight) y = at::empty({m, n}, x.options());
    MatmulAllReduceArgs args = {};
    args.matmul = gemm_of(call, x, w);
    args.bias = data_or_null(tail.bias);
    args.residual = data_or_null(tail.residual);
    args.norm_weight = tail.norm_weight ? tail.norm_weight->const_data_ptr() : nullptr;
    args.eps = static_cast<float>(tail.eps);
    args.out = out.mutable_data_ptr();
    args.y = y.defined() ? y.mutable_data_ptr() : nullptr;
    args.two_shot = two_shot;
    const int64_t peers = call.world() - 1;
    matmul_all_reduce(
        call.enter(descriptor, two_shot ? 2 * peers * bytes / call.world() : peers * bytes), args);
  }
  if (y.defined()) {
    call.wrote({range_of(out), range_of(y)});
  } else {
    call.wrote({range_of(out)});
  }
  return result;
}

at::Tensor matmul_all_reduce_of_tensors(const at::Tensor& x, const at::Tensor& w, int64_t n,
                                        int64_t handle, const std::optional<at::Tensor>& bias,
                                        const std::optional<at::Tensor>& residual) {
  return summed_product(x, w, n, handle, {bias, residual, nullptr, 0}).first;
}

std::tuple<at::Tensor, at::Tensor> matmul_all_reduce_rms_norm_of_tensors(
    const at::Tensor& x, const at::Tensor& w, int64_t n, int64_t handle,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& residual,
    const at::Tensor& norm_weight, double eps) {
  const auto [out, y] = summed_product(x, w, n, handle, {bias, residual, &norm_weight, eps});
  return {y, out};
}

}  // namespace

TORCH_LIBRARY_IMPL(commfuse, CUDA, m) {
  m.impl("matmul_all_reduce", &matmul_all_reduce_of_tensors);
  m.impl("matmul_all_reduce.rms_norm", &matmul_all_reduce_rms_norm_of_tensors);
}

}  // namespace commfuse::gpu
