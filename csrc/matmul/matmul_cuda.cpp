#include "matmul/matmul_cuda.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>

#include <map>
#include <mutex>
#include <utility>

#include "gpu/tensors.h"

namespace commfuse::gpu {
namespace {

// What parts of a tile exchange: kept for each device and stream, since calls of one stream follow
// one another. A larger one takes the place of one that is too small, whose memory the allocator
// gives to later work of the same stream.
//
// A capture has its own, which belongs to its graph: graphs may be replayed on several streams. It
// is held until the next call outside this capture, so that nothing else that is captured comes to
// lie there; from then on the graph alone keeps its memory. A replay clears the counters anew.
void* kept_workspace(size_t bytes, int device, cudaStream_t stream) {
  struct Kept {
    at::Tensor eager, captured;
    unsigned long long capture = 0;
  };
  if (bytes == 0) return nullptr;
  static std::mutex mutex;
  static auto& all = *new std::map<std::pair<int, cudaStream_t>, Kept>;  // outlives the allocator
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long capture = 0;
  C10_CUDA_CHECK(cudaStreamGetCaptureInfo(stream, &status, &capture));
  if (status == cudaStreamCaptureStatusNone) capture = 0;
  const std::lock_guard lock(mutex);
  Kept& kept = all[{device, stream}];
  if (kept.capture != capture) {
    kept.captured.reset();
    kept.capture = capture;
  }
  at::Tensor& own = capture ? kept.captured : kept.eager;
  if (!own.defined() || own.nbytes() < bytes) {
    constexpr size_t kGranule = 4 << 20;
    const int64_t size = static_cast<int64_t>((bytes + kGranule - 1) / kGranule * kGranule);
    own = at::empty(
        {size}, at::device({at::kCUDA, static_cast<c10::DeviceIndex>(device)}).dtype(at::kByte));
    // Sums are written before they are read.
    own.narrow(0, 0, kMatmulGpuCounters * sizeof(uint32_t)).zero_();
  }
  return own.mutable_data_ptr();
}

}  // namespace

bool matmul_serves(const at::Tensor& x) {
  return x.size(0) <= kMatmulGpuMaxRows && x.size(0) > 0 && x.size(1) > 0 &&
         (x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf);
}

MatmulGpuArgs matmul_args(const at::Tensor& x, const at::Tensor& w, int max_blocks,
                          int claimed_percent, cudaStream_t stream) {
  MatmulGpuArgs args = {};
  args.x = x.const_data_ptr();
  args.w = w.const_data_ptr();
  args.m = x.size(0);
  args.n = w.size(0);
  args.k = x.size(1);
  args.dtype = dtype_of_tensor(x, "x");
  TORCH_CHECK_VALUE(args.n <= INT32_MAX && args.k <= INT32_MAX, "w is too large: ", w.sizes());
  const int device = x.device().index();
  args.plan = matmul_plan(args.n, args.k, max_blocks, claimed_percent);
  args.workspace = kept_workspace(matmul_gpu_workspace_bytes(args.plan), device, stream);
  args.weights_early = settled(device, stream, range_of(w));
  return args;
}

namespace {

int multiprocessors(int device) {
  int count = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

at::Tensor matmul_of_tensors(const at::Tensor& x, const at::Tensor& weight, int64_t n,
                             const std::optional<at::Tensor>& bias, bool silu_mul,
                             int64_t out_columns, bool out_float32) {
  TORCH_CHECK_VALUE(!silu_mul && out_columns == n,
                    "on a GPU, matmul takes a plain weight [n, k], without silu_mul");
  dtype_of_tensor(x, "x");
  check_matrix(x, "x");
  check_matches(weight, x, {n, x.size(1)}, "weight");
  if (bias) check_matches(*bias, x, {n}, "bias");
  const c10::cuda::CUDAGuard guard(x.device());
  at::Tensor y;
  if (matmul_serves(x) && n > 0) {
    const int device = x.device().index();
    const cudaStream_t stream = c10::cuda::getCurrentCUDAStream(x.device().index()).stream();
    y = at::empty({x.size(0), n}, x.options());
    matmul(matmul_args(x, weight, multiprocessors(device), 0, stream), data_or_null(bias),
           y.mutable_data_ptr(), stream);
    wrote(device, stream, {range_of(y)});
  } else {
    y = at::linear(x, weight, bias);
  }
  return out_float32 ? y.to(at::kFloat) : y;
}

}  // namespace

TORCH_LIBRARY_IMPL(commfuse, CUDA, m) { m.impl("matmul", &matmul_of_tensors); }

}  // namespace commfuse::gpu
