// Causal attention, forward and backward, with at most a tile of the scores in memory; kernels/attention.py has the
// formulas. attention.cpp includes this file once for each type of number, within a namespace that defines:
//
//   Number                    an element of the tensors
//   Word, kPerWord            an element of a factor, 4 bytes, and how many numbers it holds
//   kFromZero                 whether a product is summed from zero before it is added to what is there
//   broadcast, multiply_add   one word of the left factor in every lane; words times words plus float32
//   load, store               numbers from and to float32
//   store_words               two rows of keys of a tile of weights, from float32 to words by queries
//   pack_by_rows, in_place_or what copies only where the two differ: see below
//
// A row r of a sequence sees the keys first[r] … r, which covers causality, documents and a window; a row with
// first[r] > r is padding: it reads as zeros, whatever it holds, and sees nothing.
//
// A product broadcasts its left factor word by word in place; the right one has 16 columns of words side by side. Sums
// are float32. A matrix X [T, D] is packed in two ways:
//   by columns   [T / kTile][D / kPerWord][kTile]   words along D, for products that sum over D (scores)
//   by rows      [T / kPerWord][D]                  words along T, for products that sum over T (outputs, gradients)
// Scores are computed transposed, keys down and queries across: softmax statistics are then vectors over queries, and no
// sum runs across a register. A tile of weights is a left factor by keys as it is, and by queries with kPerWord rows of
// keys interleaved. With one number in a word both are the same, and a matrix is packed by rows as it is.
//
// With rotary tables, queries and keys are rotated as they are copied, and their gradients rotated back as they are
// written: the rotated ones are never in memory.
//
// Legend: T tokens padded to a multiple of kTile, D head dimension, G query heads that share a key/value head.

constexpr int64_t kTile = 64;  // keys and queries of a tile of scores
constexpr int64_t kHalf = kTile / 2;
constexpr int64_t kLanes = 16;
constexpr int64_t kAhead = 16;  // rows that are prefetched
constexpr float kLog2E = 1.44269504088896f;

// The rows of one head of one sequence, or of its gradient, `stride` numbers apart.
struct Rows {
  Number* data;
  int64_t stride;
  const Number* operator[](int64_t t) const { return data + t * stride; }
};

// 2^x for x <= 0 or slightly above, to about 2 units in the last place; NaN for NaN.
inline __m512 exp2(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-150.0f), x);  // of two operands, one of them NaN, it is the second
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

// C[m][n] (+)= sum over k of A[m * a_row + k * a_word] · B[k * b_row + n], A and B words, C float32.
template <int kRows, int kVectors>
inline void product_tile(const Word* A, int64_t a_row, int64_t a_word, const Word* B, int64_t b_row, float* C,
                         int64_t c_row, int64_t words, bool add) {
  __m512 sum[kRows][kVectors];
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kVectors; ++j)
      sum[i][j] = add && !kFromZero ? _mm512_loadu_ps(C + i * c_row + j * kLanes) : _mm512_setzero_ps();
  for (int64_t k = 0; k < words; ++k) {
    __m512 b[kVectors];
    for (int j = 0; j < kVectors; ++j) b[j] = _mm512_loadu_ps(B + k * b_row + j * kLanes);
    for (int i = 0; i < kRows; ++i) {
      const __m512 a = broadcast(A + i * a_row + k * a_word);
      for (int j = 0; j < kVectors; ++j) sum[i][j] = multiply_add(a, b[j], sum[i][j]);
    }
  }
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kVectors; ++j) {
      float* to = C + i * c_row + j * kLanes;
      _mm512_storeu_ps(to, add && kFromZero ? _mm512_add_ps(_mm512_loadu_ps(to), sum[i][j]) : sum[i][j]);
    }
}

template <int kRows, int kVectors>
inline void product_columns(const Word* A, int64_t a_row, int64_t a_word, const Word* B, int64_t b_row, float* C,
                            int64_t c_row, int64_t rows, int64_t words, bool add) {
  int64_t m = 0;
  for (; m + kRows <= rows; m += kRows)
    product_tile<kRows, kVectors>(A + m * a_row, a_row, a_word, B, b_row, C + m * c_row, c_row, words, add);
  for (; m + 4 <= rows; m += 4)
    product_tile<4, kVectors>(A + m * a_row, a_row, a_word, B, b_row, C + m * c_row, c_row, words, add);
  for (; m < rows; m += 2)
    product_tile<2, kVectors>(A + m * a_row, a_row, a_word, B, b_row, C + m * c_row, c_row, words, add);
}

