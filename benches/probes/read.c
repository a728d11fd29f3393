// How fast a core reads 4-bit weights that lie in the last-level cache, doing with them what a GEMV does.
//
//   cc -O3 -march=native benches/probes/read.c -o read && ./read
//
// 8 MiB in panels of 32 KiB; `streams` panels at once; software prefetch some KiB ahead, or none. GB/s.
#define _GNU_SOURCE
#include <immintrin.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

enum { PANEL = 32 << 10, PANELS = 256, HUGE = 2 << 20, ROUNDS = 31 };

static volatile int sink;

static inline __attribute__((always_inline)) void gemv(int streams, const char *w, const char *x, long ahead) {
    const __m512i low = _mm512_set1_epi8(15);
    for (int p = 0; p + streams <= PANELS; p += streams) {
        __m512i sum[4][2] = {{_mm512_setzero_si512()}};
        for (long at = 0; at < PANEL; at += 512) {
            for (int i = 0; i < streams; i++) {
                const char *from = w + (long)(p + i) * PANEL + at;
                for (long line = 0; ahead && line < 512; line += 64) _mm_prefetch(from + ahead + line, _MM_HINT_T0);
            }
            for (int r = 0; r < 8; r++) {
                const int *q = (const int *)(x + at * 2) + r;
                for (int i = 0; i < streams; i++) {
                    __m512i v = _mm512_loadu_si512(w + (long)(p + i) * PANEL + at + 64 * r);
                    sum[i][0] = _mm512_dpbusd_epi32(sum[i][0], _mm512_and_si512(v, low), _mm512_set1_epi32(q[0]));
                    sum[i][1] = _mm512_dpbusd_epi32(sum[i][1], _mm512_andnot_si512(low, v), _mm512_set1_epi32(q[8]));
                }
            }
        }
        __m512i all = _mm512_setzero_si512();
        for (int i = 0; i < streams; i++) all = _mm512_add_epi32(all, _mm512_add_epi32(sum[i][0], sum[i][1]));
        sink += _mm512_reduce_add_epi32(all);
    }
}

static __attribute__((noinline)) void one(const char *w, const char *x, long ahead) { gemv(1, w, x, ahead); }
static __attribute__((noinline)) void two(const char *w, const char *x, long ahead) { gemv(2, w, x, ahead); }
static __attribute__((noinline)) void four(const char *w, const char *x, long ahead) { gemv(4, w, x, ahead); }

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

static int ascending(const void *x, const void *y) {
    double d = *(const double *)x - *(const double *)y;
    return (d > 0) - (d < 0);
}

int main(void) {
    static const struct {
        int streams;
        void (*run)(const char *, const char *, long);
    } loops[] = {{1, one}, {2, two}, {4, four}};
    static const long ahead[] = {0, 1024, 2048, 4096, 8192};
    enum { LOOPS = 3, DISTANCES = 5 };
    static double taken[LOOPS][DISTANCES][ROUNDS];
    size_t size = (size_t)PANEL * PANELS;
    char *raw = mmap(NULL, size + 2 * HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    char *x = calloc(PANEL * 2 + 4096, 1);
    if (raw == MAP_FAILED || x == NULL) return 1;
    char *w = (char *)(((uintptr_t)raw + HUGE - 1) & ~(uintptr_t)(HUGE - 1));
    madvise(w, size, MADV_HUGEPAGE);
    for (size_t i = 0; i < size; i++) w[i] = (char)(i * 2654435761u >> 13);
    for (int round = 0; round < ROUNDS; round++) {
        for (int i = 0; i < LOOPS; i++) {
            for (int j = 0; j < DISTANCES; j++) {
                double start = now();
                loops[i].run(w, x, ahead[j]);
                taken[i][j][round] = now() - start;
            }
        }
    }
    puts("streams   no prefetch   1 KiB   2 KiB   4 KiB   8 KiB ahead (GB/s, median)");
    for (int i = 0; i < LOOPS; i++) {
        printf("%7d   ", loops[i].streams);
        for (int j = 0; j < DISTANCES; j++) {
            qsort(taken[i][j], ROUNDS, sizeof(double), ascending);
            printf(j ? "%8.1f" : "%11.1f", size / taken[i][j][ROUNDS / 2] / 1e9);
        }
        puts("");
    }
    return 0;
}
