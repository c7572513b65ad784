// The threads that run the parallel loops of a compiled model. Linked into every artifact for a CPU.
//
// TVM's own pool splits a loop evenly over threads that are pinned to cores and wait for each other by spinning: beside
// one busy process each loop waits for the thread without a core. This one shares a host:
//
//   * a loop comes as many small tasks; each thread begins with a share of its own, in order, and takes half of what
//     another has left when it is done: no loop waits for a thread that has not begun;
//   * a worker that finds itself on the core of another thread of its pool moves away: Linux would leave two of them on
//     one core, and all of the other to the neighbour; nobody is pinned otherwise;
//   * who finds nothing to do spins briefly, then sleeps;
//   * where a thread was kept from running (its clock jumped, or the caller waited long for it) all spin less for a while.
//
// A pool belongs to one run at a time: runs at once have pools of their own, runs one after the other share one. A
// forked child starts with none.
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace {

struct Environment {  // TVMParallelGroupEnv
  void* sync_handle;
  int32_t num_task;
};
using Body = int (*)(int task, Environment*, void* closure);

constexpr int kTasksPerThread = 8;
constexpr int kMostTasks = 1 << 15;      // a share is two numbers of 16 bits
constexpr int kPausesPerLook = 32;       // at the clock: about a microsecond
constexpr int64_t kJump = 100'000;       // ns; a thread whose clock jumps so far was not running
constexpr int64_t kLate = 200'000;       // ns; a caller who waits so long waits for a thread that is not running
constexpr int64_t kMemory = 50'000'000;  // ns that a jump is remembered
constexpr int64_t kCrowdedSpin = 5'000;  // ns of spinning where others want the core

int64_t Now() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1'000'000'000LL + now.tv_nsec;
}

void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

void Sleep(std::atomic<uint32_t>& word, uint32_t while_it_is) {
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, while_it_is, nullptr, nullptr, 0);
}

void Wake(std::atomic<uint32_t>& word, int threads) {
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, threads, nullptr, nullptr, 0);
}

// Tasks begin..end of one job, in a word that is changed at once; a word of an earlier job never matches.
struct Range {
  uint32_t job;
  uint16_t begin, end;

  explicit Range(uint64_t word) : job(word >> 32), begin(word >> 16), end(word) {}
  Range(uint32_t job, int begin, int end) : job(job), begin(begin), end(end) {}
  uint64_t Word() const { return static_cast<uint64_t>(job) << 32 | static_cast<uint32_t>(begin) << 16 | end; }
  int Count() const { return end - begin; }
};

struct alignas(64) Share {
  std::atomic<uint64_t> word{0};
  std::atomic<int> cpu{-1};  // that the thread was seen on
};

class Pool {
 public:
  explicit Pool(int threads) : threads_(threads), shares_(new Share[threads]) {
    while (started_ < threads - 1 && StartWorker(started_ + 1)) ++started_;
    threads_ = started_ + 1;
  }

  // Before the runs of a caller: the workers may run where it may, and look for work for so many nanoseconds.
  void Lease(int64_t spin) {
    cpu_set_t allowed;
    CPU_ZERO(&allowed);
    spin_.store(spin, std::memory_order_relaxed);
    if (sched_getaffinity(0, sizeof allowed, &allowed) || CPU_EQUAL(&allowed, &allowed_)) return;
    pthread_mutex_lock(&places_mutex_);
    allowed_ = allowed;
    pthread_mutex_unlock(&places_mutex_);
    places_.fetch_add(1, std::memory_order_relaxed);
  }

  int Run(Body body, void* closure) {
    int tasks = threads_ * kTasksPerThread;
    if (tasks > kMostTasks) tasks = kMostTasks;
    body_.store(body, std::memory_order_relaxed);
    closure_.store(closure, std::memory_order_relaxed);
    tasks_.store(tasks, std::memory_order_relaxed);
    failed_.store(false, std::memory_order_relaxed);
    pending_.store(tasks, std::memory_order_relaxed);
    shares_[0].cpu.store(sched_getcpu(), std::memory_order_relaxed);
    uint32_t job = job_.load(std::memory_order_relaxed) + 1;
    for (int i = 0; i < threads_; ++i)
      shares_[i].word.store(Range(job, tasks * i / threads_, tasks * (i + 1) / threads_).Word(), std::memory_order_release);
    job_.store(job, std::memory_order_seq_cst);
    if (asleep_.load(std::memory_order_seq_cst)) Wake(job_, INT_MAX);
    Work(0, job);
    WaitForOthers(job);
    return failed_.load(std::memory_order_relaxed) ? -1 : 0;
  }

