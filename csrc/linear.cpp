// Adds a bf16 product to a float32 sum; kernels/linear.py explains why. PyTorch would convert all of it first.

#include "simd.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

using torch::stable::Tensor;

namespace spt {
namespace {

constexpr int64_t kGrain = 1 << 15;

SPT_SIMD void add(const bf16* from, float* to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] += load(from[i]);
}

// Both contiguous, of one size.
void add_product(Tensor total, const Tensor& product) {
  const bf16* from = data<bf16>(product);
  float* to = mutable_data<float>(total);
  torch::stable::parallel_for(0, total.numel(), kGrain,
                              [&](int64_t begin, int64_t end) { add(from + begin, to + begin, end - begin); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(spt_fast, m) { m.def("cpu_add_product(Tensor(a!) total, Tensor product) -> ()"); }

STABLE_TORCH_LIBRARY_IMPL(spt_fast, CPU, m) { m.impl("cpu_add_product", TORCH_BOX(&add_product)); }

}  // namespace spt