// As product_tile, for an even number of rows and a multiple of kLanes columns.
void product(const Word* A, int64_t a_row, int64_t a_word, const Word* B, int64_t b_row, float* C, int64_t c_row,
             int64_t rows, int64_t columns, int64_t words, bool add) {
  int64_t n = 0;
  for (; n + 4 * kLanes <= columns; n += 4 * kLanes)
    product_columns<6, 4>(A, a_row, a_word, B + n, b_row, C + n, c_row, rows, words, add);
  for (; n + 2 * kLanes <= columns; n += 2 * kLanes)
    product_columns<12, 2>(A, a_row, a_word, B + n, b_row, C + n, c_row, rows, words, add);
  if (n < columns) product_columns<12, 1>(A, a_row, a_word, B + n, b_row, C + n, c_row, rows, words, add);
}

// Rows of a head are too far apart for the processor's own prefetching.
inline void fetch(const Number* row, int64_t D) {
  for (int64_t d = 0; d < D; d += 64 / sizeof(Number))
    _mm_prefetch(reinterpret_cast<const char*>(row + d), _MM_HINT_T0);
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

// Copies rows, rotated, to words [T][D / kPerWord] with zeros for padding, and from there packs them.
void copy_rows(Rows x, Angles angles, const int32_t* first, int64_t tokens, int64_t T, int64_t D, Word* to) {
  for (int64_t t = 0; t < T; ++t) {
    auto* row = reinterpret_cast<Number*>(to + t * (D / kPerWord));
    fetch(x[t + kAhead], D);
    if (t >= tokens || first[t] > t) {
      std::memset(row, 0, D * sizeof(Number));
    } else if (angles.cos == nullptr) {
      for (int64_t d = 0; d < D; d += 32 / sizeof(Number))
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + d),
                            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x[t] + d)));
    } else {
      for_pairs(angles, t, D, [&](int64_t d, __mmask16 lanes, __m512 cos, __m512 sin) {
        const __m512 a = load(x[t] + d, lanes), b = load(x[t] + D / 2 + d, lanes);
        store(row + d, _mm512_fnmadd_ps(b, sin, _mm512_mul_ps(a, cos)), lanes);
        store(row + D / 2 + d, _mm512_fmadd_ps(a, sin, _mm512_mul_ps(b, cos)), lanes);
      });
    }
  }
}

// From [T][words] to [T / kTile][words][kTile]; words is a multiple of 8.
void pack_by_columns(const Word* rows, int64_t T, int64_t words, Word* to) {
  for (int64_t t = 0; t < T; t += kLanes)
    for (int64_t w = 0; w < words; w += kLanes) {
      const int64_t width = std::min(kLanes, words - w);
      const auto lanes = static_cast<__mmask16>((1 << width) - 1);
      __m512 block[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) block[i] = _mm512_maskz_loadu_ps(lanes, rows + (t + i) * words + w);
      transpose(block);
      Word* panel = to + t / kTile * kTile * words + t % kTile;
      for (int64_t i = 0; i < width; ++i) _mm512_storeu_ps(panel + (w + i) * kTile, block[i]);
    }
}

// Which of 16 queries from r on see key c.
inline __mmask16 sees(int64_t c, __m512i r, __m512i first) {
  const __m512i key = _mm512_set1_epi32(static_cast<int>(c));
  return _mm512_cmple_epi32_mask(key, r) & _mm512_cmple_epi32_mask(first, key);
}

// Arrays of numbers of 4 bytes, each a multiple of a cache line long, which they begin at.
struct Scratch {
  std::vector<float> memory;
  float* next;
  void reserve(int64_t count) {
    memory.resize(std::max<size_t>(memory.size(), count + kLanes));
    next = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
  }
  template <class T>
  T* take(int64_t count) {
    return reinterpret_cast<T*>(std::exchange(next, next + count));
  }
};

