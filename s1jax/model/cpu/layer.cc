// Parts of a layer between its products, for training on a CPU with AVX-512, in float32: each reads what it needs once,
// where XLA passes over the activations several times.

#include <cmath>
#include <vector>

#include "common.h"

namespace s1jax {
namespace {

// What a thread takes at a time.
constexpr int64_t kElements = 16 * 1024, kRowsAtOnce = 32;

using Array = ffi::Buffer<ffi::F32>;
using Result = ffi::Result<ffi::Buffer<ffi::F32>>;

inline __m512 sigmoid(__m512 x) {
  const __m512 one = _mm512_set1_ps(1), zero = _mm512_setzero_ps();
  const __m512 small = exponential(_mm512_sub_ps(zero, _mm512_abs_ps(x)));
  const __mmask16 negative = _mm512_cmp_ps_mask(x, zero, _CMP_LT_OQ);
  return _mm512_div_ps(_mm512_mask_mov_ps(one, negative, small), _mm512_add_ps(one, small));
}

// Calls work(i, mask) for every vector of n floats, shared among the threads.
template <class Work>
void each_vector(ffi::ThreadPool& pool, int64_t n, const Work& work) {
  share(pool, divide_up(n, kElements), [=](int64_t part, int64_t) {
    const int64_t end = std::min(n, (part + 1) * kElements);
    for (int64_t i = part * kElements; i < end; i += kVector) work(i, lanes(end - i));
  });
}

// silu(gate) * up.
ffi::Error gated(ffi::ThreadPool pool, Array gate, Array up, Result inner) {
  each_vector(pool, gate.element_count(),
              [gate = gate.typed_data(), up = up.typed_data(), to = inner->typed_data()](int64_t i, __mmask16 mask) {
                const __m512 x = load(gate + i, mask);
                const __m512 open = _mm512_mul_ps(x, sigmoid(x));
                _mm512_mask_storeu_ps(to + i, mask, _mm512_mul_ps(open, load(up + i, mask)));
              });
  return ffi::Error::Success();
}

ffi::Error gated_gradients(ffi::ThreadPool pool, Array gate, Array up, Array of_inner, Result of_gate, Result of_up) {
  each_vector(pool, gate.element_count(),
              [gate = gate.typed_data(), up = up.typed_data(), of_inner = of_inner.typed_data(),
               of_gate = of_gate->typed_data(), of_up = of_up->typed_data()](int64_t i, __mmask16 mask) {
                const __m512 x = load(gate + i, mask), one = _mm512_set1_ps(1), open = sigmoid(x);
                const __m512 through = _mm512_mul_ps(load(of_inner + i, mask), open);
                const __m512 slope = _mm512_fmadd_ps(x, _mm512_sub_ps(one, open), one);
                const __m512 of_x = _mm512_mul_ps(_mm512_mul_ps(through, load(up + i, mask)), slope);
                _mm512_mask_storeu_ps(of_gate + i, mask, of_x);
                _mm512_mask_storeu_ps(of_up + i, mask, _mm512_mul_ps(through, x));
              });
  return ffi::Error::Success();
}

// x over its root mean square in each row, times scale; and the inverses of those.
ffi::Error normalised(ffi::ThreadPool pool, Array x, ffi::BufferR1<ffi::F32> scale, Result y, Result inverses,
                      float epsilon) {
  const int64_t size = scale.element_count(), rows = x.element_count() / size;
  share(pool, divide_up(rows, kRowsAtOnce),
        [=, from = x.typed_data(), scale = scale.typed_data(), to = y->typed_data(),
         inverses = inverses->typed_data()](int64_t part, int64_t) {
          for (int64_t row = part * kRowsAtOnce; row < std::min(rows, (part + 1) * kRowsAtOnce); row++) {
            const float* of_x = from + row * size;
            __m512 squares = _mm512_setzero_ps();
            for (int64_t i = 0; i < size; i += kVector) {
              const __m512 value = load(of_x + i, lanes(size - i));
              squares = _mm512_fmadd_ps(value, value, squares);
            }
            inverses[row] = 1 / std::sqrt(_mm512_reduce_add_ps(squares) / size + epsilon);
            const __m512 inverse = _mm512_set1_ps(inverses[row]);
            for (int64_t i = 0; i < size; i += kVector) {
              const __mmask16 mask = lanes(size - i);
              const __m512 normal = _mm512_mul_ps(load(of_x + i, mask), inverse);
              _mm512_mask_storeu_ps(to + row * size + i, mask, _mm512_mul_ps(normal, load(scale + i, mask)));
            }
          }
        });
  return ffi::Error::Success();
}

ffi::Error normalised_gradients(ffi::ThreadPool pool, Array x, ffi::BufferR1<ffi::F32> scale, Array inverses, Array of_y,
                                Result of_x, ffi::ResultBufferR1<ffi::F32> of_scale) {
  const int64_t size = scale.element_count(), rows = x.element_count() / size, parts = divide_up(rows, kRowsAtOnce);
  // Of each part its own, added up in order: the sums do not depend on which thread was faster.
  std::vector<float> sums(parts * size, 0.0f);
  share(pool, parts,
        [=, x = x.typed_data(), scale = scale.typed_data(), inverses = inverses.typed_data(), of_y = of_y.typed_data(),
         of_x = of_x->typed_data(), sums = sums.data()](int64_t part, int64_t) {
          for (int64_t row = part * kRowsAtOnce; row < std::min(rows, (part + 1) * kRowsAtOnce); row++) {
            const int64_t at = row * size;
            const __m512 inverse = _mm512_set1_ps(inverses[row]);
            __m512 shared = _mm512_setzero_ps();
            for (int64_t i = 0; i < size; i += kVector) {
              const __mmask16 mask = lanes(size - i);
              const __m512 normal = _mm512_mul_ps(load(x + at + i, mask), inverse), slope = load(of_y + at + i, mask);
              const __m512 of_normal = _mm512_mul_ps(slope, load(scale + i, mask));
              float* sum = sums + part * size + i;
              _mm512_mask_storeu_ps(sum, mask, _mm512_fmadd_ps(slope, normal, load(sum, mask)));
              shared = _mm512_fmadd_ps(of_normal, normal, shared);
            }
            const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(shared) / size);
            for (int64_t i = 0; i < size; i += kVector) {
              const __mmask16 mask = lanes(size - i);
              const __m512 normal = _mm512_mul_ps(load(x + at + i, mask), inverse);
              const __m512 of_normal = _mm512_mul_ps(load(of_y + at + i, mask), load(scale + i, mask));
              _mm512_mask_storeu_ps(of_x + at + i, mask,
                                    _mm512_mul_ps(inverse, _mm512_fnmadd_ps(normal, mean, of_normal)));
            }
          }
        });
  std::fill_n(of_scale->typed_data(), size, 0.0f);
  for (int64_t part = 0; part < parts; part++)
    for (int64_t i = 0; i < size; i++) of_scale->typed_data()[i] += sums[part * size + i];
  return ffi::Error::Success();
}

}  // namespace
}  // namespace s1jax

XLA_FFI_DEFINE_HANDLER_SYMBOL(s1jax_gated, s1jax::gated,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<s1jax::Array>()
                                  .Arg<s1jax::Array>()
                                  .Ret<s1jax::Array>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(s1jax_gated_gradients, s1jax::gated_gradients,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<s1jax::Array>()
                                  .Arg<s1jax::Array>()
                                  .Arg<s1jax::Array>()
                                  .Ret<s1jax::Array>()
                                  .Ret<s1jax::Array>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(s1jax_normalised, s1jax::normalised,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<s1jax::Array>()
                                  .Arg<xla::ffi::BufferR1<xla::ffi::F32>>()
                                  .Ret<s1jax::Array>()
                                  .Ret<s1jax::Array>()
                                  .Attr<float>("epsilon"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(s1jax_normalised_gradients, s1jax::normalised_gradients,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<s1jax::Array>()
                                  .Arg<xla::ffi::BufferR1<xla::ffi::F32>>()
                                  .Arg<s1jax::Array>()
                                  .Arg<s1jax::Array>()
                                  .Ret<s1jax::Array>()
                                  .Ret<xla::ffi::BufferR1<xla::ffi::F32>>());
