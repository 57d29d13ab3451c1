// Causal attention in bf16 for CPUs with AVX512-BF16, forward and backward, with at most a tile of the scores in memory.
// kernels/attention.py has the formulas and the conditions.
//
// A row r of a sequence sees the keys first[r] … r, which covers causality, documents and a window; a row with
// first[r] > r is padding: it reads as zeros, whatever it holds, and sees nothing.
//
// The instruction (VDPBF16PS) multiplies pairs of neighbouring bf16 numbers and adds both products to a float32. So every
// matrix is stored as 32-bit pairs: the left factor is broadcast pair by pair in place, the right one has 16 columns of
// pairs side by side. A matrix X [T, D] is packed in two ways:
//   by columns   [D/2][T]   pairs along D, for products that sum over D (scores)
//   by rows      [T/2][D]   pairs along T, for products that sum over T (outputs, gradients)
// Scores are computed transposed, keys down and queries across: softmax statistics are then vectors over queries, no sum
// runs across a register, and a tile is a left factor directly (by keys) or with two key rows interleaved (by queries).
//
// With rotary tables, queries and keys are rotated as they are copied, and their gradients rotated back as they are
// written: the rotated ones are never in memory.
//
// Legend: T tokens padded to a multiple of kTile, D head dimension, G query heads that share a key/value head.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#define SPT_AVX512_BF16 1
// All headers are above: only the code below is compiled for this instruction set.
#pragma GCC push_options
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of GCC 12's own avx512fintrin.h
#pragma GCC diagnostic ignored "-Waggressive-loop-optimizations"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#endif

namespace spt {
namespace {

#ifdef SPT_AVX512_BF16

constexpr int64_t kTile = 64;  // keys and queries of a tile of scores
constexpr int64_t kLanes = 16;
constexpr int64_t kAhead = 16;  // rows that are prefetched
constexpr float kLog2E = 1.44269504088896f;

// The rows of one head of one sequence, or of its gradient: bf16, `stride` numbers apart.
struct Rows {
  uint16_t* data;
  int64_t stride;
  const uint16_t* operator[](int64_t t) const { return data + t * stride; }
};

inline __m512bh as_bf16(__m512 x) { return (__m512bh)x; }

// 2^x for x <= 0 or slightly above, to about 2 units in the last place.
inline __m512 exp2(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-150.0f));
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x, n);
  __m512 p = _mm512_set1_ps(1.535336188319500e-4f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.339887440266574e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.618437357674640e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.550332471162809e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.402264791363012e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.931472028550421e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

// C[m][n] (+)= sum over k of A[m * a_row + k * a_pair] · B[k * b_row + n], A and B pairs, C float32.
template <int kRows, int kVectors>
inline void product_tile(const uint32_t* A, int64_t a_row, int64_t a_pair, const uint32_t* B, int64_t b_row, float* C,
                         int64_t c_row, int64_t pairs, bool add) {
  __m512 sum[kRows][kVectors];
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kVectors; ++j)
      sum[i][j] = add ? _mm512_loadu_ps(C + i * c_row + j * kLanes) : _mm512_setzero_ps();
  for (int64_t k = 0; k < pairs; ++k) {
    __m512 b[kVectors];
    for (int j = 0; j < kVectors; ++j) b[j] = _mm512_loadu_ps(reinterpret_cast<const float*>(B + k * b_row) + j * kLanes);
    for (int i = 0; i < kRows; ++i) {
      const __m512 a = _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(A[i * a_row + k * a_pair])));
      for (int j = 0; j < kVectors; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], as_bf16(a), as_bf16(b[j]));
    }
  }
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kVectors; ++j) _mm512_storeu_ps(C + i * c_row + j * kLanes, sum[i][j]);
}

template <int kVectors>
inline void product_columns(const uint32_t* A, int64_t a_row, int64_t a_pair, const uint32_t* B, int64_t b_row, float* C,
                            int64_t c_row, int64_t rows, int64_t pairs, bool add) {
  int64_t m = 0;
  for (; m + 6 <= rows; m += 6)
    product_tile<6, kVectors>(A + m * a_row, a_row, a_pair, B, b_row, C + m * c_row, c_row, pairs, add);
  for (; m + 4 <= rows; m += 4)
    product_tile<4, kVectors>(A + m * a_row, a_row, a_pair, B, b_row, C + m * c_row, c_row, pairs, add);
  for (; m < rows; ++m)
    product_tile<1, kVectors>(A + m * a_row, a_row, a_pair, B, b_row, C + m * c_row, c_row, pairs, add);
}