// The first tile of keys that any of the queries from `row` on sees; kTile queries, `tokens` of them real.
int64_t first_key_tile(const int32_t* first, int64_t row, int64_t tokens) {
  int32_t least = std::numeric_limits<int32_t>::max();
  for (int64_t r = row; r < std::min(row + kTile, tokens); ++r) least = std::min(least, first[r]);
  return least / kTile * kTile;
}

// f(c, keys, r, queries) for each part of a tile: keys from c on, queries from r on. On the diagonal the later half of
// the keys is seen only by the later half of the queries.
template <class F>
inline void for_keys(bool diagonal, F f) {
  if (!diagonal) return f(0, kTile, 0, kTile);
  f(0, kHalf, 0, kTile);
  f(kHalf, kHalf, kHalf, kHalf);
}
template <class F>
inline void for_queries(bool diagonal, F f) {
  if (!diagonal) return f(0, kTile, 0, kTile);
  f(0, kHalf, 0, kHalf);
  f(0, kTile, kHalf, kHalf);
}
inline int64_t keys_of(bool diagonal, int64_t r) { return diagonal && r < kHalf ? kHalf : kTile; }

// All queries of `heads` heads against one key/value head. lse2 [heads][tokens]: log2 of the softmax's denominator.
void forward_head(const std::vector<Rows>& q, Rows k, Rows v, Angles angles, const int32_t* first_T, int64_t tokens,
                  int64_t D, float scale, std::vector<Rows>& o, float* lse2) {
  const int64_t T = (tokens + kTile - 1) / kTile * kTile, words = D / kPerWord;
  static thread_local Scratch scratch;
  scratch.reserve(5 * T * words + 2 * kTile * kTile + kTile * D + 3 * kTile);
  Word* rows = scratch.take<Word>(T * words);
  Word* key_rows = scratch.take<Word>(T * words);
  Word* value_rows = scratch.take<Word>(T * words);
  Word* q_by_columns = scratch.take<Word>(T * words);
  Word* packed_values = scratch.take<Word>(T * words);
  float* s = scratch.take<float>(kTile * kTile);
  Word* p = in_place_or(s, scratch.take<Word>(kTile * kTile));
  float* out = scratch.take<float>(kTile * D);
  float* most = scratch.take<float>(kTile);
  float* sum = scratch.take<float>(kTile);
  float* shrink = scratch.take<float>(kTile);
  const __m512 scale2 = _mm512_set1_ps(scale * kLog2E);
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);

  copy_rows(k, angles, first_T, tokens, T, D, key_rows);
  copy_rows(v, kUnrotated, first_T, tokens, T, D, value_rows);
  const Word* v_by_rows = pack_by_rows(value_rows, T, D, packed_values);
  for (size_t head = 0; head < q.size(); ++head) {
    copy_rows(q[head], angles, first_T, tokens, T, D, rows);
    pack_by_columns(rows, T, words, q_by_columns);
    for (int64_t r0 = 0; r0 < T; r0 += kTile) {
      std::fill_n(most, kTile, -std::numeric_limits<float>::infinity());
      std::fill_n(sum, kTile, 0.0f);
      std::fill_n(out, kTile * D, 0.0f);
      for (int64_t c0 = first_key_tile(first_T, r0, tokens); c0 <= r0; c0 += kTile) {
        const bool diagonal = c0 == r0;
        for_keys(diagonal, [&](int64_t c, int64_t keys, int64_t r, int64_t queries) {
          product(key_rows + (c0 + c) * words, words, 1, q_by_columns + r0 * words + r, kTile, s + c * kTile + r, kTile,
                  keys, queries, words, false);
        });
        for (int64_t j = 0; j < kTile; j += kLanes) {
          const __m512i r = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(r0 + j)), lanes);
          const __mmask16 real = _mm512_cmplt_epi32_mask(r, _mm512_set1_epi32(static_cast<int>(tokens)));
          const __m512i first = _mm512_mask_loadu_epi32(_mm512_set1_epi32(0), real, first_T + r0 + j);
          const int64_t keys = keys_of(diagonal, j);
          __m512 high = _mm512_loadu_ps(most + j);
          const __m512 before = high;
          for (int64_t c = 0; c < keys; ++c) {
            const __m512 x = _mm512_mask_mul_ps(_mm512_set1_ps(-std::numeric_limits<float>::infinity()),
                                                sees(c0 + c, r, first), _mm512_loadu_ps(s + c * kTile + j), scale2);
            _mm512_storeu_ps(s + c * kTile + j, x);
            high = _mm512_max_ps(high, x);
          }
          // A query that has seen nothing yet: any finite number works, as all its weights are 2^-inf = 0.
          const __m512 base = _mm512_max_ps(high, _mm512_set1_ps(-1e30f));
          const __m512 factor = exp2(_mm512_sub_ps(_mm512_max_ps(before, _mm512_set1_ps(-1e38f)), base));
          __m512 total = _mm512_mul_ps(_mm512_loadu_ps(sum + j), factor);
          for (int64_t c = 0; c < keys; c += 2) {
            const __m512 even_s = _mm512_loadu_ps(s + c * kTile + j), odd_s = _mm512_loadu_ps(s + (c + 1) * kTile + j);
            const __mmask16 even_sees = sees(c0 + c, r, first), odd_sees = sees(c0 + c + 1, r, first);
            const __m512 even = _mm512_maskz_mov_ps(even_sees, exp2(_mm512_sub_ps(even_s, base)));
            const __m512 odd = _mm512_maskz_mov_ps(odd_sees, exp2(_mm512_sub_ps(odd_s, base)));
            total = _mm512_add_ps(total, _mm512_add_ps(even, odd));
            store_words(p + c / kPerWord * kTile + j, kTile, even, odd);
          }
          _mm512_storeu_ps(most + j, high);
          _mm512_storeu_ps(sum + j, total);
          _mm512_storeu_ps(shrink + j, factor);
        }
        for (int64_t r = 0; r < kTile; ++r)
          for (int64_t d = 0; d < D; d += kLanes)
            _mm512_storeu_ps(out + r * D + d, _mm512_mul_ps(_mm512_loadu_ps(out + r * D + d), _mm512_set1_ps(shrink[r])));
        for_queries(diagonal, [&](int64_t c, int64_t keys, int64_t r, int64_t queries) {
          product(p + c / kPerWord * kTile + r, 1, kTile, v_by_rows + (c0 + c) / kPerWord * D, D, out + r * D, D, queries,
                  D, keys / kPerWord, true);
        });
      }
      for (int64_t r = 0; r < std::min(kTile, tokens - r0); ++r) {
        const bool seen = first_T[r0 + r] <= r0 + r;
        lse2[head * tokens + r0 + r] = seen ? most[r] + std::log2(sum[r]) : 0.0f;
        const __m512 norm = _mm512_set1_ps(seen ? 1 / sum[r] : 0.0f);
        Number* to = o[head].data + (r0 + r) * o[head].stride;
        fetch(o[head][r0 + r + kAhead], D);
        for (int64_t d = 0; d < D; d += kLanes)
          store(to + d, _mm512_mul_ps(_mm512_loadu_ps(out + r * D + d), norm));
      }
    }
  }
}

