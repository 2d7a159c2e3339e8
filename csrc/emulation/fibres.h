// A cluster of CTAs on one CPU thread: a fibre per CUDA thread, switched at barriers and shuffles, in a shuffled order.
//
// The scheduler is unfair on purpose: a CTA, and in it a warp, goes as far as it can before the next one gets its turn. A missing barrier
// then shows, under some seed, as a fibre that reads what another has not written yet, or what is not there any more.
// Shared memory is a heap block per CTA, of exactly the size that the launch asks for, full of NaN when a CTA begins and
// when it has ended.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace eopd::emulation {

constexpr int warp_size = 32;

struct Barrier {
  int expected = 0, arrived = 0;
  uint64_t generation = 0;
};

// The values that the lanes of a warp show each other.
struct Warp {
  Barrier barrier;
  alignas(16) unsigned char shown[warp_size][128];
};

struct Cta {
  bool begun = false;
  std::unique_ptr<char[]> shared;  // [shared_bytes]
  int64_t shared_bytes = 0;
  int running = 0;
  Barrier barrier;
  std::vector<Warp> warps;

  void poison() { std::memset(shared.get(), 0xff, shared_bytes); }
};

// A copy that has been begun and has not arrived yet.
struct Copy {
  void* to;
  const void* from;
  int group;
};

class Cluster;

struct Fibre {
  std::unique_ptr<char[]> stack;
  ucontext_t start{};
  jmp_buf here;
  bool started = false, done = true;
  const Barrier* awaited = nullptr;
  uint64_t generation = 0;
  uint64_t pause = 0;  // the scheduler's turn before which nothing goes on
  bool arrived = false;
  uint64_t arrived_in = 0;  // the generation of the cluster's barrier
  int thread = 0, rank = 0;
  std::vector<Copy> copies;
  int open_group = 0;
  void* fake_stack = nullptr;
};

class Cluster {
 public:
  int index = 0, size = 0, threads = 0;
  std::vector<Cta> ctas;

  static Cluster*& current() {
    static Cluster* cluster = nullptr;
    return cluster;
  }

  // Runs one cluster of a grid to its end.
  void run(int of_index, int of_size, int of_threads, int64_t shared_bytes, uint64_t seed,
           const std::function<void()>& body) {
    index = of_index, size = of_size, threads = of_threads;
    body_ = &body;
    prepare(shared_bytes);
    random_.seed(seed);
    left_ = size * threads;
    last_pause_ = 0;
    current() = this;
    std::vector<int> order(size);
    std::iota(order.begin(), order.end(), 0);
    for (turn_ = 1; left_ > 0; ++turn_) {
      std::shuffle(order.begin(), order.end(), random_);
      bool progress = false;
      for (const int rank : order) {
        if (!std::exchange(ctas[rank].begun, true)) ctas[rank].poison();
        while (advance_cta(rank)) progress = true;
      }
      if (!progress && last_pause_ <= turn_) throw std::runtime_error("deadlock: threads wait at barriers that others will not reach");
    }
  }

  Fibre& fibre() { return *running_; }
  Cta& cta() { return ctas[running_->rank]; }
  bool toss() { return random_() & 1; }

  // Blocks the running fibre until all of a barrier's threads have come.
  void wait(Barrier& barrier) { wait_since(barrier, come(barrier)); }

  // The two halves of the cluster's barrier. By the toss of a coin a thread that has arrived goes on only after others have
  // gone as far as they can: what it should have written before, they miss.
  void arrive() {
    if (std::exchange(running_->arrived, true)) throw std::runtime_error("a thread arrives that has not waited");
    running_->arrived_in = come(barrier_);
    if (!toss()) return;
    running_->pause = last_pause_ = turn_ + 1;
    leave();
  }

  void wait_for_arrivals() {
    if (!std::exchange(running_->arrived, false)) throw std::runtime_error("a thread waits that has not arrived");
    wait_since(barrier_, running_->arrived_in);
  }

 private:
  static constexpr size_t stack_bytes = 256 << 10;

  // Counts the running fibre among those that have come, and returns the generation they come in.
  static uint64_t come(Barrier& barrier) {
    const uint64_t generation = barrier.generation;
    if (++barrier.arrived == barrier.expected) {
      barrier.arrived = 0;
      ++barrier.generation;
    }
    return generation;
  }

  void wait_since(const Barrier& barrier, uint64_t generation) {
    running_->awaited = &barrier;
    running_->generation = generation;
    leave();
  }

