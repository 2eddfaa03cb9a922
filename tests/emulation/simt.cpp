// The scheduler of simt.h: fibers, barriers, and who touched which byte of shared memory when.
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/cuda/device.cuh"

// Saves the callee's registers and stack pointer in *from, takes up those in to. x86-64 System V.
extern "C" void hybridops_simt_switch(void** from, void* to);
asm(R"(
.text
.hidden hybridops_simt_switch
.globl hybridops_simt_switch
.type hybridops_simt_switch, @function
hybridops_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size hybridops_simt_switch, .-hybridops_simt_switch
)");

namespace hybridops::cuda::simt {
namespace {

constexpr int kMaxThreads = 1024, kStack = 64 * 1024;

enum class State { kReady, kInWarp, kAtBarrier, kDone };

struct Copy {
  int64_t to;
  int group;
  char bytes[16];
};

struct Fiber {
  void* stack_pointer;
  State state;
  int line;                  // of the barrier it waits at
  int groups;                // of async copies committed
  std::vector<Copy> copies;  // under way
};

struct Warp {
  void* lanes[kWarp];
  int arrived, line;
  const char* what;
  int64_t epoch;  // warp barriers so far
};

// A moment in a thread's life; what happened before it is known by barriers alone.
struct Moment {
  int thread;
  int64_t block_epoch, warp_epoch;
};

// Two bytes of shared memory: who wrote last, and who read since. kInFlight: by copy_async.
enum class Readers : uint8_t { kNone, kOne, kOneWarp, kMany };
struct Shadow {
  Moment write, read;
  Readers readers;
  bool in_flight;
};

struct Machine {
  Place place;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<Shadow> shadow = std::vector<Shadow>(kSharedLimit / 2);
  char* stacks;
  alignas(16) char shared[kSharedLimit];
  int64_t shared_size = 0;
  int64_t epoch = 1;        // block barriers and block starts so far: never goes back
  int64_t block_start = 0;  // the epoch this block began at
  int64_t launches = 0;
  void* scheduler = nullptr;
  const std::function<void()>* kernel = nullptr;
  bool failed = false;
  std::string fault;

