// What training does most, for XLA on a CPU with AVX-512, in float32: products of matrices, and attention over the
// examples of packed rows.

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "common.h"
#include "matmul.h"

namespace s1jax {
namespace {

template <class T>
View<T> whole(const T* data, const ffi::AnyBuffer::Dimensions& shape, bool transposed) {
  const View<T> view{data, shape[1], 1};
  return transposed ? view.transposed() : view;
}

// c = a b, each of both transposed or not; b may be of bfloat16.
ffi::Error matmul(ffi::ThreadPool pool, ffi::BufferR2<ffi::F32> a, ffi::AnyBuffer b, ffi::ResultBufferR2<ffi::F32> c,
                  bool transpose_a, bool transpose_b) {
  const int64_t rows = c->dimensions()[0], columns = c->dimensions()[1], inputs = a.dimensions()[transpose_a ? 0 : 1];
  return with_type(b, [&](auto* data) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
    Product<T>{whole(a.typed_data(), a.dimensions(), transpose_a), whole<T>(data, b.dimensions(), transpose_b),
               c->typed_data(), columns, rows, inputs, columns, false}.shared(pool);
    return ffi::Error::Success();
  });
}

// Queries of one example that are taken at a time, for all heads that share a key: tiles of a product come out even.
constexpr int64_t kQueries = 4 * kTileRows;

// What attention reads: (batch, length, heads or kv_heads, size), segments of (batch, length).
struct Inputs {
  const float *query, *key, *value;
  const int32_t* segments;
  int64_t batch, length, heads, kv_heads, size;

  int64_t group() const { return heads / kv_heads; }
  float scale() const { return 1 / std::sqrt(static_cast<float>(size)); }
  // Where a token's query head is, and its key head, in elements.
  int64_t at(int64_t row, int64_t token, int64_t head) const { return ((row * length + token) * heads + head) * size; }
  int64_t at_key(int64_t row, int64_t token, int64_t head) const {
    return ((row * length + token) * kv_heads + head) * size;
  }
  int64_t at_normaliser(int64_t row, int64_t token, int64_t head) const {
    return (row * heads + head) * length + token;
  }
};

// A block of queries of one example, for the heads of one key head: (head of the group, token) x size.
struct Block {
  const Inputs& in;
  int64_t row, kv_head;
  int64_t begin, first, tokens;  // of the example; the first query, and how many

  int64_t rows() const { return in.group() * tokens; }
  int64_t keys() const { return first + tokens - begin; }
  int64_t seen(int64_t r) const { return first + r % tokens - begin + 1; }
  int64_t head(int64_t r) const { return kv_head * in.group() + r / tokens; }
  int64_t token(int64_t r) const { return first + r % tokens; }
  int64_t at(int64_t r) const { return in.at(row, token(r), head(r)); }
  int64_t at_normaliser(int64_t r) const { return in.at_normaliser(row, token(r), head(r)); }
  int64_t at_keys() const { return in.at_key(row, begin, kv_head); }
  int64_t key_stride() const { return in.kv_heads * in.size; }

  // The block's part of an array like the query, times `factor`, in one piece.
  void gather(const float* from, float factor, std::vector<float>& to) const {
    to.resize(rows() * in.size);
    for (int64_t r = 0; r < rows(); r++)
      for (int64_t d = 0; d < in.size; d++) to[r * in.size + d] = factor * from[at(r) + d];
  }

  // y = x b and y = x b^T, where x has a row for each of the block's and b is an array of keys.
  void times(const std::vector<float>& x, const float* b, std::vector<float>& y) const {
    y.resize(rows() * in.size);
    const View<float> by_key{x.data(), keys(), 1}, of_keys{b + at_keys(), key_stride(), 1};
    Product<float>{by_key, of_keys, y.data(), in.size, rows(), keys(), in.size, false}.alone();
  }
  void times_transposed(const std::vector<float>& x, const float* b, std::vector<float>& y) const {
    y.resize(rows() * keys());
    const View<float> by_size{x.data(), in.size, 1}, of_keys{b + at_keys(), 1, key_stride()};
    Product<float>{by_size, of_keys, y.data(), keys(), rows(), in.size, keys(), false}.alone();
  }
  // y += x^T b, where y is an array of keys.
  void add_transposed(const std::vector<float>& x, const std::vector<float>& b, float* y) const {
    const View<float> of_keys{x.data(), 1, keys()}, by_size{b.data(), in.size, 1};
    Product<float>{of_keys, by_size, y + at_keys(), key_stride(), keys(), rows(), in.size, true}.alone();
  }
};

// One example's tokens, for the heads of one key head. None sees another's, so that threads share them.
struct Example {
  int64_t row, kv_head, begin, end;

