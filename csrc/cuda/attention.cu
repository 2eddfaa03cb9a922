// hybridops_cuda::attention: softmax(scale q k^T + bias) v; hybridops/ops/attention.py has the
// meaning.
//
// The softmax runs over blocks of 32 keys with a running maximum, so scores never leave registers
// whatever the number of keys.
#include "attention.cuh"

namespace hybridops::cuda {
namespace {

// Left to itself (0) ptxas aims at 128 registers for fp32 heads of up to 64, and spills 8 bytes on
// sm_90: one block per multiprocessor frees it of that.
template <class T, int kWide>
constexpr int kLeastBlocks = sizeof(T) == 4 && kWide == 4 ? 1 : 0;

template <class T, int kWide>  // kWide: tiles of 16 that Dv takes at most
__global__ void __launch_bounds__(kMostWarps* kWarp, (kLeastBlocks<T, kWide>))
    attention_forward_kernel(Heads<T> q, Heads<T> k, Heads<T> v, Bias<T> bias, Global<T> out,
                             Global<float> lse, Plan p, int activation) {
  const int warp = thread_index() / kWarp, lane = lane_index(), g = lane / 4, t = lane % 4;
  const int ld = p.row + kSkew<T>, ldv = p.row_v + kSkew<T>;
  SharedMemory memory;
  const Shared<T> keys = memory.take<T>(p.heads * p.chunk * ld);
  const Shared<T> values = memory.take<T>(p.heads * p.chunk * ldv);
  const Shared<float> masks = memory.take<float>(p.heads * p.chunk);
  const Shared<T> queries = memory.take<T>(p.warps * kTile * ld) + warp * kTile * ld;

  const Share share = share_of(block_index(), block_index() / p.parts * p.heads, p);
  for (int round = 0; round < share.rounds; ++round) {
    const Turn turn = turn_of(share, round * p.warps + warp);
    const bool active = turn.active;
    const int head = turn.head, first = turn.first;
    const auto [b, h] = place_of(share.first_head + head, p);
    float highest[2] = {-INFINITY, -INFINITY}, sum[2] = {}, o[2 * kWide][4] = {};
    if (active) {
      warp_barrier();  // the last round's queries have been read
      stage(queries, ld, q.at(b, h, first), q.stride_n, q.stride_d, p.Nq - first, p.D, kTile, p.row,
            q.whole, lane, kWarp);
      copy_commit();
      copy_wait<0>();
      warp_barrier();
    }
    for (int c = 0; c < p.chunks; ++c) {
      const int here = least(p.Nk - c * p.chunk, p.chunk);
      const int padded = (here + kTile - 1) / kTile * kTile;
      if (p.chunks > 1 || round == 0) {
        block_barrier();
        stage_heads(keys, ld, p.row, k, share, c * p.chunk, here, padded, p);
        stage_heads(values, ldv, p.row_v, v, share, c * p.chunk, here, padded, p);
        stage_masks(masks, bias.padding, share, c * p.chunk, padded, p);
        copy_commit();
        copy_wait<0>();
        block_barrier();
      }
      if (!active) continue;
      const Shared<T> key = keys + head * p.chunk * ld, value = values + head * p.chunk * ldv;
      const Shared<float> mask = masks + head * p.chunk;
      for (int j0 = 0; j0 < padded; j0 += 32) {
        if (!any_open(mask, j0, padded)) continue;
        float s[4][4] = {};
        for (int d = 0; d < p.row; d += 16) {
          Left<T> a;
          load(a, queries + d, ld);
#pragma unroll
          for (int pair = 0; pair < 2; ++pair) {
            if (j0 + 16 * pair >= padded) continue;
            Right<T> right;
            load(right, key + ((j0 + 16 * pair) * ld + d), ld);
            multiply(s[2 * pair], s[2 * pair + 1], a, right);
          }
        }
        float top[2] = {-INFINITY, -INFINITY};
#pragma unroll
        for (int n = 0; n < 4; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int i = first + g + e / 2 * 8, j = j0 + 8 * n + 2 * t + e % 2;
            float& score = s[n][e];
            const bool open = j < padded && mask.load(j) == 0.0f;
            score = !open ? -INFINITY
                          : fmaf(score, p.scale,
                                 i < p.Nq ? bias.at(b, h, i, c * p.chunk + j, p.Nk) : 0.0f);
            top[e / 2] = fmaxf(top[e / 2], score);
          }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float before = highest[r];
          highest[r] = fmaxf(before, max_over<4>(top[r]));
          const float zero = highest[r] == -INFINITY ? 0.0f : highest[r];  // nothing open yet
          const float shrink = exponential<T>(before - zero);
          sum[r] *= shrink;
#pragma unroll
          for (int n = 0; n < 2 * kWide; ++n) {
            o[n][2 * r] *= shrink;
            o[n][2 * r + 1] *= shrink;
          }
#pragma unroll
          for (int n = 0; n < 4; ++n)
#pragma unroll
            for (int e = 2 * r; e < 2 * r + 2; ++e) {
              s[n][e] = exponential<T>(s[n][e] - zero);
              sum[r] += s[n][e];
            }
        }
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
          if (j0 + 16 * pair >= padded) continue;
          Left<T> a;
          to_left(a, s[2 * pair], s[2 * pair + 1]);
#pragma unroll
          for (int n = 0; n < kWide; ++n) {
            if (16 * n >= p.row_v) continue;
            Right<T> right;
            load_transposed(right, value + ((j0 + 16 * pair) * ldv + 16 * n), ldv);
            multiply(o[2 * n], o[2 * n + 1], a, right);
          }
        }
      }
    }
    if (!active) continue;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int i = first + g + 8 * r;
      const float all = sum_over<4>(sum[r]);
      const float inverse = all == 0.0f ? 0.0f : 1.0f / all;  // no key at all: zeros, as in torch
      if (i >= p.Nq) continue;
      const int64_t row = ((b * p.Nq + i) * p.H + h) * p.Dv;
#pragma unroll
      for (int n = 0; n < 2 * kWide; ++n)
        store_pair(out, row, 8 * n + 2 * t, p.Dv, activate(o[n][2 * r] * inverse, activation),
                   activate(o[n][2 * r + 1] * inverse, activation));
      if (t == 0) lse.store((b * p.H + h) * p.Nq + i, highest[r] + logf(all));
    }
  }
}

