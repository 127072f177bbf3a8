// Products of bfloat16 by the matrix units that some Intel processors have (AMX): of pairs of bfloat16, summed in float32.
//
// A unit multiplies tiles of 16 rows of 64 bytes. A weight, stored (outputs, inputs), is read as it lies: 16 outputs by 32
// inputs. Of x, whose part in a tile is of 16 pairs of inputs by 16 rows, each pair side by side, a copy is made. Every sum
// is made in the order of the inputs, and beside as many others always: so a row's numbers do not depend on the others.

#include "common.h"

#if defined(__AMX_BF16__) && defined(__AVX512VL__)

#include <sys/syscall.h>
#include <unistd.h>

namespace s1jax {

inline void store(BFloat16* at, Floats vector, int64_t n) {
  const auto halves = _mm512_cvtneps_pbh(vector);
  memcpy(at, &halves, std::min<int64_t>(n, kVector) * sizeof(BFloat16));
}

namespace {

constexpr int64_t kSide = 16, kDepth = 32, kTile = kSide * kDepth;

BFloat16* data_of(const ffi::BufferR2<ffi::BF16>& buffer) { return static_cast<BFloat16*>(buffer.untyped_data()); }

// All eight tiles are whole ones.
constexpr struct alignas(64) {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
} kShapes;

// Some rows of x, as many tiles side by side as they have pairs, with zeros for what is missing.
void arrange(const BFloat16* x, int64_t rows, int64_t inputs, BFloat16* tiles) {
  for (int64_t k = 0; k < inputs; k += kDepth, tiles += kTile) {
    Floats v[kSide] = {};
    for (int64_t row = 0; row < std::min(rows, kSide); row++)
      memcpy(&v[row], x + row * inputs + k, std::min(kDepth, inputs - k) * sizeof(BFloat16));
    transpose(v);
    memcpy(tiles, v, sizeof(v));
  }
}

// A tile of a weight: where it lies, or a copy if a part of it is missing.
struct Tile {
  alignas(64) BFloat16 copy[kTile];