// delta[r] = do_r · o_r; zero for padding.
void row_products(Rows x, Rows y, const int32_t* first, int64_t tokens, int64_t T, int64_t D, float* to) {
  for (int64_t t = 0; t < T; ++t) {
    __m512 sum = _mm512_setzero_ps();
    fetch(y[t + kAhead], D);
    if (t < tokens && first[t] <= t)
      for (int64_t d = 0; d < D; d += kLanes) sum = _mm512_fmadd_ps(load(x[t] + d), load(y[t] + d), sum);
    to[t] = _mm512_reduce_add_ps(sum);
  }
}

// Writes factor times the rows, rotated back.
void store_rows(const float* from, Angles angles, int64_t D, int64_t tokens, float factor, Rows to) {
  const __m512 f = _mm512_set1_ps(factor);
  for (int64_t t = 0; t < tokens; ++t) {
    const float* row = from + t * D;
    Number* out = to.data + t * to.stride;
    fetch(to[t + kAhead], D);
    if (angles.cos == nullptr) {
      for (int64_t d = 0; d < D; d += kLanes) store(out + d, _mm512_mul_ps(_mm512_loadu_ps(row + d), f));
      continue;
    }
    for_pairs(angles, t, D, [&](int64_t d, __mmask16 lanes, __m512 cos, __m512 sin) {
      const __m512 a = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, row + d), f);
      const __m512 b = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, row + D / 2 + d), f);
      store(out + d, _mm512_fmadd_ps(b, sin, _mm512_mul_ps(a, cos)), lanes);
      store(out + D / 2 + d, _mm512_fnmadd_ps(a, sin, _mm512_mul_ps(b, cos)), lanes);
    });
  }
}

