// One AdamW update of a tensor, in place; kernels/adamw.py says what is computed.
//
// The arithmetic is on float32 arrays. A float32 tensor is such an array; of a bf16 tensor a block at a time is widened
// into one, in the first-level cache, and what changed is rounded back. That the blocks are small lets the next ones
// come from memory meanwhile: bf16 gradients with blocks of 1024 take 1.7 times as long as with blocks of 256.

#include "simd.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <optional>

using torch::stable::Tensor;

namespace spt {
namespace {

constexpr int64_t kBlock = 256;  // a power of 2, so that the high word of an element's number is the same in a block
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

SPT_INLINE uint32_t mix(uint32_t x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}

// Rounds up or down at random; `first` and `key` are those of the block.
SPT_SIMD void narrow_at_random(const float* from, bf16* to, int64_t n, uint32_t first, uint32_t key) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t random = mix(mix((first + static_cast<uint32_t>(i)) ^ key) + key) >> 16;
    const uint32_t rounded = (std::bit_cast<uint32_t>(from[i]) + random) >> 16;
    to[i].bits = static_cast<uint16_t>(from[i] != from[i] ? 0x7fc0 : rounded);
  }
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

  // Elements first .. first + n as float32: where they lie, or a copy in `buffer`.
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

void adamw_step(const Tensor& param, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                const std::optional<Tensor>& master, const Tensor& grad, const std::optional<Tensor>& anchor, double step, double lr, double grad_scale,
                std::optional<int64_t> seed, double beta1, double beta2, double eps, double weight_decay,
                double anchor_decay) {
  const Numbers numbers{.grad_scale = static_cast<float>(grad_scale),
                        .new1 = static_cast<float>(1 - beta1),
                        .new2 = static_cast<float>(1 - beta2),
                        .rate = static_cast<float>(lr / -std::expm1(step * std::log(beta1))),
                        .correction2 = static_cast<float>(1 / -std::expm1(step * std::log(beta2))),
                        .eps = static_cast<float>(eps),
                        .decay = static_cast<float>(lr * weight_decay),
                        .pull = static_cast<float>(lr * anchor_decay)};
  const uint64_t words = static_cast<uint64_t>(seed.value_or(0));
  const uint32_t seed_key = mix(mix(mix(static_cast<uint32_t>(words)) + static_cast<uint32_t>(words >> 32)) +
                                static_cast<uint32_t>(static_cast<int64_t>(step)));

  const Memory params(param), grads(grad), first_moments(exp_avg), second_moments(exp_avg_sq);
  const Memory thetas(master ? *master : param), anchors(anchor ? *anchor : param);
  const int64_t N = param.numel();
  torch::stable::parallel_for(0, (N + kBlock - 1) / kBlock, kGrainBlocks, [&](int64_t begin, int64_t end) {
    float buffers[5][kBlock];
    for (int64_t first = begin * kBlock; first < std::min(N, end * kBlock); first += kBlock) {
      const int64_t n = std::min(kBlock, N - first);
      const float* g = grads.read(first, n, buffers[0]);
      float* m = first_moments.read(first, n, buffers[1]);
      float* v = second_moments.read(first, n, buffers[2]);
      float* w = thetas.read(first, n, buffers[3]);
      update(w, g, m, v, anchor ? anchors.read(first, n, buffers[4]) : w, n, numbers);
      first_moments.write(first, n, m);
      second_moments.write(first, n, v);
      if (master) thetas.write(first, n, w);
      if (seed) {
        const uint32_t key = mix(seed_key + static_cast<uint32_t>(first >> 32));
        narrow_at_random(w, params.half + first, n, static_cast<uint32_t>(first), key);
      } else {
        params.write(first, n, w);
      }
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(spt_fast, m) {
  m.def(
      "cpu_adamw_step(Tensor(a!) param, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!)? master, Tensor grad, "
      "Tensor? anchor, float step, float lr, float grad_scale, int? seed, float beta1, float beta2, float eps, "
      "float weight_decay, float anchor_decay) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(spt_fast, CPU, m) { m.impl("cpu_adamw_step", TORCH_BOX(&adamw_step)); }

}  // namespace spt
