// What the functions for XLA on a CPU have in common: vectors of whatever width the processor has, in the types that GCC
// and Clang know on every one, and what depends on that width.

#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#ifdef __aarch64__
#include <arm_neon.h>
#else
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

template <>
struct xla::ffi::CtxBinding<xla::ffi::ThreadPool> {
  using Ctx = ThreadPool;
};

namespace s1jax {

namespace ffi = xla::ffi;

// By processor: how wide a vector is, unless the command that compiles this asks for 16 bytes, how many registers there
// are, a * b + c rounded once, and lanes widened: of integers, and as the upper halves of floats. Left to themselves,
// compilers round once in one loop and not in another, and a row's numbers would depend on the rows beside it; and GCC
// widens by half a dozen instructions what takes two, with which AVX2's products with 32 rows took 1.4 times as long.
#ifdef __aarch64__
constexpr int kVectorBytes = 16, kRegisters = 32;
#define S1JAX_FMA(a, b, c) vfmaq_f32(c, a, b)
#define S1JAX_WIDEN(lanes) vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(lanes))))
#define S1JAX_UPPER(halves) vshll_n_u16(halves, 16)
#define S1JAX_REGISTER "w"
#else
#define S1JAX_REGISTER "v"
#ifdef __AVX512VL__
constexpr int kVectorBytes = 64, kRegisters = 32;
#define S1JAX_FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define S1JAX_WIDEN(lanes) _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(lanes))
#define S1JAX_UPPER(halves) _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)halves), 16)
#elif S1JAX_VECTOR_BYTES == 16
constexpr int kVectorBytes = 16, kRegisters = 16;
#define S1JAX_FMA(a, b, c) _mm_fmadd_ps(a, b, c)
#define S1JAX_WIDEN(lanes) _mm_cvtepi32_ps(_mm_cvtepi8_epi32(lanes))
#define S1JAX_UPPER(halves) (__builtin_convertvector(halves, Words) << 16)
#else
constexpr int kVectorBytes = 32, kRegisters = 16;
#define S1JAX_FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define S1JAX_WIDEN(lanes) _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(lanes))
#define S1JAX_UPPER(halves) _mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)halves), 16)
#endif
#endif
constexpr int kVector = kVectorBytes / sizeof(float);

typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));

typedef int8_t Signed __attribute__((vector_size(kVectorBytes / 4)));
typedef int32_t Integers __attribute__((vector_size(kVectorBytes)));
typedef uint64_t Quads __attribute__((vector_size(kVectorBytes)));

typedef uint16_t BFloat16;

// Where there are integers of four bits: two in a byte, the first in its lower half. Of so many neighbours, a power of two,
// each is multiplied by the same scale.
struct Int4 {
  const uint8_t* bytes;
  const float* scales;
  int64_t at;
  int shift;  // of that power

  Int4 operator+(int64_t n) const { return {bytes, scales, at + n, shift}; }
};

inline bool begins_group(Int4 at) { return at.at >> at.shift << at.shift == at.at; }

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The n elements from `at` on, fewer than a vector has, and zeros. Not inlined, as it would take the vector's register away.
template <class Vector, class T>
__attribute__((noinline)) Vector part(const T* at, int64_t n) {
  Vector vector = {};
  memcpy(&vector, at, std::max<int64_t>(0, n) * sizeof(T));
  return vector;
}

template <class Vector, class T>
Vector read(const T* at, int64_t n) {
  if (n < int64_t{sizeof(Vector) / sizeof(T)}) return part<Vector>(at, n);
  Vector vector;
  memcpy(&vector, at, sizeof(Vector));
  return vector;
}

inline Floats load(const float* at, int64_t n = kVector) { return read<Floats>(at, n); }

// A bfloat16 is the upper half of a float32: widening is exact.
inline Floats load(const BFloat16* at, int64_t n = kVector) {
  return (Floats)S1JAX_UPPER(read<Halves>(at, n));
}

// In its lowest bytes, a vector of the width that instructions know.
inline Floats widened(Signed lanes) {
#ifdef __aarch64__
  int8x8_t wide = {};
#else
  __m128i wide = {};
#endif
  memcpy(&wide, &lanes, sizeof(lanes));
  return (Floats)S1JAX_WIDEN(wide);
}

inline Floats load(const int8_t* at, int64_t n = kVector) { return widened(read<Signed>(at, n)); }

// Sixteen integers of four bits, or as many as a vector has: each is shifted to the upper end of its lane, and then down.
template <int... I>
Floats unpacked(uint64_t packed, std::integer_sequence<int, I...>) {
  const Words both = (Words)(packed - Quads{}), shifts = {(28 - I % 8 * 4)...};
  const Words words = __builtin_shufflevector(both, both, (I / 8)...);
  return __builtin_convertvector((Integers)(words << shifts) >> 28, Floats);
}

