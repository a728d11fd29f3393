// L-Mul: floats multiplied by adding their bit patterns; see rust/ops/src/approx/lmul.rs. Numbers of every format become
// float32's bits, which hold them exactly; all of it is integer arithmetic.
#pragma once
#include <nibblas/base.cuh>

constexpr u32 SIGN = 0x80000000u, MAGNITUDE = 0x7fffffffu, INFINITE = 0x7f800000u, NOT_A_NUMBER = 0x7fc00000u;

// A format and its offset, as bit patterns of float32.
struct Model {
    u32 offset;   // 1, less the offset of the mantissa
    u32 smallest; // normal
    u32 largest;  // finite
    u32 beyond;   // what stands past it
};
// Where the bits of a number are.
enum Specials { SPECIALS_NONE = 0, SPECIALS_NAN = 1, SPECIALS_IEEE = 2 };
struct Layout {
    int bytes, exponent, mantissa, specials;
};

// The product of magnitudes that are finite and 0 or normal.
DEVICE u32 magnitude_of(u32 x, u32 y, const Model &m) {
    const u32 sum = x + y, r = sum - m.offset;
    const bool lives = x != 0 && y != 0 && sum >= m.offset + m.smallest;
    return lives ? r > m.largest ? m.beyond : r : 0;
}
// The product of finite numbers, none of them subnormal.
DEVICE u32 term(u32 a, u32 b, const Model &m) {
    return magnitude_of(a & MAGNITUDE, b & MAGNITUDE, m) | ((a ^ b) & SIGN);
}
// Subnormal numbers of the format are zeros.
DEVICE u32 flushed(u32 a, const Model &m) { return (a & MAGNITUDE) < m.smallest ? a & SIGN : a; }
// The product of any two numbers.
DEVICE u32 product(u32 a, u32 b, const Model &m) {
    const u32 x = flushed(a, m) & MAGNITUDE, y = flushed(b, m) & MAGNITUDE, sign = (a ^ b) & SIGN;
    if (x > INFINITE || y > INFINITE) return NOT_A_NUMBER;
    if (x == INFINITE || y == INFINITE) return (x == 0 || y == 0 ? NOT_A_NUMBER : INFINITE) | sign;
    return magnitude_of(x, y, m) | sign;
}

// A number's bits in float32; subnormal ones are zeros already.
DEVICE u32 load_number(const void *p, i64 i, Layout l) {
    const u32 u = l.bytes == 4 ? ((const u32 *)p)[i] : l.bytes == 2 ? ((const u16 *)p)[i] : ((const u8 *)p)[i];
    const u32 ones = (1u << (l.exponent + l.mantissa)) - 1, top = (1u << l.exponent) - 1;
    const u32 v = u & ones, sign = (u >> (l.exponent + l.mantissa)) << 31, field = v >> l.mantissa;
    if (field == 0) return sign;
    if (l.specials == SPECIALS_IEEE && field == top) return v == top << l.mantissa ? sign | INFINITE : NOT_A_NUMBER;
    if (l.specials == SPECIALS_NAN && v == ones) return NOT_A_NUMBER;
    return sign | ((v << (23 - l.mantissa)) + ((128u - (1u << (l.exponent - 1))) << 23));
}
// Stores a number that the format has.
DEVICE void store_number(void *p, i64 i, Layout l, u32 r) {
    const u32 m = r & MAGNITUDE, top = ((1u << l.exponent) - 1) << l.mantissa;
    u32 v = m == 0 ? 0 : (m >> (23 - l.mantissa)) - ((128u - (1u << (l.exponent - 1))) << l.mantissa);
    if (l.specials == SPECIALS_IEEE && m >= INFINITE) v = m > INFINITE ? top | 1u << (l.mantissa - 1) : top;
    if (l.specials == SPECIALS_NAN && m > INFINITE) v = (1u << (l.exponent + l.mantissa)) - 1;
    v |= r >> 31 << (l.exponent + l.mantissa);
    if (l.bytes == 4)
        ((u32 *)p)[i] = v;
    else if (l.bytes == 2)
        ((u16 *)p)[i] = (u16)v;
    else
        ((u8 *)p)[i] = (u8)v;
}

// float32's bits rounded to a format, ties to even, past the largest number to it.
DEVICE u32 rounded(u32 b, int mantissa, const Model &m) {
    const u32 x = b & MAGNITUDE, sign = b & SIGN;
    if (x >= INFINITE) return x > INFINITE ? NOT_A_NUMBER : b;
    const int field = (int)(x >> 23), lowest = (int)(m.smallest >> 23), e = field ? field : 1;
    const int drop = 23 - mantissa + (lowest > e ? lowest - e : 0);
    if (drop > 24) return sign;
    const u32 s = (x & 0x7fffffu) | (field ? 0x800000u : 0u);
    const u32 near = drop ? ((s + (1u << (drop - 1)) - 1 + ((s >> drop) & 1)) >> drop) << drop : s;
    if (near == 0) return sign;
    // A carry passes into the exponent by itself.
    const u32 r = field ? (x & INFINITE) + near - 0x800000u : near;
    return sign | (r < m.largest ? r : m.largest);
}
