// What decoding does most, for XLA on a CPU, over caches of float32, bfloat16 or int8: products with a weight stored
// (outputs, inputs), of those or of integers, and attention of one token over a cache.
//
// With few rows the time is that of reading the weight. Every weight is read from memory once, in the order in which it
// is stored, and while one part is computed the next is fetched; the rows of x stay in the caches.

#include "common.h"

namespace s1jax {
namespace {

// A tile of kRows x kOutputs sums, a vector of weights for each output and one of x fill the vector registers.
constexpr int kRows = kRegisters / 4, kOutputs = 3;

// Of a row of x at a time: then those of a tile stay in the nearest cache.
template <class X>
constexpr int64_t kInputsAtOnce = 3584 / sizeof(X);

// The sum of the lanes of each of N vectors: always of halves, so that a row's numbers do not depend on how many rows
// are summed beside it.
template <int N>
void sum_lanes(const Floats (&of)[N], float (&sums)[N]) {
  constexpr int kTogether = std::min(kVector, N > 4 ? 8 : N > 2 ? 4 : N);
#pragma GCC unroll 6
  for (int first = 0; first < N; first += kTogether) {
    Floats v[kTogether];
#pragma GCC unroll 8
    for (int i = 0; i < kTogether; i++) v[i] = of[std::min(first + i, N - 1)];
#pragma GCC unroll 4
    for (int lanes = kVector, count = kTogether; lanes > 1; lanes /= 2) {
      const int other = count / 2;  // 0 of a single one, which is added to itself
      count = std::max(1, other);
#pragma GCC unroll 4
      for (int i = 0; i < count; i++) v[i] = lower(v[i], v[i + other]) + upper(v[i], v[i + other]);
    }
    for (int i = 0; i < kTogether && first + i < N; i++) sums[first + i] = v[0][i * (kVector / kTogether)];
  }
}

// y[r, o] = sum_k x[r, k] * weight[o, k] over n values of k, added to what y holds if `add`. Rows of x and of the weight
// are `inputs` apart, those of y `outputs`. What lies `ahead` of what is read is fetched from memory meanwhile. Not inlined:
// many in one function would share its registers, which made some half as fast.
template <int Outputs, int Rows, class X, class W>
__attribute__((noinline)) void tile(const X* x, W weight, int64_t inputs, int64_t n, float* y, int64_t outputs, bool add,
                                    int64_t ahead) {
  using Of = Factors<X>;
  Floats sums[Outputs * Rows] = {};
  constexpr bool kLooksUp = std::is_same_v<X, BFloat16> && std::is_same_v<W, Int4>;
  [[maybe_unused]] typename Of::Vector tables[Outputs];
  const auto vector = [&](int64_t k, int64_t lanes) {
    typename Of::Vector weights[Outputs];
    for (int o = 0; o < Outputs; o++) {
      const auto at = weight + (o * inputs + k);
      __builtin_prefetch(address(at + ahead), 0, 2);
      if constexpr (kLooksUp) {
        if (k == 0 || begins_group(weight + k)) tables[o] = Of::table(at, lanes);
        weights[o] = Of::of(at, lanes, tables[o]);
      } else {
        weights[o] = Of::of(at, lanes);
      }
    }
    for (int r = 0; r < Rows; r++) {
      const auto values = kept(Of::of(x + r * inputs + k, lanes));
      for (int o = 0; o < Outputs; o++) sums[o * Rows + r] = Of::multiply_add(values, weights[o], sums[o * Rows + r]);
    }
  };
  int64_t k = 0;
  for (; k + Of::kLanes <= n; k += Of::kLanes) vector(k, Of::kLanes);
  if (k < n) vector(k, n - k);
  float totals[Outputs * Rows];
  sum_lanes(sums, totals);
  for (int o = 0; o < Outputs; o++)
    for (int r = 0; r < Rows; r++) y[r * outputs + o] = totals[o * Rows + r] + (add ? y[r * outputs + o] : 0);
}

// The tile of so many rows.
template <int Outputs, int Rows = kRows, class... Rest>
void tile_of(int64_t rows, Rest... rest) {
  if constexpr (Rows > 1)
    if (rows < Rows) return tile_of<Outputs, Rows - 1>(rows, rest...);
  tile<Outputs, Rows>(rest...);
}

// y = x weight^T for so many outputs of all rows; rows of y are `stride` apart. With the last tile of rows, what lies
// `ahead` of the weight is fetched from memory.
template <class X, class W>
void products(int64_t rows, int64_t inputs, int64_t outputs, const X* x, W weight, float* y, int64_t stride, int64_t ahead) {
  constexpr int64_t kLanes = Factors<X>::kLanes;
  const int64_t tiles = divide_up(rows, kRows);
  const int64_t length = divide_up(divide_up(inputs, divide_up(inputs, kInputsAtOnce<X>)), kLanes) * kLanes;
  for (int64_t k = 0; k < inputs; k += length)
    for (int64_t t = 0; t < tiles; t++) {
      const int64_t row = rows * t / tiles, count = rows * (t + 1) / tiles - row, n = std::min(length, inputs - k);
      int64_t o = 0;
      const auto tiles_of = [&](auto width) {
        constexpr int kWidth = decltype(width)::value;
        for (; o + kWidth <= outputs; o += kWidth)
          tile_of<kWidth>(count, x + row * inputs + k, weight + (o * inputs + k), inputs, n, y + row * stride + o, stride,
                          k > 0, t + 1 == tiles ? ahead : 0);
      };
      tiles_of(std::integral_constant<int, kOutputs>{});
      tiles_of(std::integral_constant<int, 1>{});
    }
}

// y[m, n] = sum_k x[m, k] * weight[n, k], of an x of float32, or where pairs of it are multiplied, of bfloat16.
ffi::Error multiply(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer weight, ffi::BufferR2<ffi::F32> scales,
                    ffi::ResultBufferR2<ffi::F32> y) {
  const int64_t rows = x.dimensions()[0], inputs = x.dimensions()[1], outputs = y->dimensions()[1];
  if (x.element_type() != ffi::F32 && !(kPairs && x.element_type() == ffi::BF16))
    return ffi::Error::InvalidArgument("no product is made of an x of this type here");
  return with_type(x, [&, y = y->typed_data()](auto* x) {
    if constexpr (kPairs || std::is_same_v<decltype(x), const float*>)
      with_weight(weight, scales, [&](auto data) {
        const auto block = [=](int64_t begin, int64_t count, int64_t ahead) {
          products(rows, inputs, count, x, data + begin * inputs, y + begin, outputs, ahead);
        };
        const int64_t at_once = std::min(inputs, kInputsAtOnce<std::decay_t<decltype(*x)>>);
        each_outputs(pool, data, outputs, kOutputs, at_once, inputs, block);
      });
  });
}

// What one row sees of a cache for one head: `seen` tokens, `slots` in each of the pages that the table lists.
template <class V>
struct Seen {
  const V* pages;
  const int32_t* table;
  int64_t seen, slots, size;

