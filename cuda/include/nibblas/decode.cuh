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
//
// Codes of PAIRS lie otherwise, so that a byte is a pair: byte i of word block*2 + row holds step i/2, low nibble
// k = 2t + 8*(i%2), high nibble the k after it.
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
//   Byte   the quad itself, unsigned, or the entries of a table.
enum Act { ACT_F16 = 0, ACT_BF16 = 1, ACT_S8 = 2, ACT_E4M3 = 3 };

// What a code is worth.
//   LINE   mul*u - sub
//   PAIRS  an entry of a table of 16; a pair of codes is looked up at once
//   FLOAT  sign, exponent, mantissa: moved to where the 16-bit type has them, worth a power of two less
//   TABLE  an entry of any table
//   SMALL  of products of bytes: an entry of a table of 16 in registers, codes lying as those of LINE
enum Worth { LINE = 0, PAIRS = 1, FLOAT = 2, TABLE = 3, SMALL = 4 };

// Set on the command line: how scales are stored, and of FLOAT the bits of the mantissa and of the exponent.
#ifndef NB_WORTH
#define NB_WORTH 0
#endif
#ifndef NB_MANTISSA
#define NB_MANTISSA 0
#endif
#ifndef NB_SCALE
#define NB_SCALE 0
#endif
enum Scale { SCALE_F32 = 0, SCALE_F16 = 1, SCALE_POWER = 2, SCALE_BYTE = 3 };
constexpr int SCALE_BYTES = NB_SCALE == SCALE_F32 ? 4 : NB_SCALE == SCALE_F16 ? 2 : 1;
DEVICE float scale_at(const void *p, int i) {
    if (NB_SCALE == SCALE_F16) return f32_of_f16(((const u16 *)p)[i]);
    if (NB_SCALE == SCALE_POWER) return __uint_as_float((u32)((const u8 *)p)[i] << 23); // 1 to 254; the host sees to it
    if (NB_SCALE == SCALE_BYTE) return (float)((const u8 *)p)[i];
    return ((const float *)p)[i];
}
// Scales of groups that are bytes beside a scale of the row (two levels): int8 products multiply the codes by them.
constexpr bool INNER = NB_SCALE == SCALE_BYTE;

template <int BITS> struct Direct {
    static constexpr bool value = NB_WORTH == LINE && (BITS == 4 || BITS == 2 || BITS == 1);
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
    return permute(__float_as_uint(__uint2float_rn(low)), __float_as_uint(__uint2float_rn(high)), 0x7632);
}

DEVICE constexpr u32 both(u32 half) { return half * 0x00010001u; }
template <int BY> DEVICE u32 shifted(u32 v) { return BY >= 0 ? v << (BY & 31) : v >> (-BY & 31); }

// A table of values, ready to be looked up by every lane of a block.
template <int ACT> struct Book {
    static constexpr bool INT = ACT == ACT_S8 || ACT == ACT_E4M3; // entries are bytes
    static constexpr bool IN_REGISTERS = INT && (NB_WORTH == PAIRS || NB_WORTH == SMALL);
    // PAIRS: every pair of values once per lane, so that no two lanes share a bank. TABLE: eight copies.
    static constexpr int BYTES = NB_WORTH == PAIRS && !INT ? 32768 : NB_WORTH == TABLE ? 8192 : 0;
    const char *at; // the table, in shared memory
    u32 lane;       // offset of this lane's copy
    u32 bytes[4];   // PAIRS and SMALL of bytes: the table itself

    // `values` are 16 or 256 of the type that the products are computed in. A barrier must follow.
    DEVICE void load(char *shared, const void *values, int tid, int threads) {
        at = shared;
        if (IN_REGISTERS) {
#pragma unroll
            for (int i = 0; i < 4; i++) bytes[i] = ((const u32 *)values)[i];
        } else if (NB_WORTH == PAIRS) {
            lane = 4 * (tid & 31);
            const u16 *v = (const u16 *)values;
            for (int i = tid >> 5; i < 256; i += threads >> 5)
                *(u32 *)(shared + i * 128 + lane) = (u32)v[i & 15] | (u32)v[i >> 4] << 16;
        } else if (NB_WORTH == TABLE) {
            lane = 4 * (tid & 7);
            for (int i = tid; i < 2048; i += threads)
                ((u32 *)shared)[i] = INT ? (u32)((const u8 *)values)[i >> 3] : (u32)((const u16 *)values)[i >> 3];
        }
    }
    // The values of the two codes of byte `i` of a word.
    template <int I> DEVICE u32 pair(u32 word) const {
        return *(const u32 *)(at + ((shifted<7 - 8 * I>(word) & 0x7f80u) | lane));
    }
    // The value of the code in byte `i`.
    template <int I> DEVICE u32 value(u32 quad) const {
        return *(const u32 *)(at + ((shifted<5 - 8 * I>(quad) & 0x1fe0u) | lane));
    }
    // int8 values of the four codes in the low or high half of a word of pairs, as a quad.
    template <int HALF> DEVICE u32 four(u32 word) const {
        const u32 place = (word & 0x77777777u) >> (16 * HALF), upper = ((word >> 1 & 0x44444444u) | 0x32103210u) >> (16 * HALF);
        const u32 found = permute(permute(bytes[0], bytes[1], place), permute(bytes[2], bytes[3], place), upper);
        return permute(found, found, 0x3120);
    }
    // The bytes of the four codes of a quad.
    DEVICE u32 each(u32 quad) const {
        const u32 twos = quad | quad >> 4, place = permute(twos, 0, 0x4420), upper = (place >> 1 & 0x4444u) | 0x3210u;
        return permute(permute(bytes[0], bytes[1], place & 0x7777u), permute(bytes[2], bytes[3], place & 0x7777u), upper);
    }
};

