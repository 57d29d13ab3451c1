// Rotary position embedding with or without the per-head RMSNorm before it, forward and backward; kernels/rotary.py has
// the formulas.
//
// Queries and keys are [B, T, H, D] of float32 or bf16, of any strides but the last, which is 1: slices of a projection
// are read in place. The tables are [T, D] or [B, T, D], contiguous float32; the first half of a row is read. Results are
// written to tensors of the same form, which may be the inputs; the heads of a token are contiguous. Everything in
// between is float32. The weights' gradients are summed over the heads of a token, then over the tokens of a block, then
// over the blocks in pairs: no sum is long or depends on the number of threads.

#include "simd.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace spt {
namespace {

constexpr int64_t kBlockTokens = 16;

// y = the H heads of one token, rotated by the angles or (sign -1) by their opposites. Without weights nothing is
// normalised.
template <class T>
SPT_INLINE void forward_heads(const T* x, int64_t stride, const float* w, const float* cos, const float* sin,
                              float sign, T* y, int64_t H, int64_t half, float eps) {
  for (int64_t head = 0; head < H; ++head) {
    const T *x1 = x + head * stride, *x2 = x1 + half;
    T *y1 = y + head * 2 * half, *y2 = y1 + half;
    if (w == nullptr) {
#pragma omp simd
      for (int64_t i = 0; i < half; ++i) {
        const float a = load(x1[i]), b = load(x2[i]), s = sign * sin[i];
        store(y1[i], a * cos[i] - b * s);
        store(y2[i], b * cos[i] + a * s);
      }
      continue;
    }
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < 2 * half; ++i) sum += load(x1[i]) * load(x1[i]);
    const float r = 1 / std::sqrt(sum / static_cast<float>(2 * half) + eps);
    const float* w2 = w + half;
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
      const float a = load(x1[i]) * r * w[i], b = load(x2[i]) * r * w2[i];
      store(y1[i], a * cos[i] - b * sin[i]);
      store(y2[i], b * cos[i] + a * sin[i]);
    }
  }
}

// dx of the H heads of one token; adds the weight's gradient to dw, using the scratch [D].
template <class T>
SPT_INLINE void backward_heads(const T* dy, int64_t dy_stride, const T* x, int64_t x_stride, const float* w,
                               const float* cos, const float* sin, T* dx, float* dw, float* scratch, int64_t H,
                               int64_t half, float eps) {
  const float* w2 = w + half;
  float *sum1 = scratch, *sum2 = scratch + half;
  std::fill_n(scratch, 2 * half, 0.0f);
  for (int64_t head = 0; head < H; ++head) {
    const T *dy1 = dy + head * dy_stride, *dy2 = dy1 + half, *x1 = x + head * x_stride, *x2 = x1 + half;
    T *dx1 = dx + head * 2 * half, *dx2 = dx1 + half;
    float squares = 0, products = 0;
#pragma omp simd reduction(+ : squares, products)
    for (int64_t i = 0; i < half; ++i) {
      const float a = load(x1[i]), b = load(x2[i]);
      const float da = load(dy1[i]) * cos[i] + load(dy2[i]) * sin[i];
      const float db = load(dy2[i]) * cos[i] - load(dy1[i]) * sin[i];
      squares += a * a + b * b;
      products += da * w[i] * a + db * w2[i] * b;
    }
    const float D = static_cast<float>(2 * half), r = 1 / std::sqrt(squares / D + eps);
    const float projection = products / D * r * r;
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
      const float a = load(x1[i]), b = load(x2[i]);
      const float da = load(dy1[i]) * cos[i] + load(dy2[i]) * sin[i];
      const float db = load(dy2[i]) * cos[i] - load(dy1[i]) * sin[i];
      sum1[i] += da * a * r;
      sum2[i] += db * b * r;
      store(dx1[i], (da * w[i] - a * projection) * r);
      store(dx2[i], (db * w2[i] - b * projection) * r);
    }
  }
#pragma omp simd
  for (int64_t i = 0; i < 2 * half; ++i) dw[i] += scratch[i];
}

#define TOKEN(T)                                                                                                       \
  SPT_SIMD void forward_token(const T* x, int64_t stride, const float* w, const float* cos, const float* sin,          \
                              float sign, T* y, int64_t H, int64_t half, float eps) {                                  \
    forward_heads(x, stride, w, cos, sin, sign, y, H, half, eps);                                                      \
  }                                                                                                                    \
  SPT_SIMD void backward_token(const T* dy, int64_t dy_stride, const T* x, int64_t x_stride, const float* w,           \
                               const float* cos, const float* sin, T* dx, float* dw, float* scratch, int64_t H,        \
                               int64_t half, float eps) {                                                              \
    backward_heads(dy, dy_stride, x, x_stride, w, cos, sin, dx, dw, scratch, H, half, eps);                            \
  }
TOKEN(float)
TOKEN(bf16)
#undef TOKEN

// Calls f(block, b, t, cos, sin) for every token of x, from several threads, all tokens of a block from one of them.
template <class F>
void for_tokens(const Tensor& x, const Tensor& cos, const Tensor& sin, F f) {
  const int64_t B = x.size(0), T = x.size(1), D = x.size(3), step = cos.dim() == 3 ? T * D : 0;
  torch::stable::parallel_for(0, (B * T + kBlockTokens - 1) / kBlockTokens, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin * kBlockTokens; n < std::min(end * kBlockTokens, B * T); ++n) {
      const int64_t b = n / T, t = n % T, row = b * step + t * D;
      f(n / kBlockTokens, b, t, data<float>(cos) + row, data<float>(sin) + row);
    }
  });
}

