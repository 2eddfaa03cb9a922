// hybridops_cuda::attention_backward: dq, dk, dv and dbias of hybridops_cuda::attention.
//
// One kernel of two kinds of blocks: 16 queries a warp give dq (and dbias), 16 keys a warp give dk
// and dv, both from scores computed anew. So each of these is summed in registers, and dbias in
// memory by one block, image after image, in a fixed order: no atomics, no dq in memory twice. It
// costs two products of seven; up to about 320 keys the memory is what takes the time.
#include "attention.cuh"
#include "attention_bias.cuh"

namespace hybridops::cuda {
namespace {

// What the backward adds to a Plan: blocks of queries come first, then blocks of keys.
struct BackwardPlan {
  Plan queries, keys;
  int64_t query_blocks;
  int images;  // that a block of queries takes one after the other, adding up dbias; 1 without
};

// A warp's 16 rows against all columns: rows are queries and columns keys, or the other way round.
// x1, x2 are q, dy (or k, v) of the rows, y1, y2 k, v (or q, dy) of the columns.
template <class T, int kWide, bool kKeys>
HYBRIDOPS_DEVICE void backward_block(const Heads<T>& x1, const Heads<T>& x2, const Heads<T>& y1,
                                     const Heads<T>& y2, const Heads<T>& out, const Bias<T>& bias,
                                     Global<const float> lse, Global<T> dx1, Global<T> dx2,
                                     Global<float> dbias, const Plan& p, int64_t block,
                                     int images) {
  constexpr int kPairs = kWide == 8 ? 1 : 2;  // columns at a time, by 16
  const int warp = thread_index() / kWarp, lane = lane_index(), g = lane / 4, t = lane % 4;
  const int ld = p.row + kSkew<T>, ldv = p.row_v + kSkew<T>;
  const int Nx = kKeys ? p.Nk : p.Nq, Ny = kKeys ? p.Nq : p.Nk;
  SharedMemory memory;
  const Shared<T> ys1 = memory.take<T>(p.heads * p.chunk * ld);
  const Shared<T> ys2 = memory.take<T>(p.heads * p.chunk * ldv);
  const Shared<float> ys_shift = memory.take<float>(p.heads * p.chunk);  // mask, or -lse
  const Shared<float> ys_delta = memory.take<float>(p.heads * p.chunk);
  const Shared<T> xs1 = memory.take<T>(p.warps * kTile * ld) + warp * kTile * ld;
  const Shared<T> xs2 = memory.take<T>(p.warps * kTile * ldv) + warp * kTile * ldv;
  const Shared<float> xs_shift = memory.take<float>(p.warps * kTile) + warp * kTile;
  const Shared<float> xs_delta = memory.take<float>(p.warps * kTile) + warp * kTile;

  // delta = sum(dy * out) of query i, by a warp
  const auto sum_of_products = [&](int64_t b, int h, int64_t i, Shared<T> dy) {
    float sum = 0.0f;
    for (int c = lane; c < p.Dv; c += kWarp)
      sum = fmaf(to_float(dy.load(c)), to_float(out.at(b, h, i).load(c * out.stride_d)), sum);
    return sum_over<kWarp>(sum);
  };
  // -lse, so that p = exp(score + shift); -inf for a query without keys, or none at all
  const auto shift_of = [&](int64_t b, int h, int i) {
    const float all = i < p.Nq ? lse.load((b * p.H + h) * p.Nq + i) : -INFINITY;
    return all == -INFINITY ? -INFINITY : -all;
  };

  for (int image = 0; image < images; ++image) {
    int64_t first_head = block / p.parts * p.heads;
    if (images > 1 || dbias) {  // one head of several images
      const int64_t slice = block / p.parts / p.H;
      const int64_t b = slice * images + image;
      if (b >= p.B) break;
      first_head = b * p.H + block / p.parts % p.H;
    }
    const Share share = share_of(block, first_head, p);
    for (int round = 0; round < share.rounds; ++round) {
      const Turn turn = turn_of(share, round * p.warps + warp);
      const bool active = turn.active;
      const int head = turn.head, first = turn.first;
      const auto [b, h] = place_of(share.first_head + head, p);
      const int64_t slice = block / p.parts / p.H;  // of images, in dbias
      const int64_t first_score = (slice * p.H + h) * p.Nq * p.Nk;
      float d1[2 * kWide][4] = {}, d2[kKeys ? 2 * kWide : 1][4] = {};
      float shift[2] = {}, delta[2] = {};
      bool open_rows = active;
      if (active) {
        warp_barrier();
        stage(xs1, ld, x1.at(b, h, first), x1.stride_n, x1.stride_d, Nx - first, p.D, kTile, p.row,
              x1.whole, lane, kWarp);
        stage(xs2, ldv, x2.at(b, h, first), x2.stride_n, x2.stride_d, Nx - first, p.Dv, kTile,
              p.row_v, x2.whole, lane, kWarp);
        copy_commit();
        copy_wait<0>();
        if constexpr (kKeys) {
          stage_mask(xs_shift, bias.padding, b, p.Nk, first, kTile, lane, kWarp);
          warp_barrier();
          open_rows = any_open(xs_shift, 0, kTile);
        } else {
          warp_barrier();
          for (int r = 0; r < kTile; ++r) {
            const float sum =
                first + r < p.Nq ? sum_of_products(b, h, first + r, xs2 + r * ldv) : 0.0f;
            if (lane == 0) {
              xs_delta.store(r, sum);
              xs_shift.store(r, shift_of(b, h, first + r));
            }
          }
          warp_barrier();
        }
        for (int r = 0; r < 2; ++r) {
          shift[r] = xs_shift.load(g + 8 * r);
          if (!kKeys) delta[r] = xs_delta.load(g + 8 * r);
        }
      }
      // dbias in fp32: a first pass takes delta from the very probabilities it is subtracted from,
      // or the error of lse, the same along a row, adds up over the rows that share a bias.
      const int passes = !kKeys && sizeof(T) == 4 && dbias ? 2 : 1;
      float weighted[2] = {}, mass[2] = {};
      for (int pass_and_chunk = 0; pass_and_chunk < passes * p.chunks; ++pass_and_chunk) {
        const int c = pass_and_chunk % p.chunks;
        const bool only_delta = pass_and_chunk < (passes - 1) * p.chunks;
        const int here = least(Ny - c * p.chunk, p.chunk);
        const int padded = (here + kTile - 1) / kTile * kTile;
        if (p.chunks > 1 || round + pass_and_chunk == 0) {
          block_barrier();
          stage_heads(ys1, ld, p.row, y1, share, c * p.chunk, here, padded, p);
          stage_heads(ys2, ldv, p.row_v, y2, share, c * p.chunk, here, padded, p);
          if constexpr (!kKeys) stage_masks(ys_shift, bias.padding, share, c * p.chunk, padded, p);
          copy_commit();
          copy_wait<0>();
          block_barrier();
          if constexpr (kKeys) {
            for (int n = 0; n < share.heads; ++n) {
              const auto [nb, nh] = place_of(share.first_head + n, p);
              for (int y = warp; y < padded; y += p.warps) {
                const int i = c * p.chunk + y;
                const float sum =
                    i < p.Nq ? sum_of_products(nb, nh, i, ys2 + (n * p.chunk + y) * ldv) : 0.0f;
                if (lane == 0) {
                  ys_delta.store(n * p.chunk + y, sum);
                  ys_shift.store(n * p.chunk + y, shift_of(nb, nh, i));
                }
              }
            }
            block_barrier();
          }
        }
        if (!open_rows) continue;
        if (passes == 2 && pass_and_chunk == p.chunks) {
          for (int r = 0; r < 2; ++r) {
            const float all = sum_over<4>(mass[r]);
            delta[r] = sum_over<4>(weighted[r]) / (all == 0.0f ? 1.0f : all);
          }
        }
        const int offset = head * p.chunk;
        for (int y0 = 0; y0 < padded; y0 += 16 * kPairs) {
          if (!kKeys && !dbias && !any_open(ys_shift + offset, y0, least(padded, y0 + 16 * kPairs)))
            continue;
          float s[2 * kPairs][4] = {}, dp[2 * kPairs][4] = {};
          for (int d = 0; d < p.row; d += 16) {
            Left<T> a;
            load(a, xs1 + d, ld);
#pragma unroll
            for (int pair = 0; pair < kPairs; ++pair) {
              if (y0 + 16 * pair >= padded) continue;
              Right<T> right;
              load(right, ys1 + ((offset + y0 + 16 * pair) * ld + d), ld);
              multiply(s[2 * pair], s[2 * pair + 1], a, right);
            }
          }
          for (int d = 0; d < p.row_v; d += 16) {
            Left<T> a;
            load(a, xs2 + d, ldv);
#pragma unroll
            for (int pair = 0; pair < kPairs; ++pair) {
              if (y0 + 16 * pair >= padded) continue;
              Right<T> right;
              load(right, ys2 + ((offset + y0 + 16 * pair) * ldv + d), ldv);
              multiply(dp[2 * pair], dp[2 * pair + 1], a, right);
            }
          }
#pragma unroll
          for (int n = 0; n < 2 * kPairs; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const int x = first + g + e / 2 * 8, y_here = y0 + 8 * n + 2 * t + e % 2;
              const int y = c * p.chunk + y_here, i = kKeys ? y : x, j = kKeys ? x : y;
              const bool exists = y_here < padded && i < p.Nq && j < p.Nk;
              const float of_y = exists ? ys_shift.load(offset + y_here) : 0.0f;
              const float of_delta =
                  kKeys ? exists ? ys_delta.load(offset + y_here) : 0.0f : delta[e / 2];
              // one of the two is the mask and the other -lse; -inf closes either
              const bool open = exists && of_y != -INFINITY && shift[e / 2] != -INFINITY;
              float probability = 0.0f;
              if (open)
                probability = exponential<T>(fmaf(s[n][e], p.scale, bias.at(b, h, i, j, p.Nk)) +
                                             (kKeys ? of_y : shift[e / 2]));
              if (only_delta) {
                weighted[e / 2] = fmaf(probability, dp[n][e], weighted[e / 2]);
                mass[e / 2] += probability;
                continue;
              }
              s[n][e] = probability;
              dp[n][e] = open ? probability * (dp[n][e] - of_delta) : 0.0f;
              if (!kKeys && dbias && exists) {
                const int64_t place = first_score + (int64_t)i * p.Nk + j;
                dbias.store(place, image ? dbias.load(place) + dp[n][e] : dp[n][e]);
              }
            }
          if (only_delta) continue;
#pragma unroll
          for (int pair = 0; pair < kPairs; ++pair) {
            if (y0 + 16 * pair >= padded) continue;
            const int row = offset + y0 + 16 * pair;
            Left<T> a;
            Right<T> right;
            to_left(a, dp[2 * pair], dp[2 * pair + 1]);
#pragma unroll
            for (int n = 0; n < kWide; ++n) {
              if (16 * n >= p.row) continue;
              load_transposed(right, ys1 + (row * ld + 16 * n), ld);
              multiply(d1[2 * n], d1[2 * n + 1], a, right);
            }
            if constexpr (kKeys) {
              to_left(a, s[2 * pair], s[2 * pair + 1]);
#pragma unroll
              for (int n = 0; n < kWide; ++n) {
                if (16 * n >= p.row_v) continue;
                load_transposed(right, ys2 + (row * ldv + 16 * n), ldv);
                multiply(d2[2 * n], d2[2 * n + 1], a, right);
              }
            }
          }
        }
      }
      if (!active) continue;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int x = first + g + 8 * r;
        if (x >= Nx) continue;
        const int64_t row = (b * Nx + x) * p.H + h;
#pragma unroll
        for (int n = 0; n < 2 * kWide; ++n) {
          store_pair(dx1, row * p.D, 8 * n + 2 * t, p.D, d1[n][2 * r] * p.scale,
                     d1[n][2 * r + 1] * p.scale);
          if constexpr (kKeys)
            store_pair(dx2, row * p.Dv, 8 * n + 2 * t, p.Dv, d2[n][2 * r], d2[n][2 * r + 1]);
        }
      }
    }
  }
}

// dbias: partial sums (slices of images, H, Nq, Nk), or null.
template <class T, int kWide>
__global__ void __launch_bounds__(kMostWarps* kWarp, 1)
    attention_backward_kernel(Heads<T> q, Heads<T> k, Heads<T> v, Heads<T> dy, Heads<T> out,
                              Bias<T> bias, Global<const float> lse, Global<T> dq, Global<T> dk,
                              Global<T> dv, Global<float> dbias, BackwardPlan plan) {
  const int64_t block = block_index();
  if (block < plan.query_blocks)
    backward_block<T, kWide, false>(q, dy, k, v, out, bias, lse, dq, Global<T>{}, dbias,
                                    plan.queries, block, plan.images);
  else
    backward_block<T, kWide, true>(k, v, q, dy, out, bias, lse, dk, dv, Global<float>{}, plan.keys,
                                   block - plan.query_blocks, 1);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(Tensor dy, Tensor q, Tensor k,
                                                              Tensor v, std::optional<Tensor> bias,
                                                              std::optional<Tensor> index,
                                                              std::optional<Tensor> mask,
                                                              Tensor out, Tensor lse, double scale,
                                                              bool needs_dbias) {
  check_attention(q, k, v, bias, index, mask);
  const int64_t B = q.size(0), Nq = q.size(1), H = q.size(2), Nk = k.size(1), D = q.size(3),
                Dv = v.size(3);
  for (const Tensor* x : {&dy, &out})
    STD_TORCH_CHECK(x->dim() == 4 && x->size(0) == B && x->size(1) == Nq && x->size(2) == H &&
                        x->size(3) == Dv && x->scalar_type() == q.scalar_type(),
                    "attention_backward: dy and out do not fit q and v");
  STD_TORCH_CHECK(lse.numel() == B * H * Nq && lse.scalar_type() == ScalarType::Float,
                  "attention_backward: lse does not fit q");
  STD_TORCH_CHECK(!needs_dbias || bias.has_value(), "attention_backward: dbias of no bias");
  Tensor dq = empty(q, {B, Nq, H, D}, q.scalar_type());
  Tensor dk = empty(q, {B, Nk, H, D}, q.scalar_type());
  Tensor dv = empty(q, {B, Nk, H, Dv}, q.scalar_type());
  Tensor dbias = empty(q, {0}, ScalarType::Float);
  const Device device(q);
  index = contiguous(index);
  mask = contiguous(mask);
  lse = torch::stable::contiguous(lse);
  std::optional<Tensor> partial;
  for_type(q, "attention_backward", [&](auto type) {
    using T = decltype(type);
    for_width(std::max(D, Dv), [&](auto width) {
      BackwardPlan plan{};
      plan.images = 1;
      const bool queries = B * H * Nq > 0, keys = B * H * Nk > 0;
      if (queries) plan.queries = plan_of<T>(device, q, v, Nq, Nk, scale, true, needs_dbias);
      if (keys) plan.keys = plan_of<T>(device, q, v, Nk, Nq, scale, true, false);
      int64_t groups = queries ? divide_up(B * H, plan.queries.heads) : 0, slices = 0;
      if (needs_dbias && queries) {
        const bool per_image = !index.has_value() && bias->size(0) > 1;
        const int64_t enough = divide_up(2 * device.processors(), H * plan.queries.parts);
        plan.images = per_image ? 1 : (int)divide_up(B, std::min(B, enough));
        slices = divide_up(B, plan.images);
        groups = slices * H;
      }
      if (needs_dbias) partial = empty(q, {slices, H, Nq, Nk}, ScalarType::Float);
      plan.query_blocks = queries ? groups * plan.queries.parts : 0;
      const int64_t key_blocks = keys ? divide_up(B * H, plan.keys.heads) * plan.keys.parts : 0;
      if (plan.query_blocks + key_blocks == 0) return;
      // one block size for both kinds
      const int warps = std::max(plan.queries.warps, plan.keys.warps);
      int64_t bytes = 0;
      for (Plan* p : {&plan.queries, &plan.keys}) {
        if (p->warps == 0) continue;
        p->warps = warps;
        while (p->chunk > kTile && bytes_of<T>(*p, true) > device.shared_limit()) p->chunk -= kTile;
        const int64_t columns = p == &plan.queries ? Nk : Nq;
        p->chunks = (int)divide_up(columns, p->chunk);
        bytes = std::max(bytes, bytes_of<T>(*p, true));
      }
      device.launch(attention_backward_kernel<T, width.value>, plan.query_blocks + key_blocks,
                    warps * kWarp, bytes, heads_of<T>(q), heads_of<T>(k), heads_of<T>(v),
                    heads_of<T>(dy), heads_of<T>(out), bias_of<T>(bias, index, mask),
                    memory_of<const float>(lse), memory_of<T>(dq), memory_of<T>(dk),
                    memory_of<T>(dv), memory_of<float>(partial), plan);
    });
  });
  if (needs_dbias) dbias = reduce_bias(device, *partial, *bias, index);
  return {dq, dk, dv, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hybridops_cuda, HYBRIDOPS_KEY, m) {
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}

}  // namespace hybridops::cuda
