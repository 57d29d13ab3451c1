// One AdamW update of a list of tensors, in place; kernels/adamw.py has the formulas.
//
// The arithmetic is on float32 arrays. A float32 tensor is such an array; a bf16 tensor is widened one block at a time in
// the first-level cache, and the changed numbers are rounded back. With small blocks the next ones arrive from memory
// meanwhile: bf16 gradients with blocks of 1024 take 1.7 times as long as with blocks of 256.

#include "simd.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <vector>

using torch::stable::Tensor;

namespace spt {
namespace {

constexpr int64_t kBlock = 256;
constexpr int64_t kGrainBlocks = 64;

struct Numbers {
  float grad_scale, new1, new2, rate, correction2, eps, decay, pull;
};

SPT_SIMD void update(float* w, const float* g, float* m, float* v, const float* anchor, int64_t n, Numbers k) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float grad = g[i] * k.grad_scale, theta = w[i];
    const float exp_avg = m[i] + (grad - m[i]) * k.new1;
    const float exp_avg_sq = v[i] + (grad * grad - v[i]) * k.new2;
    const float adam = k.rate * exp_avg / (std::sqrt(exp_avg_sq * k.correction2) + k.eps);
    w[i] = theta - (adam + k.decay * theta + k.pull * (theta - anchor[i]));
    m[i] = exp_avg;
    v[i] = exp_avg_sq;
  }
}

SPT_SIMD void widen(const bf16* from, float* to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = load(from[i]);
}

SPT_SIMD void narrow(const float* from, bf16* to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) store(to[i], from[i]);
}

// A tensor's memory, by one of two pointers.
struct Memory {
  float* wide = nullptr;
  bf16* half = nullptr;

  explicit Memory(const Tensor& x) {
    with_dtype(x, [&]<class T>(T) {
      if constexpr (std::is_same_v<T, float>) wide = static_cast<float*>(x.data_ptr());
      else half = static_cast<bf16*>(x.data_ptr());
    });
  }

  // Elements first .. first + n as float32: in place, or a copy in `buffer`.
  float* read(int64_t first, int64_t n, float* buffer) const {
    if (half == nullptr) return wide + first;
    widen(half + first, buffer, n);
    return buffer;
  }

  void write(int64_t first, int64_t n, const float* from) const {
    if (half != nullptr) narrow(from, half + first, n);
    else if (from != wide + first) std::copy_n(from, n, wide + first);
  }
};

// One of the updated tensors, with everything that belongs to it; its blocks are number begin ... end - 1 of all.
struct Part {
  Memory param, exp_avg, exp_avg_sq, theta, grad, anchor;
  int64_t numel, begin, end;
};

// masters and anchors hold one for each of params, or are empty.
void adamw_step(const std::vector<Tensor>& params, const std::vector<Tensor>& exp_avgs,
                const std::vector<Tensor>& exp_avg_sqs, const std::vector<Tensor>& masters,
                const std::vector<Tensor>& grads, const std::vector<Tensor>& anchors, double step, double lr,
                double grad_scale, double beta1, double beta2, double eps, double weight_decay, double anchor_decay) {
  const Numbers numbers{.grad_scale = static_cast<float>(grad_scale),
                        .new1 = static_cast<float>(1 - beta1),
                        .new2 = static_cast<float>(1 - beta2),
                        .rate = static_cast<float>(lr / -std::expm1(step * std::log(beta1))),
                        .correction2 = static_cast<float>(1 / -std::expm1(step * std::log(beta2))),
                        .eps = static_cast<float>(eps),
                        .decay = static_cast<float>(lr * weight_decay),
                        .pull = static_cast<float>(lr * anchor_decay)};
  const bool has_masters = !masters.empty(), has_anchors = !anchors.empty();
  std::vector<Part> parts;
  int64_t blocks = 0;
  for (size_t i = 0; i < params.size(); ++i) {
    const int64_t numel = params[i].numel();
    if (numel == 0) continue;
    const int64_t begin = blocks;
    blocks += (numel + kBlock - 1) / kBlock;
    parts.push_back({Memory(params[i]), Memory(exp_avgs[i]), Memory(exp_avg_sqs[i]),
                     Memory(has_masters ? masters[i] : params[i]), Memory(grads[i]),
                     Memory(has_anchors ? anchors[i] : params[i]), numel, begin, blocks});
  }

  torch::stable::parallel_for(0, blocks, kGrainBlocks, [&](int64_t begin, int64_t end) {
    float buffers[5][kBlock];
    auto part = std::ranges::upper_bound(parts, begin, {}, &Part::end);
    for (int64_t block = begin; block < end; ++block) {
      if (block == part->end) ++part;
      const int64_t first = (block - part->begin) * kBlock, n = std::min(kBlock, part->numel - first);
      const float* g = part->grad.read(first, n, buffers[0]);
      float* m = part->exp_avg.read(first, n, buffers[1]);
      float* v = part->exp_avg_sq.read(first, n, buffers[2]);
      float* w = part->theta.read(first, n, buffers[3]);
      update(w, g, m, v, has_anchors ? part->anchor.read(first, n, buffers[4]) : w, n, numbers);
      part->exp_avg.write(first, n, m);
      part->exp_avg_sq.write(first, n, v);
      if (has_masters) part->theta.write(first, n, w);
      part->param.write(first, n, w);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(spt_fast, m) {
  m.def(
      "cpu_adamw_step(Tensor(a!)[] params, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] masters, "
      "Tensor[] grads, Tensor[] anchors, float step, float lr, float grad_scale, float beta1, "
      "float beta2, float eps, float weight_decay, float anchor_decay) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(spt_fast, CPU, m) { m.impl("cpu_adamw_step", TORCH_BOX(&adamw_step)); }

}  // namespace spt
