// The operators of I-BERT and I-ViT as published, in 64-bit integers: rust/ops/src/intops/compat.rs. The host has checked that
// nothing leaves 62 bits. Speed was no aim.
#include <nibblas/intops.cuh>

enum Family { IBERT = 0, IVIT = 1 };
enum Function { EXP = 0, SOFTMAX = 1, GELU = 2, LAYERNORM = 3, ROOT = 4 };

struct Args {
    const void *x;
    i64 *y;
    const i64 *bias;
    int *flag; // set where a sum of squares leaves 64 bits
    i64 count; // values, or rows
    int cols, x_kind, function, family;
    i64 q0, qb, qc, n; // of exponentials; GELU's polynomial: qb, qc and 1 as n
};
constexpr i64 TOP = (1ll << 31) - 1;

DEVICE int load(const Args &a, i64 at) {
    int v[4];
    load_ints(a.x, at, 1, a.x_kind, false, v);
    return v[0];
}
DEVICE i64 exponential(const Args &a, i64 q) {
    if (a.family == IVIT) q = q + (q >> 1) - (q >> 4);
    if (q < a.n * a.q0) q = a.n * a.q0;
    // The floor, for a negative divisor.
    const i64 z = floor_div(-q, -a.q0), r = q - a.q0 * z;
    const i64 p = a.family == IBERT ? r * (r + a.qb) + a.qc : (r >> 1) - a.q0;
    const i64 shift = a.n - z;
    // Positive arguments, which one published operator passes on: clamped by whoever asked.
    if (shift >= __clzll(p > 1 ? p : 1) - 1) return 0x3fffffffffffffffll;
    const i64 e = (i64)((u64)p << shift);
    return e > 0 ? e : 0;
}
DEVICE i64 saturating(i64 a, i64 b) {
    const i64 sum = (i64)((u64)a + (u64)b);
    if (((a ^ sum) & (b ^ sum)) < 0) return a < 0 ? -0x7fffffffffffffffll - 1 : 0x7fffffffffffffffll;
    return sum;
}
// round(p * 32767 / one), p at most one: 15 doublings.
DEVICE i64 coded(i64 p, i64 one) {
    u64 q = 0, rest = 0;
    for (int i = 0; i < 15; i++) {
        q *= 2;
        rest = 2 * rest + (u64)p;
        for (; rest >= (u64)one; rest -= (u64)one) q++;
    }
    return (i64)(q + (2 * rest >= (u64)one));
}
DEVICE u64 ten_halvings(u64 v) {
    u64 k = 1 << 16;
    for (int i = 0; i < 10; i++) {
        const u64 w = quotient(v, k > 1 ? k : 1);
        k = (k & w) + ((k ^ w) >> 1);
    }
    return k;
}
// One room serves all: nobody may still read what was left before.
template <class T, class F> DEVICE T together(T v, void *room, F f) {
    __syncthreads();
    return over_block(v, (T *)room, f);
}
DEVICE i64 highest(const Args &a, i64 row, i64 *room) {
    i64 top = -0x7fffffffffffffffll - 1;
    for (int i = threadIdx.x; i < a.cols; i += blockDim.x) {
        const i64 v = load(a, row * a.cols + i);
        top = v > top ? v : top;
    }
    return together(top, room, Larger());
}