void backward_head(const std::vector<Rows>& q, Rows k, Rows v, Angles angles, const std::vector<Rows>& o,
                   const std::vector<Rows>& dout, const float* lse2, const int32_t* first_T, int64_t tokens, int64_t D,
                   float scale, std::vector<Rows>& dq, Rows dk, Rows dv) {
  const int64_t T = (tokens + kTile - 1) / kTile * kTile, words = D / kPerWord;
  static thread_local Scratch scratch;
  scratch.reserve(9 * T * words + 5 * kTile * kTile + 3 * T * D + 2 * T);
  Word* q_rows = scratch.take<Word>(T * words);
  Word* do_rows = scratch.take<Word>(T * words);
  Word* key_rows = scratch.take<Word>(T * words);
  Word* value_rows = scratch.take<Word>(T * words);
  Word* q_by_columns = scratch.take<Word>(T * words);
  Word* do_by_columns = scratch.take<Word>(T * words);
  Word* packed_keys = scratch.take<Word>(T * words);
  Word* packed_q = scratch.take<Word>(T * words);
  Word* packed_do = scratch.take<Word>(T * words);
  float* s = scratch.take<float>(kTile * kTile);
  float* dp = scratch.take<float>(kTile * kTile);
  Word* p_by_keys = in_place_or(s, scratch.take<Word>(kTile * kTile));
  Word* ds_by_keys = in_place_or(dp, scratch.take<Word>(kTile * kTile));
  Word* ds_by_queries = in_place_or(dp, scratch.take<Word>(kTile * kTile));
  float* dk_sum = scratch.take<float>(T * D);
  float* dv_sum = scratch.take<float>(T * D);
  float* dq_sum = scratch.take<float>(T * D);
  float* delta = scratch.take<float>(T);
  float* lse = scratch.take<float>(T);
  const __m512 scale2 = _mm512_set1_ps(scale * kLog2E);
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);

  copy_rows(k, angles, first_T, tokens, T, D, key_rows);
  const Word* k_by_rows = pack_by_rows(key_rows, T, D, packed_keys);
  copy_rows(v, kUnrotated, first_T, tokens, T, D, value_rows);
  std::fill_n(dk_sum, T * D, 0.0f);
  std::fill_n(dv_sum, T * D, 0.0f);
  for (size_t head = 0; head < q.size(); ++head) {
    copy_rows(q[head], angles, first_T, tokens, T, D, q_rows);
    pack_by_columns(q_rows, T, words, q_by_columns);
    const Word* q_by_rows = pack_by_rows(q_rows, T, D, packed_q);
    copy_rows(dout[head], kUnrotated, first_T, tokens, T, D, do_rows);
    pack_by_columns(do_rows, T, words, do_by_columns);
    const Word* do_by_rows = pack_by_rows(do_rows, T, D, packed_do);
    row_products(dout[head], o[head], first_T, tokens, T, D, delta);
    std::fill_n(lse, T, 0.0f);
    std::copy_n(lse2 + head * tokens, tokens, lse);
    std::fill_n(dq_sum, T * D, 0.0f);

    for (int64_t r0 = 0; r0 < T; r0 += kTile)
      for (int64_t c0 = first_key_tile(first_T, r0, tokens); c0 <= r0; c0 += kTile) {
        const bool diagonal = c0 == r0;
        for_keys(diagonal, [&](int64_t c, int64_t keys, int64_t r, int64_t queries) {
          product(key_rows + (c0 + c) * words, words, 1, q_by_columns + r0 * words + r, kTile, s + c * kTile + r, kTile,
                  keys, queries, words, false);
          product(value_rows + (c0 + c) * words, words, 1, do_by_columns + r0 * words + r, kTile, dp + c * kTile + r,
                  kTile, keys, queries, words, false);
        });
        for (int64_t j = 0; j < kTile; j += kLanes) {
          const __m512i r = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(r0 + j)), lanes);
          const __mmask16 real = _mm512_cmplt_epi32_mask(r, _mm512_set1_epi32(static_cast<int>(tokens)));
          const __m512i first = _mm512_mask_loadu_epi32(_mm512_set1_epi32(0), real, first_T + r0 + j);
          const __m512 lse_r = _mm512_loadu_ps(lse + r0 + j), delta_r = _mm512_loadu_ps(delta + r0 + j);
          for (int64_t c = 0; c < keys_of(diagonal, j); c += 2) {
            const __m512 even_s = _mm512_fmsub_ps(_mm512_loadu_ps(s + c * kTile + j), scale2, lse_r);
            const __m512 odd_s = _mm512_fmsub_ps(_mm512_loadu_ps(s + (c + 1) * kTile + j), scale2, lse_r);
            const __m512 even = _mm512_maskz_mov_ps(sees(c0 + c, r, first) & real, exp2(even_s));
            const __m512 odd = _mm512_maskz_mov_ps(sees(c0 + c + 1, r, first) & real, exp2(odd_s));
            const __m512 even_ds = _mm512_mul_ps(even, _mm512_sub_ps(_mm512_loadu_ps(dp + c * kTile + j), delta_r));
            const __m512 odd_ds = _mm512_mul_ps(odd, _mm512_sub_ps(_mm512_loadu_ps(dp + (c + 1) * kTile + j), delta_r));
            auto* p_numbers = reinterpret_cast<Number*>(p_by_keys) + c * kTile + j;
            store(p_numbers, even);
            store(p_numbers + kTile, odd);
            store_words(ds_by_queries + c / kPerWord * kTile + j, kTile, even_ds, odd_ds);
            if constexpr (kPerWord > 1) {  // otherwise both orders are the same
              auto* ds_numbers = reinterpret_cast<Number*>(ds_by_keys) + c * kTile + j;
              store(ds_numbers, even_ds);
              store(ds_numbers + kTile, odd_ds);
            }
          }
        }
        for_keys(diagonal, [&](int64_t c, int64_t keys, int64_t r, int64_t queries) {
          const int64_t row = kTile / kPerWord, from = c * row + r / kPerWord, right = (r0 + r) / kPerWord * D;
          const int64_t to = (c0 + c) * D, words_across = queries / kPerWord;
          product(p_by_keys + from, row, 1, do_by_rows + right, D, dv_sum + to, D, keys, D, words_across, true);
          product(ds_by_keys + from, row, 1, q_by_rows + right, D, dk_sum + to, D, keys, D, words_across, true);
        });
        for_queries(diagonal, [&](int64_t c, int64_t keys, int64_t r, int64_t queries) {
          product(ds_by_queries + c / kPerWord * kTile + r, 1, kTile, k_by_rows + (c0 + c) / kPerWord * D, D,
                  dq_sum + (r0 + r) * D, D, queries, D, keys / kPerWord, true);
        });
      }
    store_rows(dq_sum, angles, D, tokens, scale, dq[head]);
  }
  store_rows(dk_sum, angles, D, tokens, scale, dk);
  store_rows(dv_sum, kUnrotated, D, tokens, 1.0f, dv);
}

// [B, T, H, D] with D contiguous.
struct Heads {
  Number* data;
  int64_t batch_stride, token_stride, head_stride;
  explicit Heads(const Tensor& x)
      : data(static_cast<Number*>(x.data_ptr())),
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

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& first, double scale,
                                   const Tensor& cos, const Tensor& sin) {
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

void backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& first, const Tensor& o,
              const Tensor& lse2, double scale, const Tensor& cos, const Tensor& sin, const Tensor& dq, const Tensor& dk,
              const Tensor& dv) {
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