// As product_tile, for any number of rows and a multiple of kLanes columns.
void product(const uint32_t* A, int64_t a_row, int64_t a_pair, const uint32_t* B, int64_t b_row, float* C, int64_t c_row,
             int64_t rows, int64_t columns, int64_t pairs, bool add) {
  int64_t n = 0;
  for (; n + 4 * kLanes <= columns; n += 4 * kLanes)
    product_columns<4>(A, a_row, a_pair, B + n, b_row, C + n, c_row, rows, pairs, add);
  for (; n < columns; n += kLanes) product_columns<1>(A, a_row, a_pair, B + n, b_row, C + n, c_row, rows, pairs, add);
}

inline __m512 load_bf16(const uint16_t* from) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

inline __m512 load_bf16(const uint16_t* from, __mmask16 lanes) {
  const __m256i bits = _mm256_maskz_loadu_epi16(lanes, from);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

inline void store_bf16(uint16_t* to, __m512 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(x));
}

// A masked store of 16-bit numbers takes AMD's processors some tens of cycles.
inline void store_bf16(uint16_t* to, __m512 x, __mmask16 lanes) {
  if (lanes == 0xffff)
    store_bf16(to, x);
  else
    _mm256_mask_storeu_epi16(to, lanes, (__m256i)_mm512_cvtneps_pbh(x));
}

// The rotary tables of one sequence, [tokens][D]; their first halves are read. cos null: nothing is rotated.
struct Angles {
  const float *cos, *sin;
};
constexpr Angles kUnrotated{nullptr, nullptr};

// f(d, lanes, cos, sin) for every 16 numbers of the first half of row t.
template <class F>
inline void for_pairs(Angles angles, int64_t t, int64_t D, F f) {
  for (int64_t d = 0; d < D / 2; d += kLanes) {
    const auto lanes = static_cast<__mmask16>(D / 2 - d < kLanes ? (1 << (D / 2 - d)) - 1 : 0xffff);
    f(d, lanes, _mm512_maskz_loadu_ps(lanes, angles.cos + t * D + d), _mm512_maskz_loadu_ps(lanes, angles.sin + t * D + d));
  }
}

// Copies rows, rotated, to [T][D/2] pairs with zeros for padding, and from there packs them.
void copy_rows(Rows x, Angles angles, const int32_t* first, int64_t tokens, int64_t T, int64_t D, uint32_t* to) {
  for (int64_t t = 0; t < T; ++t) {
    auto* row = reinterpret_cast<uint16_t*>(to + t * (D / 2));
    // Rows of a head are too far apart for the processor's own prefetching.
    for (int64_t d = 0; d < D; d += 2 * kLanes) _mm_prefetch(reinterpret_cast<const char*>(x[t + kAhead] + d), _MM_HINT_T0);
    if (t >= tokens || first[t] > t) {
      std::memset(row, 0, D * sizeof(uint16_t));
    } else if (angles.cos == nullptr) {
      std::memcpy(row, x[t], D * sizeof(uint16_t));
    } else {
      for_pairs(angles, t, D, [&](int64_t d, __mmask16 lanes, __m512 cos, __m512 sin) {
        const __m512 a = load_bf16(x[t] + d, lanes), b = load_bf16(x[t] + D / 2 + d, lanes);
        store_bf16(row + d, _mm512_fnmadd_ps(b, sin, _mm512_mul_ps(a, cos)), lanes);
        store_bf16(row + D / 2 + d, _mm512_fmadd_ps(a, sin, _mm512_mul_ps(b, cos)), lanes);
      });
    }
  }
}

