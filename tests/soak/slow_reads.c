// For LD_PRELOAD: each read of a file under $SLOW_PLACE takes $SLOW_MS milliseconds longer, and is counted in the file
// $SLOW_COUNTS, which holds two 64-bit numbers: reads and bytes. So does a network's file system, whoever reads.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

static long *counts;
static struct timespec pause_;
static const char *place;

__attribute__((constructor)) static void start(void) {
  place = getenv("SLOW_PLACE");
  int file = open(getenv("SLOW_COUNTS"), O_RDWR);
  counts = mmap(0, 16, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  long ms = atol(getenv("SLOW_MS"));
  pause_.tv_sec = ms / 1000, pause_.tv_nsec = ms % 1000 * 1000000;
}

static ssize_t slow(int file, ssize_t given) {
  char link[32], path[4096] = "";
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  if (counts && readlink(link, path, sizeof path - 1) > 0 && !strncmp(path, place, strlen(place))) {
    nanosleep(&pause_, 0);
    __atomic_add_fetch(counts, 1, __ATOMIC_RELAXED);
    __atomic_add_fetch(counts + 1, given > 0 ? given : 0, __ATOMIC_RELAXED);
  }
  return given;
}

#define REAL(name, ...) ((ssize_t (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name))
ssize_t read(int f, void *to, size_t n) { return slow(f, REAL("read", int, void *, size_t)(f, to, n)); }
ssize_t pread(int f, void *to, size_t n, off_t at) {
  return slow(f, REAL("pread", int, void *, size_t, off_t)(f, to, n, at));
}
ssize_t pread64(int f, void *to, size_t n, off_t at) {
  return slow(f, REAL("pread64", int, void *, size_t, off_t)(f, to, n, at));
}