  Pool* next = nullptr;
  int wanted = 0;  // threads that were asked for

 private:
  struct Start {
    Pool* pool;
    int thread;
  };

  bool StartWorker(int thread) {
    auto* start = new Start{this, thread};
    sigset_t all, before;  // signals are for the caller's threads
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_t handle;
    bool started = pthread_create(&handle, nullptr, [](void* argument) -> void* {
      Start start = *static_cast<Start*>(argument);
      delete static_cast<Start*>(argument);
      start.pool->Serve(start.thread);
      return nullptr;
    }, start) == 0;
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    if (started) pthread_detach(handle); else delete start;
    return started;
  }

  [[noreturn]] void Serve(int thread) {
    uint32_t seen = 0, places = 0;
    for (;;) {
      Await(seen);
      seen = job_.load(std::memory_order_seq_cst);
      KeepApart(thread, &places);
      Work(thread, seen);
    }
  }

  // Until there is another job than `seen`.
  void Await(uint32_t seen) {
    Spin idle(*this);
    while (job_.load(std::memory_order_acquire) == seen) {
      if (idle.Once()) continue;
      asleep_.fetch_add(1, std::memory_order_seq_cst);
      while (job_.load(std::memory_order_seq_cst) == seen) Sleep(job_, seen);
      asleep_.fetch_sub(1, std::memory_order_seq_cst);
    }
  }

  // Leave a CPU on which another thread of the pool was seen, for any that none was, if there is one.
  void KeepApart(int thread, uint32_t* places) {
    int here = sched_getcpu();
    bool shared = places_.load(std::memory_order_relaxed) != *places;
    for (int i = 0; i < thread; ++i) shared |= shares_[i].cpu.load(std::memory_order_relaxed) == here;
    if (shared) {
      *places = places_.load(std::memory_order_relaxed);
      pthread_mutex_lock(&places_mutex_);
      cpu_set_t allowed = allowed_, free = allowed_;
      pthread_mutex_unlock(&places_mutex_);
      for (int i = 0; i < threads_; ++i) {
        int cpu = i == thread ? -1 : shares_[i].cpu.load(std::memory_order_relaxed);
        if (cpu >= 0 && cpu < CPU_SETSIZE) CPU_CLR(cpu, &free);
      }
      sched_setaffinity(0, sizeof free, CPU_COUNT(&free) ? &free : &allowed);
      here = sched_getcpu();
    }
    if (shares_[thread].cpu.load(std::memory_order_relaxed) != here)
      shares_[thread].cpu.store(here, std::memory_order_relaxed);
  }

  // Tasks of a job until none can be had.
  void Work(int thread, uint32_t job) {
    int begin, end;
    Environment environment{nullptr, tasks_.load(std::memory_order_relaxed)};
    Body body = body_.load(std::memory_order_relaxed);
    void* closure = closure_.load(std::memory_order_relaxed);
    while (Take(thread, job, &begin, &end) || (Steal(thread, job) && Take(thread, job, &begin, &end))) {
      for (int task = begin; task < end; ++task)
        if (body(task, &environment, closure)) failed_.store(true, std::memory_order_relaxed);
      uint32_t count = end - begin;
      if (pending_.fetch_sub(count, std::memory_order_seq_cst) == count && caller_sleeps_.load(std::memory_order_seq_cst))
        Wake(pending_, 1);
    }
  }

  // The next tasks of a thread's own share: a quarter of it, so that few atomic operations are needed.
  bool Take(int thread, uint32_t job, int* begin, int* end) {
    auto& word = shares_[thread].word;
    uint64_t seen = word.load(std::memory_order_acquire);
    for (;;) {
      Range range(seen);
      if (range.job != job || range.Count() <= 0) return false;
      int count = (range.Count() + 3) / 4;
      if (word.compare_exchange_weak(seen, Range(job, range.begin + count, range.end).Word(), std::memory_order_acq_rel)) {
        *begin = range.begin;
        *end = range.begin + count;
        return true;
      }
    }
  }

  // Half of what another thread has left, from its end, becomes the thread's own share.
  bool Steal(int thread, uint32_t job) {
    for (int i = 1; i < threads_; ++i) {
      auto& word = shares_[(thread + i) % threads_].word;
      uint64_t seen = word.load(std::memory_order_acquire);
      for (;;) {
        Range range(seen);
        if (range.job != job || range.Count() <= 0) break;
        int left = range.Count() / 2;
        if (!word.compare_exchange_weak(seen, Range(job, range.begin, range.begin + left).Word(), std::memory_order_acq_rel))
          continue;
        shares_[thread].word.store(Range(job, range.begin + left, range.end).Word(), std::memory_order_release);
        return true;
      }
    }
    return false;
  }