// From a vector on.
inline Floats load(Int4 at, int64_t n = kVector) {
  const uint8_t* bytes = at.bytes + (at.at >> 1);
  uint64_t packed = 0;
  if (n < kVector)
    packed = part<uint64_t>(bytes, (n + 1) / 2);
  else
    memcpy(&packed, bytes, kVector / 2);
  return unpacked(packed, std::make_integer_sequence<int, kVector>{}) * at.scales[at.at >> at.shift];
}

// What is fetched from memory for what is read there, and how many bits an element has.
template <class T>
const void* address(const T* at) {
  return at;
}
inline const void* address(Int4 at) { return at.bytes + (at.at >> 1); }
template <class T>
constexpr int64_t bits(const T*) {
  return 8 * sizeof(T);
}
constexpr int64_t bits(Int4) { return 4; }

__attribute__((noinline)) inline void store_part(float* at, Floats vector, int64_t n) {
  memcpy(at, &vector, std::max<int64_t>(0, n) * sizeof(float));
}

inline void store(float* at, Floats vector, int64_t n = kVector) {
  if (n < kVector) return store_part(at, vector, n);
  memcpy(at, &vector, sizeof(Floats));
}

// Minus, as plus would make 0 of -0 and be computed.
inline Floats all(float value) { return value - Floats{}; }

// Keeps a factor in a register: compilers would read it again for each product.
template <class Vector>
Vector kept(Vector factor) {
  asm("" : "+" S1JAX_REGISTER(factor));
  return factor;
}

// What a product with an x of this type takes of both at a time, and how it is added to sums.
template <class X>
struct Factors {
  using Vector = Floats;
  static constexpr int64_t kLanes = kVector;

  template <class At>
  static Vector of(At at, int64_t n) {
    return load(at, n);
  }
  static Floats multiply_add(Vector a, Vector b, Floats sums) { return S1JAX_FMA(a, b, sums); }
};

// Some processors multiply pairs of bfloat16, and add both products to a float32. Of integers none but those of four bits,
// with their scales, are rounded for it: they are looked up in a table of what the sixteen are then. Those that have matrix
// units too are no faster by it.
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
constexpr bool kPairs = true;

template <>
struct Factors<BFloat16> {
  using Vector = __m512bh;
  static constexpr int64_t kLanes = 2 * kVector;

  static Vector of(const BFloat16* at, int64_t n) { return read<Vector>(at, n); }
  template <class At>
  static Vector of(At at, int64_t n) {
    return _mm512_cvtne2ps_pbh(n > kVector ? load(at + kVector, n - kVector) : Floats{}, load(at, n));
  }
  // For the first sixteen of what is read at once, and for the others: their scale may be another.
  static Vector table(Int4 at, int64_t n) {
    const Floats all = {0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1};
    const Int4 others = n > kVector ? at + kVector : at;
    return _mm512_cvtne2ps_pbh(all * others.scales[others.at >> at.shift], all * at.scales[at.at >> at.shift]);
  }
  static Vector of(Int4 at, int64_t n, Vector table) {
    const __m512i bytes = _mm512_cvtepu8_epi32(read<__m128i>(at.bytes + (at.at >> 1), n / 2));
    const __m512i halves = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
    // What is in the lower half of a byte or in the upper one, and then where its half of the table begins.
    const __m512i of_table = (bytes | bytes << 12) & _mm512_set1_epi16(15) | halves;
    return (Vector)_mm512_permutexvar_epi16(of_table, (__m512i)table);
  }
  static Floats multiply_add(Vector a, Vector b, Floats sums) { return _mm512_dpbf16_ps(sums, a, b); }
};
#else
constexpr bool kPairs = false;
#endif

// Lanes of a and b by turns, from lane First on of each.
template <int First, int... I>
Floats interleave(Floats a, Floats b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (First + I / 2 + I % 2 * kVector)...);
}
inline Floats lower(Floats a, Floats b) { return interleave<0>(a, b, std::make_integer_sequence<int, kVector>{}); }
inline Floats upper(Floats a, Floats b) {
  return interleave<kVector / 2>(a, b, std::make_integer_sequence<int, kVector>{});
}

