// Keyed permutations of [0, size) and the windows of a ring of tokens: the batch versions of
// spt_fast/data/shuffle.py and spt_fast/data/ring.py, which explain them. Both agree bit for bit.

#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>

namespace spt {

using uint128 = unsigned __int128;

constexpr int kRounds = 6;
constexpr int kKeyWords = kRounds + 1;  // the last word is the rotation of a ring's epoch
constexpr int kMinBits = 8;

using Key = std::array<uint64_t, kKeyWords>;

// The finalizer of SplitMix64: every input bit reaches every output bit.
inline uint64_t mix64(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

inline Key epoch_key(const Key& key, uint64_t epoch) {
  const uint64_t mixed_epoch = mix64(epoch);
  Key result;
  for (int i = 0; i < kKeyWords; ++i) result[i] = mix64(key[i] ^ mixed_epoch);
  return result;
}

class Permutation {
 public:
  Permutation(uint64_t size, const Key& key) : size_(size), key_(key) {
    const int bits = std::max(kMinBits, 64 - std::countl_zero(size - 1));
    right_bits_ = bits - bits / 2;
    left_mask_ = (uint64_t{1} << (bits / 2)) - 1;
    right_mask_ = (uint64_t{1} << right_bits_) - 1;
  }

  uint64_t at(uint64_t index) const {
    do index = encrypt(index); while (index >= size_);
    return index;
  }

  uint64_t position_of(uint64_t value) const {
    do value = decrypt(value); while (value >= size_);
    return value;
  }

 private:
  uint64_t encrypt(uint64_t x) const {
    uint64_t left = x >> right_bits_, right = x & right_mask_;
    for (int i = 0; i < kRounds; i += 2) {
      left ^= mix64(right ^ key_[i]) & left_mask_;
      right ^= mix64(left ^ key_[i + 1]) & right_mask_;
    }
    return left << right_bits_ | right;
  }

  uint64_t decrypt(uint64_t x) const {
    uint64_t left = x >> right_bits_, right = x & right_mask_;
    for (int i = kRounds - 2; i >= 0; i -= 2) {
      right ^= mix64(left ^ key_[i + 1]) & right_mask_;
      left ^= mix64(right ^ key_[i]) & left_mask_;
    }
    return left << right_bits_ | right;
  }

  uint64_t size_;
  Key key_;
  int right_bits_;
  uint64_t left_mask_, right_mask_;
};

}  // namespace spt
