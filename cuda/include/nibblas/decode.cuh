// From packed words to the registers of the tensor cores. One layout serves every compute class.
//
// A tile is 16 rows by 128 k, the lane (g, t) = (lane / 4, lane % 4) holds rows g and g + 8. Each 32-long block of K has
// two steps of 16; in a step a lane owns k = 2t, 2t+1, 2t+8, 2t+9 of both rows (the A fragment of mma.m16n8k16). The four
// codes of one row and step are the four bytes of a "quad", in the order k = 2t, 2t+8, 2t+1, 2t+9; so the two halves of
// a quad & 0x00ff00ff are the pair (2t, 2t+1) and of (quad >> 8) & 0x00ff00ff the pair (2t+8, 2t+9).
//
// Four tiles, 64 rows, lie together; then come the chunks of K, then the next 64 rows. Widths are sums of planes of 8, 4, 2
// and 1 bits; the quads of a plane share words:
//   8 bits   word block*4 + row*2 + step
//   4 bits   word block*2 + row,   shift 4*step
//   2 bits   word block,           shift 4*step + 2*row
//   1 bit    word block/2,         shift 4*(block%2) + 2*step + row
#pragma once
#include "base.cuh"

// Bits of plane P of a width, largest first (0: none), and the bits below it.
template <int BITS> struct Planes {
    static constexpr int first = BITS == 8 ? 8 : BITS >= 4 ? 4 : BITS >= 2 ? 2 : 1;
    static constexpr int second = BITS - first >= 2 ? 2 : BITS - first;
    static constexpr int third = BITS - first - second;
    static constexpr int count = 1 + (second > 0) + (third > 0);
    static DEVICE constexpr int bits(int p) { return p == 0 ? first : p == 1 ? second : third; }
    static DEVICE constexpr int below(int p) { return p == 0 ? 0 : p == 1 ? first : first + second; }
};

template <int PB> struct Field {
    static DEVICE constexpr int word(int block, int row, int step) {
        return PB == 8 ? block * 4 + row * 2 + step : PB == 4 ? block * 2 + row : PB == 2 ? block : block / 2;
    }
    static DEVICE constexpr int shift(int block, int row, int step) {
        return PB == 8 ? 0 : PB == 4 ? 4 * step : PB == 2 ? 4 * step + 2 * row : 4 * (block & 1) + 2 * step + row;
    }
};

// The words of a lane for one tile: 2 * BITS of them, plane after plane.
template <int BITS> struct Words {
    u32 w[2 * BITS];
};

template <int BITS> DEVICE u32 quad(const Words<BITS> &x, int block, int row, int step) {
    using P = Planes<BITS>;
    u32 q;
    {
        constexpr int pb = P::first;
        q = x.w[Field<pb>::word(block, row, step)] >> Field<pb>::shift(block, row, step);
        if (pb < 8) q &= 0x01010101u * ((1u << (pb & 7)) - 1);
    }
    if (P::second) {
        constexpr int pb = P::second ? P::second : 1;
        u32 v = x.w[2 * P::first + Field<pb>::word(block, row, step)];
        int s = Field<pb>::shift(block, row, step) - P::first;
        v = s >= 0 ? v >> s : v << -s;
        q |= v & ((0x01010101u * ((1u << pb) - 1)) << P::first);
    }
    if (P::third) {
        constexpr int pb = P::third ? P::third : 1, at = P::first + P::second;
        u32 v = x.w[2 * at + Field<pb>::word(block, row, step)];
        int s = Field<pb>::shift(block, row, step) - at;
        v = s >= 0 ? v >> s : v << -s;
        q |= v & ((0x01010101u * ((1u << pb) - 1)) << at);
    }
    return q;
}

// What the codes become.
//   Half   the bits of a code are those of a subnormal float16: u * 2^-24, exact and free. SETS = 2 leaves the fields of
//          the second step (and of the odd row) where they are: worth a power of two more, undone at the end.
//   Bf16   128 + u in the mantissa; 8-bit codes are converted.
//   Byte   the quad itself, unsigned.
enum Act { ACT_F16 = 0, ACT_BF16 = 1, ACT_S8 = 2 };

template <int BITS> struct Direct {
    static constexpr bool value = BITS == 4 || BITS == 2 || BITS == 1;
};

// Two accumulators pay where registers are free and a shift per pair is not.
#ifndef NB_SETS
#define NB_SETS 1
#endif
template <int ACT, int BITS> struct Sets {
    static constexpr int value = NB_SETS == 2 && ACT == ACT_F16 && Direct<BITS>::value ? 2 : 1;
};

// log2 of what a field is worth more, of a row in the accumulators of a step.
template <int ACT, int BITS> DEVICE constexpr int excess(int row, int step) {
    return Sets<ACT, BITS>::value == 1 ? 0 : BITS == 4 ? 4 * step : BITS == 2 ? 4 * step + 2 * row : 2 * step + row;
}

DEVICE u32 bf16_pair(u32 low, u32 high) {
    // Integers below 256 are exact in bfloat16: the upper halves of their float32.
    u32 r;
    u32 a = __float_as_uint(__uint2float_rn(low)), b = __float_as_uint(__uint2float_rn(high));
    asm("prmt.b32 %0, %1, %2, 0x7632;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}

// A fragment of mma.m16n8k16 for one step of a block.
template <int ACT, int BITS> DEVICE void decode16(const Words<BITS> &x, int block, int step, u32 a[4]) {
#pragma unroll
    for (int row = 0; row < 2; row++) {
        u32 low, high;
        if (Sets<ACT, BITS>::value == 2) {
            constexpr int pb = Planes<BITS>::first;
            u32 v = x.w[Field<pb>::word(block, row, step)];
            if (BITS == 1 && (block & 1)) v >>= 4;
            u32 mask = (0x00010001u * ((1u << (pb & 7)) - 1)) << excess<ACT, BITS>(row, step);
            low = v & mask;
            high = (v >> 8) & mask;
        } else if (Direct<BITS>::value) {
            constexpr int pb = Planes<BITS>::first;
            u32 v = x.w[Field<pb>::word(block, row, step)];
            int s = Field<pb>::shift(block, row, step);
            u32 mask = 0x00010001u * ((1u << (pb & 7)) - 1);
            low = (v >> s) & mask;
            high = (v >> (s + 8)) & mask;
        } else {
            u32 q = quad<BITS>(x, block, row, step);
            low = q & 0x00ff00ffu;
            high = (q >> 8) & 0x00ff00ffu;
        }
        if (ACT == ACT_BF16) {
            if (BITS == 8) {
                low = bf16_pair(low & 0xffffu, low >> 16);
                high = bf16_pair(high & 0xffffu, high >> 16);
            } else {
                low |= 0x43004300u;
                high |= 0x43004300u;
            }
        }
        a[row] = low;
        a[2 + row] = high;
    }
}

// A fragment of mma.m16n8k32 on bytes for a block.
template <int BITS> DEVICE void decode8(const Words<BITS> &x, int block, u32 a[4]) {
#pragma unroll
    for (int step = 0; step < 2; step++)
#pragma unroll
        for (int row = 0; row < 2; row++) a[2 * step + row] = quad<BITS>(x, block, row, step);
}

// The number that a fragment holds is `u * unit + offset`.
template <int ACT, int BITS> DEVICE constexpr float inverse_unit() { return ACT == ACT_F16 ? 16777216.0f : 1.0f; }
template <int ACT, int BITS> DEVICE constexpr float offset() {
    return ACT == ACT_BF16 && BITS != 8 ? 128.0f : 0.0f;
}
