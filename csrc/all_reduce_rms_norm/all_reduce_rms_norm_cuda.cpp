#include "all_reduce_rms_norm/all_reduce_rms_norm_cuda.h"

#include <ATen/ops/add.h>
#include <ATen/ops/empty_like.h>

#include <tuple>

namespace commfuse::gpu {

void all_reduce_rms_norm_all(GpuCall& call, const Descriptor& descriptor, const RMSNormArgs& a) {
  const Workspace& workspace = call.gpu().workspace();
  const int64_t size = static_cast<int64_t>(size_of(a.dtype)), row_bytes = a.n * size;
  const bool small = all_reduce_algorithm(call.gpu(), a.rows * row_bytes) == AllReduce::one_shot;
  const auto algorithm = small ? AllReduceRMSNorm::by_lines : AllReduceRMSNorm::by_rows;
  const int64_t most = all_reduce_rms_norm_capacity(workspace, algorithm, a.dtype, a.n);
  if (most == 0) {  // a row is larger than a slot
    all_reduce_all(call, descriptor, AllReduce::bulk, a.dtype, a.x, a.residual, a.out,
                   int64_t{a.rows} * a.n);
    rms_norm(a, call.gpu().max_blocks(), call.stream);
    return;
  }
  int64_t done = 0;
  do {
    RMSNormArgs part = a;
    part.rows = static_cast<int>(std::min<int64_t>(most, a.rows - done));
    part.x = offset_by(a.x, done * row_bytes);
    part.residual = offset_by(a.residual, done * row_bytes);
    part.y = offset_by(a.y, done * row_bytes);
    part.out = offset_by(a.out, done * row_bytes);
    const int64_t peers = call.world() - 1, bytes = part.rows * row_bytes;
    all_reduce_rms_norm(
        call.enter(descriptor, small ? peers * bytes : 2 * peers * bytes / call.world()), algorithm,
        part);
    done += part.rows;
  } while (done < a.rows);
}

namespace {

std::tuple<at::Tensor, at::Tensor> all_reduce_rms_norm_of_tensors(
    const at::Tensor& x, const std::optional<at::Tensor>& residual, const at::Tensor& weight,
    double eps, int64_t handle) {
  GpuCall call(x, handle);
  const DType dtype = dtype_of_tensor(x, "x");
  check_matrix(x, "x");
  check_matches(weight, x, {x.size(1)}, "weight");
  if (residual) check_matches(*residual, x, x.sizes(), "residual");
  RMSNormArgs args = {};
  args.dtype = dtype;
  args.weight = weight.const_data_ptr();
  args.eps = static_cast<float>(eps);
  args.rows = static_cast<int>(x.size(0));
  args.n = static_cast<int>(x.size(1));
  at::Tensor y = at::empty_like(x), out;
  args.y = y.mutable_data_ptr();
  if (call.world() == 1) {
    call.communicator.check();
    out = residual ? at::add(x, *residual) : x.clone();
    args.out = out.mutable_data_ptr();
    rms_norm(args, call.gpu().max_blocks(), call.stream);
  } else {
    out = at::empty_like(x);
    args.x = x.const_data_ptr();
    args.residual = data_or_null(residual);
    args.out = out.mutable_data_ptr();
    all_reduce_rms_norm_all(
        call, describe(Op::all_reduce_rms_norm, dtype, x.sizes(), residual.has_value()), args);
  }
  call.wrote({range_of(y), range_of(out)});
  return {y, out};
}

}  // namespace

TORCH_LIBRARY_IMPL(commfuse, CUDA, m) {
  m.impl("all_reduce_rms_norm", &all_reduce_rms_norm_of_tensors);
}

}  // namespace commfuse::gpu