void pack_by_columns(const uint32_t* rows, int64_t T, int64_t D, uint32_t* to) {
  for (int64_t block = 0; block < T; block += kLanes)
    for (int64_t d = 0; d < D / 2; ++d)
      for (int64_t t = block; t < block + kLanes; ++t) to[d * T + t] = rows[t * (D / 2) + d];
}

void pack_by_rows(const uint32_t* rows, int64_t T, int64_t D, uint32_t* to) {
  const auto* x = reinterpret_cast<const uint16_t*>(rows);
  for (int64_t t = 0; t < T; t += 2)
    for (int64_t d = 0; d < D; ++d)
      to[t / 2 * D + d] = x[t * D + d] | static_cast<uint32_t>(x[(t + 1) * D + d]) << 16;
}

// Pairs (even, odd) of two key rows of float32 weights, as a left factor by queries.
inline void store_pairs(uint32_t* to, __m512 even, __m512 odd) {
  const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even));
  const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd));
  _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

// Which of 16 queries from r on see key c.
inline __mmask16 sees(int64_t c, __m512i r, __m512i first) {
  const __m512i key = _mm512_set1_epi32(static_cast<int>(c));
  return _mm512_cmple_epi32_mask(key, r) & _mm512_cmple_epi32_mask(first, key);
}

struct Scratch {
  std::vector<uint32_t> pairs;
  std::vector<float> floats;
  uint32_t* next_pairs;
  float* next_floats;
  void reserve(int64_t num_pairs, int64_t num_floats) {
    pairs.resize(std::max<size_t>(pairs.size(), num_pairs));
    floats.resize(std::max<size_t>(floats.size(), num_floats));
    next_pairs = pairs.data();
    next_floats = floats.data();
  }
  uint32_t* take_pairs(int64_t n) { return std::exchange(next_pairs, next_pairs + n); }
  float* take_floats(int64_t n) { return std::exchange(next_floats, next_floats + n); }
};

// The first tile of keys that any of the queries from `row` on sees; kTile queries, `tokens` of them real.
int64_t first_key_tile(const int32_t* first, int64_t row, int64_t tokens) {
  int32_t least = std::numeric_limits<int32_t>::max();
  for (int64_t r = row; r < std::min(row + kTile, tokens); ++r) least = std::min(least, first[r]);
  return least / kTile * kTile;
}