DEVICE void softmax_row(const Args &a, i64 row, i64 *room) {
    const i64 top = highest(a, row, room), one = exponential(a, 0);
    i64 sum = 0;
    auto saturated = [](i64 x, i64 y) { return saturating(x, y); };
    auto at = [&](int i) {
        const i64 p = exponential(a, load(a, row * a.cols + i) - top);
        return a.family == IBERT ? coded(p, one) : p;
    };
    for (int i = threadIdx.x; i < a.cols; i += blockDim.x) sum = saturating(sum, at(i));
    sum = together(sum, room, saturated);
    const u64 factor = a.family == IBERT ? quotient(1ull << 32, (u64)sum) : quotient(TOP, (u64)(sum < TOP ? sum : TOP));
    for (int i = threadIdx.x; i < a.cols; i += blockDim.x) a.y[row * a.cols + i] = (at(i) * (i64)factor) >> 24;
}
// I-BERT's; its scale is negative.
DEVICE i64 gelu_of(const Args &a, i64 q) {
    const i64 m = q < 0 ? -q : q, d = (m < -a.qb ? m : -a.qb) + a.qb, p = d * d + a.qc;
    return q * (((q > 0 ? p : q < 0 ? -p : 0) >> 14) + a.n);
}
// I-ViT's; the maximum is the row's.
DEVICE void gelu_row(const Args &a, i64 row, i64 *room) {
    const i64 top = highest(a, row, room), floor = exponential(a, -top);
    for (int i = threadIdx.x; i < a.cols; i += blockDim.x) {
        const i64 v = load(a, row * a.cols + i), p = exponential(a, v - top);
        const i64 sum = saturating(p, floor), factor = (i64)quotient(TOP, (u64)(sum < 1 ? 1 : sum < TOP ? sum : TOP));
        // p * factor is at most the larger of 2^31 and p.
        a.y[row * a.cols + i] = v * ((p * factor) >> 24);
    }
}
DEVICE void layernorm_row(const Args &a, i64 row, i64 *room) {
    auto at = [&](int i) { return (i64)load(a, row * a.cols + i); };
    i64 sum = 0;
    for (int i = threadIdx.x; i < a.cols; i += blockDim.x) sum += at(i);
    sum = together(sum, room, Sum());
    // Halves to even.
    const i64 n = a.cols, floor = floor_div(sum, n), rest = 2 * (sum - floor * n);
    const i64 mean = floor + (rest > n || (rest == n && (floor & 1)));
    u64 squares = 0;
    int shift = 0;
    // I-BERT's shift is found in training; here, the least that keeps the sum within 32 bits.
    for (;; shift++) {
        u64 part = 0, high = 0;
        for (int i = threadIdx.x; i < a.cols; i += blockDim.x) {
            const i64 d = (at(i) - mean) >> shift;
            const u64 m = d < 0 ? 0ull - (u64)d : (u64)d, before = part;
            part += m * m;
            high += (part < before) + (m >> 32); // m is at most 2^32, whose square is 2^64
        }
        // Two halves, so that carries are not lost.
        const u64 low = together(part & 0xffffffffu, room, Sum());
        const u64 middle = together(part >> 32, room, Sum()) + (low >> 32);
        high = together(high, room, Sum()) + (middle >> 32);
        squares = middle << 32 | (low & 0xffffffffu);
        if (a.family == IVIT) {
            if (high && threadIdx.x == 0) *a.flag = 1;
            break;
        }
        if (!high && squares < 1ull << 32) break;
    }
    const u64 root = a.family == IBERT ? floor_sqrt(squares) << shift : ten_halvings(squares);
    // A constant row divides by zero as published; its deviations are 0, whatever the factor.
    const i64 factor = (i64)quotient(a.family == IBERT ? 1ull << 31 : (u64)TOP, root > 1 ? root : 1);
    for (int i = threadIdx.x; i < a.cols; i += blockDim.x)
        a.y[row * a.cols + i] = saturating(((at(i) - mean) * factor) >> 1, a.bias[i]);
}

extern "C" __global__ void __launch_bounds__(256) published_each(const __grid_constant__ Args a) {
    const i64 step = (i64)gridDim.x * blockDim.x;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < a.count; i += step) {
        if (a.function == ROOT) {
            a.y[i] = (i64)ten_halvings(((const u64 *)a.x)[i]);
            continue;
        }
        const i64 q = load(a, i);
        a.y[i] = a.function == EXP ? exponential(a, q < 0 ? q : 0) : gelu_of(a, q);
    }
}
extern "C" __global__ void __launch_bounds__(256) published_rows(const __grid_constant__ Args a) {
    __shared__ i64 room[32];
    for (i64 row = blockIdx.x; row < a.count; row += gridDim.x) {
        if (a.function == SOFTMAX) softmax_row(a, row, room);
        if (a.function == GELU) gelu_row(a, row, room);
        if (a.function == LAYERNORM) layernorm_row(a, row, room);
    }
}
