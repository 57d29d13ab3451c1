// Causal attention in float32 for CPUs with AVX-512 and in bf16 for those with AVX512-BF16: attention_kernel.h compiled
// for each; kernels/attention_cpu.py has the conditions.

#include "transpose.h"

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
#define SPT_AVX512 1
// All other headers are above: only the code below is compiled for these instruction sets.
#pragma GCC push_options
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of GCC 12's own avx512fintrin.h
#pragma GCC diagnostic ignored "-Waggressive-loop-optimizations"
#endif

namespace spt {

#ifdef SPT_AVX512

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")

namespace in_float32 {
namespace {

using Number = float;
using Word = float;
constexpr int64_t kPerWord = 1;
constexpr bool kFromZero = true;  // one running sum over all tiles made dv's error two and a half times PyTorch's

inline __m512 broadcast(const Word* word) { return _mm512_set1_ps(*word); }
inline __m512 multiply_add(__m512 a, __m512 b, __m512 sum) { return _mm512_fmadd_ps(a, b, sum); }

inline __m512 load(const Number* from) { return _mm512_loadu_ps(from); }
inline __m512 load(const Number* from, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, from); }
inline void store(Number* to, __m512 x) { _mm512_storeu_ps(to, x); }
inline void store(Number* to, __m512 x, __mmask16 lanes) { _mm512_mask_storeu_ps(to, lanes, x); }

// To two rows of words, `row` apart.
inline void store_words(Word* to, int64_t row, __m512 even, __m512 odd) {
  store(to, even);
  store(to + row, odd);
}

inline const Word* pack_by_rows(const Word* rows, int64_t, int64_t, Word*) { return rows; }

// Weights take the place of the scores that they are made of.
inline Word* in_place_or(float* scores, Word*) { return scores; }

#include "attention_kernel.h"

}  // namespace
}  // namespace in_float32

#pragma GCC target("avx512bf16")

// The instruction (VDPBF16PS) multiplies pairs of neighbouring numbers and adds both products to a float32.
namespace in_bf16 {
namespace {

using Number = uint16_t;
using Word = uint32_t;
constexpr int64_t kPerWord = 2;
constexpr bool kFromZero = false;  // the roundings of the factors are far larger

inline __m512 broadcast(const Word* word) { return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(*word))); }
inline __m512 multiply_add(__m512 a, __m512 b, __m512 sum) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

inline __m512 load(const Number* from) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

inline __m512 load(const Number* from, __mmask16 lanes) {
  const __m256i bits = _mm256_maskz_loadu_epi16(lanes, from);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

inline void store(Number* to, __m512 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(x));
}

// A masked store of 16-bit numbers takes AMD's processors some tens of cycles.
inline void store(Number* to, __m512 x, __mmask16 lanes) {
  if (lanes == 0xffff)
    store(to, x);
  else
    _mm256_mask_storeu_epi16(to, lanes, (__m256i)_mm512_cvtneps_pbh(x));
}

// To one row of words, pairs (even, odd).
inline void store_words(Word* to, int64_t, __m512 even, __m512 odd) {
  const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even));
  const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd));
  _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

const Word* pack_by_rows(const Word* rows, int64_t T, int64_t D, Word* to) {
  const auto* x = reinterpret_cast<const Number*>(rows);
  for (int64_t t = 0; t < T; t += 2)
    for (int64_t d = 0; d < D; ++d)
      to[t / 2 * D + d] = x[t * D + d] | static_cast<Word>(x[(t + 1) * D + d]) << 16;
  return to;
}

inline Word* in_place_or(float*, Word* words) { return words; }

#include "attention_kernel.h"

}  // namespace
}  // namespace in_bf16

#pragma GCC pop_options

namespace {

std::tuple<Tensor, Tensor> attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& first,
                                             double scale, const Tensor& cos, const Tensor& sin) {
  const bool bf16 = q.scalar_type() == ScalarType::BFloat16;
  return (bf16 ? in_bf16::forward : in_float32::forward)(q, k, v, first, scale, cos, sin);
}

void attention_backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& first,
                        const Tensor& o, const Tensor& lse2, double scale, const Tensor& cos, const Tensor& sin,
                        const Tensor& dq, const Tensor& dk, const Tensor& dv) {
  const bool bf16 = q.scalar_type() == ScalarType::BFloat16;
  (bf16 ? in_bf16::backward : in_float32::backward)(dout, q, k, v, first, o, lse2, scale, cos, sin, dq, dk, dv);
}

bool attention_supported(ScalarType dtype) {
  if (dtype == ScalarType::BFloat16) return __builtin_cpu_supports("avx512bf16");
  return dtype == ScalarType::Float && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw");
}

#else

namespace {

std::tuple<Tensor, Tensor> attention_forward(const Tensor&, const Tensor&, const Tensor&, const Tensor&, double,
                                             const Tensor&, const Tensor&) {
  STD_TORCH_CHECK(false, "this build has no attention for this CPU");
}
void attention_backward(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                        const Tensor&, double, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                        const Tensor&) {
  STD_TORCH_CHECK(false, "this build has no attention for this CPU");
}
bool attention_supported(ScalarType) { return false; }

#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(spt_fast, m) {
  m.def(
      "cpu_attention_forward(Tensor q, Tensor k, Tensor v, Tensor first, float scale, Tensor cos, Tensor sin) -> "
      "(Tensor, Tensor)");
  m.def(
      "cpu_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor first, Tensor o, Tensor lse2, "
      "float scale, Tensor cos, Tensor sin, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv) -> ()");
  m.def("cpu_attention_supported(ScalarType dtype) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(spt_fast, CPU, m) {
  m.impl("cpu_attention_forward", TORCH_BOX(&attention_forward));
  m.impl("cpu_attention_backward", TORCH_BOX(&attention_backward));
}

STABLE_TORCH_LIBRARY_IMPL(spt_fast, CompositeExplicitAutograd, m) {
  m.impl("cpu_attention_supported", TORCH_BOX(&attention_supported));
}

}  // namespace spt
