// Fixed-point arithmetic of the integer operators: what rust/ops/src/intops computes, to the bit.
//
// No operation here is a float one, divisions included: dividing integers at run time goes through a float reciprocal on
// these devices, so quotients are made by multiplications, once per row, and roots digit by digit. The host turns scales into
// the integers of the structs below (python/nibblas/cuda/_fixed.py).
#pragma once
#include <nibblas/base.cuh>

// 1 where a host compiles the kernels for a block of one thread.
#ifndef NB_WARP
#define NB_WARP 32
#endif

enum IntKind { INT_I8 = 0, INT_U8 = 1, INT_I16 = 2, INT_U16 = 3, INT_I32 = 4 };

// x * ratio * 2^fraction = (x * m) >> shift.
struct Ratio {
    int m;
    u32 shift;
};
// d * scale * 2^fraction = (d * m) >> shift in 32 bits for d up to limit.
struct Reach {
    u32 m, shift, limit;
};

DEVICE i64 at_ratio(i64 v, Ratio r) { return (v * r.m) >> r.shift; }
DEVICE u32 at_reach(u32 d, Reach r) { return (u32)(((u64)d * r.m) >> r.shift); }
DEVICE u32 magnitude(int x) { return x < 0 ? 0u - (u32)x : (u32)x; }
DEVICE int saturate(int v, int lo, int hi) { return v < lo ? lo : v > hi ? hi : v; }
DEVICE int saturate(i64 v, int lo, int hi) { return v < lo ? lo : v > hi ? hi : (int)v; }
// Bits that a number fills.
DEVICE int width(u64 v) { return 64 - __clzll((i64)v); }

// Integers of a kind, `at` counted in elements. `four` reads and writes aligned runs of four at once, of which `left` exist.
template <class T, class Wide, class To> DEVICE void load_run(const void *p, i64 at, int left, bool four, To v[4]) {
    const T *from = (const T *)p + at;
    if (four && left >= 4) {
        Wide w = *(const Wide *)from;
        const T *each = (const T *)&w;
#pragma unroll
        for (int e = 0; e < 4; e++) v[e] = each[e];
        return;
    }
#pragma unroll
    for (int e = 0; e < 4; e++) v[e] = e < left ? from[e] : 0;
}
template <class T, class Wide> DEVICE void store_run(void *p, i64 at, int left, bool four, const int v[4]) {
    T *to = (T *)p + at;
    if (four && left >= 4) {
        Wide w;
        T *each = (T *)&w;
#pragma unroll
        for (int e = 0; e < 4; e++) each[e] = (T)v[e];
        *(Wide *)to = w;
        return;
    }
#pragma unroll
    for (int e = 0; e < 4; e++)
        if (e < left) to[e] = (T)v[e];
}
DEVICE void load_ints(const void *p, i64 at, int left, int kind, bool four, int v[4]) {
    switch (kind) {
    case INT_I8: load_run<i8, u32>(p, at, left, four, v); break;
    case INT_U8: load_run<u8, u32>(p, at, left, four, v); break;
    case INT_I16: load_run<short, uint2>(p, at, left, four, v); break;
    case INT_U16: load_run<u16, uint2>(p, at, left, four, v); break;
    default: load_run<int, uint4>(p, at, left, four, v);
    }
}
DEVICE void store_ints(void *p, i64 at, int left, int kind, bool four, const int v[4]) {
    switch (kind) {
    case INT_I8: store_run<i8, u32>(p, at, left, four, v); break;
    case INT_U8: store_run<u8, u32>(p, at, left, four, v); break;
    case INT_I16: store_run<short, uint2>(p, at, left, four, v); break;
    case INT_U16: store_run<u16, uint2>(p, at, left, four, v); break;
    default: store_run<int, uint4>(p, at, left, four, v);
    }
}

// What a block's threads hold, made one by `f`: each warp leaves its share in `room`, a barrier follows, and who needs the
// whole folds the shares. A room may be used again once everybody has passed another barrier.
template <class T, class F> DEVICE void leave(T v, T *room, F f) {
#pragma unroll
    for (int o = NB_WARP / 2; o; o >>= 1) v = f(v, __shfl_xor_sync(0xffffffffu, v, o));
    if (threadIdx.x % NB_WARP == 0) room[threadIdx.x / NB_WARP] = v;
}
template <class T, class F> DEVICE T fold(const T *room, F f) {
    T v = room[0];
    for (int i = 1; i < (int)(blockDim.x / NB_WARP); i++) v = f(v, room[i]);
    return v;
}
template <class T, class F> DEVICE T over_block(T v, T *room, F f) {
    leave(v, room, f);
    __syncthreads();
    return fold(room, f);
}
struct Larger {
    template <class T> DEVICE T operator()(T a, T b) const { return a > b ? a : b; }
};
struct Smaller {
    template <class T> DEVICE T operator()(T a, T b) const { return a < b ? a : b; }
};
struct Sum {
    template <class T> DEVICE T operator()(T a, T b) const { return a + b; }
};

