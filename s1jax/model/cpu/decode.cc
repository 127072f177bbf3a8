// What decoding does most, for XLA on a CPU with AVX-512, over float32 activations and weights and caches of float32 or
// bfloat16: products with a weight stored (outputs, inputs), attention of one token over a cache, and looking up rows.
//
// With few rows the time is that of reading the weight. Every weight is read from memory once, in the order in which it
// is stored, and while one part is computed the next is fetched; the rows of x stay in the caches. A bfloat16 is the
// upper half of a float32, so that widening is exact and costs half the reading.

#include <cmath>
#include <type_traits>
#include <vector>

#include "common.h"

namespace s1jax {
namespace {

// A tile of kRows x kOutputs sums, a vector of weights for each output and one of x fill the 32 vector registers.
constexpr int kRows = 8, kOutputs = 3;

// Inputs are taken 32 at a time, in two vectors: a bfloat16 vector holds as many.
constexpr int64_t kGroup = 2 * kVector, kCacheLine = 64;

// What a thread takes at a time: a part of the weight that stays in its cache while all rows pass over it.
constexpr int64_t kBlockBytes = 128 * 1024;

// Into so many blocks at least, so that threads end together.
constexpr int64_t kShares = 16;

// So many inputs at a time: then those of a tile of x stay in the nearest cache.
constexpr int64_t kInputsAtOnce = 896;

// How a group of neighbours in memory, of which `mask` says which are there, becomes two vectors of floats; and how
// a group of x is arranged so that the lanes meet.
template <class W>
struct Group;

template <>
struct Group<float> {
  template <bool Whole>
  static __m512 load(const float* at, int half, uint32_t mask) {
    at += half * kVector;
    return Whole ? _mm512_loadu_ps(at) : _mm512_maskz_loadu_ps(mask >> (half * kVector), at);
  }
  static __m512 arranged(__m512 first, __m512 second, int half) { return half ? second : first; }
};

template <>
struct Group<BFloat16> {
  // The even ones, then the odd ones: one instruction each, where widening neighbours takes two.
  template <bool Whole>
  static __m512 load(const BFloat16* at, int half, uint32_t mask) {
    const __m512i pairs = Whole ? _mm512_loadu_si512(at) : _mm512_maskz_loadu_epi16(mask, at);
    const __m512i upper = _mm512_set1_epi32(0xffff0000);
    return _mm512_castsi512_ps(half ? _mm512_and_si512(pairs, upper) : _mm512_slli_epi32(pairs, 16));
  }
  static __m512 arranged(__m512 first, __m512 second, int half) {
    const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    return _mm512_permutex2var_ps(first, _mm512_or_si512(even, _mm512_set1_epi32(half)), second);
  }
};

// The sum of the lanes of a vector, and of each of eight with half the shuffles; both in the same order, so that a row's
// numbers do not depend on the rows beside it.
inline float sum_lanes(__m512 of) {
  __m128 four = _mm_add_ps(_mm_add_ps(_mm512_extractf32x4_ps(of, 0), _mm512_extractf32x4_ps(of, 1)),
                           _mm_add_ps(_mm512_extractf32x4_ps(of, 2), _mm512_extractf32x4_ps(of, 3)));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

inline void sum_lanes(const __m512 (&of)[8], float (&sums)[8]) {
  __m512 quarters[4];
  for (int i = 0; i < 4; i++)  // Each then holds the lanes of two, in quarters: a a b b.
    quarters[i] = _mm512_add_ps(_mm512_shuffle_f32x4(of[2 * i], of[2 * i + 1], 0x88),
                                _mm512_shuffle_f32x4(of[2 * i], of[2 * i + 1], 0xdd));
  __m512 fours[2];
  for (int i = 0; i < 2; i++)  // And of four: a b c d.
    fours[i] = _mm512_add_ps(_mm512_shuffle_f32x4(quarters[2 * i], quarters[2 * i + 1], 0x88),
                             _mm512_shuffle_f32x4(quarters[2 * i], quarters[2 * i + 1], 0xdd));
  __m512 eights = _mm512_add_ps(_mm512_unpacklo_ps(fours[0], fours[1]), _mm512_unpackhi_ps(fours[0], fours[1]));
  eights = _mm512_add_ps(eights, _mm512_shuffle_ps(eights, eights, 0x0e));
  alignas(64) float lanes[16];
  _mm512_store_ps(lanes, eights);
  for (int i = 0; i < 4; i++) sums[i] = lanes[4 * i], sums[4 + i] = lanes[4 * i + 1];
}

// A matrix whose rows are `stride` elements apart.
template <class T>
struct Matrix {
  T* data;
  int64_t stride;

  T* at(int64_t row, int64_t column = 0) const { return data + row * stride + column; }
};

// What is to be in the cache soon, asked for little by little: many requests at once would hold up what is read now.
struct Fetch {
  const char* at;
  const char* end;
  int64_t lines;  // at a time

  void some() {
    for (int64_t i = 0; i < lines && at < end; i++, at += kCacheLine) __builtin_prefetch(at, 0, 2);
  }
};

// y[r, o] = sum_k x[r, k] * weight[o, k] over `inputs` values of k, added to what y holds if `add`; x is arranged.
template <class W, int Rows, int Outputs>
void tile(const float* x, Matrix<const W> weight, int64_t inputs, Matrix<float> y, bool add, Fetch& fetch) {
  __m512 sums[Outputs][Rows] = {};
  const auto group = [&](int64_t k, auto whole, uint32_t mask) {
    for (int half = 0; half < 2; half++) {
      __m512 weights[Outputs];
      for (int o = 0; o < Outputs; o++)
        weights[o] = Group<W>::template load<decltype(whole)::value>(weight.at(o, k), half, mask);
      for (int r = 0; r < Rows; r++) {
        __m512 values = _mm512_loadu_ps(x + (k + half * kVector) * Rows + r * kVector);
        // Into a register, once: the compiler would have each product load it again.
        asm("" : "+v"(values));
        for (int o = 0; o < Outputs; o++) sums[o][r] = _mm512_fmadd_ps(values, weights[o], sums[o][r]);
      }
    }
  };
  const int64_t whole = inputs / kGroup * kGroup;
  for (int64_t k = 0; k < whole; k += kGroup) {
    fetch.some();
    group(k, std::true_type{}, 0);
  }
  if (whole < inputs) group(whole, std::false_type{}, (uint32_t{1} << (inputs - whole)) - 1);
  for (int o = 0; o < Outputs; o++) {
    float totals[Rows];
    if constexpr (Rows == 8)
      sum_lanes(sums[o], totals);
    else
      for (int r = 0; r < Rows; r++) totals[r] = sum_lanes(sums[o][r]);
    for (int r = 0; r < Rows; r++) *y.at(r, o) = totals[r] + (add ? *y.at(r, o) : 0);
  }
}

template <class W, int Outputs, int Rows = kRows>
void tile_of(int64_t rows, const float* x, Matrix<const W> weight, int64_t inputs, Matrix<float> y, bool add,
             Fetch& fetch) {
  if (rows == Rows)
    tile<W, Rows, Outputs>(x, weight, inputs, y, add, fetch);
  else if constexpr (Rows > 1)
    tile_of<W, Outputs, Rows - 1>(rows, x, weight, inputs, y, add, fetch);
}

// A product, and how it is cut: outputs into blocks, inputs into parts, rows into tiles.
template <class W>
struct Product {
  const float* x;   // rows x inputs
  const W* weight;  // outputs x inputs
  float* y;         // rows x outputs
  int64_t rows, inputs, outputs;

  int64_t tiles() const { return divide_up(rows, kRows); }
  int64_t tile_begin(int64_t tile) const { return rows * tile / tiles(); }
  int64_t part_length() const {
    return divide_up(divide_up(inputs, divide_up(inputs, kInputsAtOnce)), kGroup) * kGroup;
  }
  int64_t block_width() const {
    const int64_t fitting = kBlockBytes / (part_length() * sizeof(W)), shared = divide_up(outputs, kShares);
    return std::max<int64_t>(1, std::min(fitting, shared) / kOutputs) * kOutputs;
  }

  // x in the order in which it is read: parts, in them tiles, in these vectors of each row in turn; parts are filled
  // up with zeros.
  void arrange(std::vector<float>& arranged) const {
    const int64_t length = part_length();
    arranged.resize(divide_up(inputs, length) * length * rows);
    float* to = arranged.data();
    for (int64_t begin = 0; begin < inputs; begin += length)
      for (int64_t t = 0; t < tiles(); t++)
        for (int64_t k = begin; k < begin + length; k += kGroup) {
          const int64_t left = std::clamp<int64_t>(inputs - k, 0, kGroup);
          const uint32_t mask = left == kGroup ? ~uint32_t{0} : (uint32_t{1} << left) - 1;
          const int64_t count = tile_begin(t + 1) - tile_begin(t);
          for (int64_t r = 0; r < count; r++) {
            const float* from = x + (tile_begin(t) + r) * inputs + k;
            const __m512 first = _mm512_maskz_loadu_ps(mask, from);
            const __m512 second = _mm512_maskz_loadu_ps(mask >> kVector, from + kVector);
            for (int half = 0; half < 2; half++)
              _mm512_storeu_ps(to + (half * count + r) * kVector, Group<W>::arranged(first, second, half));
          }
          to += count * kGroup;
        }
  }

  // The outputs from `begin` to `end` of all rows. What lies at `next` is fetched from memory meanwhile.
  void block(const float* arranged, int64_t begin, int64_t end, const W* next) const {
    const int64_t length = part_length();
    const int64_t bytes = next ? (end - begin) * inputs * sizeof(W) : 0;
    const int64_t groups = tiles() * divide_up(end - begin, kOutputs) * (inputs / kGroup);
    const char* from = reinterpret_cast<const char*>(next);
    Fetch fetch{from, from + bytes, divide_up(divide_up(bytes, kCacheLine), std::max<int64_t>(1, groups))};
    for (int64_t k = 0; k < inputs; k += length)
      for (int64_t t = 0; t < tiles(); t++) {
        const int64_t row = tile_begin(t), count = tile_begin(t + 1) - row;
        const float* of_x = arranged + k * rows + row * length;
        for (int64_t output = begin; output < end;) {
          const Matrix<const W> of_weight{weight + output * inputs + k, inputs};
          const Matrix<float> of_y{y + row * outputs + output, outputs};
          const int64_t here = std::min(length, inputs - k);
          if (end - output >= kOutputs)
            tile_of<W, kOutputs>(count, of_x, of_weight, here, of_y, k > 0, fetch), output += kOutputs;
          else
            tile_of<W, 1>(count, of_x, of_weight, here, of_y, k > 0, fetch), output++;
        }
      }
  }
};

// y[m, n] = sum_k x[m, k] * weight[n, k].
ffi::Error multiply(ffi::ThreadPool pool, ffi::BufferR2<ffi::F32> x, ffi::AnyBuffer weight,
                    ffi::ResultBufferR2<ffi::F32> y) {
  const int64_t rows = x.dimensions()[0], inputs = x.dimensions()[1], outputs = y->dimensions()[1];
  return with_type(weight, [&](auto* data) {
    using W = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
    const Product<W> product{x.typed_data(), data, y->typed_data(), rows, inputs, outputs};
    const int64_t width = product.block_width(), blocks = divide_up(outputs, width);
    static std::atomic<int64_t> calls{0};
    const int64_t call = ++calls;
    share(pool, blocks, [product, width, blocks, outputs, call](int64_t block, int64_t next) {
      static thread_local std::vector<float> arranged;
      static thread_local int64_t arranged_in = 0;
      if (arranged_in != call) product.arrange(arranged), arranged_in = call;
      product.block(arranged.data(), block * width, std::min(outputs, (block + 1) * width),
                    next < blocks ? product.weight + next * width * product.inputs : nullptr);
    }, true);
    return ffi::Error::Success();
  });
}

// y[q] = sum_s weights[q, s] * values[s] / totals[q] for the queries from `first` on, kAtOnce of them or to `end`.
constexpr int kAtOnce = 8;

template <class V>
void weigh(Matrix<const float> weights, const float* totals, const V* values, int64_t slots, int64_t size,
           int64_t first, int64_t end, Matrix<float> y) {
  for (int64_t d = 0; d < size; d += kVector) {
    const __mmask16 mask = lanes(size - d);
    __m512 sums[kAtOnce] = {};
    const float* of_query[kAtOnce];
    for (int q = 0; q < kAtOnce; q++) of_query[q] = weights.at(std::min(first + q, end - 1));
    for (int64_t s = 0; s < slots; s++) {
      const __m512 value = load(values + s * size + d, mask);
      for (int q = 0; q < kAtOnce; q++)
        sums[q] = _mm512_fmadd_ps(_mm512_set1_ps(of_query[q][s]), value, sums[q]);
    }
    for (int q = 0; q < kAtOnce && first + q < end; q++)
      _mm512_mask_storeu_ps(y.at(first + q, d), mask, _mm512_div_ps(sums[q], _mm512_set1_ps(totals[first + q])));
  }
}

// Softmax attention of each row's queries, (rows, kv_heads, queries, head_dim) and scaled already, over the slots 0..last
// of its cache, (rows, kv_heads, slots, head_dim); slots after them are not read.
ffi::Error attend(ffi::ThreadPool pool, ffi::BufferR4<ffi::F32> query, ffi::AnyBuffer keys, ffi::AnyBuffer values,
                  ffi::BufferR1<ffi::S32> last, ffi::ResultBufferR4<ffi::F32> context) {
  const auto shape = query.dimensions();
  const int64_t heads = shape[1], queries = shape[2], size = shape[3], slots = keys.dimensions()[2];
  return with_type(keys, [&](auto* key_data) {
    using W = std::remove_const_t<std::remove_pointer_t<decltype(key_data)>>;
    const W* value_data = static_cast<const W*>(values.untyped_data());
    const float* query_data = query.typed_data();
    const int32_t* last_slot = last.typed_data();
    float* context_data = context->typed_data();
    share(pool, shape[0] * heads, [=](int64_t i, int64_t) {
      static thread_local std::vector<float> arranged, scores, totals;
      const int64_t seen = std::min<int64_t>(last_slot[i / heads] + 1, slots), offset = i * slots * size;
      scores.resize(queries * seen);
      totals.resize(queries);
      const Product<W> product{query_data + i * queries * size, key_data + offset, scores.data(), queries, size, seen};
      product.arrange(arranged);
      product.block(arranged.data(), 0, seen, nullptr);
      for (int64_t q = 0; q < queries; q++) totals[q] = exponentials(scores.data() + q * seen, seen);
      for (int64_t q = 0; q < queries; q += kAtOnce)
        weigh<W>({scores.data(), seen}, totals.data(), value_data + offset, seen, size, q, queries,
                 {context_data + i * queries * size, size});
    });
    return ffi::Error::Success();
  });
}

// Rows of a table, widened.
ffi::Error look_up(ffi::AnyBuffer table, ffi::BufferR1<ffi::S32> ids, ffi::ResultBufferR2<ffi::F32> rows) {
  const int64_t entries = table.dimensions()[0], size = table.dimensions()[1];
  return with_type(table, [&](auto* data) {
    for (size_t i = 0; i < ids.element_count(); i++) {
      const int64_t id = std::clamp<int64_t>(ids.typed_data()[i], 0, entries - 1);
      for (int64_t d = 0; d < size; d += kVector) {
        const __mmask16 mask = lanes(size - d);
        _mm512_mask_storeu_ps(rows->typed_data() + i * size + d, mask, load(data + id * size + d, mask));
      }
    }
    return ffi::Error::Success();
  });
}

}  // namespace
}  // namespace s1jax

XLA_FFI_DEFINE_HANDLER_SYMBOL(s1jax_multiply, s1jax::multiply,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::BufferR2<xla::ffi::F32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::BufferR2<xla::ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(s1jax_attend, s1jax::attend,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::BufferR4<xla::ffi::F32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::BufferR1<xla::ffi::S32>>()
                                  .Ret<xla::ffi::BufferR4<xla::ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(s1jax_look_up, s1jax::look_up,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::BufferR1<xla::ffi::S32>>()
                                  .Ret<xla::ffi::BufferR2<xla::ffi::F32>>());
