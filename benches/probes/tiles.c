// What tile instructions cost on this core, in nanoseconds for each tile product (16 x 16 x 64 int8).
//
//   cc -O2 benches/probes/tiles.c -o tiles && ./tiles
//
// The loops are those of a kernel of 32 x 32 sums (two tiles by two), without and with its loads; operands stay in the
// first-level cache. Where loads and products overlap, "products and loads" costs what the dearer of the two does;
// where they do not, it costs their sum. The last loops do with fewer than eight tile registers: by writing each again as soon
// as its last product is issued, and two of them by loading more.
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { ROUNDS = 41, CALLS = 1000, STEPS = 8, ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };

static struct {
    uint8_t palette, start, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} __attribute__((packed, aligned(64))) config;

static _Alignas(4096) char a[2][STEPS * 1024], b[2][STEPS * 1024];

#define LOAD(tile, operand) "tileloadd (%" operand ",%5), %%tmm" tile "\n"
#define PRODUCT(sum, left, right) "tdpbssd %%tmm" right ", %%tmm" left ", %%tmm" sum "\n"
#define LOOP(name, body)                                                                                       \
    static __attribute__((noinline)) void name(void) {                                                         \
        const char *p = a[0], *q = a[1], *r = b[0], *s = b[1];                                                 \
        long n = STEPS;                                                                                        \
        __asm__ volatile("1:\n" body "add $1024, %0\n add $1024, %1\n add $1024, %2\n add $1024, %3\n"         \
                         "dec %4\n jnz 1b\n"                                                                   \
                         : "+r"(p), "+r"(q), "+r"(r), "+r"(s), "+r"(n)                                         \
                         : "r"(64L)                                                                            \
                         : "memory");                                                                          \
    }

LOOP(products, PRODUCT("0", "4", "6") PRODUCT("1", "4", "7") PRODUCT("2", "5", "6") PRODUCT("3", "5", "7"))
LOOP(loads, LOAD("4", "0") LOAD("5", "1") LOAD("6", "2") LOAD("7", "3"))
LOOP(both, LOAD("6", "2") LOAD("4", "0") PRODUCT("0", "4", "6") LOAD("7", "3") PRODUCT("1", "4", "7") LOAD("5", "1")
               PRODUCT("2", "5", "6") PRODUCT("3", "5", "7"))
LOOP(half, LOAD("6", "2") LOAD("7", "3") PRODUCT("0", "4", "6") PRODUCT("1", "4", "7") PRODUCT("2", "5", "6")
               PRODUCT("3", "5", "7"))

LOOP(seven, LOAD("6", "2") LOAD("4", "0") PRODUCT("0", "4", "6") LOAD("7", "3") PRODUCT("1", "4", "7") LOAD("4", "1")
                PRODUCT("2", "4", "6") PRODUCT("3", "4", "7"))
LOOP(six, LOAD("6", "2") LOAD("4", "0") PRODUCT("0", "4", "6") LOAD("4", "1") PRODUCT("2", "4", "6") LOAD("6", "3")
              PRODUCT("3", "4", "6") LOAD("4", "0") PRODUCT("1", "4", "6"))
LOOP(four, LOAD("6", "2") LOAD("4", "0") PRODUCT("0", "4", "6") LOAD("4", "1") PRODUCT("1", "4", "6") LOAD("6", "3")
               LOAD("4", "0") PRODUCT("0", "4", "6") LOAD("4", "1") PRODUCT("1", "4", "6"))

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
        const char *name;
        void (*run)(void);
    } loops[] = {{"products", products}, {"loads", loads}, {"products and loads", both}, {"half the loads", half},
                 {"seven registers", seven}, {"six, five loads", six}, {"four, six loads", four}};
    enum { COUNT = sizeof loops / sizeof *loops };
    static double ns[COUNT][ROUNDS];
    if (syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) != 0) {
        puts("no tiles here");
        return 1;
    }
    config.palette = 1;
    for (int t = 0; t < 8; t++) {
        config.row_bytes[t] = 64;
        config.rows[t] = 16;
    }
    for (int round = 0; round < ROUNDS; round++) {
        for (int i = 0; i < COUNT; i++) {
            // What a loop before has written takes no register of this one.
            __asm__ volatile("tilerelease\n ldtilecfg %0" ::"m"(config));
            double start = now();
            for (int call = 0; call < CALLS; call++) loops[i].run();
            ns[i][round] = (now() - start) * 1e9 / (4.0 * STEPS * CALLS);
        }
    }
    __asm__ volatile("tilerelease");
    puts("ns for each of four in a step      p10  median     p90");
    for (int i = 0; i < COUNT; i++) {
        qsort(ns[i], ROUNDS, sizeof(double), ascending);
        printf("%-28s  %8.2f%8.2f%8.2f\n", loops[i].name, ns[i][ROUNDS / 10], ns[i][ROUNDS / 2], ns[i][ROUNDS * 9 / 10]);
    }
    return 0;
}
