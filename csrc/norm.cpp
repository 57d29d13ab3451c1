// RMSNorm with or without the residual addition before it, forward and backward; kernels/norm.py has the formulas.
//
// N rows of width D, contiguous, float32 or bf16; everything in between is float32. A row is read twice, the second time
// from the first-level cache. The weight's gradient is summed over blocks of rows, then over the blocks, so that it does
// not depend on the number of threads.

#include "simd.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace spt {
namespace {

constexpr int64_t kBlockRows = 16;

template <class T>
SPT_INLINE void forward_row(const T* x, const T* residual, const float* w, T* y, T* stream, float* rstd, int64_t D,
                            float eps) {
  float sum = 0;
  if (residual != nullptr) {
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < D; ++i) {
      store(stream[i], load(x[i]) + load(residual[i]));
      const float s = load(stream[i]);
      sum += s * s;
    }
    x = stream;
  } else {
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < D; ++i) sum += load(x[i]) * load(x[i]);
  }
  const float r = 1 / std::sqrt(sum / static_cast<float>(D) + eps);
  *rstd = r;
#pragma omp simd
  for (int64_t i = 0; i < D; ++i) store(y[i], load(x[i]) * r * w[i]);
}

template <class T>
SPT_INLINE void backward_row(const T* dy, const T* x, const T* dstream, const float* w, float r, T* dx, float* dw,
                             int64_t D) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < D; ++i) {
    const float product = load(dy[i]) * load(x[i]) * r;
    dw[i] += product;
    sum += product * w[i];
  }
  const float projection = sum / static_cast<float>(D) * r;
  if (dstream != nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < D; ++i)
      store(dx[i], (load(dy[i]) * w[i] - load(x[i]) * projection) * r + load(dstream[i]));
  } else {
#pragma omp simd
    for (int64_t i = 0; i < D; ++i) store(dx[i], (load(dy[i]) * w[i] - load(x[i]) * projection) * r);
  }
}

#define ROWS(T)                                                                                                      \
  SPT_SIMD void forward_rows(const T* x, const T* residual, const float* w, T* y, T* stream, float* rstd,            \
                             int64_t rows, int64_t D, float eps) {                                                   \
    for (int64_t i = 0; i < rows; ++i)                                                                               \
      forward_row(x + i * D, residual ? residual + i * D : nullptr, w, y + i * D, stream ? stream + i * D : nullptr, \
                  rstd + i, D, eps);                                                                                 \
  }                                                                                                                  \
  SPT_SIMD void backward_rows(const T* dy, const T* x, const T* dstream, const float* w, const float* rstd, T* dx,   \
                              float* dw, int64_t rows, int64_t D) {                                                  \
    for (int64_t i = 0; i < rows; ++i)                                                                               \
      backward_row(dy + i * D, x + i * D, dstream ? dstream + i * D : nullptr, w, rstd[i], dx + i * D, dw, D);       \
  }
ROWS(float)
ROWS(bf16)
#undef ROWS

// Calls f(block, first row, rows) for every block of rows, from several threads.
template <class F>
void for_blocks(int64_t N, F f) {
  torch::stable::parallel_for(0, (N + kBlockRows - 1) / kBlockRows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block)
      f(block, block * kBlockRows, std::min(kBlockRows, N - block * kBlockRows));
  });
}

std::tuple<Tensor, Tensor, Tensor> rms_norm_forward(const Tensor& x, const std::optional<Tensor>& residual,
                                                    const Tensor& weight, double eps) {
  const int64_t D = weight.numel(), N = x.numel() / std::max<int64_t>(D, 1);
  Tensor y = torch::stable::empty_like(x);
  Tensor stream = residual ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  Tensor rstd = torch::stable::new_empty(x, {N}, ScalarType::Float);
  with_dtype(x, [&]<class T>(T) {
    for_blocks(N, [&](int64_t, int64_t first, int64_t rows) {
      forward_rows(data<T>(x) + first * D, residual ? data<T>(*residual) + first * D : nullptr, data<float>(weight),
                   mutable_data<T>(y) + first * D, residual ? mutable_data<T>(stream) + first * D : nullptr,
                   mutable_data<float>(rstd) + first, rows, D, static_cast<float>(eps));
    });
  });
  return {y, stream, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& dy, const Tensor& x, const std::optional<Tensor>& dstream,
                                             const Tensor& weight, const Tensor& rstd) {
  const int64_t D = weight.numel(), N = rstd.numel(), blocks = (N + kBlockRows - 1) / kBlockRows;
  Tensor dx = torch::stable::empty_like(x);
  Tensor dw = torch::stable::new_empty(x, {D}, ScalarType::Float);
  std::vector<float> partial(std::max<int64_t>(blocks, 1) * D);
  with_dtype(x, [&]<class T>(T) {
    for_blocks(N, [&](int64_t block, int64_t first, int64_t rows) {
      backward_rows(data<T>(dy) + first * D, data<T>(x) + first * D, dstream ? data<T>(*dstream) + first * D : nullptr,
                    data<float>(weight), data<float>(rstd) + first, mutable_data<T>(dx) + first * D,
                    partial.data() + block * D, rows, D);
    });
  });
  // In pairs, and pairs of pairs: rounding errors grow with the logarithm of the number of blocks.
  for (int64_t apart = 1; apart < blocks; apart *= 2)
    for (int64_t block = 0; block + apart < blocks; block += 2 * apart)
      for (int64_t i = 0; i < D; ++i) partial[block * D + i] += partial[(block + apart) * D + i];
  std::copy_n(partial.data(), D, mutable_data<float>(dw));
  return {dx, dw};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(spt_fast, m) {
  m.def("cpu_rms_norm_forward(Tensor x, Tensor? residual, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)");
  m.def("cpu_rms_norm_backward(Tensor dy, Tensor x, Tensor? dstream, Tensor weight, Tensor rstd) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(spt_fast, CPU, m) {
  m.impl("cpu_rms_norm_forward", TORCH_BOX(&rms_norm_forward));
  m.impl("cpu_rms_norm_backward", TORCH_BOX(&rms_norm_backward));
}

}  // namespace spt
