// What training does most, for XLA on a CPU, in float32: products of matrices, and attention over the examples of packed
// rows.
//
// Products are as fast as the processor multiplies: both operands are packed into panels that are read in order, and a
// tile of sums stays in the vector registers.

#include "common.h"

namespace s1jax {
namespace {

// A tile of sums of this size, two vectors of b and one value of a fill the registers.
constexpr int64_t kTileRows = kRegisters == 16 ? (kVector == 8 ? 6 : 4) : kVector == 16 ? 14 : 12;
constexpr int64_t kTileColumns = 2 * kVector;

// What is packed at a time: so many inputs of so many panels of b, for a core's second cache, and of one tile of a, for
// its first. So many tiles of a are multiplied with what was packed of b.
constexpr int64_t kInputsAtOnce = 384, kPanels = 16, kTiles = 32;

// A matrix to read: neighbours in a column are `row` elements apart, those in a row `column`; one of both is 1.
template <class Pointer>
struct View {
  Pointer data;
  int64_t row, column;

  View from(int64_t i, int64_t j) const { return {data + (i * row + j * column), row, column}; }
  View transposed() const { return {data, column, row}; }
};

// Writes the first `rows` rows and `columns` columns of a matrix as packed[column][row], `width` floats a column, with
// zeros for the rows that are missing; what a last vector has too much, the next column overwrites.
template <int64_t width, class Pointer>
void pack(View<Pointer> from, int64_t rows, int64_t columns, float* packed) {
  if (from.row == 1) {
    for (int64_t column = 0; column < columns; column++)
#pragma GCC unroll 4
      for (int64_t row = 0; row < width; row += kVector)
        store(packed + column * width + row, load(from.from(row, column).data, rows - row));
    return;
  }
  for (int64_t column = 0; column < columns; column += kVector)
    for (int64_t row = 0; row < width; row += kVector) {
      Floats v[kVector];
#pragma GCC unroll 16
      for (int i = 0; i < kVector; i++)
        v[i] = row + i < rows ? load(from.from(row + i, column).data, columns - column) : Floats{};
      transpose(v);
#pragma GCC unroll 16
      for (int i = 0; i < kVector; i++)
        if (column + i < columns) store(packed + (column + i) * width + row, v[i]);
    }
}

// c = a b for a panel of each, added to what c holds if `add`; of c there are so many rows and columns.
void tile(const float* a, const float* b, int64_t inputs, float* c, int64_t stride, int64_t rows, int64_t columns,
          bool add) {
  for (int64_t r = 0; r < std::min(rows, kTileRows); r++)
    for (int64_t half = 0; half < 2; half++) __builtin_prefetch(c + r * stride + half * kVector, 1);
  Floats sums[kTileRows][2] = {};
  for (int64_t k = 0; k < inputs; k++, a += kTileRows, b += kTileColumns) {
    for (int64_t half = 0; half < 2; half++) __builtin_prefetch(b + 8 * kTileColumns + half * kVector);
    const Floats first = load(b), second = load(b + kVector);
#pragma GCC unroll 14
    for (int r = 0; r < kTileRows; r++) {
      const Floats value = kept(all(a[r]));
      sums[r][0] = S1JAX_FMA(value, first, sums[r][0]);
      sums[r][1] = S1JAX_FMA(value, second, sums[r][1]);
    }
  }
#pragma GCC unroll 14
  for (int r = 0; r < kTileRows; r++)
    if (r < rows)
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        const int64_t n = columns - half * kVector;
        float* at = c + r * stride + half * kVector;
        store(at, add ? sums[r][half] + load(at, n) : sums[r][half], n);
      }
}

// c = a b of rows x inputs by inputs x columns, added to what c holds if `add`; rows of c are `stride` apart. On the threads
// of the pool, or without one on this alone.
template <class Pointer>
void product(View<const float*> a, View<Pointer> b, float* c, int64_t stride, int64_t rows, int64_t inputs, int64_t columns, bool add,
             ffi::ThreadPool* pool = nullptr) {
  // c is cut into blocks, which threads compute independently of each other: so many tiles down by so many panels across.
  const int64_t tiles = divide_up(rows, kTileRows), panels = divide_up(columns, kTileColumns);
  const int64_t parts = divide_up(inputs, kInputsAtOnce), depth = divide_up(divide_up(inputs, parts), kVector) * kVector;
  const int64_t threads = pool ? pool->num_threads() : 1;
  int64_t down = divide_up(tiles, kTiles), across = divide_up(panels, kPanels);
  // As many for each thread, if there are enough: of the longer side.
  int64_t& more = tiles >= 8 * threads ? down : across;
  more = divide_up(more, threads) * threads;
  const auto block = [=](int64_t i, int64_t) {
    static thread_local std::vector<float> of_a, of_b;
    const int64_t top = tiles * (i / across) / down, bottom = tiles * (i / across + 1) / down;
    const int64_t left = panels * (i % across) / across, right = panels * (i % across + 1) / across;
    of_a.resize(depth * kTileRows + kVector);
    of_b.resize((right - left) * depth * kTileColumns);
    // b's panels are packed, part by part, and with each part every tile of a, which then stays where it is.
    for (int64_t k = 0; k < inputs; k += depth) {
      const int64_t deep = std::min(depth, inputs - k);
      for (int64_t j = left, column = j * kTileColumns; j < right; j++, column += kTileColumns)
        pack<kTileColumns>(b.from(k, column).transposed(), columns - column, deep, &of_b[(j - left) * depth * kTileColumns]);
      for (int64_t t = top, row = t * kTileRows; t < bottom; t++, row += kTileRows) {
        pack<kTileRows>(a.from(row, k), rows - row, deep, of_a.data());
        for (int64_t j = left, column = j * kTileColumns; j < right; j++, column += kTileColumns)
          tile(of_a.data(), &of_b[(j - left) * depth * kTileColumns], deep, c + row * stride + column, stride, rows - row,
               columns - column, add || k > 0);
      }
    }
  };
  if (pool) return share(*pool, down * across, block);
  for (int64_t i = 0; i < down * across; i++) block(i, 0);
}

template <class Pointer>
View<Pointer> whole(Pointer data, int64_t columns, bool transposed) {
  return transposed ? View<Pointer>{data, 1, columns} : View<Pointer>{data, columns, 1};
}

// c = a b, each of both transposed or not; b may be a weight of any type.
ffi::Error matmul(ffi::ThreadPool pool, ffi::BufferR2<ffi::F32> a, ffi::AnyBuffer b, ffi::BufferR2<ffi::F32> scales,
                  ffi::ResultBufferR2<ffi::F32> c, ffi::Dictionary how) {
  const bool transpose_a = *how.get<bool>("transpose_a"), transpose_b = *how.get<bool>("transpose_b");
  const int64_t rows = c->dimensions()[0], columns = c->dimensions()[1], inputs = a.dimensions()[transpose_a ? 0 : 1];
  return with_weight(b, scales, [&](auto data) {
    product(whole<const float*>(a.typed_data(), a.dimensions()[1], transpose_a), whole(data, b.dimensions()[1], transpose_b),
            c->typed_data(), columns, rows, inputs, columns, false, &pool);
  });
}

// Tokens of one example whose queries are taken at a time.
constexpr int64_t kTokens = 56;

using Heads = ffi::BufferR4<ffi::F32>;     // (batch, length, heads or kv_heads, size)
using Segments = ffi::BufferR2<ffi::S32>;  // (batch, length)

// One head's queries of neighbouring tokens of an example, and the keys that they see: from the example's first on.
struct Block {
  int64_t query, key;        // where the first of each is
  int64_t of_query, of_key;  // from one to the next
  int64_t tokens, keys, size;

