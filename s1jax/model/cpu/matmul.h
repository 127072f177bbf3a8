// Products of matrices of float32 or bfloat16, summed in float32 as fast as AVX-512 multiplies: both operands are packed
// into panels that are read in order, and a tile of sums stays in the vector registers.

#pragma once

#include <vector>

#include "common.h"

namespace s1jax {

// A tile of kTileRows x two vectors of sums, two vectors of b and one value of a fill the 32 vector registers.
constexpr int64_t kTileRows = 14, kTileColumns = 2 * kVector;

// What is packed at a time: so many inputs of so many panels of b, for a core's second cache, and of one tile of a, for
// its first. So many tiles of a are multiplied with what was packed of b.
constexpr int64_t kInputsAtOnce = 384, kPanels = 16, kTiles = 32;

// A matrix to read: neighbours in a column are `row` elements apart, those in a row `column`; one of both is 1.
template <class T>
struct View {
  const T* data;
  int64_t row, column;

  View from(int64_t i, int64_t j) const { return {data + i * row + j * column, row, column}; }
  View transposed() const { return {data, column, row}; }
};

// Lane i of vector j becomes what was lane j of vector i.
inline void transpose(__m512 (&v)[16]) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
#pragma GCC unroll 4
  for (int distance = 1; distance < 16; distance *= 2) {
    const __mmask16 upper = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(distance));
    const __m512i first = _mm512_mask_add_epi32(lane, upper, lane, _mm512_set1_epi32(16 - distance));
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(distance));
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++)
      if (!(i & distance)) {
        const __m512 a = v[i], b = v[i + distance];
        v[i] = _mm512_permutex2var_ps(a, first, b);
        v[i + distance] = _mm512_permutex2var_ps(a, second, b);
      }
  }
}

// Writes the first `rows` rows and `columns` columns of a matrix as packed[column][row], `width` floats a column, with
// zeros for the rows that are missing.
template <class T>
void pack(View<T> from, int64_t rows, int64_t columns, int64_t width, float* packed) {
  if (from.row == 1) {
    for (int64_t column = 0; column < columns; column++)
      for (int64_t row = 0; row < width; row += kVector)
        _mm512_mask_storeu_ps(packed + column * width + row, lanes(width - row),
                              load(from.from(row, column).data, lanes(rows - row)));
    return;
  }
  for (int64_t column = 0; column < columns; column += kVector)
    for (int64_t row = 0; row < width; row += kVector) {
      __m512 v[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++)
        v[i] = row + i < rows ? load(from.from(row + i, column).data, lanes(columns - column)) : _mm512_setzero_ps();
      transpose(v);
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++)
        if (column + i < columns)
          _mm512_mask_storeu_ps(packed + (column + i) * width + row, lanes(width - row), v[i]);
    }
}

// c = a b for a panel of each, added to what c holds if `add`; of c there are so many rows and columns.
inline void tile(const float* a, const float* b, int64_t inputs, float* c, int64_t stride, int64_t rows,
                 int64_t columns, bool add) {
  for (int64_t r = 0; r < std::min(rows, kTileRows); r++)
    for (int64_t half = 0; half < 2; half++) __builtin_prefetch(c + r * stride + half * kVector, 1);
  __m512 sums[kTileRows][2] = {};
  for (int64_t k = 0; k < inputs; k++, a += kTileRows, b += kTileColumns) {
    for (int64_t half = 0; half < 2; half++) __builtin_prefetch(b + 8 * kTileColumns + half * kVector);
    const __m512 first = _mm512_loadu_ps(b), second = _mm512_loadu_ps(b + kVector);
#pragma GCC unroll 14
    for (int r = 0; r < kTileRows; r++) {
      __m512 value = _mm512_set1_ps(a[r]);
      // Into a register, once: the compiler would have each product load it again.
      asm("" : "+v"(value));
      sums[r][0] = _mm512_fmadd_ps(value, first, sums[r][0]);
      sums[r][1] = _mm512_fmadd_ps(value, second, sums[r][1]);
    }
  }
#pragma GCC unroll 14
  for (int r = 0; r < kTileRows; r++)
    if (r < rows)
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        const __mmask16 mask = lanes(columns - half * kVector);
        float* at = c + r * stride + half * kVector;
        const __m512 sum = add ? _mm512_add_ps(sums[r][half], _mm512_maskz_loadu_ps(mask, at)) : sums[r][half];
        _mm512_mask_storeu_ps(at, mask, sum);
      }
}

// A product c = a b of rows x inputs by inputs x columns, added to what c holds if `add`.
template <class T>
struct Product {
  View<float> a;
  View<T> b;
  float* c;
  int64_t stride;  // of c's rows
  int64_t rows, inputs, columns;
  bool add;

  // Computes it on the threads of the pool, or on this one alone.
  void shared(ffi::ThreadPool& pool) const {
    const Cut cut(*this, pool.num_threads());
    share(pool, cut.blocks(), [cut, product = *this](int64_t i, int64_t) { product.block(cut, i); });
  }

  void alone() const {
    const Cut cut(*this, 1);
    for (int64_t i = 0; i < cut.blocks(); i++) block(cut, i);
  }

 private:
  // How c is cut into blocks, which threads compute independently of each other: so many tiles by so many panels.
  struct Cut {
    int64_t tiles, panels, down, across;

    Cut(const Product& p, int64_t threads) {
      tiles = divide_up(p.rows, kTileRows), panels = divide_up(p.columns, kTileColumns);
      down = divide_up(tiles, kTiles), across = divide_up(panels, kPanels);
      // As many for each thread, if there are enough: of the longer side.
      int64_t& more = tiles >= 8 * threads ? down : across;
      more = divide_up(more, threads) * threads;
    }
    int64_t blocks() const { return down * across; }
    int64_t tile(int64_t i) const { return tiles * i / down; }
    int64_t panel(int64_t i) const { return panels * i / across; }
  };

  // Block i: b's panels are packed, part by part, and with each part every tile of a, which then stays where it is.
  void block(const Cut& cut, int64_t i) const {
    static thread_local std::vector<float> of_a, of_b;
    const int64_t down = i / cut.across, across = i % cut.across, first = cut.panel(across);
    const int64_t parts = divide_up(inputs, kInputsAtOnce), depth = divide_up(inputs, parts);
    of_a.resize(depth * kTileRows);
    of_b.resize((cut.panel(across + 1) - first) * depth * kTileColumns);
    for (int64_t k = 0; k < inputs; k += depth) {
      const int64_t deep = std::min(depth, inputs - k);
      const auto each_panel = [&](auto work) {
        for (int64_t j = first; j < cut.panel(across + 1); j++)
          work(j * kTileColumns, of_b.data() + (j - first) * depth * kTileColumns);
      };
      each_panel([&](int64_t column, float* panel) {
        pack(b.from(k, column).transposed(), columns - column, deep, kTileColumns, panel);
      });
      for (int64_t t = cut.tile(down); t < cut.tile(down + 1); t++) {
        const int64_t row = t * kTileRows;
        pack(a.from(row, k), rows - row, deep, kTileRows, of_a.data());
        each_panel([&](int64_t column, float* panel) {
          tile(of_a.data(), panel, deep, c + row * stride + column, stride, rows - row, columns - column, add || k > 0);
        });
      }
    }
  }
};

}  // namespace s1jax