  // Calls work(block) for every block of queries.
  template <class Work>
  void for_each_block(const Inputs& in, const Work& work) const {
    for (int64_t first = begin; first < end; first += kQueries)
      work(Block{in, row, kv_head, begin, first, std::min(kQueries, end - first)});
  }
};

// All examples, the longest first, so that threads end together. Padding, segment 0, is in none.
std::vector<Example> examples_of(const Inputs& in) {
  std::vector<Example> examples;
  for (int64_t row = 0; row < in.batch; row++) {
    const int32_t* segments = in.segments + row * in.length;
    for (int64_t begin = 0, end; begin < in.length; begin = end) {
      const int32_t id = segments[begin];
      end = std::find_if(segments + begin, segments + in.length, [=](int32_t s) { return s != id; }) - segments;
      for (int64_t head = 0; id != 0 && head < in.kv_heads; head++) examples.push_back({row, head, begin, end});
    }
  }
  std::stable_sort(examples.begin(), examples.end(),
                   [](const Example& a, const Example& b) { return a.end - a.begin > b.end - b.begin; });
  return examples;
}

void attend(const Inputs& in, const Example& example, float* context, float* normalisers) {
  static thread_local std::vector<float> query, weights, totals, sums;
  example.for_each_block(in, [&](const Block& block) {
    const int64_t keys = block.keys();
    block.gather(in.query, in.scale(), query);
    block.times_transposed(query, in.key, weights);
    totals.resize(block.rows());
    for (int64_t r = 0; r < block.rows(); r++) {
      float greatest, *scores = weights.data() + r * keys;
      totals[r] = exponentials(scores, block.seen(r), &greatest);
      std::fill(scores + block.seen(r), scores + keys, 0.0f);
      normalisers[block.at_normaliser(r)] = greatest + std::log(totals[r]);
    }
    block.times(weights, in.value, sums);
    for (int64_t r = 0; r < block.rows(); r++)
      for (int64_t d = 0; d < in.size; d++) context[block.at(r) + d] = sums[r * in.size + d] / totals[r];
  });
}

// Of the loss: its gradients with respect to the query, key and value, given that of the context.
struct Gradients {
  const float *context, *normalisers, *of_context;
  float *of_query, *of_key, *of_value;
};

void differentiate(const Inputs& in, const Example& example, const Gradients& g) {
  static thread_local std::vector<float> query, of_context, weights, of_weights, of_query;
  example.for_each_block(in, [&](const Block& block) {
    const int64_t keys = block.keys(), size = in.size;
    block.gather(in.query, in.scale(), query);
    block.gather(g.of_context, 1, of_context);
    block.times_transposed(query, in.key, weights);
    block.times_transposed(of_context, in.value, of_weights);
    for (int64_t r = 0; r < block.rows(); r++) {
      __m512 sum = _mm512_setzero_ps();
      for (int64_t d = 0; d < size; d += kVector)
        sum = _mm512_fmadd_ps(load(of_context.data() + r * size + d, lanes(size - d)),
                              load(g.context + block.at(r) + d, lanes(size - d)), sum);
      const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum));
      const __m512 normaliser = _mm512_set1_ps(g.normalisers[block.at_normaliser(r)]);
      float *of_row = weights.data() + r * keys, *of_scores = of_weights.data() + r * keys;
      for (int64_t k = 0; k < keys; k += kVector) {
        const __mmask16 there = lanes(keys - k), seen = lanes(block.seen(r) - k);
        const __m512 score = _mm512_maskz_loadu_ps(seen, of_row + k);
        const __m512 weight = _mm512_maskz_mov_ps(seen, exponential(_mm512_sub_ps(score, normaliser)));
        const __m512 of_weight = _mm512_sub_ps(_mm512_maskz_loadu_ps(there, of_scores + k), mean);
        _mm512_mask_storeu_ps(of_row + k, there, weight);
        _mm512_mask_storeu_ps(of_scores + k, there, _mm512_mul_ps(weight, of_weight));
      }
    }
    block.add_transposed(weights, of_context, g.of_value);
    block.add_transposed(of_weights, query, g.of_key);
    block.times(of_weights, in.key, of_query);
    for (int64_t r = 0; r < block.rows(); r++)
      for (int64_t d = 0; d < size; d++) g.of_query[block.at(r) + d] = in.scale() * of_query[r * size + d];
  });
}

