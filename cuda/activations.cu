// Activations as the products read them: rows of whole chunks of 128 places, aligned, groups padded as the weights' are.
#include <nibblas/base.cuh>

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
};

// Index along K of a place, or -1.
DEVICE int natural(const Args &a, int place) {
    const int group = place / a.padded, off = place - group * a.padded;
    const i64 k = (i64)group * a.group + off;
    return off < a.group && k < a.k ? (int)k : -1;
}

// Converts and places. float32 becomes three rows of bfloat16 that add up to it: 3m, 3m+1, 3m+2.
extern "C" __global__ void place(const Args a) {
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
            // Same type in and out: bits.
            out[(i64)m * a.places + p] = k < 0 ? 0 : ((const u16 *)a.x)[m * a.x_row + k * a.x_col];
        }
    }
}

// y = the sum of three parts, for each part of the weights, and the bias.
extern "C" __global__ void combine(const Args a) {
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

DEVICE u32 warp_max(u32 v) {
    u32 r;
    asm volatile("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(r) : "r"(v));
    return r;
}

DEVICE u32 magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }
// clip(rint(x/s), -127, 127), ties to even; the caller has seen to s.
DEVICE int nearest(float x, float s) { return (int)fminf(fmaxf(rintf(__fdiv_rn(x, s)), -127.0f), 127.0f); }

// Sixteen consecutive elements of a row of floats.
DEVICE void load_run(const Args &a, i64 m, int run, float v[16]) {
    if (a.kind == KIND_F32) {
        const float4 *p = (const float4 *)((const float *)a.x + m * a.x_row) + run * 4;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float4 f = p[i];
            v[4 * i] = f.x, v[4 * i + 1] = f.y, v[4 * i + 2] = f.z, v[4 * i + 3] = f.w;
        }
    } else {
        const uint4 *p = (const uint4 *)((const u16 *)a.x + m * a.x_row) + run * 2;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint4 h = p[i];
            const u32 w[4] = {h.x, h.y, h.z, h.w};
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const u16 b = (u16)(w[j / 2] >> (16 * (j & 1)));
                v[8 * i + j] = a.kind == KIND_F16 ? f32_of_f16(b) : f32_of_bf16(b);
            }
        }
    }
}

// s = absmax/127, q = clip(rint(x/s), -127, 127): one IEEE division each, ties to even; 0 where s is 0. int8 is taken as
// codes with scale 1. A block per row.
extern "C" __global__ void quantise(const Args a) {
    __shared__ u32 tops[32];
    const i64 m = blockIdx.x;
    u8 *out = (u8 *)a.out + m * a.places;
    const bool codes = a.kind == KIND_I8;
    float s = 1.0f;
    bool bad = false;
    if (!codes) {
        u32 top = 0;
        if (a.plain) {
            for (int run = threadIdx.x; run < a.k / 16; run += blockDim.x) {
                float v[16];
                load_run(a, m, run, v);
#pragma unroll
                for (int i = 0; i < 16; i++) top = max(top, magnitude(v[i]));
            }
        } else {
            for (int k = threadIdx.x; k < a.k; k += blockDim.x)
                top = max(top, magnitude(load_float(a.x, m * a.x_row + k * a.x_col, a.kind)));
        }
        top = warp_max(top);
        if ((threadIdx.x & 31) == 0) tops[threadIdx.x >> 5] = top;
        __syncthreads();
        top = 0;
        for (int w = 0; w < blockDim.x / 32; w++) top = max(top, tops[w]);
        bad = top >= 0x7f800000u;
        s = __fdiv_rn(__uint_as_float(top), 127.0f);
    }
    if (threadIdx.x == 0) a.scale[m] = bad ? __uint_as_float(0x7fc00000u) : __fmul_rn(s, a.step);
    if (a.plain) {
        for (int run = threadIdx.x; run < a.places / 16; run += blockDim.x) {
            u32 w[4] = {0, 0, 0, 0};
            if (run < a.k / 16 && !bad && s != 0.0f) {
                float v[16];
                load_run(a, m, run, v);
#pragma unroll
                for (int i = 0; i < 16; i++) {
                    const int q = nearest(v[i], s), at = byte_order(i);
                    w[at / 4] |= (u32)(q & 255) << (8 * (at % 4));
                }
            }
            ((uint4 *)out)[run] = make_uint4(w[0], w[1], w[2], w[3]);
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
            int q = 0;
            if (k >= 0) {
                if (codes)
                    q = ((const i8 *)a.x)[m * a.x_row + k * a.x_col];
                else if (!bad && s != 0.0f)
                    q = nearest(load_float(a.x, m * a.x_row + k * a.x_col, a.kind), s);
            }
            word |= (u32)(q & 255) << (8 * i);
        }
        *(u32 *)(out + p) = word;
    }
}

// As quantise, with one scale per `length` values of a row: `scale` is [rows][segments]. A warp takes every eighth group.
extern "C" __global__ void __launch_bounds__(256) quantise_groups(const Args a) {
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
