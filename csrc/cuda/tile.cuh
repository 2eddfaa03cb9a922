// Products of 16 x 16 tiles by a warp, the same words for every type: fp16 and bf16 by one
// mma.sync each half, fp32 by three of tf32.
//
// A number in fp32 is hi + lo, both tf32, to 2^-22; lo * lo is below the rounding of the sum.
// Tensor cores truncate as they add, so each step of 8 starts from zero and joins the sum by an
// ordinary addition (Ootomo and Yokota 2022): then the error is that of fp32.
#pragma once
#include "device.cuh"

namespace hybridops::cuda {

// Rows of a tile lie this many elements apart in shared memory: no two of 8 rows share a bank.
template <class T>
constexpr int kSkew = 16 / sizeof(T);

// The left operand (16 rows x 16 of the sum), and the right one (16 of the sum x 16 columns).
template <class T>
struct Left {
  uint32_t r[4];
};
template <class T>
struct Right {
  uint32_t r[4];  // columns 0-7, then 8-15
};
// fp32: two steps of 8. Slot t of a step stands for number 2t of the sum, slot t + 4 for 2t + 1, on
// both sides, so that a product's own layout is a left operand as it is.
template <>
struct Left<float> {
  float r[8];
};
template <>
struct Right<float> {
  float r[8];  // [columns 0-7, 8-15][step][slot t, t + 4]
};

HYBRIDOPS_DEVICE int lane_index() { return thread_index() % kWarp; }

// From rows of the sum's numbers: tile (16, ld).
template <class T>
HYBRIDOPS_DEVICE void load(Left<T>& a, Shared<T> tile, int ld) {
  const int lane = lane_index();
  if constexpr (sizeof(T) == 2) {
    load_matrices<false>(a.r, tile + (lane % 16 * ld + lane / 16 * 8));
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // step i / 2, rows g + 8 (i % 2)
      const auto pair =
          tile.template load<Vec<float, 2>>((lane / 4 + i % 2 * 8) * ld + i / 2 * 8 + lane % 4 * 2);
      a.r[i / 2 * 4 + i % 2] = pair.v[0];
      a.r[i / 2 * 4 + i % 2 + 2] = pair.v[1];
    }
  }
}

// From rows that are columns of the product: tile (16 columns, ld).
template <class T>
HYBRIDOPS_DEVICE void load(Right<T>& b, Shared<T> tile, int ld) {
  const int lane = lane_index();
  if constexpr (sizeof(T) == 2) {
    load_matrices<false>(b.r, tile + ((lane / 16 * 8 + lane % 8) * ld + lane / 8 % 2 * 8));
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // columns 8 (i / 2), step i % 2
      const auto pair =
          tile.template load<Vec<float, 2>>((i / 2 * 8 + lane / 4) * ld + i % 2 * 8 + lane % 4 * 2);
      b.r[2 * i] = pair.v[0];
      b.r[2 * i + 1] = pair.v[1];
    }
  }
}

// From rows along the sum: tile (16 of the sum, ld).
template <class T>
HYBRIDOPS_DEVICE void load_transposed(Right<T>& b, Shared<T> tile, int ld) {
  const int lane = lane_index();
  if constexpr (sizeof(T) == 2) {
    load_matrices<true>(b.r, tile + (lane % 16 * ld + lane / 16 * 8));
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      b.r[i] = tile.load((i / 2 % 2 * 8 + lane % 4 * 2 + i % 2) * ld + i / 4 * 8 + lane / 4);
  }
}

// The same for the left operand: columns of the tile are rows of the product.
template <class T>
HYBRIDOPS_DEVICE void load_transposed(Left<T>& a, Shared<T> tile, int ld) {
  const int lane = lane_index();
  if constexpr (sizeof(T) == 2) {
    load_matrices<true>(a.r, tile + ((lane % 8 + lane / 16 * 8) * ld + lane / 8 % 2 * 8));
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)  // step i / 4, number i / 2 % 2 of a pair, rows g + 8 (i % 2)
      a.r[i] = tile.load((i / 4 * 8 + lane % 4 * 2 + i / 2 % 2) * ld + i % 2 * 8 + lane / 4);
  }
}

