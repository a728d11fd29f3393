// Which cores slow each other down: nanoseconds for a tile product with its load on one core (16 x 16 x 64 int8), or for 28 fused
// multiply-adds of 16 floats where there are no tiles, while each other core in turn does the same or spins.
//
//   cc -O2 -pthread benches/probes/neighbours.c -o neighbours && ./neighbours [core]
//
// Two hyperthreads of one core show as a pair, whatever the guest is told of the topology.
#define _GNU_SOURCE
#include "limits.c"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { ROUNDS = 15 };
enum { STOP, SAME, SPIN };

static int tiles;
static _Atomic int work, begun;

static void pin(int core) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(core, &set);
    sched_setaffinity(0, sizeof set, &set);
}

static void loop(void) {
    if (tiles)
        limit_int8(500, 64);
    else
        limit_f32(500, 0);
}

static void *other(void *core) {
    pin(*(int *)core);
    atomic_store(&begun, 1);
    for (int w; (w = atomic_load(&work)) != STOP;) {
        if (w == SAME)
            loop();
        else
            __builtin_ia32_pause();
    }
    return 0;
}

static int ascending(const void *x, const void *y) {
    double d = *(const double *)x - *(const double *)y;
    return (d > 0) - (d < 0);
}

static double measure(void) {
    double t[ROUNDS];
    for (int i = 0; i < ROUNDS; i++) {
        struct timespec a, b;
        clock_gettime(CLOCK_MONOTONIC, &a);
        loop();
        clock_gettime(CLOCK_MONOTONIC, &b);
        t[i] = ((b.tv_sec - a.tv_sec) * 1e9 + (b.tv_nsec - a.tv_nsec)) / (500 * (tiles ? 4 : 1));
    }
    qsort(t, ROUNDS, sizeof *t, ascending);
    return t[ROUNDS / 2];
}

int main(int argc, char **argv) {
    int core = argc > 1 ? atoi(argv[1]) : 0, cores = sysconf(_SC_NPROCESSORS_ONLN);
    tiles = limit_tiles() == 0;
    pin(core);
    measure();
    printf("core %d, ns for each %s\n%8s %8s %8s %8s\n", core, tiles ? "tile product" : "28 x 16 products", "beside", "alone", "the same",
           "spinning");
    for (int c = 0; c < cores; c++) {
        if (c == core)
            continue;
        double alone = measure(), beside[2];
        for (int w = SAME; w <= SPIN; w++) {
            pthread_t thread;
            atomic_store(&begun, 0);
            atomic_store(&work, w);
            if (pthread_create(&thread, 0, other, &c))
                return 1;
            while (!atomic_load(&begun))
                ;
            beside[w - SAME] = measure();
            atomic_store(&work, STOP);
            pthread_join(thread, 0);
        }
        printf("%8d %8.1f %8.1f %8.1f\n", c, alone, beside[0], beside[1]);
    }
    return 0;
}
