// Copies windows of token files into a batch, and requests the next ones ahead of time.
//
// Windows are read by pread rather than through a map: a truncated file, or a failing disk, is then an error to report at
// any time, while a map would kill the process by SIGBUS. The price: a map reaches 1.9, 1.3 and 1.2 times the rate at
// T = 256, 1024 and 2048.

#include "simd.h"

#include <fcntl.h>
#include <sys/uio.h>
#include <unistd.h>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <mutex>
#include <vector>

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace spt {
namespace {

constexpr int64_t kGrainTokens = 1 << 16;
constexpr int64_t kProbes = 16;
constexpr int64_t kPrefetchedTokens = 256;

// A row of the sources table [S, 4].
struct Source {
  int64_t fd;
  int64_t first_byte;
  int64_t num_tokens;
  int64_t kind;  // bytes of an id, negative if it is signed
};

enum Outcome : int64_t { kDone = 0, kCutShort = 1, kReadError = 2, kIdTooLarge = 3 };

struct Failure {
  int64_t outcome = kDone, row = -1, token = -1, detail = 0;  // token: its place in the source; detail: errno or the id
};

// Calls part(first token, tokens) for the one or two stretches of a window that may run across the ring's end.
template <class Part>
void for_each_part(const Source& source, int64_t start, int64_t tokens, const Part& part) {
  const int64_t before_end = std::min(tokens, source.num_tokens - start);
  part(start, before_end);
  if (before_end < tokens) part(0, tokens - before_end);
}

template <class Id>
Failure read_part(const Source& source, int64_t first_token, int64_t tokens, Id* ids) {
  char* to = reinterpret_cast<char*>(ids);
  int64_t missing = tokens * sizeof(Id), at = source.first_byte + first_token * sizeof(Id);
  while (missing > 0) {
    const ssize_t got = pread(static_cast<int>(source.fd), to, missing, at);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) {
      const int64_t token = (at - source.first_byte) / static_cast<int64_t>(sizeof(Id));
      return {got < 0 ? kReadError : kCutShort, -1, token, got < 0 ? errno : 0};
    }
    to += got;
    at += got;
    missing -= got;
  }
  return {};
}

// T inputs and T targets from T + 1 ids, and their extremes.
#define WIDEN(Id)                                                                                            \
  SPT_SIMD void widen(const Id* ids, int64_t T, int64_t* tokens_T, int64_t* targets_T, Id& smallest, Id& largest) { \
    Id low = ids[T], high = ids[T];                                                                          \
    for (int64_t t = 0; t < T; ++t) {                                                                        \
      low = std::min(low, ids[t]);                                                                           \
      high = std::max(high, ids[t]);                                                                         \
    }                                                                                                        \
    for (int64_t t = 0; t < T; ++t) tokens_T[t] = ids[t];                                                    \
    for (int64_t t = 0; t < T; ++t) targets_T[t] = ids[t + 1];                                               \
    smallest = low;                                                                                          \
    largest = high;                                                                                          \
  }
WIDEN(uint8_t)
WIDEN(uint16_t)
WIDEN(uint32_t)
WIDEN(uint64_t)
WIDEN(int8_t)
WIDEN(int16_t)
WIDEN(int32_t)
WIDEN(int64_t)
#undef WIDEN

template <class Id>
Failure read_window(const Source& source, int64_t start, int64_t context, uint64_t vocab_size, char* buffer,
                    int64_t* tokens_T, int64_t* targets_T) {
  Id* ids = reinterpret_cast<Id*>(buffer);
  Failure failure;
  int64_t filled = 0;
  for_each_part(source, start, context + 1, [&](int64_t first_token, int64_t tokens) {
    if (failure.outcome == kDone) failure = read_part(source, first_token, tokens, ids + filled);
    filled += tokens;
  });
  if (failure.outcome != kDone) return failure;

  Id smallest, largest;
  widen(ids, context, tokens_T, targets_T, smallest, largest);
  const auto is_bad = [&](Id id) { return id < 0 || static_cast<uint64_t>(id) >= vocab_size; };
  if (!is_bad(largest) && !is_bad(smallest)) return {};
  const int64_t bad = std::find_if(ids, ids + context + 1, is_bad) - ids;
  return {kIdTooLarge, -1, (start + bad) % source.num_tokens, static_cast<int64_t>(ids[bad])};
}

Failure read_window(const Source& source, int64_t start, int64_t context, uint64_t vocab_size, char* buffer,
                    int64_t* tokens_T, int64_t* targets_T) {
  const auto read = [&](auto id) {
    return read_window<decltype(id)>(source, start, context, vocab_size, buffer, tokens_T, targets_T);
  };
  switch (source.kind) {
    case 1: return read(uint8_t{});
    case 2: return read(uint16_t{});
    case 4: return read(uint32_t{});
    case 8: return read(uint64_t{});
    case -1: return read(int8_t{});
    case -2: return read(int16_t{});
    case -4: return read(int32_t{});
    case -8: return read(int64_t{});
  }
  STD_TORCH_CHECK(false, "no ids of kind ", source.kind);
}

const Source* sources_from(const Tensor& sources_S4) {
  static_assert(sizeof(Source) == 4 * sizeof(int64_t));
  return reinterpret_cast<const Source*>(sources_S4.const_data_ptr<int64_t>());
}

// Fills batch [2, R, T] with the inputs (0) and the targets (1) of R windows. Returns the Failure of the first row that
// failed, as [4] int64.
Tensor gather(const Tensor& sources_S4, const Tensor& source_R, const Tensor& start_R, int64_t vocab_size,
              Tensor batch_2RT) {
  const Source* sources = sources_from(sources_S4);
  const int32_t* source = source_R.const_data_ptr<int32_t>();
  const int64_t* start = start_R.const_data_ptr<int64_t>();
  int64_t* batch = batch_2RT.mutable_data_ptr<int64_t>();
  const int64_t rows = batch_2RT.size(1), context = batch_2RT.size(2);

  Failure first_failure;
  std::mutex mutex;
  const int64_t grain_rows = std::max<int64_t>(1, kGrainTokens / context);
  torch::stable::parallel_for(0, rows, grain_rows, [&](int64_t begin, int64_t end) {
    std::vector<char> buffer((context + 1) * sizeof(int64_t));
    for (int64_t row = begin; row < end; ++row) {
      int64_t* tokens_T = batch + row * context;
      // The destination of a short window is prefetched during the system call.
      for (int64_t t = 0; t < std::min<int64_t>(context, kPrefetchedTokens); t += 8) {
        __builtin_prefetch(tokens_T + t, 1);
        __builtin_prefetch(tokens_T + rows * context + t, 1);
      }
      Failure failure = read_window(sources[source[row]], start[row], context, vocab_size, buffer.data(), tokens_T,
                                    tokens_T + rows * context);
      if (failure.outcome == kDone) continue;
      const std::lock_guard lock(mutex);
      failure.row = row;
      if (first_failure.row < 0 || row < first_failure.row) first_failure = failure;
      return;
    }
  });

  Tensor result = torch::stable::new_empty(sources_S4, {4});
  int64_t* out = result.mutable_data_ptr<int64_t>();
  out[0] = first_failure.outcome;
  out[1] = first_failure.row;
  out[2] = first_failure.token;
  out[3] = first_failure.detail;
  return result;
}

// Whether the last token is in memory for an even sample of these windows.
bool in_memory(const Source* sources, const int32_t* source, const int64_t* start, int64_t rows, int64_t context) {
#ifdef RWF_NOWAIT
  for (int64_t probe = 0; probe < kProbes; ++probe) {
    const int64_t row = probe * rows / kProbes;
    const Source& from = sources[source[row]];
    char byte;
    const iovec to{&byte, 1};
    const int64_t token = (start[row] + context) % from.num_tokens;
    if (preadv2(static_cast<int>(from.fd), &to, 1, from.first_byte + token * std::abs(from.kind), RWF_NOWAIT) != 1)
      return false;
  }
  return true;
#else
  return false;
#endif
}

// Asks the kernel to read the pages of these windows; harmless on a system without such a request. It doesn't if a sample
// is in memory already, since asking takes a third of the time of reading.
void advise(const Tensor& sources_S4, const Tensor& source_R, const Tensor& start_R, int64_t context) {
#ifdef POSIX_FADV_WILLNEED
  const Source* sources = sources_from(sources_S4);
  const int32_t* source = source_R.const_data_ptr<int32_t>();
  const int64_t* start = start_R.const_data_ptr<int64_t>();
  const int64_t rows = start_R.numel();
  if (rows > kProbes && in_memory(sources, source, start, rows, context)) return;
  for (int64_t row = 0; row < rows; ++row) {
    const Source& from = sources[source[row]];
    const int64_t id_bytes = std::abs(from.kind);
    for_each_part(from, start[row], context + 1, [&](int64_t first_token, int64_t tokens) {
      posix_fadvise(static_cast<int>(from.fd), from.first_byte + first_token * id_bytes, tokens * id_bytes,
                    POSIX_FADV_WILLNEED);
    });
  }
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(spt_fast, m) {
  m.def("gather(Tensor sources, Tensor source, Tensor start, int vocab_size, Tensor(a!) batch) -> Tensor");
  m.def("advise(Tensor sources, Tensor source, Tensor start, int context) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(spt_fast, CPU, m) {
  m.impl("gather", TORCH_BOX(&gather));
  m.impl("advise", TORCH_BOX(&advise));
}

}  // namespace spt
