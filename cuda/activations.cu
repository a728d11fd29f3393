// Activations as the products read them: rows of whole chunks of 128 places, aligned, groups padded as the weights' are.
#include <nibblas/base.cuh>
#include <nibblas/rows.cuh>

struct Args {
    const void *x;
    void *out;
    float *scale; // int8: of each row, NaN where it has a NaN or an infinity
    const float *parts_in; // combine: sums of the three parts of float32 rows
    const float *bias;
    void *y;
    i64 x_row, x_col; // elements
    i64 y_row, y_col;
    int m, n, k, places, group, padded;
    int kind, out_kind, y_kind;
    int plain; // rows of whole runs of 16, 16-byte aligned, without gaps
    int tables; // combine: that the weights were cut into
    float step; // int8: what multiplies the scale of a row
    int length, segment, segments; // groups of activations, places that share one scale of W and one of X, how many
    int gain_kind;
    const void *gain; // RMSNorm: what multiplies each column; null without
    float eps;
};

// Index along K of a place, or -1.
DEVICE int natural(const Args &a, int place) {
    const int group = place / a.padded, off = place - group * a.padded;
    const i64 k = (i64)group * a.group + off;
    return off < a.group && k < a.k ? (int)k : -1;
}

// Converts and places. float32 becomes three rows of bfloat16 that add up to it: 3m, 3m+1, 3m+2.
extern "C" __global__ void place(const Args a) {
    follow();
    const int m = blockIdx.y;
    for (int p = blockIdx.x * blockDim.x + threadIdx.x; p < a.places; p += gridDim.x * blockDim.x) {
        const int k = natural(a, p);
        u16 *out = (u16 *)a.out;
        if (a.out_kind == KIND_F32) {
            const float x = k < 0 ? 0.0f : load_float(a.x, m * a.x_row + k * a.x_col, a.kind);
            const float high = __uint_as_float(__float_as_uint(x) & 0xffff0000u);
            const bool finite = (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u;
            const float rest = finite ? __fsub_rn(x, high) : 0.0f;
            const float middle = __uint_as_float(__float_as_uint(rest) & 0xffff0000u);
            const float low = __fsub_rn(rest, middle);
            u16 top = (u16)(__float_as_uint(high) >> 16);
            if (x != x) top = 0x7fc0u;
            out[(i64)(3 * m) * a.places + p] = top;
            out[(i64)(3 * m + 1) * a.places + p] = (u16)(__float_as_uint(middle) >> 16);
            out[(i64)(3 * m + 2) * a.places + p] = bf16_of_f32(low);
        } else {
            u16 v = 0;
            if (k >= 0 && a.kind == a.out_kind)
                v = ((const u16 *)a.x)[m * a.x_row + k * a.x_col];
            else if (k >= 0) // to bfloat16 by name
                v = bf16_of_f32(load_float(a.x, m * a.x_row + k * a.x_col, a.kind));
            out[(i64)m * a.places + p] = v;
        }
    }
}

// y = the sum of three parts, for each part of the weights, and the bias.
extern "C" __global__ void combine(const Args a) {
    follow();
    const int m = blockIdx.y;
    for (int n = blockIdx.x * blockDim.x + threadIdx.x; n < a.n; n += gridDim.x * blockDim.x) {
        float v = 0.0f;
        for (int i = a.tables - 1; i >= 0; i--) {
            const float *p = a.parts_in + ((i64)i * 3 * a.m + 3 * m) * a.n + n;
            v = __fadd_rn(__fadd_rn(p[0], __fadd_rn(p[a.n], p[2 * (i64)a.n])), v);
        }
        if (a.bias) v = __fadd_rn(v, a.bias[n]);
        store_float(a.y, m * a.y_row + n * a.y_col, a.y_kind, v);
    }
}

// clip(rint(x/s), -127, 127), ties to even; the caller has seen to s.
DEVICE int nearest(float x, float s) { return (int)fminf(fmaxf(rintf(__fdiv_rn(x, s)), -127.0f), 127.0f); }

// Two of e4m3 as bytes, the nearest, ties to even.
DEVICE u32 two_e4m3(float low, float high) {
    u16 r = 0;
#if __CUDA_ARCH__ >= 890
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(r) : "f"(high), "f"(low));
#endif
    return r;
}
DEVICE u32 nearest(float x, float s, int kind) { return kind == KIND_E4M3 ? two_e4m3(__fdiv_rn(x, s), 0.0f) : (u32)nearest(x, s); }
// What the largest magnitude of a row becomes.
DEVICE float top_of(int kind) { return kind == KIND_E4M3 ? 448.0f : 127.0f; }

