// Loops that the compiler vectorises, once for each instruction set; the machine's is chosen at run time.
//
// A function marked SPT_SIMD is compiled for AVX-512, AVX2 and plain x86-64 (on other processors just once). Inside,
// numbers are float32: `load` and `store` convert from and to the tensor's dtype, bf16 by rounding to the nearest even.
// Sums need `#pragma omp simd reduction(+ : sum)`; otherwise a compiler must add one number after the other.

#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <bit>
#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SPT_SIMD __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SPT_SIMD
#endif
#define SPT_INLINE inline __attribute__((always_inline))

namespace spt {

struct bf16 {
  uint16_t bits;
};

SPT_INLINE float load(const float& x) { return x; }
SPT_INLINE float load(const bf16& x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

SPT_INLINE void store(float& to, float x) { to = x; }
SPT_INLINE void store(bf16& to, float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  to.bits = static_cast<uint16_t>(x != x ? 0x7fc0 : rounded);
}

// The value after a store and a load.
SPT_INLINE float rounded(float x, const float*) { return x; }
SPT_INLINE float rounded(float x, const bf16*) {
  bf16 stored;
  store(stored, x);
  return load(stored);
}

// e^x to 2 units in the last place, between e^-87.3 and e^88.7, so that nothing becomes infinite. x / log(2) is rounded
// by adding 1.5 * 2^23, which leaves the integer part in the last bits: a conversion to an integer may trap, and GCC does
// not vectorise code that may trap on some paths only.
SPT_INLINE float exp_(float x) {
  x = x < -87.3f ? -87.3f : x;
  x = x > 88.7f ? 88.7f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(p) + (std::bit_cast<uint32_t>(shifted) << 23));
}

// The data of a tensor that is float32 or bf16, as `with_dtype` has determined.
template <class T>
const T* data(const torch::stable::Tensor& x) {
  return static_cast<const T*>(x.data_ptr());
}
template <class T>
T* mutable_data(torch::stable::Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

// Calls f(T{}), T being the dtype of `x`.
template <class F>
auto with_dtype(const torch::stable::Tensor& x, F f) {
  if (x.scalar_type() == torch::headeronly::ScalarType::BFloat16) return f(bf16{});
  STD_TORCH_CHECK(x.scalar_type() == torch::headeronly::ScalarType::Float, "float32 and bfloat16 only");
  return f(float{});
}

}  // namespace spt
