// Preloaded: what is allocated with an alignment of 64 bytes, as tensors are, ends at a page that nobody may touch, and
// begins after one. The 0 to 63 bytes between a tensor's end and its page are the alignment's.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>

#define PAGE 4096UL
#define MOST 65536

static struct { char *data, *start; size_t length; } live[MOST];
static char lock;

static void acquire(void) { while (__atomic_test_and_set(&lock, __ATOMIC_ACQUIRE)); }
static void release(void) { __atomic_clear(&lock, __ATOMIC_RELEASE); }

int posix_memalign(void** result, size_t alignment, size_t size) {
  static int (*real)(void**, size_t, size_t);
  if (alignment != 64) {
    if (!real) real = (int (*)(void**, size_t, size_t))dlsym(RTLD_NEXT, "posix_memalign");
    return real(result, alignment, size);
  }
  size_t used = (size + 63) / 64 * 64, inside = (used + PAGE - 1) / PAGE * PAGE, length = inside + 2 * PAGE;
  char* start = mmap(NULL, length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (start == MAP_FAILED || mprotect(start + PAGE, inside, PROT_READ | PROT_WRITE)) return ENOMEM;
  char* data = start + PAGE + inside - used;
  for (char* byte = start + PAGE; byte < start + PAGE + inside; ++byte) *byte = (char)0x7f;  // no accidental zeros
  acquire();
  size_t slot = 0;
  while (slot < MOST && live[slot].data) ++slot;
  if (slot < MOST) {
    live[slot].data = data;
    live[slot].start = start;
    live[slot].length = length;
  }
  release();
  if (slot == MOST) abort();
  *result = data;
  return 0;
}

void free(void* data) {
  static void (*real)(void*);
  if (data && (uintptr_t)data % 64 == 0) {
    acquire();
    for (size_t slot = 0; slot < MOST; ++slot)
      if (live[slot].data == data) {
        munmap(live[slot].start, live[slot].length);
        live[slot].data = NULL;
        release();
        return;
      }
    release();
  }
  if (!real) real = (void (*)(void*))dlsym(RTLD_NEXT, "free");
  real(data);
}