  int64_t seen(int64_t token) const { return keys - tokens + token + 1; }

  // Products of x, tokens x keys, y, an array of queries, and z, an array of keys.
  void y_times_z(const float* y, const float* z, std::vector<float>& x) const {
    x.resize(tokens * keys);
    product<const float*>({y + query, of_query, 1}, {z + key, 1, of_key}, x.data(), keys, tokens, size, keys, false);
  }
  void x_times_z(const std::vector<float>& x, const float* z, float* y) const {
    product<const float*>({x.data(), keys, 1}, {z + key, of_key, 1}, y + query, of_query, tokens, keys, size, false);
  }
  void add_x_times_y(const std::vector<float>& x, const float* y, float* z) const {
    product<const float*>({x.data(), 1, keys}, {y + query, of_query, 1}, z + key, of_key, keys, tokens, size, true);
  }
};

// Calls work(block) for all blocks: those of an example that share a key head in order and on one thread, the longest
// examples first, so that threads end together. Padding, segment 0, is in none.
template <class Work>
void each_block(ffi::ThreadPool& pool, const Heads& query, const Heads& key, const Segments& segments, const Work& work) {
  struct Example {
    int64_t row, kv_head, begin, end;
    bool operator<(const Example& other) const { return end - begin > other.end - other.begin; }
  };
  const int64_t length = key.dimensions()[1], kv_heads = key.dimensions()[2];
  std::vector<Example> examples;
  for (int64_t row = 0; row < key.dimensions()[0]; row++) {
    const int32_t* ids = segments.typed_data() + row * length;
    for (int64_t begin = 0, end; begin < length; begin = end) {
      end = std::find_if(ids + begin, ids + length, [=](int32_t id) { return id != ids[begin]; }) - ids;
      for (int64_t head = 0; ids[begin] != 0 && head < kv_heads; head++) examples.push_back({row, head, begin, end});
    }
  }
  std::stable_sort(examples.begin(), examples.end());
  share(pool, examples.size(), [=, heads = query.dimensions()[2], size = key.dimensions()[3]](int64_t i, int64_t) {
    const auto [row, kv_head, begin, end] = examples[i];
    const int64_t group = heads / kv_heads, at_key = ((row * length + begin) * kv_heads + kv_head) * size;
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++)
      for (int64_t first = begin; first < end; first += kTokens) {
        const int64_t last = std::min(first + kTokens, end), at = ((row * length + first) * heads + head) * size;
        work(Block{at, at_key, heads * size, kv_heads * size, last - first, last - begin, size});
      }
  });
}

