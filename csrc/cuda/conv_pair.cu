// The first two convolutions of a stem in one launch: what lies between them, the largest tensor of
// the model, stays in shared memory.
//
// A block makes 8 x 8 cells of the second layer. It first makes the cells of the first layer under
// them, 64 at a time, straight from the image, zeros where that layer has none; at stride 2 and a
// kernel of 3 it makes 289 for 256 of its own, so an eighth is made twice. Both products and their
// order are those of conv.cu, so the bits are too.
#include "conv.cuh"
#include "conv_weight.cuh"

namespace hybridops::cuda {
namespace {

constexpr int kSide = 8, kCells = kSide * kSide;
constexpr int kMiddle = 32, kColumns = 64;  // channels at most: between, and of the second layer
constexpr int kRegion = 18 * 18;            // cells of the first layer at most

template <class T>
struct Layers {
  Window<T> x;
  Rows<T> first, second;
  Global<const T> first_bias, second_bias;
  Global<T> y;
  int first_activation, second_activation;
  int C, H, W;                       // between the layers
  int N, KH, KW, stride, top, left;  // of the second layer
  int Ho, Wo, down, across;          // its cells, in so many blocks
  int region_h, region_w;            // cells of the first layer that a block needs
};

template <class T>
using First = Product<T, kCells, kMiddle>;
template <class T>
using Second = Product<T, kCells, kColumns>;

template <class T>
HYBRIDOPS_DEVICE float finished(float value, Global<const T> bias, int c, int activation) {
  return activate(bias ? value + to_float(bias.load(c)) : value, activation);
}

template <class T>
HYBRIDOPS_DEVICE void stage_weight(Shared<T> to, int ld, const Rows<T>& w, int k0, int N, int rows,
                                   int columns) {
  stage(to, ld, w.data + k0, w.stride, w.stride_column, N, (int)w.stride - k0, rows, columns,
        w.whole, thread_index(), thread_count());
}

template <class T>
__global__ void __launch_bounds__(Second<T>::kThreads, Second<T>::kBlocks)
    pair_kernel(Layers<T> p) {
  constexpr int kGroup = 16 / sizeof(T);
  const int block_w = (int)(block_index() % p.across);
  const int block_h = (int)(block_index() / p.across % p.down);
  const int64_t b = block_index() / p.across / p.down;
  const int h0 = block_h * kSide * p.stride - p.top, w0 = block_w * kSide * p.stride - p.left;
  const int region = p.region_h * p.region_w, ld = p.C + kSkew<T>;
  SharedMemory memory;
  const Shared<T> middle = memory.take<T>(region * ld);

  for (int first = 0; first < region; first += kCells) {
    const auto exists = [&](int h, int w) {
      return (unsigned)h < (unsigned)p.H && (unsigned)w < (unsigned)p.W;
    };
    const auto cell_at = [&](int row) {
      const int h = h0 + (first + row) / p.region_w, w = w0 + (first + row) % p.region_w;
      return first + row < region && exists(h, w) ? p.x.cell(b, h, w) : Cell{0, kNowhere, 0};
    };
    SharedMemory operands = memory;
    First<T> tile;
    tile.run(
        operands, ((int)p.first.stride + First<T>::kSum - 1) / First<T>::kSum,
        [&](Shared<T> to, int step) {
          stage_window<kCells, First<T>::kSum>(to, First<T>::kLeftLd, p.x, step * First<T>::kSum,
                                               cell_at);
        },
        [&](Shared<T> to, int step) {
          stage_weight(to, First<T>::kRightLd, p.first, step * First<T>::kSum, p.C, kMiddle,
                       First<T>::kSum);
        });
    tile.each([&](int row, int c, float one, float next) {
      const int cell = first + row;
      if (cell >= region || c >= p.C) return;
      const bool inside = exists(h0 + cell / p.region_w, w0 + cell % p.region_w);
      one = inside ? finished(one, p.first_bias, c, p.first_activation) : 0.0f;
      next = inside ? finished(next, p.first_bias, c + 1, p.first_activation) : 0.0f;
      middle.store(cell * ld + c, Vec<T, 2>{{cast<T>(one), cast<T>(next)}});
    });
  }
  block_barrier();

  Second<T> tile;
  const int K = (int)p.second.stride;
  tile.run(
      memory, (K + Second<T>::kSum - 1) / Second<T>::kSum,
      [&](Shared<T> to, int step) {
        constexpr int kGroups = Second<T>::kSum / kGroup;
        const int column = thread_index() % kGroups * kGroup, k = step * Second<T>::kSum + column;
        const int tap = k / p.C, i = tap / p.KW, j = tap % p.KW;
        for (int row = thread_index() / kGroups; row < kCells; row += thread_count() / kGroups) {
          const int h = row / kSide * p.stride + i, w = row % kSide * p.stride + j;
          Vec<T, kGroup> numbers{};
          if (k < K)
            numbers = middle.template load<Vec<T, kGroup>>((h * p.region_w + w) * ld + k % p.C);
          to.store(row * Second<T>::kLeftLd + column, numbers);
        }
      },
      [&](Shared<T> to, int step) {
        stage_weight(to, Second<T>::kRightLd, p.second, step * Second<T>::kSum, p.N, kColumns,
                     Second<T>::kSum);
      });
  tile.each([&](int row, int c, float one, float next) {
    const int h = block_h * kSide + row / kSide, w = block_w * kSide + row % kSide;
    if (h >= p.Ho || w >= p.Wo || c >= p.N) return;
    one = finished(one, p.second_bias, c, p.second_activation);
    if (c + 1 < p.N) next = finished(next, p.second_bias, c + 1, p.second_activation);
    store_pair(p.y, ((b * p.Ho + h) * p.Wo + w) * p.N, c, p.N, one, next);
  });
}

int64_t extent(int64_t kernel, int64_t stride) { return (kSide - 1) * stride + kernel; }

}  // namespace

bool fits_pair(const Pair& p) {
  const int64_t C = p.first.size(0), N = p.second.size(0), K = p.image.C * p.first.size(2);
  const int64_t group = p.first.scalar_type() == ScalarType::Float ? 4 : 8;
  const Sight& s = p.second_sight;
  return C > 0 && C % group == 0 && C <= kMiddle && N > 0 && N <= kColumns && p.image.B > 0 &&
         K > 0 && K * p.first.size(3) <= 256 &&  // cheap to make twice
         s.stride <= 2 && extent(s.KH, s.stride) * extent(s.KW, s.stride) <= kRegion;
}

void convolve(const Device& device, const Pair& pair, Tensor& y, const char* op) {
  const auto fits = [&](const std::optional<Tensor>& bias, const Tensor& weight) {
    return !bias.has_value() || (bias->dim() == 1 && bias->size(0) == weight.size(0) &&
                                 bias->scalar_type() == weight.scalar_type());
  };
  STD_TORCH_CHECK(fits(pair.first_bias, pair.first) && fits(pair.second_bias, pair.second), op,
                  ": bias does not fit weight");
  const Sight &from = pair.first_sight, &s = pair.second_sight;
  const auto first_bias = contiguous(pair.first_bias), second_bias = contiguous(pair.second_bias);
  for_type(pair.first, op, [&](auto type) {
    using T = decltype(type);
    std::optional<Tensor> first, second;
    Layers<T> p{};
    p.x = window_of<T>(pair.image, from);
    p.first = weight_of<T>(device, pair.first, from.channels_last, first);
    p.second = weight_of<T>(device, pair.second, true, second);
    p.first_bias = memory_of<const T>(first_bias), p.second_bias = memory_of<const T>(second_bias);
    p.y = memory_of<T>(y);
    p.first_activation = (int)pair.first_activation;
    p.second_activation = (int)pair.second_activation;
    p.C = (int)pair.first.size(0), p.H = (int)from.Ho, p.W = (int)from.Wo;
    p.N = (int)pair.second.size(0), p.KH = (int)s.KH, p.KW = (int)s.KW, p.stride = (int)s.stride;
    p.top = (int)s.padding.top, p.left = (int)s.padding.left;
    p.Ho = (int)s.Ho, p.Wo = (int)s.Wo;
    p.down = (int)divide_up(s.Ho, kSide), p.across = (int)divide_up(s.Wo, kSide);
    p.region_h = (int)extent(s.KH, s.stride), p.region_w = (int)extent(s.KW, s.stride);
    const int64_t bytes = shared_bytes<T>(p.region_h * p.region_w * (p.C + kSkew<T>)) +
                          std::max(First<T>::bytes(), Second<T>::bytes());
    device.launch(pair_kernel<T>, pair.image.B * p.down * p.across, Second<T>::kThreads, bytes, p);
  });
}

}  // namespace hybridops::cuda
