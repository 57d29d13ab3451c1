// Products of float32 matrices on CPUs with AVX-512; kernels/matmul.py has the conditions.
//
// The right factor is packed once, by all threads, in panels of 64 or 48 columns. The left one is read in place if its
// rows are contiguous, and packed in panels of kPackedRows rows if its columns are. Threads take blocks of the result's
// rows from a common counter, so that a delayed thread delays only its block; which thread takes which does not change
// the result.
//
// A tile of the result, 6 x 64 or 8 x 48, fills the registers; kDepth rows of a panel stay in the first-level cache.
// Longer sums are computed in parts, each from zero, which also keeps their rounding errors small.
//
// Legend: C [M, N] = A [M, K] · B [K, N].

#include "transpose.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <type_traits>

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <cpuid.h>
#include <immintrin.h>
#define SPT_AVX512 1
#pragma GCC push_options
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of GCC 12's own avx512fintrin.h
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#endif

namespace spt {
namespace {

#ifdef SPT_AVX512

constexpr int64_t kLanes = 16;
constexpr int64_t kDepth = 192;
constexpr int kRows = 6, kPackedRows = 8;
constexpr int64_t kAhead = 12;  // rows or columns that are prefetched for packing
constexpr int64_t kBlockRows = 96, kPackedBlockRows = 64;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline __mmask16 lanes_of(int64_t count) {
  return count >= kLanes ? 0xffff : (1 << std::max<int64_t>(count, 0)) - 1;
}

// A matrix in which either the rows or the columns are contiguous, and the others `line` numbers apart.
struct Factor {
  const float* data;
  int64_t line;
  bool rows;  // are contiguous