  // Runs each warp until all of its threads wait for others, or have ended; returns whether any thread did anything.
  bool advance_cta(int rank) {
    std::vector<int> order(threads / warp_size);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random_);
    bool progress = false;
    for (const int warp : order)
      while (advance_warp(rank * threads + warp * warp_size)) progress = true;
    return progress;
  }

  bool advance_warp(int first) {
    int order[warp_size];
    std::iota(order, order + warp_size, first);
    std::shuffle(order, order + warp_size, random_);
    bool progress = false;
    for (const int i : order) {
      Fibre& fibre = *fibres_[i];
      if (fibre.done || fibre.pause > turn_) continue;
      if (fibre.awaited != nullptr && fibre.awaited->generation == fibre.generation) continue;
      fibre.awaited = nullptr;
      enter(fibre);
      progress = true;
      if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
      if (fibre.done) --left_;
    }
    return progress;
  }

  void prepare(int64_t shared_bytes) {
    ctas.clear();
    ctas.resize(size);
    for (Cta& cta : ctas) {
      cta.shared.reset(new char[shared_bytes]);
      cta.shared_bytes = shared_bytes;
      cta.running = threads;
      cta.barrier.expected = threads;
      cta.warps.resize(threads / warp_size);
      for (Warp& warp : cta.warps) warp.barrier.expected = warp_size;
    }
    barrier_ = Barrier{};
    barrier_.expected = size * threads;
    while (int(fibres_.size()) < size * threads) fibres_.push_back(std::make_unique<Fibre>());
    for (int i = 0; i < size * threads; ++i) {
      Fibre& fibre = *fibres_[i];
      if (!fibre.done) fibre.started = false;  // a launch that failed has left it somewhere in the middle
      fibre.done = false;
      fibre.awaited = nullptr;
      fibre.arrived = false;
      fibre.pause = 0;
      fibre.copies.clear();
      fibre.open_group = 0;
      fibre.rank = i / threads;
      fibre.thread = i % threads;
    }
  }

  // A fibre lives on after its kernel, ready for the next one: to start one costs two system calls.
  static void main_of_a_fibre() {
    Cluster* cluster = current();
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &cluster->scheduler_stack_, &cluster->scheduler_stack_bytes_);
#endif
    for (;;) {
      try {
        (*cluster->body_)();
      } catch (...) {
        cluster->failure_ = std::current_exception();
      }
      Cta& cta = cluster->cta();
      if (--cta.running == 0) cta.poison();
      cluster->running_->done = true;
      cluster->leave();
      cluster = current();
    }
  }

  void enter(Fibre& fibre) {
    running_ = &fibre;
#if defined(__SANITIZE_ADDRESS__)
    start_if_new(fibre);
    __sanitizer_start_switch_fiber(&scheduler_fake_stack_, fibre.stack.get(), stack_bytes);
    swapcontext(&scheduler_, &fibre.start);
    __sanitizer_finish_switch_fiber(scheduler_fake_stack_, nullptr, nullptr);
#else
    if (_setjmp(scheduler_) != 0) return;
    if (start_if_new(fibre)) setcontext(&fibre.start);
    _longjmp(fibre.here, 1);
#endif
  }

  // Switches back to the scheduler.
  void leave() {
    Fibre& fibre = *running_;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&fibre.fake_stack, scheduler_stack_, scheduler_stack_bytes_);
    swapcontext(&fibre.start, &scheduler_);
    __sanitizer_finish_switch_fiber(fibre.fake_stack, &scheduler_stack_, &scheduler_stack_bytes_);
#else
    if (_setjmp(fibre.here) == 0) _longjmp(scheduler_, 1);
#endif
  }

  bool start_if_new(Fibre& fibre) {
    if (fibre.started) return false;
    fibre.started = true;
    if (!fibre.stack) fibre.stack.reset(new char[stack_bytes]);
    getcontext(&fibre.start);
    fibre.start.uc_stack.ss_sp = fibre.stack.get();
    fibre.start.uc_stack.ss_size = stack_bytes;
    fibre.start.uc_link = nullptr;
    makecontext(&fibre.start, main_of_a_fibre, 0);
    return true;
  }

#if defined(__SANITIZE_ADDRESS__)
  ucontext_t scheduler_;
  void* scheduler_fake_stack_ = nullptr;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
#else
  jmp_buf scheduler_;
#endif
  std::mt19937_64 random_;
  int left_ = 0;  // fibres that have not ended
  uint64_t turn_ = 0, last_pause_ = 0;
  Barrier barrier_;
  Fibre* running_ = nullptr;
  const std::function<void()>* body_ = nullptr;
  std::exception_ptr failure_;
  std::vector<std::unique_ptr<Fibre>> fibres_;
};

}  // namespace eopd::emulation
