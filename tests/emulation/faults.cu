// One right kernel and the ways to break it: `faults NAME` prints what the emulation says of it.
// tests/test_cuda_emulator.py runs each; "none" must pass, every other name must not.
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "../../csrc/cuda/device.cuh"

namespace hybridops::cuda {
namespace {

constexpr const char* kFaults[] = {"none",         "barrier",    "overwrite",      "rewrite",
                                   "fragment",     "transposed", "tail",           "misaligned",
                                   "wait",         "wait_group", "copy_barrier",   "lost_copy",
                                   "unwritten",    "shared_end", "warp_order",     "divergent",
                                   "early_return", "shuffle",    "unrounded_tf32", "budget"};

bool is(const char* fault, const char* name) { return std::strcmp(fault, name) == 0; }

// y = sum over pairs of 16x16 tiles of a b, n numbers of a copied to tail; 64 threads.
__global__ void multiply(const char* fault, Global<const BF16> a, Global<const BF16> b,
                         Global<float> y, Global<float> tail, int n) {
  SharedMemory memory;
  const Shared<BF16> as = memory.take<BF16>(256), bs = memory.take<BF16>(256);
  const Shared<float> sums = memory.take<float>(64);
  const int thread = thread_index(), lane = thread % kWarp, warp = thread / kWarp;

  // a through registers by both warps, b without registers by half the threads
  for (int i = thread * 4; i < 256; i += 256)
    as.store(i, a.load<Vec<BF16, 4>>(i + is(fault, "misaligned")));
  if (!(is(fault, "lost_copy") && thread == 3) && thread < 32)
    copy_async(bs + 8 * thread, b + 8 * thread, true);
  copy_commit();
  if (is(fault, "wait_group")) copy_commit();
  if (is(fault, "wait_group"))
    copy_wait<2>();
  else if (!is(fault, "wait"))
    copy_wait<0>();
  if (!is(fault, "barrier") && !is(fault, "copy_barrier")) block_barrier();
  if (is(fault, "copy_barrier") && warp == 1) (void)bs.load(8);

  // each warp one half of the columns
  uint32_t af[4], bf[4];
  const int row = lane % 8 + lane / 8 % 2 * 8, column = lane / 16 * 8;
  load_matrices<false>(af, as + row * 16 + column);
  load_matrices<true>(bf, bs + row * 16 + column);
  if (is(fault, "fragment")) std::swap(af[1], af[2]);
  if (is(fault, "transposed")) load_matrices<false>(bf, bs + row * 16 + column);
  float c[4] = {};
  multiply_add(c, af, bf[2 * warp], bf[2 * warp + 1], BF16{});
  for (int i = 0; i < 4; ++i)
    y.store((lane / 4 + i / 2 * 8) * 16 + warp * 8 + 2 * (lane % 4) + i % 2, c[i]);
  if (is(fault, "rewrite")) {
    sums.store(thread, 0.0f);
    block_barrier();
    if (warp == 0) sums.store(thread + 32, 1.0f);
    if (warp == 1) c[0] = sums.load(thread);
  }
  if (is(fault, "overwrite")) as.store((thread + 40) % 64 * 4, BF16{0});

  if (is(fault, "unrounded_tf32")) {
    const uint32_t rough[4] = {bits_of(1.2345678f)};
    multiply_add(c, rough, 0u, 0u, 0.0f);
  }
  if (is(fault, "shuffle") && lane < 16) c[0] = sum_over<32>(c[0]);
  sums.store(is(fault, "shared_end") ? thread + 1 : thread, c[0]);
  if (is(fault, "warp_order")) c[1] = sums.load(thread ^ 1);
  warp_barrier();
  c[1] += sums.load(thread ^ 1);
  if (is(fault, "unwritten")) c[1] += memory.take<float>(64).load(thread);
  if (is(fault, "early_return") && thread == 5) return;
  if (is(fault, "divergent") && warp == 1)
    block_barrier();
  else
    block_barrier();
  for (int i = thread; i < n + is(fault, "tail"); i += 64) tail.store(i, to_float(a.load(i)));
  if (is(fault, "budget")) (void)memory.take<float>(1024);
}

template <class T, class U>
Global<T> whole(std::vector<U>& x) {
  return {x.data(), x.data(), x.data() + x.size()};
}

int run(const char* fault) {
  std::vector<BF16> a(257), b(256);
  for (int i = 0; i < 256; ++i) {  // small integers: exact
    from_float(i * 7 % 11 - 5, a[i]);
    from_float(i * 5 % 13 - 6, b[i]);
  }
  std::vector<float> y(256), tail(17);
  const int64_t bytes = 2 * shared_bytes<BF16>(256) + 2 * shared_bytes<float>(64);
  for (int repeat = 0; repeat < 2; ++repeat)  // both orders of warps
    simt::launch(2, 64, bytes, [&] {
      multiply(fault, whole<const BF16>(a), whole<const BF16>(b), whole<float>(y),
               whole<float>(tail), 17);
    });
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) {
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += to_float(a[i * 16 + k]) * to_float(b[k * 16 + j]);
      if (y[i * 16 + j] != sum) {
        std::printf("wrong result at (%d, %d): %g for %g\n", i, j, y[i * 16 + j], sum);
        return 1;
      }
    }
  std::printf("right\n");
  return 0;
}

}  // namespace
}  // namespace hybridops::cuda

int main(int, char** argv) {
  if (!argv[1]) {
    for (const char* name : hybridops::cuda::kFaults) std::printf("%s\n", name);
    return 0;
  }
  try {
    return hybridops::cuda::run(argv[1]);
  } catch (const std::runtime_error& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
}
