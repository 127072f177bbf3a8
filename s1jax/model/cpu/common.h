// What the functions for XLA on a CPU with AVX-512 have in common.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace s1jax {

namespace ffi = xla::ffi;

// Floats of a vector.
constexpr int64_t kVector = 16;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The lanes of a vector that are filled when so many elements are left.
inline __mmask16 lanes(int64_t left) { return left < kVector ? left > 0 ? (1 << left) - 1 : 0 : -1; }

struct BFloat16 {
  uint16_t bits;
};

// A vector's neighbours in memory, widened; zeros for those that are not there.
inline __m512 load(const float* at, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, at); }

inline __m512 load(const BFloat16* at, __mmask16 mask) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, at)), 16));
}

// e to the power of numbers that are not positive: a polynomial for the fraction of a power of two. What is not a number
// stays so, as the second operand of a maximum.
inline __m512 exponential(__m512 x) {
  const __m512 scaled = _mm512_mul_ps(_mm512_max_ps(_mm512_set1_ps(-87), x), _mm512_set1_ps(1.44269504f));
  const __m512 whole = _mm512_roundscale_ps(scaled, 0), fraction = _mm512_sub_ps(scaled, whole);
  __m512 sum = _mm512_set1_ps(1.5403530e-4f);
  for (float coefficient : {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f})
    sum = _mm512_fmadd_ps(sum, fraction, _mm512_set1_ps(coefficient));
  return _mm512_scalef_ps(sum, whole);
}

// Makes exponentials of n scores, less the greatest; returns their sum, and the greatest in `greatest`.
inline float exponentials(float* scores, int64_t n, float* greatest = nullptr) {
  const __m512 lowest = _mm512_set1_ps(-INFINITY);
  __m512 most = lowest, sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < n; i += kVector)
    most = _mm512_max_ps(most, _mm512_mask_loadu_ps(lowest, lanes(n - i), scores + i));
  const float of_all = _mm512_reduce_max_ps(most);
  most = _mm512_set1_ps(of_all);
  for (int64_t i = 0; i < n; i += kVector) {
    const __m512 power = exponential(_mm512_sub_ps(_mm512_maskz_loadu_ps(lanes(n - i), scores + i), most));
    sum = _mm512_mask_add_ps(sum, lanes(n - i), sum, power);
    _mm512_mask_storeu_ps(scores + i, lanes(n - i), power);
  }
  if (greatest) *greatest = of_all;
  return _mm512_reduce_add_ps(sum);
}

// Does work(i, next) for every i below `count` on this thread, and on those of the pool that are free: what is waited for
// is only what another thread has begun, so that a busy pool delays nothing. If `ahead`, a thread knows its next i.
template <class Work>
void share(ffi::ThreadPool& pool, int64_t count, const Work& work, bool ahead = false) {
  struct Progress {
    std::atomic<int64_t> taken{0}, done{0};
  };
  auto progress = std::make_shared<Progress>();
  const auto run = [progress, count, work, ahead] {
    for (int64_t i = progress->taken.fetch_add(1), next; i < count; i = next) {
      if (ahead) next = progress->taken.fetch_add(1);
      work(i, ahead ? next : count);
      progress->done.fetch_add(1, std::memory_order_release);
      if (!ahead) next = progress->taken.fetch_add(1);
    }
  };
  for (int64_t i = 1; i < std::min(pool.num_threads(), count); i++) pool.Schedule(std::function<void()>(run));
  run();
  while (progress->done.load(std::memory_order_acquire) < count) std::this_thread::yield();
}

// Calls f with the data of a weight or cache, as what it is.
template <class F>
ffi::Error with_type(const ffi::AnyBuffer& buffer, F f) {
  if (buffer.element_type() == ffi::F32) return f(static_cast<const float*>(buffer.untyped_data()));
  if (buffer.element_type() == ffi::BF16) return f(static_cast<const BFloat16*>(buffer.untyped_data()));
  return ffi::Error::InvalidArgument("expected float32 or bfloat16");
}

}  // namespace s1jax
