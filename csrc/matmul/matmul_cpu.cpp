#include <cstring>

#include "matmul/gemm.h"
#include "runtime/huge_memory.h"

namespace commfuse {
namespace {

// Work below which a second thread costs more than it brings, in bytes of weights times row tiles.
constexpr int64_t kBytesPerThread = 128 * 1024;

template <class T>
void pack(const T* w, int64_t n, int64_t k, int64_t stride, int64_t k_step, T* out) {
  const int64_t k_padded = round_up(k, k_step), n_padded = round_up(n, kLanes);
  at::parallel_for(0, panel_count(n), 1, [&](int64_t panel_begin, int64_t panel_end) {
    for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
      const int64_t column = panel * kPanelColumns;
      const int64_t width = std::min(kPanelColumns, n_padded - column);
      T* target = out + column * k_padded;
      for (int64_t row = column; row < column + width; ++row) {
        T* lane = target + (row - column) * k_step;
        for (int64_t i = 0; i < k_padded; ++i) {
          lane[i / k_step * width * k_step + i % k_step] =
              row < n && i < k ? w[row * stride + i] : T{};
        }
      }
    }
  });
}

// w [n, k] -> packed, one-dimensional.
at::Tensor pack_weight(const at::Tensor& w) {
  const DType dtype = dtype_of_tensor(w, "w");
  TORCH_CHECK_VALUE(w.dim() == 2, "w has ", w.dim(), " dimensions, not 2 (out, in)");
  TORCH_CHECK_VALUE(w.stride(1) == 1 || w.size(1) <= 1, "the rows of w are not contiguous");
  const int64_t n = w.size(0), k = w.size(1);
  at::Tensor out = huge_empty(packed_elements(dtype, n, k), w.options());
  if (dtype == DType::float32) {
    pack(static_cast<const uint32_t*>(w.const_data_ptr()), n, k, w.stride(0), 1,
         static_cast<uint32_t*>(out.mutable_data_ptr()));
  } else {
    pack(static_cast<const uint16_t*>(w.const_data_ptr()), n, k, w.stride(0),
         dtype == DType::bfloat16 ? 2 : 1, static_cast<uint16_t*>(out.mutable_data_ptr()));
  }
  return out;
}

}  // namespace

GemmArgs gemm_args(const at::Tensor& x, const at::Tensor& weights, int64_t n) {
  GemmArgs args{};
  args.dtype = dtype_of_tensor(x, "x");
  check_matrix(x, "x");
  args.x = x.const_data_ptr();
  args.rows = x.size(0);
  args.k = args.x_stride = x.size(1);
  args.n = n;
  check_matches(weights, x, {packed_elements(args.dtype, n, args.k)}, "the packed weight");
  args.weights = weights.const_data_ptr();
  return args;
}

void run_gemm(const GemmArgs& args, int64_t panel_begin, int64_t panel_end) {
  if (args.rows == 0) return;
  const int64_t panel_bytes =
      kPanelColumns * args.k * static_cast<int64_t>(size_of(args.dtype)) * ((args.rows + 3) / 4);
  const int64_t grain = std::max<int64_t>(1, kBytesPerThread / std::max<int64_t>(1, panel_bytes));
  at::parallel_for(panel_begin, panel_end, grain,
                   [&](int64_t begin, int64_t end) { kernels().gemm(args, begin, end); });
}

at::Tensor matmul(const at::Tensor& x, const at::Tensor& weights, int64_t n,
                  const std::optional<at::Tensor>& bias, bool silu_mul, int64_t out_columns,
                  bool out_float32) {
  GemmArgs args = gemm_args(x, weights, n);
  if (bias) check_matches(*bias, x, {n}, "bias");
  if (silu_mul) {
    TORCH_CHECK_VALUE(n == 2 * round_up(out_columns, kLanes), "silu_mul of ", out_columns,
                      " columns takes ", 2 * round_up(out_columns, kLanes),
                      " packed rows (gate and up alternating by 16), not ", n);
    args.activation = Activation::silu_mul;
  } else {
    TORCH_CHECK_VALUE(n == out_columns, "out_columns is ", out_columns, ", not n = ", n);
  }
  at::Tensor out =
      empty_output({x.size(0), out_columns}, out_float32 ? at::kFloat : x.scalar_type());
  args.bias = data_or_null(bias);
  args.out = out.mutable_data_ptr();
  args.out_stride = args.out_columns = out_columns;
  args.out_float32 = out_float32;
  run_gemm(args, 0, panel_count(n));
  return out;
}

TORCH_LIBRARY_IMPL(commfuse, CPU, m) {
  m.impl("pack_weight", &pack_weight);
  m.impl("matmul", &matmul);
}

}  // namespace commfuse