// The codes of a run of sixteen, in the order of byte_order. A product with 1/s is within 2^-15 of the quotient: the
// division itself is for numbers that near to half-way.
DEVICE uint4 codes_of(const float v[16], float s, float inverse, int kind) {
    if (kind == KIND_E4M3) {
        u32 w[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
            w[i] = two_e4m3(__fdiv_rn(v[2 * i], s), __fdiv_rn(v[2 * i + 8], s)) |
                   two_e4m3(__fdiv_rn(v[2 * i + 1], s), __fdiv_rn(v[2 * i + 9], s)) << 16;
        return make_uint4(w[0], w[1], w[2], w[3]);
    }
    constexpr float shift = 12582912.0f; // 1.5 * 2^23: the lowest bits of a sum are the nearest integer
    u32 n[16];
    float far = 0.0f;
#pragma unroll
    for (int i = 0; i < 16; i++) {
        const float t = __fmul_rn(v[i], inverse), moved = __fadd_rn(t, shift);
        n[i] = __float_as_uint(moved);
        far = fmaxf(far, fabsf(__fsub_rn(t, __fsub_rn(moved, shift))));
    }
    if (far > 0.5f - 0x1p-15f || s < 0x1p-126f)
#pragma unroll
        for (int i = 0; i < 16; i++) n[i] = (u32)nearest(v[i], s);
    u32 w[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        w[i] = permute(permute(n[2 * i], n[2 * i + 8], 0x0040), permute(n[2 * i + 1], n[2 * i + 9], 0x0040), 0x5410);
    return make_uint4(w[0], w[1], w[2], w[3]);
}

// s = absmax/127, q = clip(rint(x/s), -127, 127): one IEEE division each, ties to even; 0 where s is 0. int8 is taken as
// codes with scale 1. For e4m3 (out_kind) 448 stands for 127. A block per row. RMSNorm, where asked for, is a factor of the row and one of each column: codes
// need the second alone.
extern "C" __global__ void __launch_bounds__(1024) quantise(const Args a) {
    follow();
    const i64 m = blockIdx.x;
    u8 *out = (u8 *)a.out + m * a.places;
    const bool codes = a.kind == KIND_I8;
    float s = 1.0f, v[16];
    bool bad = false;
    if (!codes) {
        const Survey seen = survey(a, m, v);
        bad = seen.bad;
        s = __fdiv_rn(__uint_as_float(seen.top), top_of(a.out_kind));
        if (threadIdx.x == 0) a.scale[m] = bad ? __uint_as_float(0x7fc00000u) : __fmul_rn(__fmul_rn(s, seen.factor), a.step);
    } else if (threadIdx.x == 0) {
        a.scale[m] = a.step;
    }
    const bool none = bad || s == 0.0f;
    if (a.plain) {
        const float inverse = __frcp_rn(s);
        for (int run = threadIdx.x; run < a.places / 16; run += blockDim.x) {
            uint4 w = make_uint4(0, 0, 0, 0);
            if (run < a.k / 16 && !none) {
                if (run >= blockDim.x) load_run(a, m, run, v);
                w = codes_of(v, s, inverse, a.out_kind);
            }
            ((uint4 *)out)[run] = w;
        }
        return;
    }
    // Sixteen places at a time, written in the order of byte_order.
    for (int p = 4 * threadIdx.x; p < a.places; p += 4 * blockDim.x) {
        const int run = p & ~15, t = (p & 15) >> 2;
        u32 word = 0;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int k = natural(a, run + 2 * t + (i >> 1) + (i & 1) * 8);
            u32 q = 0;
            if (k >= 0) {
                if (codes)
                    q = (u32)((const i8 *)a.x)[m * a.x_row + k * a.x_col];
                else if (!none)
                    q = nearest(value_at(a, m, k), s, a.out_kind);
            }
            word |= (q & 255) << (8 * i);
        }
        *(u32 *)(out + p) = word;
    }
}

// As quantise, of plain rows of 16 bits that a thread has a run of each: while one row is rounded the next is under way.
extern "C" __global__ void __launch_bounds__(1024) quantise_rows(const Args a) {
    follow();
    __shared__ u32 tops[2][32];
    const int run = threadIdx.x, rows = gridDim.x; // of all blocks at a time
    const bool mine = run < a.k / 16;
    const u16 *from = (const u16 *)a.x + blockIdx.x * a.x_row + 16 * run;
    Sixteen raw = {};
    if (mine) raw.load(from);
    int turn = 0;
    for (i64 m = blockIdx.x; m < a.m; m += rows) {
        float v[16], squares = 0.0f;
        u32 top = 0;
        raw.unpack(v, a.kind);
        from += rows * a.x_row;
        if (mine && m + rows < a.m) raw.load(from);
        if (a.gain && mine) apply_gain(a, run, v, &squares);
#pragma unroll
        for (int i = 0; i < 16; i++) top = max(top, magnitude(v[i]));
        const Survey seen = summary(a, top, squares, tops[turn]);
        turn ^= 1;
        const float s = __fdiv_rn(__uint_as_float(seen.top), top_of(a.out_kind));
        if (threadIdx.x == 0)
            a.scale[m] = seen.bad ? __uint_as_float(0x7fc00000u) : __fmul_rn(__fmul_rn(s, seen.factor), a.step);
        uint4 w = make_uint4(0, 0, 0, 0);
        if (mine && !seen.bad && s != 0.0f) w = codes_of(v, s, __frcp_rn(s), a.out_kind);
        uint4 *to = (uint4 *)((u8 *)a.out + m * a.places);
        if (run < a.places / 16) to[run] = w;
        // Groups may be padded by more than the block is wide.
        for (int rest = run + blockDim.x; rest < a.places / 16; rest += blockDim.x) to[rest] = make_uint4(0, 0, 0, 0);
    }
}

// As quantise, with one scale per `length` values of a row: `scale` is [rows][segments]. A warp takes every eighth group.
extern "C" __global__ void __launch_bounds__(256) quantise_groups(const Args a) {
    follow();
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const i64 m = blockIdx.x;
    u8 *out = (u8 *)a.out + m * a.places;
    float *scale = a.scale + m * a.segments;
    for (int p = threadIdx.x; p < a.places / 16; p += 256) ((uint4 *)out)[p] = make_uint4(0, 0, 0, 0);
    for (int p = threadIdx.x; p < a.segments; p += 256) scale[p] = 0.0f;
    __syncthreads();
    bool bad = false;
    for (int first = warp * a.length; first < a.k; first += 8 * a.length) {
        const int end = min(first + a.length, a.k);
        u32 top = 0;
        for (int k = first + lane; k < end; k += 32)
            top = max(top, magnitude(load_float(a.x, m * a.x_row + k * a.x_col, a.kind)));
        top = warp_max(top);
        bad |= top >= 0x7f800000u;
        const float s = __fdiv_rn(__uint_as_float(top), 127.0f);
        for (int k = first + lane; k < end; k += 32) {
            const int place = k / a.group * a.padded + k % a.group;
            const float x = load_float(a.x, m * a.x_row + k * a.x_col, a.kind);
            if (s != 0.0f && top < 0x7f800000u) out[(place & ~15) + byte_order(place & 15)] = (u8)nearest(x, s);
            scale[place / a.segment] = s; // the same number from every lane that writes here
        }
    }
    if (__syncthreads_or(bad))
        for (int p = threadIdx.x; p < a.segments; p += 256) scale[p] = __uint_as_float(0x7fc00000u);
}
