// The L2 norm of all numbers of some float32 tensors; see kernels/total_norm.py.
//
// Squares are summed in float64 by blocks, and then over the blocks, so that the number of threads has no effect.

#include "simd.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <vector>

using torch::stable::Tensor;

namespace spt {
namespace {

constexpr int64_t kBlock = 1 << 14;

SPT_SIMD double sum_of_squares(const float* x, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(x[i]) * x[i];
  return sum;
}

double total_norm(const std::vector<Tensor>& tensors) {
  struct Block {
    const float* data;
    int64_t size;
  };
  std::vector<Block> blocks;
  for (const Tensor& x : tensors)
    for (int64_t i = 0; i < x.numel(); i += kBlock)
      blocks.push_back({x.const_data_ptr<float>() + i, std::min(kBlock, x.numel() - i)});
  std::vector<double> sums(blocks.size());
  torch::stable::parallel_for(0, static_cast<int64_t>(blocks.size()), 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) sums[i] = sum_of_squares(blocks[i].data, blocks[i].size);
  });
  double total = 0;
  for (const double sum : sums) total += sum;
  return std::sqrt(total);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(spt_fast, m) { m.def("cpu_total_norm(Tensor[] tensors) -> float"); }

STABLE_TORCH_LIBRARY_IMPL(spt_fast, CPU, m) { m.impl("cpu_total_norm", TORCH_BOX(&total_norm)); }

}  // namespace spt