  void WaitForOthers(uint32_t job) {
    if (pending_.load(std::memory_order_seq_cst) == 0) return;
    Spin patience(*this);
    int64_t start = Now();
    for (uint32_t left; (left = pending_.load(std::memory_order_seq_cst)) != 0;) {
      if (patience.Once()) {
        if (patience.looked) Work(0, job);  // a thread may have taken a share and not begun
        continue;
      }
      caller_sleeps_.store(true, std::memory_order_seq_cst);
      Sleep(pending_, left);
      caller_sleeps_.store(false, std::memory_order_seq_cst);
    }
    int64_t now = Now();
    if (now - start > kLate) crowded_until_.store(now + kMemory, std::memory_order_relaxed);
  }

  // A limited wait, which notices when the thread is kept from running.
  struct Spin {
    explicit Spin(Pool& pool) : pool(pool) {}

    bool Once() {  // false when it has lasted long enough
      Pause();
      looked = false;
      if (++pauses % kPausesPerLook) return true;
      looked = true;
      int64_t now = Now();
      if (start == 0) {
        start = now;
      } else if (now - last > kJump) {
        pool.crowded_until_.store(now + kMemory, std::memory_order_relaxed);
      }
      last = now;
      int64_t most = pool.spin_.load(std::memory_order_relaxed);
      if (now < pool.crowded_until_.load(std::memory_order_relaxed) && most > kCrowdedSpin) most = kCrowdedSpin;
      return now - start < most;
    }

    Pool& pool;
    int pauses = 0;
    bool looked = false;
    int64_t start = 0, last = 0;
  };

  int threads_;
  int started_ = 0;
  Share* shares_;
  cpu_set_t allowed_{};              // where the caller may run
  std::atomic<uint32_t> places_{0};  // counts its changes
  pthread_mutex_t places_mutex_ = PTHREAD_MUTEX_INITIALIZER;
  std::atomic<int64_t> spin_{0};
  std::atomic<uint32_t> asleep_{0};
  std::atomic<int64_t> crowded_until_{0};
  // What the running job is, in one cache line. Who takes tasks of a job has read these of that job: they change after
  // its last task has ended.
  alignas(64) std::atomic<uint32_t> job_{0};
  std::atomic<int> tasks_{0};
  std::atomic<Body> body_{nullptr};
  std::atomic<void*> closure_{nullptr};
  alignas(64) std::atomic<uint32_t> pending_{0};
  std::atomic<bool> caller_sleeps_{false};
  std::atomic<bool> failed_{false};
};

pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
Pool* idle = nullptr;            // pools that no run holds
thread_local Pool* held = nullptr;

void ForgetPools() {             // in a forked child, which has none of the threads
  idle = nullptr;
  held = nullptr;
  pthread_mutex_init(&mutex, nullptr);
}

Pool* Idle(int threads) {
  for (Pool** link = &idle; *link != nullptr; link = &(*link)->next) {
    Pool* pool = *link;
    if (pool->wanted != threads) continue;
    *link = pool->next;
    return pool;
  }
  return nullptr;
}

}  // namespace

extern "C" {

// The runtime writes here what generated code calls for a parallel loop; absent where a model has none.
extern int (*__TVMBackendParallelLaunch)(Body, void*, int) __attribute__((weak));

// Until xopt_pool_leave the calling thread's parallel loops run on so many threads, itself included; `spin`: nanoseconds
// that a thread looks for work before it sleeps.
void xopt_pool_enter(int threads, int64_t spin) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, [] { pthread_atfork(nullptr, nullptr, ForgetPools); });
  if (threads < 2) return;
  pthread_mutex_lock(&mutex);
  Pool* pool = Idle(threads);
  pthread_mutex_unlock(&mutex);
  if (pool == nullptr) {
    pool = new Pool(threads);
    pool->wanted = threads;
  }
  pool->Lease(spin);
  held = pool;
}

void xopt_pool_leave() {
  if (held == nullptr) return;
  pthread_mutex_lock(&mutex);
  held->next = idle;
  idle = held;
  pthread_mutex_unlock(&mutex);
  held = nullptr;
}

int xopt_pool_launch(Body body, void* closure, int) {
  if (held != nullptr) return held->Run(body, closure);
  Environment alone{nullptr, 1};
  return body(0, &alone, closure);
}

// Let this library's parallel loops run by `launch`: the pool of whichever artifact was loaded first serves all.
void xopt_pool_install(int (*launch)(Body, void*, int)) {
  if (&__TVMBackendParallelLaunch != nullptr) __TVMBackendParallelLaunch = launch;
}
}