using Array4 = ffi::BufferR4<ffi::F32>;
using Result4 = ffi::ResultBufferR4<ffi::F32>;

Inputs inputs_of(const Array4& query, const Array4& key, const Array4& value, const ffi::BufferR2<ffi::S32>& segments) {
  const auto q = query.dimensions();
  return {query.typed_data(), key.typed_data(), value.typed_data(), segments.typed_data(), q[0], q[1], q[2],
          key.dimensions()[2], q[3]};
}

template <class Buffer>
void clear(Buffer& buffer) {
  std::fill_n(buffer->typed_data(), buffer->element_count(), 0.0f);
}

// Causal softmax attention within segments, and the logarithm of each query's sum of exponentials.
ffi::Error attention(ffi::ThreadPool pool, Array4 query, Array4 key, Array4 value, ffi::BufferR2<ffi::S32> segments,
                     Result4 context, ffi::ResultBufferR3<ffi::F32> normalisers) {
  const Inputs in = inputs_of(query, key, value, segments);
  clear(context);
  clear(normalisers);
  const std::vector<Example> examples = examples_of(in);
  float *to = context->typed_data(), *of_normalisers = normalisers->typed_data();
  share(pool, examples.size(), [=](int64_t i, int64_t) { attend(in, examples[i], to, of_normalisers); });
  return ffi::Error::Success();
}

ffi::Error attention_gradients(ffi::ThreadPool pool, Array4 query, Array4 key, Array4 value,
                               ffi::BufferR2<ffi::S32> segments, Array4 context, ffi::BufferR3<ffi::F32> normalisers,
                               Array4 of_context, Result4 of_query, Result4 of_key, Result4 of_value) {
  const Inputs in = inputs_of(query, key, value, segments);
  clear(of_query);
  clear(of_key);
  clear(of_value);
  const Gradients gradients{context.typed_data(),  normalisers.typed_data(), of_context.typed_data(),
                            of_query->typed_data(), of_key->typed_data(),     of_value->typed_data()};
  const std::vector<Example> examples = examples_of(in);
  share(pool, examples.size(), [=](int64_t i, int64_t) { differentiate(in, examples[i], gradients); });
  return ffi::Error::Success();
}

// How both functions of attention begin.
auto bind_inputs() {
  return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Array4>().Arg<Array4>().Arg<Array4>().Arg<ffi::BufferR2<ffi::S32>>();
}

}  // namespace
}  // namespace s1jax

XLA_FFI_DEFINE_HANDLER_SYMBOL(s1jax_matmul, s1jax::matmul,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::BufferR2<xla::ffi::F32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::BufferR2<xla::ffi::F32>>()
                                  .Attr<bool>("transpose_a")
                                  .Attr<bool>("transpose_b"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(s1jax_attention, s1jax::attention,
                              s1jax::bind_inputs()
                                  .Ret<s1jax::Array4>()
                                  .Ret<xla::ffi::BufferR3<xla::ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(s1jax_attention_gradients, s1jax::attention_gradients,
                              s1jax::bind_inputs()
                                  .Arg<s1jax::Array4>()
                                  .Arg<xla::ffi::BufferR3<xla::ffi::F32>>()
                                  .Arg<s1jax::Array4>()
                                  .Ret<s1jax::Array4>()
                                  .Ret<s1jax::Array4>()
                                  .Ret<s1jax::Array4>());
