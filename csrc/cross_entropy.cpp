// Cross-entropy of rows of logits, which become their own gradient; kernels/cross_entropy.py has the formulas.
//
// Rows of V logits in float32 or bf16; everything in between is float32. A row is read once, into a float32 copy in
// cache, one per thread. Its exponentials replace the copy, so that none is computed twice, and then, scaled, the row.

#include "simd.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace spt {
namespace {

// Numbers per thread for which another thread pays.
constexpr int64_t kGrain = 1 << 15;

struct Options {
  float z_loss, softcap;
  bool wants_grad;
};

// To 2 units in the last place: near 0 an odd polynomial, since the other formula would cancel.
SPT_INLINE float tanh_(float x) {
  const float magnitude = std::fabs(x), square = x * x;
  float p = -5.1550859e-3f;
  p = p * square + 2.0111624e-2f;
  p = p * square - 5.3566975e-2f;
  p = p * square + 1.3329243e-1f;
  p = p * square - 3.3333197e-1f;
  const float far = 1.0f - 2.0f / (exp_(2.0f * magnitude) + 1.0f);
  return magnitude < 0.7f ? x + x * square * p : std::copysign(far, x);
}

template <bool kCapped>
SPT_INLINE float capped(float s, Options o) {
  return kCapped ? o.softcap * tanh_(s / o.softcap) : s;
}

// The derivative of the softcap at a result of z.
template <bool kCapped>
SPT_INLINE float slope(float z, Options o) {
  return kCapped ? 1.0f - (z / o.softcap) * (z / o.softcap) : 1.0f;
}

// `work` has room for V numbers: the capped logits, and then the exponentials times the slope.
template <bool kCapped, class T>
SPT_INLINE float row_loss(T* __restrict z, int64_t V, int64_t target, float dloss, float* __restrict work, Options o) {
  float top = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : top)
  for (int64_t v = 0; v < V; ++v) {
    const float capped_z = capped<kCapped>(load(z[v]), o);
    work[v] = capped_z;
    top = std::max(top, capped_z);
  }
  const float z_target = work[target];

  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t v = 0; v < V; ++v) {
    const float capped_z = work[v], e = exp_(capped_z - top);
    work[v] = e * slope<kCapped>(capped_z, o);
    sum += e;
  }
  const float lse = top + std::log(sum);

  if (o.wants_grad) {
    const float p_scale = dloss * (1.0f + 2.0f * o.z_loss * lse) / sum;
#pragma omp simd
    for (int64_t v = 0; v < V; ++v) store(z[v], work[v] * p_scale);
    store(z[target], work[target] * p_scale - dloss * slope<kCapped>(z_target, o));
  }
  return lse - z_target + o.z_loss * lse * lse;
}

template <bool kCapped, class T>
SPT_INLINE void row_losses(T* z, const int64_t* targets, const float* dloss, float* loss, int64_t rows, int64_t V,
                           int64_t stride, int64_t ignore_index, float* work, Options o) {
  for (int64_t i = 0; i < rows; ++i) {
    T* row = z + i * stride;
    if (targets[i] != ignore_index) {
      loss[i] = row_loss<kCapped>(row, V, targets[i], dloss[i], work, o);
    } else {
      loss[i] = 0;
      if (o.wants_grad) std::fill_n(row, V, T{});
    }
  }
}

#define ROWS(T)                                                                                              \
  SPT_SIMD void rows(T* z, const int64_t* targets, const float* dloss, float* loss, int64_t rows, int64_t V, \
                     int64_t stride, int64_t ignore_index, float* work, Options o) {                         \
    if (o.softcap > 0)                                                                                       \
      row_losses<true>(z, targets, dloss, loss, rows, V, stride, ignore_index, work, o);                     \
    else                                                                                                     \
      row_losses<false>(z, targets, dloss, loss, rows, V, stride, ignore_index, work, o);                    \
  }
ROWS(float)
ROWS(bf16)
#undef ROWS

// `logits` [C, V] may have gaps between its rows; `targets` int64 and `dloss` float32 are contiguous [C].
Tensor cross_entropy_rows(Tensor logits, const Tensor& targets, const Tensor& dloss, int64_t ignore_index,
                          double z_loss, double softcap, bool wants_grad) {
  const int64_t C = logits.size(0), V = logits.size(1), stride = logits.stride(0);
  const int64_t* target = data<int64_t>(targets);
  for (int64_t i = 0; i < C; ++i)
    STD_TORCH_CHECK(target[i] == ignore_index || (target[i] >= 0 && target[i] < V), "linear_cross_entropy: target ",
                    target[i], " is out of bounds for a vocabulary of ", V);
  const Options options{static_cast<float>(z_loss), static_cast<float>(softcap), wants_grad};
  Tensor loss = torch::stable::new_empty(logits, {C}, ScalarType::Float);
  with_dtype(logits, [&]<class T>(T) {
    torch::stable::parallel_for(0, C, kGrain / std::max<int64_t>(V, 1) + 1, [&](int64_t begin, int64_t end) {
      std::vector<float> work(V);
      rows(mutable_data<T>(logits) + begin * stride, target + begin, data<float>(dloss) + begin,
           mutable_data<float>(loss) + begin, end - begin, V, stride, ignore_index, work.data(), options);
    });
  });
  return loss;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(spt_fast, m) {
  m.def(
      "cpu_cross_entropy_rows(Tensor(a!) logits, Tensor targets, Tensor dloss, int ignore_index, float z_loss, "
      "float softcap, bool wants_grad) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(spt_fast, CPU, m) { m.impl("cpu_cross_entropy_rows", TORCH_BOX(&cross_entropy_rows)); }

}  // namespace spt
