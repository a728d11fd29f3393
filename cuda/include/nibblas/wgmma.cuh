// wgmma of sm_90a: 64 rows of W from registers times N rows of X from shared memory, and bit planes with both operands
// there. The instruction names every register of its accumulator, so its text is put together by macros.
#pragma once
#include "base.cuh"

DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory"); }
// Keeps the compiler from moving uses of an accumulator across a wait.
DEVICE void pin(float &c) { asm volatile("" : "+f"(c)::"memory"); }
DEVICE void pin(int &c) { asm volatile("" : "+r"(c)::"memory"); }
template <int N> DEVICE void pin(float (&c)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) pin(c[i]);
}
template <int N> DEVICE void pin(int (&c)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) pin(c[i]);
}

// A K-major operand in rows of 128 bytes, 16-byte pieces exchanged by piece ^ (row % 8); 1024-byte aligned. Along K one
// adds bytes / 16.
DEVICE u64 describe(u32 address) {
    return (u64)((address & 0x3ffffu) >> 4) | ((u64)1 << 16) | ((u64)(1024 >> 4) << 32) | ((u64)1 << 62);
}

// clang-format off
// The first registers of an instruction, and the four operands after them.
#define NB_FIRST_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define NB_FIRST_32 NB_FIRST_16 \
    ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NB_FIRST_64 NB_FIRST_32 \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
    ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NB_FIRST_128 NB_FIRST_64 \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
    ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95" \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
    ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define NB_WEIGHTS_16 "{%16, %17, %18, %19}, %20"
#define NB_ADD_16 "%21"
#define NB_BOTH_16 "%16, %17"
#define NB_ADD_BITS_16 "%18"
#define NB_WEIGHTS_32 "{%32, %33, %34, %35}, %36"
#define NB_ADD_32 "%37"
#define NB_BOTH_32 "%32, %33"
#define NB_ADD_BITS_32 "%34"
#define NB_WEIGHTS_64 "{%64, %65, %66, %67}, %68"
#define NB_ADD_64 "%69"
#define NB_BOTH_64 "%64, %65"
#define NB_ADD_BITS_64 "%66"
#define NB_WEIGHTS_128 "{%128, %129, %130, %131}, %132"
#define NB_ADD_128 "%133"
#define NB_BOTH_128 "%128, %129"
#define NB_ADD_BITS_128 "%130"
#define NB_C4(k, i) k(c[i]), k(c[i + 1]), k(c[i + 2]), k(c[i + 3])
#define NB_C16(k, i) NB_C4(k, i), NB_C4(k, i + 4), NB_C4(k, i + 8), NB_C4(k, i + 12)
#define NB_C32(k, i) NB_C16(k, i), NB_C16(k, i + 16)
#define NB_C64(k, i) NB_C32(k, i), NB_C32(k, i + 32)
#define NB_C128(k, i) NB_C64(k, i), NB_C64(k, i + 64)
// clang-format on

template <int ACT, int T> struct Wgmma;
#define NB_WGMMA(ACT, T, C, TYPE, REGISTER, SHAPE, FLAGS)                                                                   \
    template <> struct Wgmma<ACT, T> {                                                                                      \
        static DEVICE void multiply(TYPE (&c)[C], const u32 *a, u64 b, int add) {                                           \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " NB_ADD_##C ", 0;\n"                                           \
                         "wgmma.mma_async.sync.aligned.m64n" #T SHAPE " {" NB_FIRST_##C "}, " NB_WEIGHTS_##C ", p" FLAGS ";\n}" \
                         : NB_C##C(REGISTER, 0)                                                                             \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));                                   \
        }                                                                                                                   \
    };
#define NB_WGMMAS(T, C)                                                                                                     \
    NB_WGMMA(0, T, C, float, "+f", "k16.f32.f16.f16", ", 1, 1, 0")                                                          \
    NB_WGMMA(1, T, C, float, "+f", "k16.f32.bf16.bf16", ", 1, 1, 0")                                                        \
    NB_WGMMA(2, T, C, int, "+r", "k32.s32.s8.s8", "")                                                                       \
    NB_WGMMA(3, T, C, float, "+f", "k32.f32.e4m3.e4m3", ", 1, 1")
NB_WGMMAS(32, 16)
NB_WGMMAS(64, 32)
NB_WGMMAS(128, 64)
NB_WGMMAS(256, 128)

// Counts of common ones, 256 k at a time.
template <int T> struct BitWgmma;
#define NB_BIT_WGMMA(T, C)                                                                                                  \
    template <> struct BitWgmma<T> {                                                                                        \
        static DEVICE void multiply(int (&c)[C], u64 a, u64 b, int add) {                                                   \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " NB_ADD_BITS_##C ", 0;\n"                                      \
                         "wgmma.mma_async.sync.aligned.m64n" #T "k256.s32.b1.b1.and.popc {" NB_FIRST_##C "}, " NB_BOTH_##C  \
                         ", p;\n}"                                                                                          \
                         : NB_C##C("+r", 0)                                                                                 \
                         : "l"(a), "l"(b), "r"(add));                                                                       \
        }                                                                                                                   \
    };
NB_BIT_WGMMA(32, 16)
NB_BIT_WGMMA(64, 32)
NB_BIT_WGMMA(128, 64)
NB_BIT_WGMMA(256, 128)

// Four 8 by 8 matrices of 16 bits, transposed; lane l names where column l % 8 of matrix l / 8 goes.
DEVICE void store_transposed(u32 address, const u32 r[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(r[0]), "r"(r[1]),
                 "r"(r[2]), "r"(r[3])
                 : "memory");
}