// A product's two halves (columns 0-7 and 8-15) as the left operand of the next.
template <class T>
HYBRIDOPS_DEVICE void to_left(Left<T>& a, const float (&c0)[4], const float (&c1)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float* c = i < 2 ? c0 : c1;
    if constexpr (sizeof(T) == 2) {
      const T low = cast<T>(c[i % 2 * 2]), high = cast<T>(c[i % 2 * 2 + 1]);
      a.r[i] = low.bits | (uint32_t)high.bits << 16;
    } else {
      a.r[i / 2 * 4 + i % 2] = c[i % 2 * 2];
      a.r[i / 2 * 4 + i % 2 + 2] = c[i % 2 * 2 + 1];
    }
  }
}

HYBRIDOPS_DEVICE void split(float x, uint32_t& high, uint32_t& low) {
  high = round_tf32(x);
  low = round_tf32(x - float_of(high));
}

// c0, c1 (columns 0-7 and 8-15) += a b
template <class T>
HYBRIDOPS_DEVICE void multiply(float (&c0)[4], float (&c1)[4], const Left<T>& a,
                               const Right<T>& b) {
  if constexpr (sizeof(T) == 2) {
    multiply_add(c0, a.r, b.r[0], b.r[1], T{});
    multiply_add(c1, a.r, b.r[2], b.r[3], T{});
  } else {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      uint32_t high[4], low[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) split(a.r[4 * step + i], high[i], low[i]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t b_high[2], b_low[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) split(b.r[4 * half + 2 * step + i], b_high[i], b_low[i]);
        float sum[4] = {};
        multiply_add(sum, low, b_high[0], b_high[1], 0.0f);
        multiply_add(sum, high, b_low[0], b_low[1], 0.0f);
        multiply_add(sum, high, b_high[0], b_high[1], 0.0f);
#pragma unroll
        for (int i = 0; i < 4; ++i) (half ? c1 : c0)[i] += sum[i];
      }
    }
  }
}

// Thread `who` of `count` walks over lines of `length`, without a division a step.
struct Walk {
  int line, place, lines_a_step, places_a_step, length;
  HYBRIDOPS_DEVICE Walk(int who, int count, int length)
      : line(who / length),
        place(who % length),
        lines_a_step(count / length),
        places_a_step(count % length),
        length(length) {}
  HYBRIDOPS_DEVICE void next() {
    line += lines_a_step;
    place += places_a_step;
    if (place >= length) {
      place -= length;
      ++line;
    }
  }
};

// Rows [0, rows) x columns [0, columns) of a matrix into shared memory, zeros up to (padded_rows,
// padded_columns); thread `who` of `count`. `whole`: columns lie side by side, 16 bytes at a time
// are aligned and columns come in such groups; then the copy is asynchronous.
template <class T>
HYBRIDOPS_DEVICE void stage(Shared<T> to, int ld, Global<const T> from, int64_t stride_row,
                            int64_t stride_column, int rows, int columns, int padded_rows,
                            int padded_columns, bool whole, int who, int count) {
  constexpr int kGroup = 16 / sizeof(T);
  if (whole) {
    for (Walk at(who, count, padded_columns / kGroup); at.line < padded_rows; at.next())
      copy_async(to + (at.line * ld + at.place * kGroup),
                 from + (at.line * stride_row + at.place * kGroup),
                 at.line < rows && at.place * kGroup < columns);
    return;
  }
  const bool down = stride_row == 1 && stride_column != 1;  // walk along what lies side by side
  const int lines = down ? padded_columns : padded_rows;
  for (Walk at(who, count, down ? padded_rows : padded_columns); at.line < lines; at.next()) {
    const int row = down ? at.place : at.line, column = down ? at.line : at.place;
    const bool inside = row < rows && column < columns;
    to.store(row * ld + column,
             inside ? from.load(row * stride_row + column * stride_column) : cast<T>(0.0f));
  }
}

// x and y into columns `column` and the next of a row of `columns` that starts at i.
template <class T>
HYBRIDOPS_DEVICE void store_pair(Global<T> to, int64_t i, int column, int columns, float x,
                                 float y) {
  if (columns % 2 == 0 && column < columns) {
    to.store(i + column, Vec<T, 2>{{cast<T>(x), cast<T>(y)}});
  } else if (columns % 2) {
    if (column < columns) to.store(i + column, cast<T>(x));
    if (column + 1 < columns) to.store(i + column + 1, cast<T>(y));
  }
}

}  // namespace hybridops::cuda