float scale_of(const Heads& query) { return 1 / std::sqrt(static_cast<float>(query.dimensions()[3])); }

template <class Buffer>
float* cleared(Buffer& buffer) {
  return std::fill_n(buffer->typed_data(), buffer->element_count(), 0.0f), buffer->typed_data();
}

// Causal softmax attention within segments.
ffi::Error attention(ffi::ThreadPool pool, Heads query, Heads key, Heads value, Segments segments,
                     ffi::Result<Heads> context) {
  const float *q = query.typed_data(), *k = key.typed_data(), *v = value.typed_data(), scale = scale_of(query);
  float* y = cleared(context);
  each_block(pool, query, key, segments, [=](const Block& block) {
    static thread_local std::vector<float> weights;
    block.y_times_z(q, k, weights);
    for (int64_t t = 0; t < block.tokens; t++) {
      float* weight = weights.data() + t * block.keys;
      softmax(weight, block.seen(t), scale);
      std::fill(weight + block.seen(t), weight + block.keys, 0.0f);
    }
    block.x_times_z(weights, v, y);
  });
  return ffi::Error::Success();
}

// The gradients with respect to the query, key and value, given that of the context.
ffi::Error attention_gradients(ffi::ThreadPool pool, Heads query, Heads key, Heads value, Segments segments, Heads of_context,
                               ffi::Result<Heads> of_query, ffi::Result<Heads> of_key, ffi::Result<Heads> of_value) {
  const float *q = query.typed_data(), *k = key.typed_data(), *v = value.typed_data(), scale = scale_of(query);
  const float* of_y = of_context.typed_data();
  float *of_q = cleared(of_query), *of_k = cleared(of_key), *of_v = cleared(of_value);
  each_block(pool, query, key, segments, [=](const Block& block) {
    static thread_local std::vector<float> weights, of_weights;
    block.y_times_z(q, k, weights);
    block.y_times_z(of_y, v, of_weights);
    for (int64_t t = 0; t < block.tokens; t++) {
      const int64_t seen = block.seen(t);
      float mean = 0, *weight = weights.data() + t * block.keys, *of_weight = of_weights.data() + t * block.keys;
      softmax(weight, seen, scale);
#pragma omp simd reduction(+ : mean)
      for (int64_t i = 0; i < seen; i++) mean += weight[i] * of_weight[i];
#pragma omp simd
      for (int64_t i = 0; i < seen; i++) of_weight[i] = scale * weight[i] * (of_weight[i] - mean);
      std::fill(weight + seen, weight + block.keys, 0.0f);
      std::fill(of_weight + seen, of_weight + block.keys, 0.0f);
    }
    block.add_x_times_y(weights, of_y, of_v);
    block.add_x_times_y(of_weights, q, of_k);
    block.x_times_z(of_weights, k, of_q);
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace s1jax

XLA_FFI_DEFINE_HANDLER_SYMBOL(s1jax_matmul, s1jax::matmul);
XLA_FFI_DEFINE_HANDLER_SYMBOL(s1jax_attention, s1jax::attention);
XLA_FFI_DEFINE_HANDLER_SYMBOL(s1jax_attention_gradients, s1jax::attention_gradients);