// All queries of `heads` heads against one key/value head. lse2 [heads][tokens]: log2 of the softmax's denominator.
void forward_head(const std::vector<Rows>& q, Rows k, Rows v, Angles angles, const int32_t* first_T, int64_t tokens,
                  int64_t D, float scale, std::vector<Rows>& o, float* lse2) {
  const int64_t T = (tokens + kTile - 1) / kTile * kTile, TD2 = T * D / 2;
  static thread_local Scratch scratch;
  scratch.reserve(3 * TD2 + T * D / 2 + kTile * kTile / 2, kTile * kTile + kTile * D + 3 * kTile);
  uint32_t* rows = scratch.take_pairs(TD2);
  uint32_t* key_rows = scratch.take_pairs(TD2);
  uint32_t* v_by_rows = scratch.take_pairs(TD2);
  uint32_t* q_by_columns = scratch.take_pairs(TD2);
  uint32_t* p_pairs = scratch.take_pairs(kTile * kTile / 2);
  float* s = scratch.take_floats(kTile * kTile);
  float* out = scratch.take_floats(kTile * D);
  float* most = scratch.take_floats(kTile);
  float* sum = scratch.take_floats(kTile);
  float* shrink = scratch.take_floats(kTile);
  const __m512 scale2 = _mm512_set1_ps(scale * kLog2E);
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);

  copy_rows(k, angles, first_T, tokens, T, D, key_rows);
  copy_rows(v, kUnrotated, first_T, tokens, T, D, rows);
  pack_by_rows(rows, T, D, v_by_rows);
  for (size_t head = 0; head < q.size(); ++head) {
    copy_rows(q[head], angles, first_T, tokens, T, D, rows);
    pack_by_columns(rows, T, D, q_by_columns);
    for (int64_t r0 = 0; r0 < T; r0 += kTile) {
      std::fill_n(most, kTile, -std::numeric_limits<float>::infinity());
      std::fill_n(sum, kTile, 0.0f);
      std::fill_n(out, kTile * D, 0.0f);
      for (int64_t c0 = first_key_tile(first_T, r0, tokens); c0 <= r0; c0 += kTile) {
        product(key_rows + c0 * (D / 2), D / 2, 1, q_by_columns + r0, T, s, kTile, kTile, kTile, D / 2, false);
        for (int64_t j = 0; j < kTile; j += kLanes) {
          const __m512i r = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(r0 + j)), lanes);
          const __mmask16 real = _mm512_cmplt_epi32_mask(r, _mm512_set1_epi32(static_cast<int>(tokens)));
          const __m512i first =
              _mm512_mask_loadu_epi32(_mm512_set1_epi32(0), real, first_T + r0 + j);
          __m512 high = _mm512_loadu_ps(most + j);
          const __m512 before = high;
          for (int64_t c = 0; c < kTile; ++c) {
            const __m512 x = _mm512_mask_mul_ps(_mm512_set1_ps(-std::numeric_limits<float>::infinity()),
                                                sees(c0 + c, r, first), _mm512_loadu_ps(s + c * kTile + j), scale2);
            _mm512_storeu_ps(s + c * kTile + j, x);
            high = _mm512_max_ps(high, x);
          }
          // A query that has seen nothing yet: any finite number works, as all its weights are 2^-inf = 0.
          const __m512 base = _mm512_max_ps(high, _mm512_set1_ps(-1e30f));
          const __m512 factor = exp2(_mm512_sub_ps(_mm512_max_ps(before, _mm512_set1_ps(-1e38f)), base));
          __m512 total = _mm512_mul_ps(_mm512_loadu_ps(sum + j), factor);
          for (int64_t c = 0; c < kTile; c += 2) {
            const __m512 even_s = _mm512_loadu_ps(s + c * kTile + j), odd_s = _mm512_loadu_ps(s + (c + 1) * kTile + j);
            const __mmask16 even_sees = sees(c0 + c, r, first), odd_sees = sees(c0 + c + 1, r, first);
            const __m512 even = _mm512_maskz_mov_ps(even_sees, exp2(_mm512_sub_ps(even_s, base)));
            const __m512 odd = _mm512_maskz_mov_ps(odd_sees, exp2(_mm512_sub_ps(odd_s, base)));
            total = _mm512_add_ps(total, _mm512_add_ps(even, odd));
            store_pairs(p_pairs + c / 2 * kTile + j, even, odd);
          }
          _mm512_storeu_ps(most + j, high);
          _mm512_storeu_ps(sum + j, total);
          _mm512_storeu_ps(shrink + j, factor);
        }
        for (int64_t r = 0; r < kTile; ++r)
          for (int64_t d = 0; d < D; d += kLanes)
            _mm512_storeu_ps(out + r * D + d, _mm512_mul_ps(_mm512_loadu_ps(out + r * D + d), _mm512_set1_ps(shrink[r])));
        product(p_pairs, 1, kTile, v_by_rows + c0 / 2 * D, D, out, D, kTile, D, kTile / 2, true);
      }
      for (int64_t r = 0; r < std::min(kTile, tokens - r0); ++r) {
        const bool seen = sum[r] > 0;
        lse2[head * tokens + r0 + r] = seen ? most[r] + std::log2(sum[r]) : 0.0f;
        const __m512 norm = _mm512_set1_ps(seen ? 1 / sum[r] : 0.0f);
        uint16_t* to = o[head].data + (r0 + r) * o[head].stride;
        for (int64_t d = 0; d < D; d += kLanes)
          store_bf16(to + d, _mm512_mul_ps(_mm512_loadu_ps(out + r * D + d), norm));
      }
    }
  }
}

// delta[r] = do_r · o_r; zero for padding.
void row_products(Rows x, Rows y, const int32_t* first, int64_t tokens, int64_t T, int64_t D, float* to) {
  for (int64_t t = 0; t < T; ++t) {
    __m512 sum = _mm512_setzero_ps();
    if (t < tokens && first[t] <= t)
      for (int64_t d = 0; d < D; d += kLanes) sum = _mm512_fmadd_ps(load_bf16(x[t] + d), load_bf16(y[t] + d), sum);
    to[t] = _mm512_reduce_add_ps(sum);
  }
}