// floor(n / d * 2^k), for n and d whose highest bits are set, k of at most 62: Newton's method for 2^32 over the upper half of d
// from a line (a seventeenth off, 2^-28 after three steps), once more in 64 bits, and the quotient's rest twice.
DEVICE u64 ratio_of(u64 n, u64 d, int k) {
    const u32 top = (u32)(d >> 32);
    u32 x = 3031741620u - __umulhi(top, 2021161080u); // 48/17 - 32/17 top, Q30
#pragma unroll
    for (int i = 0; i < 3; i++) x = (u32)(((u64)x * (0x80000000u - __umulhi(top, x))) >> 30);
    const u64 wide = (u64)x << 32; // Q62
    const i64 off = (i64)((1ull << 62) - __umul64hi(d, wide));
    u64 q = __umul64hi(n, wide + (u64)(((off >> 4) * (i64)x) >> 26)) >> (62 - k);
    const u64 low = n << k, high = k ? n >> (64 - k) : 0;
    u64 rest = low - q * d;
    i64 more = (i64)(high - __umul64hi(q, d) - (low < q * d));
    // Still off by less than 2^10.
    q += (u64)((i64)((u64)more << 20 | rest >> 44) * (i64)x >> 50);
    rest = low - q * d;
    more = (i64)(high - __umul64hi(q, d) - (low < q * d));
    return more < 0 ? q - 1 : more > 0 || rest >= d ? q + 1 : q;
}
// floor(n / d), d not 0.
DEVICE u64 quotient(u64 n, u64 d) {
    if (n < d) return 0;
    if (d == 1) return n;
    const int up = __clzll((i64)n), k = __clzll((i64)d) - up;
    return ratio_of(n << up, d << (k + up), k);
}
// floor(n / d) for any sign of n and positive d.
DEVICE i64 floor_div(i64 n, i64 d) {
    return n >= 0 ? (i64)quotient((u64)n, (u64)d) : -1 - (i64)quotient((u64)(-1 - n), (u64)d);
}

// The floor of the square root, digit by digit.
template <class T> DEVICE T floor_sqrt(T v) {
    T root = 0;
#pragma unroll
    for (T bit = (T)1 << (8 * sizeof(T) - 2); bit; bit >>= 2) {
        const T trial = root + bit;
        const bool fits = v >= trial;
        if (fits) v -= trial;
        root = (root >> 1) + (fits ? bit : 0);
    }
    return root;
}

constexpr int Q = 30;        // fraction bits of polynomials
constexpr int EXPONENT = 26; // fraction bits of exponents of two
constexpr int FRACTION = 16; // fraction bits of terms that are rounded together

// Product of two Q30 numbers that lies in [-2, 2).
DEVICE int mul(int a, int b) { return (int)(((i64)a * b) >> Q); }
// 2^-f in Q30, for f in [0, 1) in Q32: products with it are upper halves. The sums change their sign from one to the next, and
// the upper half of a negative number's is the unsigned one less the other factor.
DEVICE int halving(u32 f) {
    u32 y = __umulhi(7356205u, f) - 57204807u;
    y = __umulhi(y, f) - f + 257158263u;
    y = __umulhi(y, f) - 744180573u;
    return (int)(__umulhi(y, f) - f + (1u << Q));
}
// 1 / (1 + e) for e in [0, 1], in Q30; sums pass through 2^31 as unsigned ones.
DEVICE int reciprocal(int e) {
    u32 y = 0u - 57839524u;
    y = mul((int)y, e) + 282103845u;
    y = mul((int)y, e) - 633021006u;
    y = mul((int)y, e) + 916285514u;
    y = mul((int)y, e) - 1041194899u;
    y = mul((int)y, e) + 1070418559u;
    y = mul((int)y, e) - 1073624705u;
    return (int)(mul((int)y, e) + (1u << Q));
}
// e^-(d * scale) in Q30.
DEVICE int decay(u32 d, Reach r) {
    const u32 t = at_reach(d, r);
    const int e = halving(t << (32 - EXPONENT));
    return d > r.limit ? 0 : e >> (t >> EXPONENT > 31 ? 31 : t >> EXPONENT);
}

// A Q30 number in steps of the output, given what 2^-30 is worth in them.
DEVICE i64 in_steps(int v, Ratio unit) { return (at_ratio(v, unit) + (1 << (FRACTION - 1))) >> FRACTION; }
// max(x, 0) * scale - bump, in steps of the output.
DEVICE i64 less(int x, int bump, Ratio whole, Ratio unit) {
    const i64 line = at_ratio(x > 0 ? x : 0, whole);
    return (line - at_ratio(bump, unit) + (1 << (FRACTION - 1))) >> FRACTION;
}