  explicit Factor(const Tensor& x)
      : data(x.const_data_ptr<float>()), line(x.stride(x.stride(1) == 1 ? 0 : 1)), rows(x.stride(1) == 1) {
    STD_TORCH_CHECK(x.stride(0) == 1 || x.stride(1) == 1, "matmul: neither rows nor columns are contiguous");
  }
};

// C's columns in panels of `width`; the last two share theirs if the last would have one vector.
struct Panels {
  int64_t columns, width, number = ceil_div(columns, width);
  int64_t begin(int64_t p) const {
    const int64_t rest = columns - (number - 1) * width;
    return p * width - (p > 0 && p == number - 1 && rest <= kLanes ? kLanes : 0);
  }
  int64_t end(int64_t p) const { return p + 1 < number ? begin(p + 1) : ceil_div(columns, kLanes) * kLanes; }
};

// ------------------------------------------------------------------------------------------------ packing

// Panels of B, each [K][columns]: row k of all of them, or, if its columns are contiguous, all of panel p.
void pack_row(const Factor& b, int64_t N, int64_t K, const Panels& panels, int64_t k, float* to) {
  for (int64_t p = 0; p < panels.number; ++p) {
    const int64_t begin = panels.begin(p), end = panels.end(p);
    for (int64_t i = begin; i < end; i += kLanes)
      _mm512_storeu_ps(to + begin * K + k * (end - begin) + i - begin,
                       _mm512_maskz_loadu_ps(lanes_of(N - i), b.data + k * b.line + i));
  }
}
void pack_panel(const Factor& b, int64_t N, int64_t K, const Panels& panels, int64_t p, float* to) {
  const int64_t begin = panels.begin(p), end = panels.end(p);
  for (int64_t i = begin; i < end; i += kLanes)
    for (int64_t k = 0; k < K; k += kLanes) {
      __m512 r[16];
      for (int64_t j = 0; j < kLanes; ++j)
        r[j] = _mm512_maskz_loadu_ps(i + j < N ? lanes_of(K - k) : 0, b.data + (i + j) * b.line + k);
      transpose(r);
      for (int64_t j = 0; j < std::min(kLanes, K - k); ++j)
        _mm512_storeu_ps(to + begin * K + (k + j) * (end - begin) + i - begin, r[j]);
    }
}

// Rows first .. first + count of A's columns k .. k + depth, [depth][kPackedRows] for each kPackedRows of them.
void pack_rows(const Factor& a, int64_t k, int64_t depth, int64_t first, int64_t count, float* to) {
  for (int64_t i = 0; i < depth; ++i)
    for (int64_t row = 0; row < count; row += kPackedRows) {
      const __mmask8 mask = static_cast<__mmask8>(lanes_of(count - row));
      _mm_prefetch(reinterpret_cast<const char*>(a.data + (k + i + kAhead) * a.line + first + row), _MM_HINT_T0);
      _mm256_storeu_ps(to + row * depth + i * kPackedRows,
                       _mm256_maskz_loadu_ps(mask, a.data + (k + i) * a.line + first + row));
    }
}

// ------------------------------------------------------------------------------------------------ the product

// Rows of A: number k of row i lies at data[i * row + k * column], and `step` further in the next tile.
struct Left {
  const float* data;
  int64_t row, column, step;
};

// A tile of C; meanwhile `ahead` and the following lines are prefetched, one every `ahead_step` numbers.
template <int kTileRows, int kVectors>
inline void tile(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t depth, const float* ahead,
                 int64_t ahead_step, float* c, int64_t c_row, bool add, __mmask16 last) {
  __m512 sum[kTileRows][kVectors];
  for (int i = 0; i < kTileRows; ++i)
    for (int j = 0; j < kVectors; ++j) sum[i][j] = _mm512_setzero_ps();
  for (int64_t k = 0; k < depth; ++k) {
    _mm_prefetch(reinterpret_cast<const char*>(ahead + k * ahead_step), _MM_HINT_T1);
    __m512 right[kVectors];
    for (int j = 0; j < kVectors; ++j) right[j] = _mm512_loadu_ps(b + (k * kVectors + j) * kLanes);
    for (int i = 0; i < kTileRows; ++i) {
      const __m512 left = _mm512_set1_ps(a[i * a_row + k * a_column]);
      for (int j = 0; j < kVectors; ++j) sum[i][j] = _mm512_fmadd_ps(left, right[j], sum[i][j]);
    }
  }
  for (int i = 0; i < kTileRows; ++i)
    for (int j = 0; j < kVectors; ++j) {
      const __mmask16 mask = j + 1 < kVectors ? 0xffff : last;
      float* to = c + i * c_row + j * kLanes;
      _mm512_mask_storeu_ps(to, mask, _mm512_add_ps(sum[i][j], _mm512_maskz_loadu_ps(add ? mask : 0, to)));
    }
}

// All rows of a block in one panel.
template <int kTileRows, int kVectors>
void tiles(Left a, const float* b, const float* ahead, int64_t depth, float* c, int64_t c_row, int64_t rows, bool add,
           __mmask16 last) {
  const int64_t ahead_step = kVectors * kLanes / ceil_div(rows, kTileRows);
  const auto run = [&]<int kNow>(std::integral_constant<int, kNow>, int64_t i) {
    if (add)
      for (int64_t next = i + kNow; next < std::min(i + kNow + kTileRows, rows); ++next)
        for (int64_t j = 0; j <= kVectors; ++j)
          _mm_prefetch(reinterpret_cast<const char*>(c + next * c_row + j * kLanes), _MM_HINT_T0);
    tile<kNow, kVectors>(a.data + i / kTileRows * a.step + i % kTileRows * a.row, a.row, a.column, b, depth,
                         ahead + i / kTileRows * depth * ahead_step, ahead_step, c + i * c_row, c_row, add, last);
  };
  int64_t i = 0;
  for (; i + kTileRows <= rows; i += kTileRows) run(std::integral_constant<int, kTileRows>{}, i);
  for (; i + 2 <= rows; i += 2) run(std::integral_constant<int, 2>{}, i);
  for (; i < rows; ++i) run(std::integral_constant<int, 1>{}, i);
}

template <int kTileRows, class... Arguments>
void tiles_of(int64_t vectors, Arguments... arguments) {
  switch (vectors) {
    case 1: return tiles<kTileRows, 1>(arguments...);
    case 2: return tiles<kTileRows, 2>(arguments...);
    case 3: return tiles<kTileRows, 3>(arguments...);
    default: if constexpr (kTileRows == kRows) return tiles<kTileRows, 4>(arguments...);
  }
}

// out = a · b, added to out if `add`. Each factor is contiguous one way or the other, out along its rows.
void matmul(const Tensor& a_MK, const Tensor& b_KN, Tensor out, bool add) {
  const Factor a(a_MK), b(b_KN);
  const int64_t M = a_MK.size(0), K = a_MK.size(1), N = b_KN.size(1), c_row = out.stride(0);
  STD_TORCH_CHECK(b_KN.size(0) == K && out.size(0) == M && out.size(1) == N && out.stride(1) == 1,
                  "matmul: the shapes don't fit");
  if (M == 0 || N == 0) return;
  float* c = out.mutable_data_ptr<float>();
  const Panels panels{N, (a.rows ? 4 : 3) * kLanes};
  const int64_t parts = std::max<int64_t>(1, ceil_div(K, kDepth)), part = std::max<int64_t>(1, ceil_div(K, parts));

  Tensor packed = torch::stable::new_empty(out, {K * ceil_div(N, kLanes) * kLanes});
  float* right = packed.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, b.rows ? K : panels.number, b.rows ? 64 : 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) (b.rows ? pack_row : pack_panel)(b, N, K, panels, i, right);
  });

  const int64_t block = a.rows ? kBlockRows : kPackedBlockRows, blocks = ceil_div(M, block);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, [&](int64_t, int64_t) {
    alignas(64) float packed_left[kPackedBlockRows * kDepth];
    for (int64_t number; (number = next.fetch_add(1, std::memory_order_relaxed)) < blocks;) {
      const int64_t row = number * block, rows = std::min(block, M - row);
      for (int64_t k = 0; k == 0 || k < K; k += part) {
        const int64_t depth = std::min(part, K - k);
        Left left{a.data + row * a.line + k, a.line, 1, kRows * a.line};
        if (!a.rows) {
          pack_rows(a, k, depth, row, rows, packed_left);
          left = {packed_left, 1, kPackedRows, kPackedRows * depth};
        }
        for (int64_t p = 0; p < panels.number; ++p) {
          const int64_t column = panels.begin(p), width = panels.end(p) - column;
          const float* panel = right + column * K + k * width;
          const auto run = a.rows ? &tiles_of<kRows, Left, const float*, const float*, int64_t, float*, int64_t, int64_t,
                                              bool, __mmask16>
                                  : &tiles_of<kPackedRows, Left, const float*, const float*, int64_t, float*, int64_t,
                                              int64_t, bool, __mmask16>;
          run(width / kLanes, left, panel, panel + width * K, depth, c + row * c_row + column, c_row, rows, k > 0 || add,
              lanes_of(N - (column + width - kLanes)));
        }
      }
    }
  });
}