// Writes factor times the rows, rotated back.
void store_rows(const float* from, Angles angles, int64_t D, int64_t tokens, float factor, Rows to) {
  const __m512 f = _mm512_set1_ps(factor);
  for (int64_t t = 0; t < tokens; ++t) {
    const float* row = from + t * D;
    uint16_t* out = to.data + t * to.stride;
    if (angles.cos == nullptr) {
      for (int64_t d = 0; d < D; d += kLanes) store_bf16(out + d, _mm512_mul_ps(_mm512_loadu_ps(row + d), f));
      continue;
    }
    for_pairs(angles, t, D, [&](int64_t d, __mmask16 lanes, __m512 cos, __m512 sin) {
      const __m512 a = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, row + d), f);
      const __m512 b = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, row + D / 2 + d), f);
      store_bf16(out + d, _mm512_fmadd_ps(b, sin, _mm512_mul_ps(a, cos)), lanes);
      store_bf16(out + D / 2 + d, _mm512_fnmadd_ps(a, sin, _mm512_mul_ps(b, cos)), lanes);
    });
  }
}

void backward_head(const std::vector<Rows>& q, Rows k, Rows v, Angles angles, const std::vector<Rows>& o,
                   const std::vector<Rows>& dout, const float* lse2, const int32_t* first_T, int64_t tokens, int64_t D, float scale,
                   std::vector<Rows>& dq, Rows dk, Rows dv) {
  const int64_t T = (tokens + kTile - 1) / kTile * kTile, TD2 = T * D / 2;
  static thread_local Scratch scratch;
  scratch.reserve(8 * TD2 + 2 * kTile * kTile, 2 * kTile * kTile + 3 * T * D + 2 * T);
  uint32_t* rows = scratch.take_pairs(TD2);
  uint32_t* key_rows = scratch.take_pairs(TD2);
  uint32_t* value_rows = scratch.take_pairs(TD2);
  uint32_t* k_by_rows = scratch.take_pairs(TD2);
  uint32_t* q_by_columns = scratch.take_pairs(TD2);
  uint32_t* q_by_rows = scratch.take_pairs(TD2);
  uint32_t* do_by_columns = scratch.take_pairs(TD2);
  uint32_t* do_by_rows = scratch.take_pairs(TD2);
  uint32_t* p_rows = scratch.take_pairs(kTile * kTile / 2);
  uint32_t* ds_rows = scratch.take_pairs(kTile * kTile / 2);
  uint32_t* ds_pairs = scratch.take_pairs(kTile * kTile / 2);
  float* s = scratch.take_floats(kTile * kTile);
  float* dp = scratch.take_floats(kTile * kTile);
  float* dk_sum = scratch.take_floats(T * D);
  float* dv_sum = scratch.take_floats(T * D);
  float* dq_sum = scratch.take_floats(T * D);
  float* delta = scratch.take_floats(T);
  float* lse = scratch.take_floats(T);
  const __m512 scale2 = _mm512_set1_ps(scale * kLog2E);
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);

  copy_rows(k, angles, first_T, tokens, T, D, key_rows);
  pack_by_rows(key_rows, T, D, k_by_rows);
  copy_rows(v, kUnrotated, first_T, tokens, T, D, value_rows);
  std::fill_n(dk_sum, T * D, 0.0f);
  std::fill_n(dv_sum, T * D, 0.0f);
  for (size_t head = 0; head < q.size(); ++head) {
    copy_rows(q[head], angles, first_T, tokens, T, D, rows);
    pack_by_columns(rows, T, D, q_by_columns);
    pack_by_rows(rows, T, D, q_by_rows);
    copy_rows(dout[head], kUnrotated, first_T, tokens, T, D, rows);
    pack_by_columns(rows, T, D, do_by_columns);
    pack_by_rows(rows, T, D, do_by_rows);
    row_products(dout[head], o[head], first_T, tokens, T, D, delta);
    std::fill_n(lse, T, 0.0f);
    std::copy_n(lse2 + head * tokens, tokens, lse);
    std::fill_n(dq_sum, T * D, 0.0f);

    for (int64_t r0 = 0; r0 < T; r0 += kTile)
      for (int64_t c0 = first_key_tile(first_T, r0, tokens); c0 <= r0; c0 += kTile) {
        product(key_rows + c0 * (D / 2), D / 2, 1, q_by_columns + r0, T, s, kTile, kTile, kTile, D / 2, false);
        product(value_rows + c0 * (D / 2), D / 2, 1, do_by_columns + r0, T, dp, kTile, kTile, kTile, D / 2, false);
        for (int64_t j = 0; j < kTile; j += kLanes) {
          const __m512i r = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(r0 + j)), lanes);
          const __mmask16 real = _mm512_cmplt_epi32_mask(r, _mm512_set1_epi32(static_cast<int>(tokens)));
          const __m512i first = _mm512_mask_loadu_epi32(_mm512_set1_epi32(0), real, first_T + r0 + j);
          const __m512 lse_r = _mm512_loadu_ps(lse + r0 + j), delta_r = _mm512_loadu_ps(delta + r0 + j);
          for (int64_t c = 0; c < kTile; c += 2) {
            const __m512 even_s = _mm512_fmsub_ps(_mm512_loadu_ps(s + c * kTile + j), scale2, lse_r);
            const __m512 odd_s = _mm512_fmsub_ps(_mm512_loadu_ps(s + (c + 1) * kTile + j), scale2, lse_r);
            const __m512 even = _mm512_maskz_mov_ps(sees(c0 + c, r, first) & real, exp2(even_s));
            const __m512 odd = _mm512_maskz_mov_ps(sees(c0 + c + 1, r, first) & real, exp2(odd_s));
            const __m512 even_ds = _mm512_mul_ps(even, _mm512_sub_ps(_mm512_loadu_ps(dp + c * kTile + j), delta_r));
            const __m512 odd_ds = _mm512_mul_ps(odd, _mm512_sub_ps(_mm512_loadu_ps(dp + (c + 1) * kTile + j), delta_r));
            auto* p_16 = reinterpret_cast<uint16_t*>(p_rows);
            auto* ds_16 = reinterpret_cast<uint16_t*>(ds_rows);
            store_bf16(p_16 + c * kTile + j, even);
            store_bf16(p_16 + (c + 1) * kTile + j, odd);
            store_bf16(ds_16 + c * kTile + j, even_ds);
            store_bf16(ds_16 + (c + 1) * kTile + j, odd_ds);
            store_pairs(ds_pairs + c / 2 * kTile + j, even_ds, odd_ds);
          }
        }
        const int64_t pairs = kTile / 2;
        product(p_rows, pairs, 1, do_by_rows + r0 / 2 * D, D, dv_sum + c0 * D, D, kTile, D, pairs, true);
        product(ds_rows, pairs, 1, q_by_rows + r0 / 2 * D, D, dk_sum + c0 * D, D, kTile, D, pairs, true);
        product(ds_pairs, 1, kTile, k_by_rows + c0 / 2 * D, D, dq_sum + r0 * D, D, kTile, D, pairs, true);
      }
    store_rows(dq_sum, angles, D, tokens, scale, dq[head]);
  }
  store_rows(dk_sum, angles, D, tokens, scale, dk);
  store_rows(dv_sum, kUnrotated, D, tokens, 1.0f, dv);
}

