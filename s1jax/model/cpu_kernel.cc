// Products of a few rows with a weight stored (outputs, inputs), for XLA on a CPU: y[m, n] = sum_k x[m, k] * w[n, k],
// in float32, of float32 or bfloat16 arrays.
//
// With few rows the time is that of reading the weight. Every weight is read once, in the order in which it is stored,
// and while one tile is computed the next is fetched from memory; the rows of x stay in the caches.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

namespace ffi = xla::ffi;

// A tile of kRows x kOutputs sums, a vector of weights for each output and one of x fill the vector registers.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kRows = 8, kOutputs = 3;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32, kRows = 4, kOutputs = 3;
#else
constexpr int kVectorBytes = 16, kRows = 4, kOutputs = 3;
#endif

// What a thread takes at a time: a part of the weight that stays in its cache while all rows pass over it.
constexpr int64_t kBlockBytes = 128 * 1024;

constexpr int kLanes = kVectorBytes / sizeof(float);
using Floats = float __attribute__((vector_size(kVectorBytes)));
using Bits = uint32_t __attribute__((vector_size(kVectorBytes)));
using HalfBits = uint16_t __attribute__((vector_size(kVectorBytes / 2)));

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

// How `width` neighbours in memory are loaded, and their products added to a vector of sums.
template <class T>
struct Neighbours;

template <>
struct Neighbours<float> {
  static constexpr int width = kLanes;
  using Loaded = Floats;

  static Loaded load(const float* at) {
    Floats loaded;
    std::memcpy(&loaded, at, sizeof(loaded));
    return loaded;
  }

  static void add_products(Floats& sums, Loaded a, Loaded b) { sums += a * b; }
};

#if defined(__AVX512BF16__)
template <>
struct Neighbours<BFloat16> {
  static constexpr int width = 2 * kLanes;
  using Loaded = __m512bh;

  static Loaded load(const BFloat16* at) { return (__m512bh)_mm512_loadu_si512(at); }

  static void add_products(Floats& sums, Loaded a, Loaded b) { sums = (Floats)_mm512_dpbf16_ps((__m512)sums, a, b); }
};
#else
template <>
struct Neighbours<BFloat16> {
  static constexpr int width = kLanes;
  using Loaded = Floats;

  static Loaded load(const BFloat16* at) {
    HalfBits loaded;
    std::memcpy(&loaded, at, sizeof(loaded));
    return (Floats)(__builtin_convertvector(loaded, Bits) << 16);
  }

  static void add_products(Floats& sums, Loaded a, Loaded b) { sums += a * b; }
};
#endif

inline float sum_of(Floats sums) {
  float lanes[kLanes];
  std::memcpy(lanes, &sums, sizeof(lanes));
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
  return lanes[0];
}

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
    Floats sums[Rows][Outputs] = {};
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
        for (int o = 0; o < Outputs; o++) N::add_products(sums[r][o], values, weights[o]);
      }
    }
    for (int r = 0; r < Rows; r++)
      for (int o = 0; o < Outputs; o++) {
        float sum = sum_of(sums[r][o]);
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

// Computes the product on this thread, and on those of the pool that are free: what is waited for is only what another
// thread has begun, so that a busy pool delays nothing.
template <class T>
void compute(ffi::ThreadPool& pool, const Product<T>& product) {
  struct Progress {
    std::atomic<int64_t> taken{0}, done{0};
  };
  auto progress = std::make_shared<Progress>();
  const int64_t fitting = kBlockBytes / (product.inputs * sizeof(T)) / kOutputs * kOutputs;
  const int64_t width = std::max<int64_t>(kOutputs, fitting);
  const int64_t blocks = (product.outputs + width - 1) / width;
  auto work = [product, progress, width, blocks] {
    for (int64_t b; (b = progress->taken.fetch_add(1)) < blocks;) {
      product.block(b * width, std::min(product.outputs, (b + 1) * width));
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
  if (x_shape.size() != 2 || weight_shape.size() != 2 || y_shape.size() != 2 || x_shape[1] != weight_shape[1] ||
      y_shape[0] != x_shape[0] || y_shape[1] != weight_shape[0] || x.element_type() != weight.element_type())
    return ffi::Error::InvalidArgument("expected (rows, inputs) and (outputs, inputs) of one type");
  auto run = [&](auto element) {
    using T = decltype(element);
    compute(pool, Product<T>{static_cast<const T*>(x.untyped_data()), static_cast<const T*>(weight.untyped_data()),
                             y->typed_data(), x_shape[0], x_shape[1], weight_shape[0]});
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
