// Products of a few rows with a weight stored (outputs, inputs), for XLA on a CPU with AVX-512 and its bfloat16
// instructions: y[m, n] = sum_k x[m, k] * w[n, k] in float32, of float32 or bfloat16 arrays, each a batch of matrices or
// one.
//
// With few rows the time is that of reading the weight. Every weight is read once, in the order in which it is stored,
// and while one tile is computed the next is fetched from memory; the rows of x stay in the caches.

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

// A tile of kRows x kOutputs sums, a vector of weights for each output and one of x fill the 32 vector registers.
constexpr int kRows = 8, kOutputs = 3;

// What a thread takes at a time: a part of the weight that stays in its cache while all rows pass over it.
constexpr int64_t kBlockBytes = 128 * 1024;

struct BFloat16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }

inline float to_float(BFloat16 x) {
  uint32_t bits = uint32_t{x.bits} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// How the neighbours in memory that fill a vector are loaded, and their products added to a vector of sums.
template <class T>
struct Neighbours;

template <>
struct Neighbours<float> {
  static constexpr int width = 16;
  using Loaded = __m512;

  static Loaded load(const float* at) { return _mm512_loadu_ps(at); }
  static __m512 add_products(__m512 sums, Loaded a, Loaded b) { return _mm512_fmadd_ps(a, b, sums); }
};

template <>
struct Neighbours<BFloat16> {
  static constexpr int width = 32;
  using Loaded = __m512bh;

  static Loaded load(const BFloat16* at) { return (__m512bh)_mm512_loadu_si512(at); }
  static __m512 add_products(__m512 sums, Loaded a, Loaded b) { return _mm512_dpbf16_ps(sums, a, b); }
};

template <class T>
struct Product {
  const T* x;       // rows x inputs
  const T* weight;  // outputs x inputs
  float* y;         // rows x outputs
  int64_t rows, inputs, outputs;

  // `Rows` rows from `row` on, `Outputs` outputs from `output` on.
  template <int Rows, int Outputs>
  void tile(int64_t row, int64_t output, bool fetch_next) const {
    using N = Neighbours<T>;
    const T* rows_of_x = x + row * inputs;
    const T* of_weight = weight + output * inputs;
    __m512 sums[Rows][Outputs] = {};
    int64_t k = 0;
    for (; k + N::width <= inputs; k += N::width) {
      typename N::Loaded weights[Outputs];
      for (int o = 0; o < Outputs; o++) {
        weights[o] = N::load(of_weight + o * inputs + k);
        // Past the end of the weight this asks for memory that is not there, which is not an error.
        if (fetch_next) __builtin_prefetch(of_weight + (o + Outputs) * inputs + k, 0, 2);
      }
      for (int r = 0; r < Rows; r++) {
        typename N::Loaded values = N::load(rows_of_x + r * inputs + k);
        for (int o = 0; o < Outputs; o++) sums[r][o] = N::add_products(sums[r][o], values, weights[o]);
      }
    }
    for (int r = 0; r < Rows; r++)
      for (int o = 0; o < Outputs; o++) {
        float sum = _mm512_reduce_add_ps(sums[r][o]);
        for (int64_t rest = k; rest < inputs; rest++)
          sum += to_float(rows_of_x[r * inputs + rest]) * to_float(of_weight[o * inputs + rest]);
        y[(row + r) * outputs + output + o] = sum;
      }
  }

  template <int Outputs, int Rows = kRows>
  void tile_of(int64_t count, int64_t row, int64_t output, bool fetch_next) const {
    if (count == Rows)
      tile<Rows, Outputs>(row, output, fetch_next);
    else if constexpr (Rows > 1)
      tile_of<Outputs, Rows - 1>(count, row, output, fetch_next);
  }

  // The outputs from `begin` to `end` of all rows.
  void block(int64_t begin, int64_t end) const {
    const int64_t tiles = (rows + kRows - 1) / kRows;
    for (int64_t t = 0; t < tiles; t++) {
      const int64_t row = rows * t / tiles, count = rows * (t + 1) / tiles - row;
      int64_t output = begin;
      for (; output + kOutputs <= end; output += kOutputs) tile_of<kOutputs>(count, row, output, t == 0);
      for (; output < end; output++) tile_of<1>(count, row, output, false);
    }
  }
};

// Computes the products on this thread, and on those of the pool that are free: what is waited for is only what another
// thread has begun, so that a busy pool delays nothing.
template <class T>
void compute(ffi::ThreadPool& pool, int64_t batch, const Product<T>& first) {
  struct Progress {
    std::atomic<int64_t> taken{0}, done{0};
  };
  auto progress = std::make_shared<Progress>();
  const int64_t fitting = kBlockBytes / (first.inputs * sizeof(T)) / kOutputs * kOutputs;
  const int64_t width = std::max<int64_t>(kOutputs, fitting);
  const int64_t blocks_of_one = (first.outputs + width - 1) / width, blocks = batch * blocks_of_one;
  auto work = [first, progress, width, blocks_of_one, blocks] {
    for (int64_t taken; (taken = progress->taken.fetch_add(1)) < blocks;) {
      const int64_t i = taken / blocks_of_one, begin = taken % blocks_of_one * width;
      Product<T> product = first;
      product.x += i * product.rows * product.inputs;
      product.weight += i * product.outputs * product.inputs;
      product.y += i * product.rows * product.outputs;
      product.block(begin, std::min(product.outputs, begin + width));
      progress->done.fetch_add(1, std::memory_order_release);
    }
  };
  for (int64_t i = 1; i < std::min(pool.num_threads(), blocks); i++) pool.Schedule(std::function<void()>(work));
  work();
  while (progress->done.load(std::memory_order_acquire) < blocks) std::this_thread::yield();
}

ffi::Error multiply(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer weight,
                    ffi::Result<ffi::Buffer<ffi::F32>> y) {
  const auto x_shape = x.dimensions(), weight_shape = weight.dimensions(), y_shape = y->dimensions();
  const size_t rank = x_shape.size();
  bool fit = rank >= 2 && weight_shape.size() == rank && y_shape.size() == rank &&
             x.element_type() == weight.element_type() && x_shape[rank - 1] == weight_shape[rank - 1] &&
             y_shape[rank - 2] == x_shape[rank - 2] && y_shape[rank - 1] == weight_shape[rank - 2];
  int64_t batch = 1;
  for (size_t d = 0; fit && d + 2 < rank; d++) {
    fit = x_shape[d] == weight_shape[d] && x_shape[d] == y_shape[d];
    batch *= x_shape[d];
  }
  if (!fit) return ffi::Error::InvalidArgument("expected (..., rows, inputs) and (..., outputs, inputs) of one type");
  auto run = [&](auto element) {
    using T = decltype(element);
    compute(pool, batch,
            Product<T>{static_cast<const T*>(x.untyped_data()), static_cast<const T*>(weight.untyped_data()),
                       y->typed_data(), x_shape[rank - 2], x_shape[rank - 1], weight_shape[rank - 2]});
    return ffi::Error::Success();
  };
  if (x.element_type() == ffi::F32) return run(float{});
  if (x.element_type() == ffi::BF16) return run(BFloat16{});
  return ffi::Error::InvalidArgument("expected float32 or bfloat16");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(multiply_few_rows, multiply,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