std::tuple<Tensor, Tensor> attention(Tensor q, Tensor k, Tensor v, std::optional<Tensor> bias,
                                     std::optional<Tensor> index, std::optional<Tensor> mask,
                                     double scale, int64_t activation) {
  check_attention(q, k, v, bias, index, mask);
  const int64_t B = q.size(0), Nq = q.size(1), H = q.size(2), Nk = k.size(1), Dv = v.size(3);
  Tensor out = empty(q, {B, Nq, H, Dv}, q.scalar_type());
  Tensor lse = empty(q, {B, H, Nq}, ScalarType::Float);
  if (lse.numel() == 0) return {out, lse};
  const Device device(q);
  index = contiguous(index);
  mask = contiguous(mask);
  for_type(q, "attention", [&](auto type) {
    using T = decltype(type);
    for_width(Dv, [&](auto width) {
      const Plan p = plan_of<T>(device, q, v, Nq, Nk, scale, false, false);
      device.launch(attention_forward_kernel<T, width.value>, divide_up(B * H, p.heads) * p.parts,
                    p.warps * kWarp, bytes_of<T>(p, false), heads_of<T>(q), heads_of<T>(k),
                    heads_of<T>(v), bias_of<T>(bias, index, mask), memory_of<T>(out),
                    memory_of<float>(lse), p, (int)activation);
    });
  });
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hybridops_cuda, HYBRIDOPS_KEY, m) {
  m.impl("attention", TORCH_BOX(&attention));
}

}  // namespace hybridops::cuda
