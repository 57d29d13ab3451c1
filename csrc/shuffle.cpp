// Batch permutation of indices, and batch starts of a ring's windows.

#include "shuffle.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

using torch::stable::Tensor;

namespace spt {
namespace {

constexpr int64_t kGrain = 1 << 14;

Key key_from(const Tensor& key) {
  STD_TORCH_CHECK(key.numel() == kKeyWords, "a key has ", kKeyWords, " words");
  Key words;
  std::copy_n(key.const_data_ptr<int64_t>(), kKeyWords, words.begin());
  return words;
}

Tensor permute(const Tensor& index, int64_t size, const Tensor& key, bool inverse) {
  const Permutation permutation(size, key_from(key));
  Tensor result = torch::stable::empty_like(index);
  const int64_t* in = index.const_data_ptr<int64_t>();
  int64_t* out = result.mutable_data_ptr<int64_t>();
  torch::stable::parallel_for(0, index.numel(), kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) out[i] = inverse ? permutation.position_of(in[i]) : permutation.at(in[i]);
  });
  return result;
}

Tensor ring_starts(const Tensor& window, int64_t num_tokens, int64_t context, const Tensor& source_key) {
  const Key base = key_from(source_key);
  const uint64_t per_epoch = num_tokens / context;
  const bool rotates = num_tokens % context == 0;
  Tensor result = torch::stable::empty_like(window);
  const int64_t* in = window.const_data_ptr<int64_t>();
  int64_t* out = result.mutable_data_ptr<int64_t>();
  torch::stable::parallel_for(0, window.numel(), kGrain, [&](int64_t begin, int64_t end) {
    uint64_t epoch = ~uint64_t{0}, epoch_start = 0;
    Permutation permutation(1, base);
    for (int64_t i = begin; i < end; ++i) {
      const uint64_t k = in[i];
      if (k / per_epoch != epoch) {
        epoch = k / per_epoch;
        const Key key = epoch_key(base, epoch);
        permutation = Permutation(per_epoch, key);
        epoch_start = rotates ? uint128{key[kRounds]} * num_tokens >> 64
                              : uint128{epoch} * (per_epoch * context) % num_tokens;
      }
      out[i] = (uint128{epoch_start} + permutation.at(k % per_epoch) * context) % num_tokens;
    }
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(spt_fast, m) {
  m.def("permute(Tensor index, int size, Tensor key, bool inverse) -> Tensor");
  m.def("ring_starts(Tensor window, int num_tokens, int context, Tensor source_key) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(spt_fast, CPU, m) {
  m.impl("permute", TORCH_BOX(&permute));
  m.impl("ring_starts", TORCH_BOX(&ring_starts));
}

}  // namespace spt
