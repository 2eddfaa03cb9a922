// hybridops::patch_embed: see hybridops/ops/patch_embed.py for the meaning.
#include <cmath>
#include <cstring>

#include "conv.h"
#include "linear.h"

namespace hybridops {
namespace {

using simd::Depth;
using simd::Grid;
using simd::Image;
using simd::Output;
using simd::Rows;
using simd::Type;

struct Patches {
  int64_t Ci, Kh, Kw, stride, top, left, Hp, Wp, Ho, Wo;
  bool planar;  // must agree with is_planar() in patch_embed.py: it decides the order of `packed`
  Type type;    // in which they are multiplied

  Depth depth() const { return planar ? Depth{type, Kw, Ci * Kh} : Depth{type, Kw * Ci, Kh}; }
};

// The rows under the patches of one image (Hp, Wp, Ci): where it lies if they can be read there,
// else in `buffer`.
Rows rows_of(const Image& image, const Patches& p, float* buffer) {
  if (p.Hp == image.H && p.Wp == image.W && image.type == p.type && image.stride_c == 1 &&
      image.stride_w == p.Ci)
    return {image.data,  p.type, Grid{p.Wo, p.stride * image.stride_h, p.stride * p.Ci},
            p.Kw * p.Ci, p.Kh,   image.stride_h};
  simd::load_padded(image, p.top, p.left, p.Wp, 0, p.Hp, buffer, p.type);
  return {buffer,      p.type, Grid{p.Wo, p.stride * p.Wp * p.Ci, p.stride * p.Ci},
          p.Kw * p.Ci, p.Kh,   p.Wp * p.Ci};
}

// The patches of planes, some at a time, copied to rows: in place, a row of 768 numbers would be 48
// runs far apart, read again for each panel of the weight.
void planar_product(const Image& image, const Patches& p, const float* panels, int64_t C,
                    const Output& output) {
  constexpr int64_t kTogether = 128;  // a part of L2
  const Depth K = p.depth();
  const int64_t width = K.length * K.runs;
  const bool one_run = p.type == Type::kFloat || p.Kw % 2 == 0;
  const simd::PatchGrid grid{p.Kh, p.Kw, p.stride, p.top, p.left, p.Wo};
  parallel(p.Ho, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    const int64_t pieces = divide_up((end - begin) * p.Wo, kTogether);
    const int64_t lines = divide_up(end - begin, pieces);
    float* rows = scratch.take(lines * p.Wo * width);
    for (int64_t ho = begin; ho < end; ho += lines) {
      const int64_t n = std::min(lines, end - ho), first = ho * p.Wo;
      simd::load_patches(image, grid, ho, ho + n, rows, p.type);
      Output part = output;
      part.data = offset(output.data, output.type, first * C);
      if (output.residual) part.residual = offset(output.residual, output.type, first * C);
      part.few_rows = p.Ho * p.Wo < 4;
      simd::product({rows, p.type, simd::plain_rows(width), one_run ? width : p.Kw,
                     one_run ? 1 : K.runs, p.Kw},
                    0, n * p.Wo, panels, C, 0, simd::panel_count(C), part);
    }
  });
}

// rows (n, C) in `type` += added (n, C) in `type`
void add_into(void* rows, const void* added, Type type, int64_t n) {
  Scratch scratch;
  float* a = scratch.take(n);
  float* b = scratch.take(n);
  simd::to_float(rows, type, n, 1, n, a, n);
  simd::to_float(added, type, n, 1, n, b, n);
  simd::add_rows(b, n, 1, n, a);
  simd::from_float(a, n, 1, n, rows, type, n);
}

Tensor patch_embed(Tensor image, Tensor weight, std::optional<Tensor> bias,
                   std::optional<Tensor> packed, std::optional<Tensor> norm_weight,
                   std::optional<Tensor> norm_bias, double eps, std::optional<Tensor> pos_embed,
                   std::optional<Tensor> prefix, int64_t stride, std::vector<int64_t> padding) {
  STD_TORCH_CHECK(image.dim() == 4 && weight.dim() == 4 && weight.size(1) == image.size(1) &&
                      stride > 0 && padding.size() == 4 &&
                      *std::min_element(padding.begin(), padding.end()) >= 0 &&
                      *std::max_element(padding.begin(), padding.end()) <= kLargestPadding,
                  "patch_embed: image and weight do not fit");
  const int64_t B = image.size(0), C = weight.size(0), Ci = weight.size(1), Kh = weight.size(2),
                Kw = weight.size(3);
  const int64_t Hp = image.size(2) + padding[0] + padding[2],
                Wp = image.size(3) + padding[1] + padding[3];
  STD_TORCH_CHECK(Kh > 0 && Kw > 0 && Hp >= Kh && Wp >= Kw,
                  "patch_embed: the patch does not fit the image");
  const int64_t Ho = (Hp - Kh) / stride + 1, Wo = (Wp - Kw) / stride + 1, N = Ho * Wo,
                K = Ci * Kh * Kw;
  const int64_t P = prefix.has_value() ? prefix->size(0) : 0,
                pos_rows = pos_embed.has_value() ? pos_embed->size(0) : 0;
  const Type type = type_of(weight);
  STD_TORCH_CHECK(image.is_cpu() && weight.is_cpu() &&
                      (type_of(image) == type || type_of(image) == Type::kByte),
                  "patch_embed: image and weight differ in device or dtype");
  for (const auto& rows : {prefix, pos_embed})
    STD_TORCH_CHECK(!rows.has_value() || (rows->is_cpu() && rows->dim() == 2 &&
                                          rows->size(1) == C && type_of(*rows) == type),
                    "patch_embed: prefix or pos_embed does not fit");
  STD_TORCH_CHECK(!pos_embed.has_value() || pos_rows == N || pos_rows == P + N,
                  "patch_embed: pos_embed does not fit");
  Scratch scratch;
  const float *shift = vector_of(scratch, bias, C, type),
              *norm = vector_of(scratch, norm_weight, C, type),
              *norm_shift = vector_of(scratch, norm_bias, C, type);
  STD_TORCH_CHECK(norm ? std::isfinite(eps) && eps >= 0 : !norm_bias.has_value(),
                  "patch_embed: norm needs a weight and an eps that is finite and not negative");
  Tensor tokens = empty({B, P + N, C}, weight.scalar_type());
  if (tokens.numel() == 0) return tokens;

  const Patches patches{Ci, Kh, Kw, stride, padding[0],         padding[1],
                        Hp, Wp, Ho, Wo,     Ci <= 4 && Kw >= 8, simd::product_type(type)};
  const float* panels;
  if (packed.has_value()) {
    panels =
        check_packed(*packed, C, patches.depth(), "patch_embed: packed is not pack_patch(weight)");
  } else {
    Tensor w = patches.planar
                   ? weight
                   : torch::stable::transpose(torch::stable::transpose(weight, 1, 2), 2, 3);
    w = torch::stable::contiguous(w);
    panels = pack_weight(scratch, w.const_data_ptr(), type, K, 1, C, patches.depth());
  }
  std::optional<Tensor> pos, front;
  if (pos_embed.has_value()) pos = torch::stable::contiguous(*pos_embed);
  if (prefix.has_value()) front = torch::stable::contiguous(*prefix);
  const void* pos_data = pos.has_value() ? pos->const_data_ptr() : nullptr;
  const void* patch_pos = pos_data ? offset(pos_data, type, pos_rows == N ? 0 : P * C) : nullptr;
  const simd::Grid plain = simd::plain_rows(C);
  float* buffer = patches.planar ? nullptr : scratch.take(Ci * Hp * Wp);
  float* raw = norm ? scratch.take(N * C) : nullptr;

  for (int64_t b = 0; b < B; ++b) {
    void* out = offset(tokens.mutable_data_ptr(), type, b * (P + N) * C);
    if (P > 0) {
      std::memcpy(out, front->const_data_ptr(), P * C * size_of(type));
      if (pos_data && pos_rows != N) add_into(out, pos_data, type, P * C);
    }
    const Image source = image_of(image, b);
    void* patch_tokens = offset(out, type, P * C);
    Output output{patch_tokens, type, plain, shift};
    if (norm)
      output = {raw, Type::kFloat, plain, shift};
    else if (patch_pos)
      output.residual = patch_pos, output.residual_grid = plain;
    if (patches.planar)
      planar_product(source, patches, panels, C, output);
    else
      product_parallel(rows_of(source, patches, buffer), N, panels, C, output);
    if (!norm) continue;
    parallel(divide_up(N, 16), [&](int64_t begin, int64_t end) {
      const int64_t first = begin * 16, rows = std::min(end * 16, N) - first;
      float* normed = raw + first * C;
      simd::layer_norm(normed, Type::kFloat, C, rows, C, norm, norm_shift, (float)eps,
                       offset(patch_tokens, type, first * C), type, C);
      if (patch_pos)
        add_into(offset(patch_tokens, type, first * C), offset(patch_pos, type, first * C), type,
                 rows * C);
    });
  }
  return tokens;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hybridops, CPU, m) { m.impl("patch_embed", TORCH_BOX(&patch_embed)); }

}  // namespace hybridops