Tensor new_product(const Tensor& a_MK, const Tensor& b_KN) {
  Tensor out = torch::stable::new_empty(a_MK, {a_MK.size(0), b_KN.size(1)});
  matmul(a_MK, b_KN, out, false);
  return out;
}

#pragma GCC pop_options

bool matmul_runs() {
  return __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
}

// AMD's family 26 (Zen 5) and later. Intel's MKL uses AVX-512 on Intel's processors, and AVX2 on others; Zen 4 takes
// the vectors of AVX-512 in two halves, so that AVX2 is as fast there.
bool matmul_pays() {
  unsigned version, b, c, d;
  if (!matmul_runs() || !__builtin_cpu_is("amd") || !__get_cpuid(1, &version, &b, &c, &d)) return false;
  const unsigned family = (version >> 8 & 0xf) + (version >> 20 & 0xff);
  return family >= 26;
}

#else

void matmul(const Tensor&, const Tensor&, Tensor, bool) { STD_TORCH_CHECK(false, "this build has no matmul"); }
Tensor new_product(const Tensor&, const Tensor&) { STD_TORCH_CHECK(false, "this build has no matmul"); }
bool matmul_runs() { return false; }
bool matmul_pays() { return false; }

#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(spt_fast, m) {
  m.def("cpu_matmul(Tensor a, Tensor b, Tensor(a!) out, bool add) -> ()");
  m.def("cpu_product(Tensor a, Tensor b) -> Tensor");
  m.def("cpu_matmul_runs() -> bool");
  m.def("cpu_matmul_pays() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(spt_fast, CPU, m) {
  m.impl("cpu_matmul", TORCH_BOX(&matmul));
  m.impl("cpu_product", TORCH_BOX(&new_product));
}

STABLE_TORCH_LIBRARY_IMPL(spt_fast, CompositeExplicitAutograd, m) {
  m.impl("cpu_matmul_runs", TORCH_BOX(&matmul_runs));
  m.impl("cpu_matmul_pays", TORCH_BOX(&matmul_pays));
}

}  // namespace spt