  Machine() {
    stacks = (char*)mmap(nullptr, (size_t)kMaxThreads * kStack, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stacks == MAP_FAILED) throw std::runtime_error("simt: no memory for stacks");
  }
  ~Machine() { munmap(stacks, (size_t)kMaxThreads * kStack); }
};

Machine& machine() {
  static thread_local Machine instance;
  return instance;
}

Fiber& self(Machine& m) { return m.fibers[m.place.thread]; }

void leave(Machine& m) { hybridops_simt_switch(&self(m).stack_pointer, m.scheduler); }

void begin_fiber() {
  Machine& m = machine();
  (*m.kernel)();
  self(m).state = State::kDone;
  if (!self(m).copies.empty()) fail("a thread ended with async copies under way");
  leave(m);
  __builtin_unreachable();
}

void prepare(Machine& m, int thread) {
  Fiber& f = m.fibers[thread];
  void** top = (void**)(m.stacks + (size_t)(thread + 1) * kStack);
  *--top = nullptr;              // so that begin_fiber finds the stack aligned as after a call
  *--top = (void*)&begin_fiber;  // where the first switch returns to
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  f.stack_pointer = top;
  f.state = State::kReady;
  f.groups = 0;
  f.copies.clear();
}

void run_warp(Machine& m, int warp) {
  for (bool any = true; any && !m.failed;) {
    any = false;
    for (int lane = 0; lane < kWarp && !m.failed; ++lane) {
      const int thread = warp * kWarp + lane;
      if (m.fibers[thread].state != State::kReady) continue;
      any = true;
      m.place.thread = thread;
      hybridops_simt_switch(&m.scheduler, m.fibers[thread].stack_pointer);
    }
  }
}

void set_fault(Machine& m, const char* what, int thread) {
  m.failed = true;
  char text[400];
  std::snprintf(text, sizeof text, "%s (block %ld, thread %d of %d)", what, (long)m.place.block,
                thread, m.place.threads);
  m.fault = text;
}

// Nobody can go on: all at one barrier is how it should be.
void release_barrier(Machine& m) {
  for (int t = 0; t < m.place.threads && !m.failed; ++t) {
    const Fiber& f = m.fibers[t];
    if (f.state == State::kInWarp)
      set_fault(m, "divergence: a warp instruction that not all lanes reach", t);
    else if (f.state == State::kDone || f.line != m.fibers[0].line)
      set_fault(m, "divergence: a block_barrier that not all threads reach", t);
  }
  for (int t = 0; t < m.place.threads; ++t) m.fibers[t].state = State::kReady;
  ++m.epoch;
}

void run_block(Machine& m, bool backwards) {
  m.block_start = ++m.epoch;
  std::memset(m.shared, 0xff, m.shared_size);  // NaN in every floating-point type
  for (int t = 0; t < m.place.threads; ++t) prepare(m, t);
  const int warps = m.place.threads / kWarp;
  for (Warp& w : m.warps) w = {};
  for (;;) {
    for (int w = 0; w < warps && !m.failed; ++w) run_warp(m, backwards ? warps - 1 - w : w);
    const auto done = [&](int t) { return m.fibers[t].state == State::kDone; };
    bool all = true;
    for (int t = 0; t < m.place.threads; ++t) all &= done(t);
    if (all || m.failed) return;
    release_barrier(m);
    if (m.failed) return;
  }
}

Moment now(Machine& m) {
  const int thread = m.place.thread;
  return {thread, m.epoch, m.warps[thread / kWarp].epoch};
}

bool is_before(const Moment& a, const Moment& b) {
  if (a.thread == b.thread || a.block_epoch < b.block_epoch) return true;
  return a.thread / kWarp == b.thread / kWarp && a.warp_epoch < b.warp_epoch;
}

void touch(int64_t offset, int64_t bytes, bool writes, bool in_flight = false) {
  Machine& m = machine();
  const Moment at = now(m);
  for (int64_t i = offset / 2; i < (offset + bytes) / 2; ++i) {
    Shadow& s = m.shadow[i];
    const bool written = s.write.block_epoch >= m.block_start;
    const bool was_read = s.readers != Readers::kNone && s.read.block_epoch >= m.block_start;
    if (written && s.in_flight && !in_flight)
      fail("shared byte %ld is touched while copy_async writes it", (long)(2 * i));
    if (!writes && !written)
      fail("shared byte %ld is read before anything wrote it", (long)(2 * i));
    if (written && !is_before(s.write, at))
      fail("race: shared byte %ld, written by thread %d, no barrier between", (long)(2 * i),
           s.write.thread);
    if (writes) {
      const bool same_epoch = was_read && s.read.block_epoch == at.block_epoch;
      const bool ordered =
          s.readers == Readers::kMany ? false
          : s.readers == Readers::kOneWarp
              ? s.read.thread / kWarp == at.thread / kWarp && s.read.warp_epoch < at.warp_epoch
              : is_before(s.read, at);
      if (same_epoch && !ordered)
        fail("race: shared byte %ld, read by thread %d%s, no barrier between", (long)(2 * i),
             s.read.thread, s.readers == Readers::kOne ? "" : " and others");
      s = {at, {}, Readers::kNone, in_flight};
    } else if (!was_read || s.read.block_epoch < at.block_epoch) {
      s.read = at;
      s.readers = Readers::kOne;
    } else if (s.read.thread / kWarp != at.thread / kWarp) {
      s.readers = Readers::kMany;
    } else {
      if (s.read.thread != at.thread && s.readers == Readers::kOne) s.readers = Readers::kOneWarp;
      s.read.warp_epoch = std::max(s.read.warp_epoch, at.warp_epoch);
    }
  }
}

}  // namespace

const Place& here() { return machine().place; }
char* shared_base() { return machine().shared; }
int64_t shared_size() { return machine().shared_size; }
void shared_read(int64_t offset, int64_t bytes) { touch(offset, bytes, false); }
void shared_write(int64_t offset, int64_t bytes) { touch(offset, bytes, true); }

void fail(const char* format, ...) {
  Machine& m = machine();
  char text[300];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  set_fault(m, text, m.place.thread);
  leave(m);
  __builtin_unreachable();
}

void async_copy(int64_t to, const void* from) {
  Machine& m = machine();
  touch(to, 16, true, true);
  std::memset(m.shared + to, 0xff, 16);
  Copy copy{to, self(m).groups, {}};
  if (from) std::memcpy(copy.bytes, from, 16);
  self(m).copies.push_back(copy);
}

void async_commit() { ++self(machine()).groups; }

void async_wait(int pending) {
  Machine& m = machine();
  Fiber& f = self(m);
  const auto landed = [&](const Copy& copy) { return copy.group < f.groups - pending; };
  for (const Copy& copy : f.copies) {
    if (!landed(copy)) continue;
    std::memcpy(m.shared + copy.to, copy.bytes, 16);
    for (int64_t i = copy.to / 2; i < copy.to / 2 + 8; ++i)
      m.shadow[i] = {now(m), {}, Readers::kNone, false};
  }
  f.copies.erase(std::remove_if(f.copies.begin(), f.copies.end(), landed), f.copies.end());
}

void block_barrier(int line) {
  Machine& m = machine();
  self(m).state = State::kAtBarrier;
  self(m).line = line;
  leave(m);
}

void warp_meet(const char* what, int line, void* mine, void (*act)(void**)) {
  Machine& m = machine();
  const int thread = m.place.thread, first = thread / kWarp * kWarp;
  Warp& w = m.warps[thread / kWarp];
  if (w.arrived && (w.line != line || std::strcmp(w.what, what)))
    fail("divergence: lanes at different warp instructions, %s in line %d and %s in line %d",
         w.what, w.line, what, line);
  w.what = what;
  w.line = line;
  w.lanes[thread - first] = mine;
  if (++w.arrived < kWarp) {
    m.fibers[thread].state = State::kInWarp;
    leave(m);
    return;
  }
  w.arrived = 0;
  act(w.lanes);
  for (int lane = 0; lane < kWarp; ++lane) m.fibers[first + lane].state = State::kReady;
}

void warp_barrier(int line) {
  warp_meet("warp_barrier", line, nullptr, [](void**) {
    Machine& m = machine();
    ++m.warps[m.place.thread / kWarp].epoch;
  });
}

void launch(int64_t blocks, int threads, int64_t bytes, const std::function<void()>& kernel) {
  Machine& m = machine();
  if (blocks < 1 || blocks > 0x7fffffff || threads < kWarp || threads > kMaxThreads ||
      threads % kWarp || bytes > kSharedLimit)
    throw std::runtime_error("simt: a launch of " + std::to_string(blocks) + " blocks of " +
                             std::to_string(threads) + " threads with " + std::to_string(bytes) +
                             " bytes of shared memory");
  m.failed = false;
  m.kernel = &kernel;
  m.shared_size = bytes;
  m.fibers.resize(std::max<size_t>(m.fibers.size(), threads));
  m.warps.assign(threads / kWarp, {});
  // Every other launch runs blocks and warps in the opposite order: results may not depend on it.
  const bool backwards = ++m.launches % 2;
  for (int64_t b = 0; b < blocks && !m.failed; ++b) {
    m.place = {backwards ? blocks - 1 - b : b, 0, threads};
    run_block(m, backwards);
  }
  if (m.failed) throw std::runtime_error("simt: " + m.fault);
}

}  // namespace hybridops::cuda::simt