// The place of a tensor's heads.
template <class T>
struct Heads {
  T* first;
  int64_t H, D, stride_b, stride_t, stride_h;

  explicit Heads(const Tensor& x)
      : first(static_cast<T*>(x.data_ptr())), H(x.size(2)), D(x.size(3)), stride_b(x.stride(0)), stride_t(x.stride(1)),
        stride_h(x.stride(2)) {}

  T* token(int64_t b, int64_t t) const { return first + b * stride_b + t * stride_t; }
};

void forward(const Tensor& q, const Tensor& k, const float* q_weight, const float* k_weight, const Tensor& cos,
             const Tensor& sin, float sign, float eps, const Tensor& q_out, const Tensor& k_out) {
  with_dtype(q, [&]<class T>(T) {
    const Heads<const T> from_q(q), from_k(k);
    const Heads<T> to_q(q_out), to_k(k_out);
    for_tokens(q, cos, sin, [&](int64_t, int64_t b, int64_t t, const float* cos, const float* sin) {
      forward_token(from_q.token(b, t), from_q.stride_h, q_weight, cos, sin, sign, to_q.token(b, t), to_q.H, to_q.D / 2,
                    eps);
      forward_token(from_k.token(b, t), from_k.stride_h, k_weight, cos, sin, sign, to_k.token(b, t), to_k.H, to_k.D / 2,
                    eps);
    });
  });
}

void rope(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, bool inverse, const Tensor& q_out,
          const Tensor& k_out) {
  forward(q, k, nullptr, nullptr, cos, sin, inverse ? -1.0f : 1.0f, 0.0f, q_out, k_out);
}

void qk_norm_rope_forward(const Tensor& q, const Tensor& k, const Tensor& q_weight, const Tensor& k_weight,
                          const Tensor& cos, const Tensor& sin, double eps, const Tensor& q_out, const Tensor& k_out) {
  forward(q, k, data<float>(q_weight), data<float>(k_weight), cos, sin, 1.0f, static_cast<float>(eps), q_out, k_out);
}

Tensor qk_norm_rope_backward(const Tensor& dy_q, const Tensor& dy_k, const Tensor& q, const Tensor& k,
                             const Tensor& q_weight, const Tensor& k_weight, const Tensor& cos, const Tensor& sin,
                             double eps_, const Tensor& dq, const Tensor& dk) {
  const int64_t D = q.size(3), blocks = (q.size(0) * q.size(1) + kBlockTokens - 1) / kBlockTokens;
  const float eps = static_cast<float>(eps_);
  Tensor dw = torch::stable::new_empty(q, {2, D}, ScalarType::Float);
  std::vector<float> sums(blocks * 3 * D);  // by block: of q, of k, scratch
  with_dtype(q, [&]<class T>(T) {
    const Heads<const T> up_q(dy_q), up_k(dy_k), from_q(q), from_k(k);
    const Heads<T> to_q(dq), to_k(dk);
    for_tokens(q, cos, sin, [&](int64_t block, int64_t b, int64_t t, const float* cos, const float* sin) {
      float *sum_q = sums.data() + block * 3 * D, *sum_k = sum_q + D, *scratch = sum_k + D;
      backward_token(up_q.token(b, t), up_q.stride_h, from_q.token(b, t), from_q.stride_h, data<float>(q_weight), cos,
                     sin, to_q.token(b, t), sum_q, scratch, to_q.H, D / 2, eps);
      backward_token(up_k.token(b, t), up_k.stride_h, from_k.token(b, t), from_k.stride_h, data<float>(k_weight), cos,
                     sin, to_k.token(b, t), sum_k, scratch, to_k.H, D / 2, eps);
    });
  });
  for (int64_t step = 1; step < blocks; step *= 2)
    for (int64_t block = 0; block + step < blocks; block += 2 * step)
      for (int64_t i = 0; i < 2 * D; ++i) sums[block * 3 * D + i] += sums[(block + step) * 3 * D + i];
  if (blocks > 0)
    std::copy_n(sums.data(), 2 * D, mutable_data<float>(dw));
  else
    std::fill_n(mutable_data<float>(dw), 2 * D, 0.0f);
  return dw;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(spt_fast, m) {
  m.def(
      "cpu_rope(Tensor q, Tensor k, Tensor cos, Tensor sin, bool inverse, Tensor(a!) q_out, Tensor(b!) k_out) -> ()");
  m.def(
      "cpu_qk_norm_rope_forward(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, "
      "float eps, Tensor(a!) q_out, Tensor(b!) k_out) -> ()");
  m.def(
      "cpu_qk_norm_rope_backward(Tensor dy_q, Tensor dy_k, Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, "
      "Tensor cos, Tensor sin, float eps, Tensor(a!) dq, Tensor(b!) dk) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(spt_fast, CPU, m) {
  m.impl("cpu_rope", TORCH_BOX(&rope));
  m.impl("cpu_qk_norm_rope_forward", TORCH_BOX(&qk_norm_rope_forward));
  m.impl("cpu_qk_norm_rope_backward", TORCH_BOX(&qk_norm_rope_backward));
}

}  // namespace spt
