// Types and the few instructions that C++ has no name for. No header of the toolkit is needed: NVRTC alone compiles this.
#pragma once

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define DEVICE __device__ __forceinline__

// Element types of activations and results, as the host names them.
enum Kind { KIND_F16 = 0, KIND_BF16 = 1, KIND_F32 = 2, KIND_F64 = 3, KIND_I8 = 4, KIND_E4M3 = 5 };

DEVICE u32 shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }

// A kernel that is launched early starts where each block of the one before has begun (`let_next_begin`) or ended. Those before may
// have started so themselves, thus any number of them may still run. Until `wait_for_previous` it writes nothing, and reads only what
// the host saw finished before the launch: packed weights, as packing waits for its stream. Past it all that came before in
// the stream has ended and can be seen, since each such kernel waits before it ends.
DEVICE void let_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Copies 16 bytes to shared memory past L1; bytes from `valid` on are zeros and not read.
DEVICE void copy16(u32 to, const void *from, int valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid) : "memory");
}
DEVICE void copy16(u32 to, const void *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
DEVICE void copy8(u32 to, const void *from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to), "l"(from) : "memory");
}
DEVICE void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> DEVICE void wait_pending() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

DEVICE u32 permute(u32 a, u32 b, u32 selector) {
    u32 r;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(selector));
    return r;
}

DEVICE float f32_of_f16(u16 h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}
DEVICE u16 f16_of_f32(float f) {
    u16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}
DEVICE float f32_of_bf16(u16 h) { return __uint_as_float((u32)h << 16); }
// Ties to even; a NaN stays one.
DEVICE u16 bf16_of_f32(float f) {
    u32 b = __float_as_uint(f);
    if ((b & 0x7fffffffu) > 0x7f800000u) return (u16)((b >> 16) | 0x40u);
    return (u16)((b + 0x7fffu + ((b >> 16) & 1u)) >> 16);
}

// Two numbers in the halves of a word.
DEVICE u32 halves(float low, float high, int kind) {
    u32 r;
    if (kind == KIND_F16)
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    else
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

DEVICE float load_float(const void *p, i64 i, int kind) {
    switch (kind) {
    case KIND_F16: return f32_of_f16(((const u16 *)p)[i]);
    case KIND_BF16: return f32_of_bf16(((const u16 *)p)[i]);
    case KIND_F32: return ((const float *)p)[i];
    case KIND_F64: return __double2float_rn(((const double *)p)[i]);
    default: return (float)((const i8 *)p)[i];
    }
}
DEVICE void store_float(void *p, i64 i, int kind, float v) {
    switch (kind) {
    case KIND_F16: ((u16 *)p)[i] = f16_of_f32(v); break;
    case KIND_BF16: ((u16 *)p)[i] = bf16_of_f32(v); break;
    case KIND_F32: ((float *)p)[i] = v; break;
    default: ((double *)p)[i] = (double)v; break;
    }
}

// Four numbers that follow each other and are aligned.
DEVICE void store_four(void *p, i64 i, int kind, const float v[4]) {
    if (kind == KIND_F16 || kind == KIND_BF16) {
        u16 h[4];
#pragma unroll
        for (int e = 0; e < 4; e++) h[e] = kind == KIND_F16 ? f16_of_f32(v[e]) : bf16_of_f32(v[e]);
        *(uint2 *)((u16 *)p + i) = make_uint2((u32)h[0] | (u32)h[1] << 16, (u32)h[2] | (u32)h[3] << 16);
    } else if (kind == KIND_F32) {
        *(float4 *)((float *)p + i) = make_float4(v[0], v[1], v[2], v[3]);
    } else {
#pragma unroll
        for (int e = 0; e < 4; e++) ((double *)p)[i + e] = (double)v[e];
    }
}

// Where code k of a 16-long run of int8 activations lies: the order in which a packed word yields its four bytes.
DEVICE int byte_order(int k) { return ((k & 7) >> 1) * 4 + (k & 1) * 2 + (k >> 3); }