  // Calls `visit` with each page's first token and how many of them are seen.
  template <class Visit>
  void each_page(const Visit& visit) const {
    for (int64_t begin = 0; begin < seen; begin += slots)
      visit(begin, pages + table[begin / slots] * slots * size, std::min(slots, seen - begin));
  }
};

// y[q] = sum_s weights[q, s] * values[s] for some queries, kAtOnce at most.
constexpr int64_t kAtOnce = 8;

template <class V>
void weigh(const float* weights, const Seen<V>& values, int64_t queries, float* y) {
  for (int64_t d = 0; d < values.size; d += kVector) {
    Floats sums[kAtOnce] = {};
    const int64_t lanes = values.size - d;
    values.each_page([&](int64_t begin, const V* page, int64_t count) {
      const float* of_query[kAtOnce];
      for (int64_t q = 0; q < kAtOnce; q++) of_query[q] = weights + std::min(q, queries - 1) * values.seen + begin;
      for (int64_t s = 0; s < count; s++) {
        const Floats value = load(page + s * values.size + d, lanes);
        for (int q = 0; q < kAtOnce; q++) sums[q] = S1JAX_FMA(all(of_query[q][s]), value, sums[q]);
      }
    });
    for (int q = 0; q < kAtOnce && q < queries; q++) store(y + q * values.size + d, sums[q], lanes);
  }
}

// Softmax attention of each row's queries, (rows, kv_heads, queries, head_dim) and scaled already, over its tokens
// 0..last, which lie in the pages that its table lists, of (kv_heads, pages, slots, head_dim). Integers have scales,
// (kv_heads, pages, slots).
ffi::Error attend(ffi::ThreadPool pool, ffi::BufferR4<ffi::F32> query, ffi::AnyBuffer keys, ffi::BufferR3<ffi::F32> of_keys,
                  ffi::AnyBuffer values, ffi::BufferR3<ffi::F32> of_values, ffi::BufferR2<ffi::S32> table,
                  ffi::BufferR1<ffi::S32> last, ffi::ResultBufferR4<ffi::F32> context) {
  const auto shape = query.dimensions(), cache = keys.dimensions();
  const int64_t heads = shape[1], queries = shape[2], size = shape[3], slots = cache[2], width = table.dimensions()[1];
  const int64_t of_head = cache[1] * slots * size;
  return with_cache(keys, [&, x = query.typed_data(), y = context->typed_data(), of_rows = table.typed_data(),
                           last = last.typed_data()](auto* key) {
    const auto* value = static_cast<decltype(key)>(values.untyped_data());
    const float *key_scales = of_keys.typed_data(), *value_scales = of_values.typed_data();
    share(pool, shape[0] * heads, [=](int64_t i, int64_t) {
      static thread_local std::vector<float> scores;
      const int64_t row = i / heads, head = i % heads * of_head, at = i * queries * size;
      const int64_t seen = std::min<int64_t>(last[row] + 1, width * slots);
      const Seen<std::remove_cv_t<std::remove_pointer_t<decltype(key)>>> k{key + head, of_rows + row * width, seen, slots, size};
      auto v = k;
      v.pages = value + head;
      // Multiplies what is there of each query and token by the token's scale.
      const auto scale = [&](const float* scales) {
        if (!std::is_same_v<decltype(key), const int8_t*>) return;
        Seen<float>{scales + head / size, k.table, seen, slots, 1}.each_page([&](int64_t begin, auto* of, int64_t count) {
          for (int64_t q = 0; q < queries; q++)
            for (int64_t s = 0; s < count; s++) scores[q * seen + begin + s] *= of[s];
        });
      };
      scores.resize(queries * seen);
      k.each_page([&](int64_t begin, auto* page, int64_t count) {
        products(queries, size, count, x + at, page, scores.data() + begin, seen, 0);
      });
      scale(key_scales);
      for (int64_t q = 0; q < queries; q++) softmax(scores.data() + q * seen, seen, 1);
      scale(value_scales);
      for (int64_t q = 0; q < queries; q += kAtOnce)
        weigh(scores.data() + q * seen, v, queries - q, y + at + q * size);
    });
  });
}

// Puts tokens, (rows, tokens, kv_heads, head_dim), or their scales, which have no head_dim, into the pages of their rows, the
// first at its row's position; what has no page is not kept. The cache is updated in place.
ffi::Error write(ffi::AnyBuffer, ffi::AnyBuffer tokens, ffi::BufferR2<ffi::S32> table, ffi::BufferR1<ffi::S32> first,
                 ffi::Result<ffi::AnyBuffer> cache) {
  const auto shape = tokens.dimensions(), pages = cache->dimensions();
  const int64_t slots = pages[2], width = table.dimensions()[1], bytes = cache->size_bytes() / (pages[0] * pages[1] * slots);
  const char* from = static_cast<const char*>(tokens.untyped_data());
  char* to = static_cast<char*>(cache->untyped_data());
  for (int64_t i = 0; i < shape[0] * shape[1] * shape[2]; i++, from += bytes) {
    const int64_t head = i % shape[2], row = i / shape[2] / shape[1], at = first.typed_data()[row] + i / shape[2] % shape[1];
    if (at >= width * slots) continue;
    const int64_t page = head * pages[1] + table.typed_data()[row * width + at / slots];
    std::memcpy(to + (page * slots + at % slots) * bytes, from, bytes);
  }
  return ffi::Error::Success();
}

// Of each row of scores, in one reading: of the ids that each set allows the first with the greatest, whether all are
// numbers, and the logarithm of their exponentials' sum, if there is room for it.
ffi::Error survey(ffi::ThreadPool pool, ffi::BufferR2<ffi::F32> scores, ffi::BufferR2<ffi::S8> allowed,
                  ffi::ResultBufferR2<ffi::S32> greatest, ffi::ResultBufferR1<ffi::S32> finite,
                  ffi::ResultBufferR1<ffi::F32> total) {
  constexpr int kSets = 2;
  const int32_t size = scores.dimensions()[1];
  const bool with_total = total->dimensions()[0] > 0;
  const auto work = [=, all_scores = scores.typed_data(), of_set = allowed.typed_data(), ids = greatest->typed_data(),
                     finite = finite->typed_data(), total = total->typed_data()](int64_t row, int64_t) {
    const float* x = all_scores + row * size;
    Integers lane = {}, at[kSets] = {};
    for (int i = 0; i < kVector; i++) lane[i] = i;
    Floats best[kSets] = {all(-INFINITY), all(-INFINITY)}, top = all(-INFINITY), nothing = {};
    for (int64_t i = 0; i < size; i += kVector, lane += kVector) {
      const Floats v = load(x + i, size - i);
      nothing += v - v;
      top = (lane < size) & (v > top) ? v : top;
      for (int set = 0; set < kSets; set++) {
        const Integers in_set = load(of_set + set * size + i, size - i) != 0;
        const Integers better = in_set & (v > best[set]);
        best[set] = better ? v : best[set];
        at[set] = better ? lane : at[set];
      }
    }
    for (int set = 0; set < kSets; set++) {
      int winner = 0;
      for (int i = 1; i < kVector; i++)
        if (best[set][i] > best[set][winner] || (best[set][i] == best[set][winner] && at[set][i] < at[set][winner])) winner = i;
      ids[row * kSets + set] = at[set][winner];
    }
    float most = -INFINITY, none = 0, sum = 0;
    for (int i = 0; i < kVector; i++) most = std::max(most, top[i]), none += nothing[i];
    finite[row] = none == 0;
    if (!with_total) return;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; i++) sum += exponential(x[i] - most);
    total[row] = most + std::log(sum);
  };
  share(pool, scores.dimensions()[0], work);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace s1jax

extern "C" constexpr int s1jax_vector_bytes = s1jax::kVectorBytes, s1jax_pairs = s1jax::kPairs;

XLA_FFI_DEFINE_HANDLER_SYMBOL(s1jax_multiply, s1jax::multiply);
XLA_FFI_DEFINE_HANDLER_SYMBOL(s1jax_attend, s1jax::attend);
XLA_FFI_DEFINE_HANDLER_SYMBOL(s1jax_write, s1jax::write);
XLA_FFI_DEFINE_HANDLER_SYMBOL(s1jax_survey, s1jax::survey);
