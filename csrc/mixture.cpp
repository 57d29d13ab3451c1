// Exact interleaving of sources, in batches: the batch version of spt_fast/data/mixture.py, which explains and checks it.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <queue>
#include <tuple>
#include <vector>

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace spt {
namespace {

using uint128 = unsigned __int128;

// One rounded-Bresenham split. Among its first n samples, floor((2n·weight + total) / 2·total) go to `first`; the
// remainder of that division is kept, so that a step costs an addition and a comparison.
struct Split {
  uint64_t step, modulus, remainder;
  int64_t first, second;  // a split's number, or ~source
};

// splits [S, 4]: weight of the first child, total weight, first child, second child. Root: split 0, or source 0 alone.
std::tuple<Tensor, Tensor> locate_splits(const Tensor& splits_S4, int64_t num_sources, int64_t first_sample,
                                         int64_t count) {
  const int64_t num_splits = splits_S4.size(0);
  const int64_t* row = splits_S4.const_data_ptr<int64_t>();
  std::vector<Split> splits(num_splits);
  std::vector<int64_t> drawn_before(num_splits), next_k(num_sources);
  const auto arrive = [&](int64_t node, int64_t samples) {
    (node >= 0 ? drawn_before[node] : next_k[~node]) = samples;
  };
  arrive(num_splits ? 0 : ~int64_t{0}, first_sample);
  for (int64_t s = 0; s < num_splits; ++s, row += 4) {  // a parent comes before its children
    const uint64_t weight = row[0], total = row[1], modulus = 2 * total;
    const uint128 scaled = uint128{2 * weight} * drawn_before[s] + total;
    const int64_t to_first = scaled / modulus;
    splits[s] = {2 * weight, modulus, static_cast<uint64_t>(scaled % modulus), row[2], row[3]};
    arrive(row[2], to_first);
    arrive(row[3], drawn_before[s] - to_first);
  }

  Tensor source = torch::stable::new_empty(splits_S4, {count}, ScalarType::Int);
  Tensor k = torch::stable::new_empty(splits_S4, {count}, ScalarType::Long);
  int32_t* source_out = source.mutable_data_ptr<int32_t>();
  int64_t* k_out = k.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < count; ++i) {
    int64_t node = num_splits ? 0 : ~int64_t{0};
    while (node >= 0) {
      Split& split = splits[node];
      split.remainder += split.step;
      const bool to_first = split.remainder >= split.modulus;
      if (to_first) split.remainder -= split.modulus;
      node = to_first ? split.first : split.second;
    }
    source_out[i] = static_cast<int32_t>(~node);
    k_out[i] = next_k[~node]++;
  }
  return {source, k};
}

// Earliest deadline first over one period Q = sum of weights: see chairman_order in mixture.py.
// weights [K] -> source of each slot [Q] int16, its rank among that source's slots [Q] int32, and the slots of each
// source, one source after another [Q] int32.
std::tuple<Tensor, Tensor, Tensor> chairman_table(const Tensor& weights_K) {
  const int64_t sources = weights_K.numel();
  const int64_t* weight = weights_K.const_data_ptr<int64_t>();
  std::vector<int64_t> first_slot(sources + 1, 0), rank(sources, 0);
  for (int64_t s = 0; s < sources; ++s) first_slot[s + 1] = first_slot[s] + weight[s];
  const int64_t period = first_slot[sources];
  const int64_t unit = 2 * (sources - std::count(weight, weight + sources, 0)) - 2;

  // The sources whose next sample may be drawn from a slot on: a linked list for each slot.
  std::vector<int32_t> released(period, -1), next_released(sources, -1);
  const auto release = [&](int64_t s, int64_t next_slot) {
    if (rank[s] == weight[s]) return;
    const int64_t share = unit * weight[s];
    const int64_t slot = std::max(next_slot, ((rank[s] * unit + 1) * period + share - 1) / share - 1);
    next_released[s] = released[slot];
    released[slot] = static_cast<int32_t>(s);
  };
  const auto deadline = [&](int64_t s) { return ((rank[s] + 1) * unit - 1) * period / (unit * weight[s]); };
  for (int64_t s = 0; s < sources; ++s) release(s, 0);

  Tensor source = torch::stable::new_empty(weights_K, {period}, ScalarType::Short);
  Tensor rank_of_slot = torch::stable::new_empty(weights_K, {period}, ScalarType::Int);
  Tensor slots = torch::stable::new_empty(weights_K, {period}, ScalarType::Int);
  int16_t* source_out = source.mutable_data_ptr<int16_t>();
  int32_t* rank_out = rank_of_slot.mutable_data_ptr<int32_t>();
  int32_t* slots_out = slots.mutable_data_ptr<int32_t>();
  using Due = std::pair<int64_t, int32_t>;  // deadline, source
  std::priority_queue<Due, std::vector<Due>, std::greater<>> due;
  for (int64_t slot = 0; slot < period; ++slot) {
    for (int32_t s = released[slot]; s >= 0; s = next_released[s]) due.emplace(deadline(s), s);
    STD_TORCH_CHECK(!due.empty() && due.top().first >= slot, "the chairman's theorem failed at slot ", slot);
    const int32_t s = due.top().second;
    due.pop();
    source_out[slot] = static_cast<int16_t>(s);
    rank_out[slot] = static_cast<int32_t>(rank[s]);
    slots_out[first_slot[s] + rank[s]] = static_cast<int32_t>(slot);
    ++rank[s];
    release(s, slot + 1);
  }
  return {source, rank_of_slot, slots};
}

std::tuple<Tensor, Tensor> locate_table(const Tensor& source_Q, const Tensor& rank_Q, const Tensor& weights_K,
                                        int64_t first_sample, int64_t count) {
  const int64_t period = source_Q.numel();
  const int16_t* source_of_slot = source_Q.const_data_ptr<int16_t>();
  const int32_t* rank_of_slot = rank_Q.const_data_ptr<int32_t>();
  const int64_t* weight = weights_K.const_data_ptr<int64_t>();
  Tensor source = torch::stable::new_empty(source_Q, {count}, ScalarType::Int);
  Tensor k = torch::stable::new_empty(source_Q, {count}, ScalarType::Long);
  int32_t* source_out = source.mutable_data_ptr<int32_t>();
  int64_t* k_out = k.mutable_data_ptr<int64_t>();
  int64_t periods = first_sample / period, slot = first_sample % period;
  for (int64_t i = 0; i < count; ++i) {
    const int16_t s = source_of_slot[slot];
    source_out[i] = s;
    k_out[i] = periods * weight[s] + rank_of_slot[slot];
    if (++slot == period) {
      slot = 0;
      ++periods;
    }
  }
  return {source, k};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(spt_fast, m) {
  m.def("locate_splits(Tensor splits, int num_sources, int first_sample, int count) -> (Tensor, Tensor)");
  m.def("chairman_table(Tensor weights) -> (Tensor, Tensor, Tensor)");
  m.def("locate_table(Tensor source, Tensor rank, Tensor weights, int first_sample, int count) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(spt_fast, CPU, m) {
  m.impl("locate_splits", TORCH_BOX(&locate_splits));
  m.impl("chairman_table", TORCH_BOX(&chairman_table));
  m.impl("locate_table", TORCH_BOX(&locate_table));
}

}  // namespace spt