// [B, T, H, D] with D contiguous.
struct Heads {
  uint16_t* data;
  int64_t batch_stride, token_stride, head_stride;
  explicit Heads(const Tensor& x)
      : data(static_cast<uint16_t*>(x.data_ptr())),
        batch_stride(x.stride(0)),
        token_stride(x.stride(1)),
        head_stride(x.stride(2)) {}
  Rows operator()(int64_t b, int64_t h) const { return {data + b * batch_stride + h * head_stride, token_stride}; }
  std::vector<Rows> group(int64_t b, int64_t first_head, int64_t heads) const {
    std::vector<Rows> rows;
    for (int64_t h = first_head; h < first_head + heads; ++h) rows.push_back((*this)(b, h));
    return rows;
  }
};

// f(b, key/value head) for all of them, from several threads.
template <class F>
void for_heads(const Tensor& k, F f) {
  const int64_t heads = k.size(2);
  torch::stable::parallel_for(0, k.size(0) * heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i / heads, i % heads);
  });
}

// The table of sequence b, from tables [T, D] or [B, T, D], or from an empty tensor for none.
Angles angles_of(const Tensor& cos, const Tensor& sin, int64_t b) {
  if (cos.numel() == 0) return kUnrotated;
  const int64_t from = cos.dim() == 3 ? b * cos.stride(0) : 0;
  return {static_cast<const float*>(cos.data_ptr()) + from, static_cast<const float*>(sin.data_ptr()) + from};
}