DEVICE i64 exp_of(int x, Reach reach, Ratio unit) { return in_steps(decay(x < 0 ? magnitude(x) : 0u, reach), unit); }
DEVICE i64 sigmoid_of(int x, Reach reach, Ratio unit) {
    const int e = decay(magnitude(x), reach), r = reciprocal(e);
    return in_steps(x >= 0 ? r : mul(e, r), unit);
}
DEVICE i64 silu_of(int x, Reach reach, Reach place, Ratio whole, Ratio unit) {
    const u32 a = magnitude(x);
    const int e = decay(a, reach), tail = mul(e, reciprocal(e));
    // At 32 the bump is below 1e-12.
    u32 v = at_reach(a, place);
    v = a > place.limit ? 0 : v < 1u << 28 ? v : 1u << 28;
    return less(x, (int)(((i64)v * tail) >> 23), whole, unit);
}

// GELU in 32 bits, for results of 8: see Short in rust/ops/src/intops/scale.rs.
struct Short {
    int end;
    u32 coarse;
    int place;
    u32 place_shift;
    int top;
    u32 line_coarse;
    int line, unit;
    u32 shift;
};
DEVICE int gelu_short(int x, const Short &p) {
    const u32 m = magnitude(x);
    const int a = m < (u32)p.end ? (int)m : p.end;
    const int v = ((a >> p.coarse) * p.place) >> p.place_shift;
    constexpr int digits = 15;
    const int c[9] = {1009, -6093, 15713, -18079, -4976, 33968, -21092, -9794, 9348};
    const int w = 2 * v - (1 << digits);
    int y = c[8];
#pragma unroll
    for (int i = 7; i >= 0; i--) y = c[i] + ((y * w + (1 << (digits - 1))) >> digits);
    const int bump = a == p.end || y < 0 ? 0 : y;
    const int line = ((x < 0 ? 0 : x > p.top ? p.top : x) >> p.line_coarse) * p.line;
    return (line - bump * p.unit + ((1 << p.shift) >> 1)) >> p.shift;
}

// u Phi(-u) in cubic pieces: see rust/ops/src/intops/pieces.rs.
struct Pieces {
    int base[32], slope[32], bend[32];
    u32 coarse, up, last;
    int fraction;
};
// The same with the halves of `slope` apart and signed, 32 entries each: an entry per bank, so that lanes look up what they like.
struct Tables {
    int base[32], linear[32], square[32], cube[32];
};
DEVICE void fill(Tables &t, const Pieces &p) {
    for (int i = threadIdx.x; i < 32; i += blockDim.x) {
        t.base[i] = p.base[i];
        t.linear[i] = (short)p.slope[i];
        t.square[i] = p.slope[i] >> 16;
        t.cube[i] = (short)p.bend[i];
    }
    __syncthreads();
}
DEVICE int bump_of(int x, const Tables &c, const Pieces &p) {
    u32 m = magnitude(x);
    m = m < p.last ? m : p.last;
    const u32 i = m >> p.coarse;
    const int t = (int)((m << p.up) ^ 0x80000000u) >> 16, high = (t * t) >> 16;
    const int sum = c.linear[i] * t + c.square[i] * high + c.cube[i] * ((t * high) >> 16);
    const int v = c.base[i] + (sum >> 8);
    return v > 0 ? v : 0;
}
// The last step of GELU, line - bump: where input and output have one scale the line has no fraction, and 32 bits do.
DEVICE int gelu_direct(int x, int bump, int fraction) {
    const int right = fraction > 0 ? fraction : 0, left = fraction < 0 ? -fraction : 0;
    const int rounded = (((1 << right) >> 1) - (int)((u32)bump << left)) >> right;
    return (int)((u32)(x > 0 ? x : 0) + (u32)rounded);
}
DEVICE i64 gelu_scaled(int x, int bump, int fraction, Ratio whole) {
    const int right = fraction > FRACTION ? fraction - FRACTION : 0, left = fraction < FRACTION ? FRACTION - fraction : 0;
    i64 b = bump >> right;
    if (left) b <<= left;
    return (at_ratio(x > 0 ? x : 0, whole) - b + (1 << (FRACTION - 1))) >> FRACTION;
}

// int32 sums to a narrower type: one rounding, halves up; or gemmlowp's two.
struct Factor {
    int multiplier, shift;
};
DEVICE i64 requantized(int x, Factor f) {
    const int shift = 31 + f.shift;
    return ((i64)x * f.multiplier + (((i64)1 << shift) >> 1)) >> shift;
}
DEVICE i64 requantized_twice(int x, Factor f) {
    const int left = f.shift < 0 ? -f.shift : 0, right = f.shift > 0 ? f.shift : 0;
    const i64 product = (i64)saturate((i64)x << left, -2147483647 - 1, 2147483647) * f.multiplier;
    const i64 sum = product + (product >= 0 ? 1 << 30 : 1 - (1 << 30));
    // A division that truncates.
    i64 high = (sum + ((sum >> 63) & 0x7fffffff)) >> 31;
    if (high > 2147483647) high = 2147483647;
    const i64 mask = ((i64)1 << right) - 1;
    return (high >> right) + ((high & mask) > (mask >> 1) + (high < 0));
}
