// Runs many parallel loops on the pool and checks that every iteration was done once; for sanitizers.
//
//   pool_stress CALLERS THREADS LOOPS
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

struct Environment {  // TVMParallelGroupEnv
  void* sync_handle;
  int32_t num_task;
};

extern "C" {
void xopt_pool_enter(int threads, int64_t spin);
void xopt_pool_leave();
int xopt_pool_launch(int (*)(int, Environment*, void*), void*, int);
}

struct Loop {
  std::vector<int> done;  // by iteration; plain numbers, so that a sanitizer sees a race
};

static int Body(int task, Environment* environment, void* closure) {
  auto& done = static_cast<Loop*>(closure)->done;
  size_t begin = done.size() * task / environment->num_task, end = done.size() * (task + 1) / environment->num_task;
  for (size_t i = begin; i < end; ++i) ++done[i];
  return 0;
}

static int Fails(int, Environment*, void*) { return -1; }

int main(int, char** arguments) {
  int callers = atoi(arguments[1]), threads = atoi(arguments[2]), loops = atoi(arguments[3]);
  std::vector<std::thread> all;
  std::vector<int> wrong(callers);
  for (int caller = 0; caller < callers; ++caller) {
    all.emplace_back([=, &wrong] {
      for (int loop = 0; loop < loops; ++loop) {
        xopt_pool_enter(1 + (threads + loop / 50 + caller) % threads, loop % 3 ? 20000 : 0);
        Loop work{std::vector<int>(1 + loop * 37 % 700)};
        if (xopt_pool_launch(Body, &work, 0) != 0) ++wrong[caller];
        for (int count : work.done) wrong[caller] += count != 1;
        if (loop % 10 == 0 && xopt_pool_launch(Fails, &work, 0) == 0) ++wrong[caller];
        xopt_pool_leave();
      }
    });
  }
  for (auto& caller : all) caller.join();
  int total = 0;
  for (int count : wrong) total += count;
  printf("%d wrong\n", total);
  return total != 0;
}
