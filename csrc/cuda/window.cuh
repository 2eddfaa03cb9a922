// An image as the operand of a product: a row is a cell (an output position of a convolution), its
// numbers are what the window sees there. Never written out: it is gathered as it is staged.
#pragma once
#include "product.cuh"

namespace hybridops::cuda {

struct Padding {
  int64_t top, left, bottom, right;
};

// An image (B, C, H, W) of any strides; tokens (B, H * W, C) are one too.
struct Image {
  Tensor tensor;
  int64_t B, C, H, W, stride_b, stride_c, stride_h, stride_w;
};

// What of an image a window of (KH, KW) sees from each of (Ho, Wo) cells, in the order in which
// memory has it: channel, row, column; or, where channels lie together, row, column, channel.
struct Sight {
  int64_t KH, KW, stride, Ho, Wo;
  Padding padding;
  bool channels_last;
  bool backwards = false;  // a window goes up and left from its cell, as a gradient's does
  int64_t cells() const { return Ho * Wo; }
};
Sight sight_of(const Image& image, int64_t KH, int64_t KW, int64_t stride, const Padding& padding,
               const char* op);

constexpr int kNowhere = 1 << 30;  // a row that no image has, even when added to another

// Where a cell's window starts, and a number's place within it.
struct Cell {
  int64_t start;
  int h, w;
};

template <class T>
struct Window {
  Global<const T> data;  // one of the two
  Global<const uint8_t> bytes;
  int64_t stride_b, stride_h, stride_w, stride_outer, stride_middle, stride_inner;
  int K, middle, inner;  // number k is (k / inner / middle, k / inner % middle, k % inner)
  int H, W, cells, across, stride, top, left;
  bool channels_last, joined, backwards;  // joined: inner runs over columns and channels
  bool whole;  // numbers come 16 bytes at a time, all inside or all outside

  HYBRIDOPS_DEVICE Cell cell(int64_t row, int64_t rows) const {
    if (row >= rows) return {0, kNowhere, 0};
    const int64_t b = row / cells;
    const int at = (int)(row - b * cells);
    return cell(b, at / across, at % across);
  }
  HYBRIDOPS_DEVICE Cell cell(int64_t b, int row, int column) const {
    const int h = row * stride - top, w = column * stride - left;
    return {b * stride_b + h * stride_h + w * stride_w, h, w};
  }
  HYBRIDOPS_DEVICE Cell tap(int k) const {
    if (k >= K) return {0, kNowhere, 0};
    const int n = k % inner, rest = k / inner, m = rest % middle, o = rest / middle;
    const int64_t offset = o * stride_outer + m * stride_middle + n * stride_inner;
    const int h = channels_last ? o : m, w = joined ? 0 : channels_last ? m : n;
    return {offset, backwards ? -h : h, backwards ? -w : w};
  }
  HYBRIDOPS_DEVICE bool holds(const Cell& cell, const Cell& tap) const {
    return (unsigned)cell.h + (unsigned)tap.h < (unsigned)H &&
           (unsigned)cell.w + (unsigned)tap.w < (unsigned)W;
  }
  HYBRIDOPS_DEVICE T load(int64_t at) const {
    return bytes ? cast<T>((float)bytes.load(at)) : data.load(at);
  }
};

// kRows cells, at(row), by the kColumns numbers from k0 on; by all threads, of which each has one
// column. The copy is asynchronous where the window is whole.
template <int kRows, int kColumns, class T, class At>
HYBRIDOPS_DEVICE void stage_window(Shared<T> to, int ld, const Window<T>& x, int k0, At at) {
  const int group = x.whole ? 16 / sizeof(T) : 1, groups = kColumns / group;
  const int column = thread_index() % groups * group;
  const Cell tap = x.tap(k0 + column);
  for (int row = thread_index() / groups; row < kRows; row += thread_count() / groups) {
    const Cell cell = at(row);
    const bool inside = x.holds(cell, tap);
    const int64_t from = cell.start + tap.start;
    if (x.whole)
      copy_async(to + (row * ld + column), x.data + from, inside);
    else
      to.store(row * ld + column, inside ? x.load(from) : cast<T>(0.0f));
  }
}

template <class T>
Window<T> window_of(const Image& image, const Sight& s) {
  constexpr int64_t kGroup = 16 / sizeof(T);
  Window<T> x{};
  const bool is_bytes = image.tensor.scalar_type() == ScalarType::Byte;
  if (is_bytes)
    x.bytes = memory_of<const uint8_t>(image.tensor);
  else
    x.data = memory_of<const T>(image.tensor);
  x.stride_b = image.stride_b, x.stride_h = image.stride_h, x.stride_w = image.stride_w;
  x.H = (int)image.H, x.W = (int)image.W, x.K = (int)(image.C * s.KH * s.KW);
  x.cells = (int)s.cells(), x.across = (int)s.Wo, x.stride = (int)s.stride;
  x.top = (int)s.padding.top, x.left = (int)s.padding.left;
  x.channels_last = s.channels_last;
  x.backwards = s.backwards;
  const bool within =
      !s.backwards && s.padding.left == 0 && (s.Wo - 1) * s.stride + s.KW <= image.W;
  x.joined = s.channels_last && within && image.stride_w == image.C;
  const int64_t ahead = s.backwards ? -1 : 1;
  int64_t outer = s.KH;
  if (!s.channels_last) {
    outer = image.C;
    x.middle = (int)s.KH, x.inner = (int)s.KW;
    x.stride_outer = image.stride_c, x.stride_middle = ahead * image.stride_h;
    x.stride_inner = ahead * image.stride_w;
  } else {
    x.middle = (int)s.KW, x.inner = (int)image.C;
    if (x.joined) x.inner *= x.middle, x.middle = 1;
    x.stride_outer = ahead * image.stride_h, x.stride_middle = ahead * image.stride_w;
    x.stride_inner = 1;
  }
  const auto even = [](int64_t count, int64_t stride) {
    return count <= 1 || stride % kGroup == 0;
  };
  x.whole = !is_bytes && x.stride_inner == 1 && x.inner % kGroup == 0 &&
            (s.channels_last || within) && is_aligned(image.tensor, 16) &&
            even(image.B, x.stride_b) && even(outer, x.stride_outer) &&
            even(x.middle, x.stride_middle) && even(s.Ho, s.stride * x.stride_h) &&
            even(s.Wo, s.stride * x.stride_w) &&
            (s.padding.top * x.stride_h + s.padding.left * x.stride_w) % kGroup == 0;
  return x;
}

}  // namespace hybridops::cuda
