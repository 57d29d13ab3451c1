// SwiGLU forward and backward; kernels/activation.py has the formulas.
//
// N rows of F numbers, float32 or bf16; everything in between is float32. Rows may have gaps between them, so that gate
// and up, and their gradients, can be the two halves of one tensor; within a row numbers are contiguous.

#include "simd.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

using torch::stable::Tensor;

namespace spt {
namespace {

constexpr int64_t kThreadNumbers = 16384;

// 0 below -88, where exp_ would not be small enough for a gate of -1e38.
SPT_INLINE float sigmoid(float x) {
  const float s = 1 / (1 + exp_(-x));
  return x < -88 ? 0 : s;
}

template <class T>
SPT_INLINE void forward_row(const T* gate, const T* up, T* y, int64_t F) {
#pragma omp simd
  for (int64_t i = 0; i < F; ++i) {
    const float g = load(gate[i]);
    store(y[i], g * sigmoid(g) * load(up[i]));
  }
}

// kForward: y is written in place of dy.
template <bool kForward, class T>
SPT_INLINE void backward_row(T* dy, const T* gate, const T* up, T* dgate, T* dup, int64_t F) {
#pragma omp simd
  for (int64_t i = 0; i < F; ++i) {
    const float g = load(gate[i]), u = load(up[i]), s = sigmoid(g), dys = load(dy[i]) * s;
    store(dup[i], dys * g);
    store(dgate[i], dys * u * (1 + g * (1 - s)));
    if (kForward) store(dy[i], g * s * u);
  }
}

template <class T>
SPT_INLINE void backward_row(T* dy, const T* gate, const T* up, T* dgate, T* dup, int64_t F, bool forward) {
  if (forward)
    backward_row<true>(dy, gate, up, dgate, dup, F);
  else
    backward_row<false>(dy, gate, up, dgate, dup, F);
}

#define ROWS(T)                                                                                                       \
  SPT_SIMD void forward_rows(const T* gate, const T* up, T* y, int64_t rows, int64_t F, int64_t gate_stride,          \
                             int64_t up_stride) {                                                                     \
    for (int64_t i = 0; i < rows; ++i) forward_row(gate + i * gate_stride, up + i * up_stride, y + i * F, F);         \
  }                                                                                                                   \
  SPT_SIMD void backward_rows(T* dy, const T* gate, const T* up, T* dgate, T* dup, int64_t rows, int64_t F,           \
                              int64_t dy_stride, int64_t gate_stride, int64_t up_stride, int64_t dgate_stride,        \
                              int64_t dup_stride, bool forward) {                                                     \
    for (int64_t i = 0; i < rows; ++i)                                                                                \
      backward_row(dy + i * dy_stride, gate + i * gate_stride, up + i * up_stride, dgate + i * dgate_stride,          \
                   dup + i * dup_stride, F, forward);                                                                 \
  }
ROWS(float)
ROWS(bf16)
#undef ROWS

// Calls f(first row, rows) from several threads.
template <class F>
void for_rows(const Tensor& gate, F f) {
  const int64_t grain = std::max<int64_t>(1, kThreadNumbers / std::max<int64_t>(1, gate.size(1)));
  torch::stable::parallel_for(0, gate.size(0), grain, [&](int64_t begin, int64_t end) { f(begin, end - begin); });
}

Tensor swiglu_forward(const Tensor& gate, const Tensor& up) {
  const int64_t F = gate.size(1), gate_stride = gate.stride(0), up_stride = up.stride(0);
  Tensor y = torch::stable::new_empty(gate, {gate.size(0), F});
  with_dtype(gate, [&]<class T>(T) {
    for_rows(gate, [&](int64_t i, int64_t rows) {
      forward_rows(data<T>(gate) + i * gate_stride, data<T>(up) + i * up_stride, mutable_data<T>(y) + i * F, rows, F,
                   gate_stride, up_stride);
    });
  });
  return y;
}

void backward(Tensor dy, const Tensor& gate, const Tensor& up, Tensor dgate, Tensor dup, bool forward) {
  const int64_t dy_stride = dy.stride(0), gate_stride = gate.stride(0), up_stride = up.stride(0);
  const int64_t dgate_stride = dgate.stride(0), dup_stride = dup.stride(0);
  with_dtype(gate, [&]<class T>(T) {
    for_rows(gate, [&](int64_t i, int64_t rows) {
      backward_rows(mutable_data<T>(dy) + i * dy_stride, data<T>(gate) + i * gate_stride, data<T>(up) + i * up_stride,
                    mutable_data<T>(dgate) + i * dgate_stride, mutable_data<T>(dup) + i * dup_stride, rows,
                    gate.size(1), dy_stride, gate_stride, up_stride, dgate_stride, dup_stride, forward);
    });
  });
}

void swiglu_backward(const Tensor& dy, const Tensor& gate, const Tensor& up, Tensor dgate, Tensor dup) {
  backward(dy, gate, up, dgate, dup, false);
}

void swiglu_backward_again(Tensor dy, const Tensor& gate, const Tensor& up, Tensor dgate, Tensor dup) {
  backward(dy, gate, up, dgate, dup, true);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(spt_fast, m) {
  m.def("cpu_swiglu_forward(Tensor gate, Tensor up) -> Tensor");
  m.def("cpu_swiglu_backward(Tensor dy, Tensor gate, Tensor up, Tensor(a!) dgate, Tensor(b!) dup) -> ()");
  m.def("cpu_swiglu_backward_again(Tensor(a!) dy, Tensor gate, Tensor up, Tensor(b!) dgate, Tensor(c!) dup) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(spt_fast, CPU, m) {
  m.impl("cpu_swiglu_forward", TORCH_BOX(&swiglu_forward));
  m.impl("cpu_swiglu_backward", TORCH_BOX(&swiglu_backward));
  m.impl("cpu_swiglu_backward_again", TORCH_BOX(&swiglu_backward_again));
}

}  // namespace spt