std::tuple<Tensor, Tensor> attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& first,
                                             double scale, const Tensor& cos, const Tensor& sin) {
  const int64_t B = q.size(0), T = q.size(1), H = q.size(2), D = q.size(3), group = H / std::max<int64_t>(1, k.size(2));
  Tensor o = torch::stable::new_empty(q, {B, T, H, D});
  Tensor lse2 = torch::stable::new_empty(q, {B, H, T}, ScalarType::Float);
  const Heads query(q), key(k), value(v), out(o);
  for_heads(k, [&](int64_t b, int64_t h) {
    std::vector<Rows> to = out.group(b, h * group, group);
    forward_head(query.group(b, h * group, group), key(b, h), value(b, h), angles_of(cos, sin, b),
                 static_cast<const int32_t*>(first.data_ptr()) + b * T, T, D, static_cast<float>(scale), to,
                 static_cast<float*>(lse2.data_ptr()) + (b * H + h * group) * T);
  });
  return {o, lse2};
}

void attention_backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& first,
                        const Tensor& o, const Tensor& lse2, double scale, const Tensor& cos, const Tensor& sin,
                        const Tensor& dq, const Tensor& dk, const Tensor& dv) {
  const int64_t T = q.size(1), H = q.size(2), D = q.size(3), group = H / std::max<int64_t>(1, k.size(2));
  const Heads query(q), key(k), value(v), out(o), dout_(dout), dquery(dq), dkey(dk), dvalue(dv);
  for_heads(k, [&](int64_t b, int64_t h) {
    std::vector<Rows> to = dquery.group(b, h * group, group);
    backward_head(query.group(b, h * group, group), key(b, h), value(b, h), angles_of(cos, sin, b),
                  out.group(b, h * group, group), dout_.group(b, h * group, group),
                  static_cast<const float*>(lse2.data_ptr()) + (b * H + h * group) * T,
                  static_cast<const int32_t*>(first.data_ptr()) + b * T, T, D, static_cast<float>(scale), to,
                  dkey(b, h), dvalue(b, h));
  });
}

#pragma GCC pop_options

bool attention_supported() { return __builtin_cpu_supports("avx512bf16"); }

#else

std::tuple<Tensor, Tensor> attention_forward(const Tensor&, const Tensor&, const Tensor&, const Tensor&, double,
                                             const Tensor&, const Tensor&) {
  STD_TORCH_CHECK(false, "this build has no attention for this CPU");
}
void attention_backward(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                        const Tensor&, double, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                        const Tensor&) {
  STD_TORCH_CHECK(false, "this build has no attention for this CPU");
}
bool attention_supported() { return false; }

#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(spt_fast, m) {
  m.def(
      "cpu_attention_forward(Tensor q, Tensor k, Tensor v, Tensor first, float scale, Tensor cos, Tensor sin) -> "
      "(Tensor, Tensor)");
  m.def(
      "cpu_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor first, Tensor o, Tensor lse2, "
      "float scale, Tensor cos, Tensor sin, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv) -> ()");
  m.def("cpu_attention_supported() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(spt_fast, CPU, m) {
  m.impl("cpu_attention_forward", TORCH_BOX(&attention_forward));
  m.impl("cpu_attention_backward", TORCH_BOX(&attention_backward));
}

STABLE_TORCH_LIBRARY_IMPL(spt_fast, CompositeExplicitAutograd, m) {
  m.impl("cpu_attention_supported", TORCH_BOX(&attention_supported));
}

}  // namespace spt
