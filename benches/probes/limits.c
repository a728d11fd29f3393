// What a core can multiply at most, for the race to run in turn with the contenders (see limits.py).
//
// Loops of nothing but the instructions that a product of large matrices cannot do without: 32 x 32 sums in four tiles and
// a load for each tile product, or 14 x 32 float sums in registers. Operands stay in the first-level cache; nothing is
// decoded, scaled or written. Built as a shared library by limits.py, or by hand:
//
//   cc -O2 -shared -fPIC benches/probes/limits.c -o limits.so
#define _GNU_SOURCE
#include <immintrin.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { BLOCKS = 8, ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };

static _Alignas(4096) char a[2][BLOCKS * 1024], b[2][BLOCKS * 1024];

// Whether the process may use tiles: 0 when it may.
int limit_tiles(void) { return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) != 0; }

static void configure(int k) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } __attribute__((packed, aligned(64))) c;
    memset(&c, 0, sizeof c);
    c.palette = 1;
    for (int t = 0; t < 8; t++) {
        c.row_bytes[t] = t == 4 || t == 5 ? k : 64;
        c.rows[t] = t >= 6 ? k / 4 : 16;
    }
    __asm__ volatile("ldtilecfg %0" ::"m"(c));
}

// Steps of four tile products each, `k` bytes deep.
#define TILES(name, product)                                                                                   \
    void name(long steps, int k) {                                                                             \
        configure(k);                                                                                          \
        while (steps > 0) {                                                                                    \
            const char *p = a[0], *q = a[1], *r = b[0], *s = b[1];                                             \
            long n = steps < BLOCKS ? steps : BLOCKS;                                                          \
            steps -= n;                                                                                        \
            __asm__ volatile("1:\n"                                                                            \
                             "tileloadd (%2,%5), %%tmm6\n tileloadd (%0,%5), %%tmm4\n"                         \
                             product " %%tmm6, %%tmm4, %%tmm0\n"                                               \
                             "tileloadd (%3,%5), %%tmm7\n" product " %%tmm7, %%tmm4, %%tmm1\n"                 \
                             "tileloadd (%1,%5), %%tmm4\n" product " %%tmm6, %%tmm4, %%tmm2\n"                 \
                             product " %%tmm7, %%tmm4, %%tmm3\n"                                               \
                             "add $1024, %0\n add $1024, %1\n add $1024, %2\n add $1024, %3\n"                 \
                             "dec %4\n jnz 1b\n"                                                               \
                             : "+r"(p), "+r"(q), "+r"(r), "+r"(s), "+r"(n)                                     \
                             : "r"(64L)                                                                        \
                             : "memory");                                                                      \
        }                                                                                                      \
        __asm__ volatile("tilerelease");                                                                       \
    }

TILES(limit_int8, "tdpbssd")
TILES(limit_bf16, "tdpbf16ps")

// Steps of 28 fused multiply-adds of 16 floats: one of K for 14 x 32 sums.
__attribute__((target("avx512f"))) void limit_f32(long steps, int unused) {
    (void)unused;
    __m512 sums[14][2];
    memset(sums, 0, sizeof sums);
    for (long i = 0; i < steps; i++) {
        const float *x = (const float *)a[0] + 14 * (i & 127), *w = (const float *)b[0] + 32 * (i & 63);
        __m512 w0 = _mm512_load_ps(w), w1 = _mm512_load_ps(w + 16);
#pragma GCC unroll 14
        for (int m = 0; m < 14; m++) {
            __m512 v = _mm512_set1_ps(x[m]);
            sums[m][0] = _mm512_fmadd_ps(v, w0, sums[m][0]);
            sums[m][1] = _mm512_fmadd_ps(v, w1, sums[m][1]);
        }
    }
    __m512 all = _mm512_setzero_ps();
#pragma GCC unroll 14
    for (int m = 0; m < 14; m++) all = _mm512_add_ps(all, _mm512_add_ps(sums[m][0], sums[m][1]));
    _mm512_store_ps((float *)a[1], all);
}
