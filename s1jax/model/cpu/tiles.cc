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
namespace {

constexpr int64_t kSide = 16, kPairs = 32, kTile = kSide * kPairs;

// All eight tiles are whole ones.
constexpr struct alignas(64) {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
} kShapes;

// Some rows of x, as many tiles side by side as they have pairs, with zeros for what is missing.
void arrange(const BFloat16* x, int64_t rows, int64_t inputs, BFloat16* tiles) {
  for (int64_t k = 0; k < inputs; k += kPairs, tiles += kTile) {
    Floats v[kSide] = {};
    for (int64_t row = 0; row < std::min(rows, kSide); row++)
      memcpy(&v[row], x + row * inputs + k, std::min(kPairs, inputs - k) * sizeof(BFloat16));
    transpose(v);
    memcpy(tiles, v, sizeof(v));
  }
}

// A tile of a weight: where it lies, or a copy if a part of it is missing.
struct Tile {
  alignas(64) BFloat16 copy[kTile];

  std::pair<const BFloat16*, int64_t> of(const BFloat16* at, int64_t outputs, int64_t inputs, int64_t stride) {
    if (outputs >= kSide && inputs >= kPairs) return {at, stride};
    memset(copy, 0, sizeof(copy));
    for (int64_t o = 0; o < std::min(outputs, kSide); o++)
      memcpy(copy + o * kPairs, at + o * stride, std::min(inputs, kPairs) * sizeof(BFloat16));
    return {copy, kPairs};
  }
};

// y[r, o] = sum_k x[r, k] * weight[o, k] for two tiles of outputs and of rows, or what there is of them. What lies `ahead`
// of the weight is fetched from memory meanwhile.
void product(const BFloat16* x, const BFloat16* weight, int64_t rows, int64_t outputs, int64_t inputs, float* y,
             int64_t stride, int64_t ahead) {
  const int64_t of_rows = divide_up(inputs, kPairs) * kTile;
  const bool more_rows = rows > kSide, more_outputs = outputs > kSide;
  Tile first, second;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < inputs; k += kPairs, x += kTile) {
    for (int64_t o = 0; ahead && o < 2 * kSide; o++) __builtin_prefetch(weight + o * inputs + k + ahead, 0, 2);
    const auto [a, of_a] = first.of(weight + k, outputs, inputs - k, inputs);
    _tile_loadd(4, a, of_a * sizeof(BFloat16));
    _tile_loadd(6, x, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (more_rows) {
      _tile_loadd(7, x + of_rows, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (!more_outputs) continue;
    const auto [b, of_b] = second.of(weight + kSide * inputs + k, outputs - kSide, inputs - k, inputs);
    _tile_loadd(5, b, of_b * sizeof(BFloat16));
    _tile_dpbf16ps(2, 5, 6);
    if (more_rows) _tile_dpbf16ps(3, 5, 7);
  }
  const auto put = [&](Floats(&sums)[kSide], int64_t row, int64_t output) {
    if (row >= rows || output >= outputs) return;
    transpose(sums);
    for (int64_t r = 0; r < std::min(kSide, rows - row); r++) store(y + (row + r) * stride + output, sums[r], outputs - output);
  };
  alignas(64) Floats sums[kSide];
  _tile_stored(0, sums, 64);
  put(sums, 0, 0);
  _tile_stored(1, sums, 64);
  put(sums, kSide, 0);
  _tile_stored(2, sums, 64);
  put(sums, 0, kSide);
  _tile_stored(3, sums, 64);
  put(sums, kSide, kSide);
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

// y[m, n] = sum_k x[m, k] * weight[n, k].
ffi::Error multiply_tiles(ffi::ThreadPool pool, ffi::BufferR2<ffi::BF16> x, ffi::AnyBuffer weight,
                          ffi::BufferR2<ffi::F32> scales, ffi::ResultBufferR2<ffi::F32> y) {
  const int64_t rows = x.dimensions()[0], inputs = x.dimensions()[1], outputs = y->dimensions()[1];
  const int64_t panel = divide_up(inputs, kPairs) * kTile, panels = divide_up(rows, kSide), pair = 2 * kSide;
  static thread_local std::vector<BFloat16> kept;
  kept.resize(panels * panel);
  const auto* from = reinterpret_cast<const BFloat16*>(x.typed_data());
  share(pool, panels, [=, to = kept.data()](int64_t i, int64_t) {
    arrange(from + i * kSide * inputs, rows - i * kSide, inputs, to + i * panel);
  });
  return with_weight(weight, scales, [&](auto data) {
    const auto block = [=, x = kept.data(), y = y->typed_data()](int64_t begin, int64_t outputs_here, int64_t ahead) {
      _tile_loadconfig(&kShapes);
      const int64_t end = begin + outputs_here;
      for (int64_t o = begin; o < end; o += pair) {
        const int64_t count = std::min(pair, end - o);
        const BFloat16* strip = widened(data + o * inputs, count * inputs, ahead);
        for (int64_t row = 0; row < rows; row += pair)
          product(x + row / kSide * panel, strip, rows - row, count, inputs, y + row * outputs + o, outputs,
                  std::is_same_v<decltype(data), const BFloat16*> && row + pair >= rows ? ahead : 0);
      }
      _tile_release();
    };
    each_outputs(pool, data, outputs, pair, inputs, inputs, block);
  });
}

}  // namespace
}  // namespace s1jax

// Whether this process may use the matrix units: Linux wants to be asked, as their registers are large.
extern "C" int s1jax_tiles() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

XLA_FFI_DEFINE_HANDLER_SYMBOL(s1jax_multiply_tiles, s1jax::multiply_tiles);

#else

extern "C" int s1jax_tiles() { return 0; }

#endif
