// Rows of activations, and what must be known of a row before its numbers are rounded. `A` has the fields x, x_row, x_col,
// k, kind, plain; and of RMSNorm gain (or null), gain_kind, eps.
#pragma once
#include "base.cuh"

// How a kernel begins that has nothing to do before the one before it has ended.
DEVICE void follow() {
    let_next_begin();
    wait_for_previous();
}

DEVICE u32 warp_max(u32 v) {
    u32 r;
    asm volatile("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(r) : "r"(v));
    return r;
}
template <class T> DEVICE T warp_sum(T v) {
#pragma unroll
    for (int i = 16; i; i /= 2) v += __shfl_xor_sync(0xffffffffu, v, i);
    return v;
}
// A sum over the block, the same in every thread.
template <class T> DEVICE T block_sum(T v) {
    __shared__ T parts[32];
    __syncthreads();
    v = warp_sum(v);
    if ((threadIdx.x & 31) == 0) parts[threadIdx.x >> 5] = v;
    __syncthreads();
    v = 0;
    for (int w = 0; w < blockDim.x / 32; w++) v += parts[w];
    return v;
}

DEVICE u32 magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }

// Sixteen consecutive floats of 16 bits, aligned, as they lie in memory.
struct Sixteen {
    uint4 q[2];
    DEVICE void load(const void *p) {
        q[0] = ((const uint4 *)p)[0];
        q[1] = ((const uint4 *)p)[1];
    }
    DEVICE void unpack(float v[16], int kind) const {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const u32 w[4] = {q[i].x, q[i].y, q[i].z, q[i].w};
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const u16 b = (u16)(w[j / 2] >> (16 * (j & 1)));
                v[8 * i + j] = kind == KIND_F16 ? f32_of_f16(b) : f32_of_bf16(b);
            }
        }
    }
};
DEVICE void load_sixteen(const void *p, int kind, float v[16]) {
    if (kind == KIND_F32) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float4 f = ((const float4 *)p)[i];
            v[4 * i] = f.x, v[4 * i + 1] = f.y, v[4 * i + 2] = f.z, v[4 * i + 3] = f.w;
        }
    } else {
        Sixteen raw;
        raw.load(p);
        raw.unpack(v, kind);
    }
}
DEVICE int size_of(int kind) { return kind == KIND_F32 ? 4 : 2; }
// RMSNorm's factors of the columns of a run; adds the squares from before them.
template <class A> DEVICE void apply_gain(const A &a, int run, float v[16], float *squares) {
    float g[16];
    load_sixteen((const char *)a.gain + 16 * run * size_of(a.gain_kind), a.gain_kind, g);
#pragma unroll
    for (int i = 0; i < 16; i++) {
        if (squares) *squares = __fmaf_rn(v[i], v[i], *squares);
        v[i] = __fmul_rn(v[i], g[i]);
    }
}
// Run `run` of sixteen of a row.
template <class A> DEVICE void load_run(const A &a, i64 m, int run, float v[16], float *squares = nullptr) {
    load_sixteen((const char *)a.x + (m * a.x_row + 16 * run) * size_of(a.kind), a.kind, v);
    if (a.gain) apply_gain(a, run, v, squares);
}
template <class A> DEVICE float value_at(const A &a, i64 m, int k) {
    const float x = load_float(a.x, m * a.x_row + k * a.x_col, a.kind);
    return a.gain ? __fmul_rn(x, load_float(a.gain, k, a.gain_kind)) : x;
}

// What the numbers of a row say together; RMSNorm's factor of the row is not in `top`.
struct Survey {
    u32 top;      // the largest magnitude, as bits
    float factor; // 1/sqrt(mean of squares + eps), 1 without RMSNorm
    bool bad;     // a NaN or an infinity
};
// From what every thread has seen; `tops` may be used again after another barrier.
template <class A> DEVICE Survey summary(const A &a, u32 top, float squares, u32 tops[32]) {
    top = warp_max(top);
    if ((threadIdx.x & 31) == 0) tops[threadIdx.x >> 5] = top;
    if (a.gain) squares = block_sum(squares);
    __syncthreads();
    Survey out = {0, 1.0f, false};
    for (int w = 0; w < blockDim.x / 32; w++) out.top = max(out.top, tops[w]);
    out.bad = out.top >= 0x7f800000u;
    if (a.gain) {
        out.factor = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(__fdiv_rn(squares, (float)a.k), a.eps)));
        // The squares of a NaN or an infinity; of numbers beyond 2^63, too.
        out.bad |= !(squares < __uint_as_float(0x7f800000u));
    }
    return out;
}
// `first` becomes the thread's first run, where rows are plain. `see` is called with every number.
template <class A, class F> DEVICE Survey survey(const A &a, i64 m, float first[16], F see) {
    __shared__ u32 tops[32];
    u32 top = 0;
    float squares = 0.0f;
    if (a.plain) {
        float v[16];
        for (int run = threadIdx.x; run < a.k / 16; run += blockDim.x) {
            load_run(a, m, run, v, &squares);
#pragma unroll
            for (int i = 0; i < 16; i++) {
                top = max(top, magnitude(v[i]));
                see(v[i]);
                if (run < blockDim.x) first[i] = v[i];
            }
        }
    } else {
        for (int k = threadIdx.x; k < a.k; k += blockDim.x) {
            const float v = value_at(a, m, k);
            if (a.gain) {
                const float x = load_float(a.x, m * a.x_row + k * a.x_col, a.kind);
                squares = __fmaf_rn(x, x, squares);
            }
            top = max(top, magnitude(v));
            see(v);
        }
    }
    return summary(a, top, squares, tops);
}
template <class A> DEVICE Survey survey(const A &a, i64 m, float first[16]) {
    return survey(a, m, first, [](float) {});
}