// The codes of half of a quad (places 0 and 2, or 1 and 3) as small floats of the 16-bit type, as they are or a power
// of two apart.
template <int ACT, int BITS, int HALF> DEVICE u32 small_float(u32 q) {
    constexpr int mantissa = ACT == ACT_F16 ? 10 : 7, up = mantissa - NB_MANTISSA;
    constexpr u32 magnitude = (((1u << (BITS - 1)) - 1) << up) & 0x7fffu;
    u32 v = (shifted<up - 8 * HALF>(q) & both(magnitude)) | (shifted<16 - BITS - 8 * HALF>(q) & both(0x8000u));
    if (ACT == ACT_BF16) {
        // The exponent's bias brought up to that of bfloat16: there products could leave the range of float32.
        constexpr u32 bias = (1u << (BITS > 2 + NB_MANTISSA ? BITS - 2 - NB_MANTISSA : 0)) - 1;
        asm("fma.rn.bf16x2 %0, %0, %1, %2;" : "+r"(v) : "r"(both((254u - bias) << 7)), "r"(0x80008000u));
    }
    return v;
}

// Small floats of four bits as float16, both steps of a word alike: the number is in the upper byte, so a quad is put in
// order at once and its bytes then go to the halves.
template <int STEP> DEVICE void small_floats4(u32 word, u32 &low, u32 &high) {
    constexpr int up = 2 - NB_MANTISSA; // from the nibble to exponent and mantissa in that byte
    u32 v = shifted<up - 4 * STEP>(word) & (0x0f0f0f0fu << up);
    v += (v & (0x08080808u << up)) * ((16u >> up) - 1); // the sign goes on to the top
    low = permute(v, 0, 0x2404);
    high = v & 0xff00ff00u;
}

// A fragment of mma.m16n8k16 for one step of a block.
template <int ACT, int BITS> DEVICE void decode16(const Book<ACT> &book, const Words<BITS> &x, int block, int step, u32 a[4]) {
#pragma unroll
    for (int row = 0; row < 2; row++) {
        u32 low, high;
        if (NB_WORTH == PAIRS) {
            const u32 w = x.w[block * 2 + row];
            low = step ? book.template pair<2>(w) : book.template pair<0>(w);
            high = step ? book.template pair<3>(w) : book.template pair<1>(w);
        } else if (NB_WORTH == FLOAT && ACT == ACT_F16 && BITS == 4) {
            const u32 w = x.w[block * 2 + row];
            if (step)
                small_floats4<1>(w, low, high);
            else
                small_floats4<0>(w, low, high);
        } else if (NB_WORTH == FLOAT) {
            const u32 q = quad<BITS>(x, block, row, step);
            low = small_float<ACT, BITS, 0>(q);
            high = small_float<ACT, BITS, 1>(q);
        } else if (NB_WORTH == TABLE) {
            const u32 q = quad<BITS>(x, block, row, step);
            low = permute(book.template value<0>(q), book.template value<2>(q), 0x5410);
            high = permute(book.template value<1>(q), book.template value<3>(q), 0x5410);
        } else if (Sets<ACT, BITS>::value == 2) {
            constexpr int pb = Planes<BITS>::first;
            u32 v = x.w[Field<pb>::word(block, row, step)];
            if (BITS == 1 && (block & 1)) v >>= 4;
            u32 mask = both((1u << (pb & 7)) - 1) << excess<ACT, BITS>(row, step);
            low = v & mask;
            high = (v >> 8) & mask;
        } else if (Direct<BITS>::value) {
            constexpr int pb = Planes<BITS>::first;
            u32 v = x.w[Field<pb>::word(block, row, step)];
            int s = Field<pb>::shift(block, row, step);
            u32 mask = both((1u << (pb & 7)) - 1);
            low = (v >> s) & mask;
            high = (v >> (s + 8)) & mask;
        } else {
            u32 q = quad<BITS>(x, block, row, step);
            low = q & 0x00ff00ffu;
            high = (q >> 8) & 0x00ff00ffu;
        }
        if (NB_WORTH == LINE && ACT == ACT_BF16) {
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

// The integers of one row and step as a quad, of products in int8; of LINE the codes.
template <int ACT, int BITS> DEVICE u32 integers(const Book<ACT> &book, const Words<BITS> &x, int block, int row, int step) {
    if (NB_WORTH == PAIRS) {
        const u32 w = x.w[block * 2 + row];
        return step ? book.template four<1>(w) : book.template four<0>(w);
    }
    const u32 q = quad<BITS>(x, block, row, step);
    if (NB_WORTH != TABLE) return NB_WORTH == SMALL ? book.each(q) : q;
    const u32 low = permute(book.template value<0>(q), book.template value<1>(q), 0x0040);
    const u32 high = permute(book.template value<2>(q), book.template value<3>(q), 0x0040);
    return permute(low, high, 0x5410);
}

// A fragment of mma.m16n8k32 on bytes for a block.
template <int ACT, int BITS> DEVICE void decode8(const Book<ACT> &book, const Words<BITS> &x, int block, u32 a[4]) {
#pragma unroll
    for (int step = 0; step < 2; step++)
#pragma unroll
        for (int row = 0; row < 2; row++) a[2 * step + row] = integers(book, x, block, row, step);
}

// Of LINE: the number that a fragment of `gemm.cu` holds is `u * unit + offset`.
template <int ACT, int BITS> DEVICE constexpr float inverse_unit() { return ACT == ACT_F16 ? 16777216.0f : 1.0f; }
template <int ACT, int BITS> DEVICE constexpr float offset() {
    return ACT == ACT_BF16 && BITS != 8 ? 128.0f : 0.0f;
}