  std::pair<const BFloat16*, int64_t> of(const BFloat16* at, int64_t outputs, int64_t inputs, int64_t stride) {
    if (outputs >= kSide && inputs >= kDepth) return {at, stride};
    memset(copy, 0, sizeof(copy));
    for (int64_t o = 0; o < std::min(outputs, kSide); o++)
      memcpy(copy + o * kDepth, at + o * stride, std::min(inputs, kDepth) * sizeof(BFloat16));
    return {copy, kDepth};
  }
};

// Of a weight, some outputs that follow each other.
struct Strip {
  const BFloat16* at;
  int64_t outputs;
};

// A tile's sums of products: for each output those of some rows.
struct Sums {
  alignas(64) Floats of[kSide];
};

// Some rows of inputs, as tiles: those of 16 rows, for all inputs, and then those of the next.
struct Rows {
  const BFloat16* tiles;
  int64_t count, inputs;
};

// Calls put(row, of_one, of_other) with the sums of every tile of rows, from that row on, and of a tile of each strip.
template <class Put>
void product(const Rows& rows, Strip one, Strip other, const Put& put) {
  const int64_t inputs = rows.inputs, of_rows = divide_up(inputs, kDepth) * kTile;
  const BFloat16* x = rows.tiles;
  Tile first, second;
  Sums of_one, of_other;
  for (int64_t row = 0; row < rows.count; row += 2 * kSide, x += of_rows) {
    const bool more_rows = rows.count - row > kSide, more_outputs = other.outputs > 0;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < inputs; k += kDepth, x += kTile) {
      const auto [a, of_a] = first.of(one.at + k, one.outputs, inputs - k, inputs);
      _tile_loadd(4, a, of_a * sizeof(BFloat16));
      _tile_loadd(6, x, 64);
      _tile_dpbf16ps(0, 4, 6);
      if (more_rows) {
        _tile_loadd(7, x + of_rows, 64);
        _tile_dpbf16ps(1, 4, 7);
      }
      if (!more_outputs) continue;
      const auto [b, of_b] = second.of(other.at + k, other.outputs, inputs - k, inputs);
      _tile_loadd(5, b, of_b * sizeof(BFloat16));
      _tile_dpbf16ps(2, 5, 6);
      if (more_rows) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, &of_one, 64);
    _tile_stored(2, &of_other, 64);
    put(row, of_one, of_other);
    if (!more_rows) return;
    _tile_stored(1, &of_one, 64);
    _tile_stored(3, &of_other, 64);
    put(row + kSide, of_one, of_other);
  }
}

inline Floats silu(Floats x) {
#pragma omp simd
  for (int i = 0; i < kVector; i++) {
    const float small = exponential(-std::fabs(x[i]));
    x[i] *= (x[i] < 0 ? small : 1) / (1 + small);
  }
  return x;
}

// Writes what a tile has of so many rows and outputs to y, whose rows are `stride` apart.
template <class Y>
void write(Sums& sums, Y* y, int64_t rows, int64_t outputs, int64_t stride) {
  if (outputs <= 0) return;
  transpose(sums.of);
  for (int64_t r = 0; r < std::min(kSide, rows); r++) store(y + r * stride, sums.of[r], outputs);
}

// Neighbours of a weight as tiles take them: bfloat16 where it lies, a copy of integers times their scales, rounded. What
// lies `ahead` of those is fetched from memory.
template <class W>
const BFloat16* widened(W weight, int64_t n, int64_t ahead) {
  if constexpr (std::is_same_v<W, const BFloat16*>) return weight;
  static thread_local std::vector<BFloat16> kept;
  kept.resize(n + kVector);
  for (int64_t i = 0; i < n; i += kVector) {
    if (ahead) __builtin_prefetch(address(weight + (i + ahead)), 0, 2);
    const auto halves = _mm512_cvtneps_pbh(load(weight + i, n - i));
    memcpy(&kept[i], &halves, sizeof(halves));
  }
  return kept.data();
}

// The tiles of x, in memory of this thread.
Rows arranged(ffi::ThreadPool& pool, const ffi::BufferR2<ffi::BF16>& x) {
  constexpr int64_t kAtOnce = 8;
  const int64_t rows = x.dimensions()[0], inputs = x.dimensions()[1], panels = divide_up(rows, kSide);
  const int64_t panel = divide_up(inputs, kDepth) * kTile;
  static thread_local std::vector<BFloat16> kept;
  kept.resize(panels * panel);
  share(pool, divide_up(panels, kAtOnce), [=, from = data_of(x), to = kept.data()](int64_t group, int64_t) {
    for (int64_t i = group * kAtOnce; i < std::min(panels, (group + 1) * kAtOnce); i++)
      arrange(from + i * kSide * inputs, rows - i * kSide, inputs, to + i * panel);
  });
  return {kept.data(), rows, inputs};
}

// Calls work(begin, end, ahead) for blocks of the outputs of a weight, of which each has so many inputs, on all threads,
// whose matrix units are ready for it.
template <class W, class Work>
void each_block(ffi::ThreadPool& pool, W weight, int64_t outputs, int64_t unit, int64_t inputs, const Work& work) {
  each_outputs(pool, weight, outputs, unit, inputs, inputs, [=](int64_t begin, int64_t count, int64_t ahead) {
    _tile_loadconfig(&kShapes);
    work(begin, begin + count, ahead);
    _tile_release();
  });
}

// y[m, n] = sum_k x[m, k] * weight[n, k].
template <class Y>
ffi::Error multiply(ffi::ThreadPool& pool, const Rows& x, const ffi::AnyBuffer& weight,
                    const ffi::BufferR2<ffi::F32>& scales, int64_t outputs, Y* y) {
  return with_weight(weight, scales, [&](auto data) {
    each_block(pool, data, outputs, 2 * kSide, x.inputs, [=](int64_t begin, int64_t end, int64_t ahead) {
      for (int64_t o = begin; o < end; o += 2 * kSide) {
        const int64_t count = std::min(2 * kSide, end - o), more = count - kSide;
        const BFloat16* strip = widened(data + o * x.inputs, count * x.inputs, ahead);
        product(x, {strip, count}, {strip + kSide * x.inputs, more}, [=](int64_t row, Sums& one, Sums& other) {
          write(one, y + row * outputs + o, x.count - row, count, outputs);
          write(other, y + row * outputs + o + kSide, x.count - row, more, outputs);
        });
      }
    });
  });
}

ffi::Error multiply_tiles(ffi::ThreadPool pool, ffi::BufferR2<ffi::BF16> x, ffi::AnyBuffer weight,
                          ffi::BufferR2<ffi::F32> scales, ffi::Result<ffi::AnyBuffer> y) {
  const int64_t outputs = y->dimensions()[1];
  const Rows rows = arranged(pool, x);
  if (y->element_type() == ffi::BF16)
    return multiply(pool, rows, weight, scales, outputs, static_cast<BFloat16*>(y->untyped_data()));
  return multiply(pool, rows, weight, scales, outputs, static_cast<float*>(y->untyped_data()));
}

// y[m, n] = silu(sum_k x[m, k] * gate[n, k]) * sum_k x[m, k] * up[n, k].
ffi::Error gate_tiles(ffi::ThreadPool pool, ffi::BufferR2<ffi::BF16> x, ffi::BufferR2<ffi::BF16> gate,
                      ffi::BufferR2<ffi::BF16> up, ffi::ResultBufferR2<ffi::BF16> y) {
  const int64_t outputs = y->dimensions()[1];
  const Rows rows = arranged(pool, x);
  const auto work = [=, gate = data_of(gate), up = data_of(up), y = data_of(*y)](int64_t begin, int64_t end, int64_t) {
    for (int64_t o = begin; o < end; o += kSide) {
      const int64_t at = o * rows.inputs;
      product(rows, {gate + at, end - o}, {up + at, end - o}, [=](int64_t row, Sums& of_gate, Sums& of_up) {
        for (int64_t i = 0; i < kSide; i++) of_gate.of[i] = silu(of_gate.of[i]) * of_up.of[i];
        write(of_gate, y + row * outputs + o, rows.count - row, end - o, outputs);
      });
    }
  };
  each_block(pool, data_of(gate), outputs, kSide, 2 * rows.inputs, work);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace s1jax

// Whether this process may use the matrix units: Linux wants to be asked, as their registers are large.
extern "C" int s1jax_tiles() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

XLA_FFI_DEFINE_HANDLER_SYMBOL(s1jax_multiply_tiles, s1jax::multiply_tiles);
XLA_FFI_DEFINE_HANDLER_SYMBOL(s1jax_gate_tiles, s1jax::gate_tiles);

#else

extern "C" int s1jax_tiles() { return 0; }

#endif