// Lane i of vector j becomes what was lane j of vector i.
inline void transpose(Floats (&v)[kVector]) {
#pragma GCC unroll 4
  for (int distance = 1; distance < kVector; distance *= 2) {
    Floats mixed[kVector];
#pragma GCC unroll 8
    for (int i = 0; i < kVector / 2; i++) {
      mixed[2 * i] = lower(v[i], v[i + kVector / 2]);
      mixed[2 * i + 1] = upper(v[i], v[i + kVector / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kVector; i++) v[i] = mixed[i];
  }
}

// e to the power of a number that is not positive: a polynomial for the fraction of a power of two. What is not a number
// stays so. In a loop over neighbours, compilers make vectors of it.
inline float exponential(float x) {
  const float scaled = (x < -87.0f ? -87.0f : x) * 1.44269504f;
  const float shift = 12582912.0f, whole = scaled + shift - shift, f = scaled - whole;
  const float high = (1.5403530e-4f * f + 1.3333558e-3f) * f + 9.6181291e-3f;
  const float sum = (((high * f + 5.5504109e-2f) * f + 2.4022651e-1f) * f + 6.9314718e-1f) * f + 1;
  const int32_t bits = (static_cast<int32_t>(whole) + 127) << 23;
  float power;
  memcpy(&power, &bits, sizeof(power));
  return sum * power;
}

// The softmax of n scores times a positive number, in their place.
inline void softmax(float* scores, int64_t n, float scale) {
  float greatest = -INFINITY, sum = 0;
#pragma omp simd reduction(max : greatest)
  for (int64_t i = 0; i < n; i++) greatest = scores[i] > greatest ? scores[i] : greatest;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; i++) {
    scores[i] = exponential((scores[i] - greatest) * scale);
    sum += scores[i];
  }
  const float share = 1 / sum;
  for (int64_t i = 0; i < n; i++) scores[i] *= share;
}

// Does work(i, next) for every i below `count` on this thread, and on those that XLA lends and that are free: what is waited
// for is only what another thread has begun, so that a busy pool delays nothing. If `ahead`, `next` is what this thread
// does next; else, or if there is none, it is at least `count`.
template <class Work>
void share(ffi::ThreadPool& threads, int64_t count, const Work& work, bool ahead = false) {
  struct Progress {
    std::atomic<int64_t> taken{0}, done{0};
  };
  auto progress = std::make_shared<Progress>();
  const auto run = [progress, count, work, ahead] {
    for (int64_t i = progress->taken++, next = count; i < count; i = next) {
      if (ahead) next = progress->taken++;
      work(i, next);
      progress->done.fetch_add(1, std::memory_order_release);
      if (!ahead) next = progress->taken++;
    }
  };
  for (int64_t i = 1; i < std::min(threads.num_threads(), count); i++) threads.Schedule(std::function<void()>(run));
  run();
  while (progress->done.load(std::memory_order_acquire) < count) std::this_thread::yield();
}

// Calls work(begin, count, ahead) for all outputs of a product with a weight, so many at a time, in units, that `inputs` of
// each stay in a core's second cache while all rows pass over them; and few enough that threads end together. The weight's
// rows are `stride` apart, and what its thread reads next lies `ahead` of what it reads.
template <class W, class Work>
void each_outputs(ffi::ThreadPool& threads, W weight, int64_t outputs, int64_t unit, int64_t inputs, int64_t stride,
                  const Work& work) {
  constexpr int64_t kBlockBytes = 128 * 1024, kShares = 16;
  const int64_t fitting = 8 * kBlockBytes / (inputs * bits(weight));
  const int64_t width = std::max<int64_t>(1, std::min(fitting, divide_up(outputs, kShares)) / unit) * unit;
  const auto block = [=](int64_t i, int64_t next) {
    const int64_t begin = i * width;
    work(begin, std::min(width, outputs - begin), next * width < outputs ? (next - i) * width * stride : 0);
  };
  share(threads, divide_up(outputs, width), block, true);
}

// Calls f with data of float32 or bfloat16 as what it is.
template <class F>
ffi::Error with_type(const ffi::AnyBuffer& buffer, F f) {
  const void* data = buffer.untyped_data();
  buffer.element_type() == ffi::F32 ? f(static_cast<const float*>(data)) : f(static_cast<const BFloat16*>(data));
  return ffi::Error::Success();
}

// Calls f with the data of a cache of any type.
template <class F>
ffi::Error with_cache(const ffi::AnyBuffer& buffer, F f) {
  if (buffer.element_type() != ffi::S8) return with_type(buffer, f);
  return f(static_cast<const int8_t*>(buffer.untyped_data())), ffi::Error::Success();
}

// Calls f with a weight of any type that there is a load for. The scales, (outputs, groups), are those of four bits.
template <class F>
ffi::Error with_weight(const ffi::AnyBuffer& weight, const ffi::BufferR2<ffi::F32>& scales, F f) {
  const void* data = weight.untyped_data();
  if (weight.element_type() != ffi::S4) return with_cache(weight, f);
  const int64_t group = weight.dimensions()[1] / scales.dimensions()[1];
  f(Int4{static_cast<const uint8_t*>(data), scales.typed_data(), 0, __builtin_ctzll(group)});
  return ffi::Error::Success();
}

}  // namespace s1jax
