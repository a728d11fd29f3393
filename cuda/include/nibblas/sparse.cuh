// Sparse weights, stored as kept entries and expanded in registers.
//
// A record is a tile of 32 rows by 128 k (bitmap: two of them along K): two tiles of 16 rows, eight steps of 16 k. Of step s and tile i the lane (g, t)
// owns the four registers of the first operand of mma.m16n8k16: pairs of neighbours along K at (row g, 2t), (g+8, 2t),
// (g, 2t+8), (g+8, 2t+8). A lane's entries are numbered from ((2s + i) * 4 + register) * 2 on, 128 of them. int8: four
// steps of 32 k, four neighbours in a register, those of mma.m16n8k32.
//
//   bitmap   numbers of 16 bits, or int8. A unit is one entry or a pair of neighbours; a bit per unit:
//              masks   [half][lane][words]   units 0 to 31 of a half in the first word; those of the first tile first
//              starts  [lane][lists], 16 bits: where the lists of the second half begin, in bytes after the head
//              length  in bytes, of the record; filled up to 16 bytes
//              values  32 columns of four bytes, as high as the highest
//            What a lane keeps of a half is in as many lists as units fit into four bytes. Each follows a column down, so that
//            the loads of a warp, each from a column of its own, meet no bank twice. Lane l has column l for the first half,
//            and below that lies the second half of some lane: the longest above meet the shortest.
//   2:4      half of the entries, in the order of mma.sp (register r holds what is kept of one four of 16-bit numbers, of
//            two fours of int8). Steps are of 32 k, of 64 for int8.
//              places  16 bits: [lane][step], two bits per kept entry; lanes 2i and 2i + 1 of a quad speak for tile i
//                      int8: [step][tile][lane]
//              values  [step][tile][lane][4 registers]
//   tiles    16 rows by 32 bytes, what a lane holds for one product: kept or dropped whole, with the product
//              mask    16 bits: step * 2 + tile (steps of 16 k, of 32 for int8); filled up to 16 bytes
//              units   [lane][4 registers] each
//   groups   4-bit codes; a unit is 32 k of a row, the words of four lanes, as decode.cuh has them
//              quads   [g] 16 bits, one per unit of the rows of the lanes (g, t): tile * 8 + (block of 32 k) * 2 + half of
//                      the tile; a byte: how many units lie before those of this quad; a byte: how many there are of all
//              scales  [row], float16
//              units   of 16 bytes, those of a quad after those of the one before: few lanes read at once, so few collide
//
// Records lie in the order of row tiles, then k; `offsets` says where each begins, in 16 bytes.
#pragma once
#include "base.cuh"
#include <nibblas/scheduler.cuh>

enum Structure { BITMAP_ENTRIES = 1, BITMAP_PAIRS = 2, TWO_OF_FOUR = 3, GROUPS = 4, TILES = 5 };
constexpr int RECORD_ROWS = 32, RECORD_K = 128;
constexpr int MOST_BLOCKS = 288; // of a grid, along the rows of weights
DEVICE constexpr int halves_of(int structure) { return structure == BITMAP_ENTRIES || structure == BITMAP_PAIRS ? 2 : 1; }

// planes[0] holds the records.
struct SparseArgs : Args {
    const u32 *offsets;
    int slot;    // bytes of the ring of a warp
    int records; // of a row
    int starts[MOST_BLOCKS + 1]; // the first unit of each block's span, and the end of the last
};

// Row and column in its record of a lane's entry, BYTES wide.
template <int BYTES> DEVICE int entry_row(int lane, int entry) {
    const int r = entry / (4 / BYTES);
    return (r >> 2 & 1) * 16 + (r & 1) * 8 + (lane >> 2);
}
template <int BYTES> DEVICE int entry_k(int lane, int entry) {
    const int r = entry / (4 / BYTES), per = 4 / BYTES;
    return (r >> 3) * 8 * per + (r >> 1 & 1) * 4 * per + (lane & 3) * per + entry % per;
}

// Bytes of a record of kept groups before its units.
constexpr int GROUPS_HEAD = 32 + RECORD_ROWS * 2;

DEVICE void load_four(u32 r[4], u32 at) {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at));
}

// How a record lies that has units of UNIT entries of BYTES.
template <int UNIT, int BYTES> struct Bitmap {
    static constexpr int WORDS = 4 / UNIT, WIDTH = UNIT * BYTES;        // of a lane and half; of a unit
    static constexpr int LISTS = 4 / WIDTH, UNITS = 32 * WORDS / LISTS; // of a lane and half; of a list
    static constexpr int STEPS = 4 * BYTES;                             // of a half
    // The register of a tile and step, in the order of units.
    static DEVICE constexpr int number(int tile, int step, int r) { return (tile * STEPS + step) * 4 + r; }
    static constexpr int STARTS = 256 * WORDS, LENGTH = STARTS + 64 * LISTS, HEAD = LENGTH + 16;
};

// The bitmap of a lane, and where the next value is of each list, and tile: their sums of bits do not wait for each other.
template <int UNIT, int BYTES> struct Bits : Bitmap<UNIT, BYTES> {
    using B = Bitmap<UNIT, BYTES>;
    static constexpr int CHAINS = B::LISTS < 2 ? 2 : B::LISTS;
    u32 mask[B::WORDS], next[CHAINS];

    DEVICE void open(u32 record, int half, int lane) {
        const u32 masks = record + half * (128 * B::WORDS) + lane * (4 * B::WORDS), values = record + B::HEAD;
        if constexpr (UNIT == 1)
            load_four(mask, masks);
        else
            asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(mask[0]), "=r"(mask[1]) : "r"(masks));
#pragma unroll
        for (int i = 0; i < B::LISTS; i++) {
            u16 start;
            asm volatile("ld.shared.u16 %0, [%1];" : "=h"(start) : "r"(record + B::STARTS + (lane * B::LISTS + i) * 2));
            next[i] = values + (half ? start : lane * 4 + i * B::WIDTH);
        }
        if (B::LISTS == 1) next[1] = next[0] + __popc(mask[0]) * 128;
    }
    static DEVICE u32 end(u32 record) {
        u32 length;
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(length) : "r"(record + B::LENGTH));
        return record + length;
    }
    // The next register; it is known when this is compiled which.
    DEVICE u32 expand(int number) {
        constexpr int COUNT = 4 / B::WIDTH; // units of a register
        u32 v[4] = {0, 0, 0, 0};
#pragma unroll
        for (int i = 0; i < COUNT; i++) load(v[i], number * COUNT + i);
        if (COUNT == 4) return (v[3] * 0x100u + v[2]) * 0x10000u + (v[1] * 0x100u + v[0]);
        return COUNT == 2 ? v[1] * 0x10000u + v[0] : v[0];
    }
    // Every address has a register of its own: one that changed would have to wait until the load before has read it.
    DEVICE void load(u32 &v, int unit) {
        const int bit = unit & 31;
        const u32 kept = mask[(unit >> 5) % B::WORDS] & 1u << bit;
        u32 &at = next[unit / (32 * B::WORDS / CHAINS) % CHAINS];
        if (B::WIDTH == 4)
            asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %1, 0;\n@p ld.shared.u32 %0, [%2];\n}" : "+r"(v) : "r"(kept), "r"(at));
        else if (B::WIDTH == 2)
            asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %1, 0;\n@p ld.shared.u16 %0, [%2];\n}" : "+r"(v) : "r"(kept), "r"(at));
        else
            asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %1, 0;\n@p ld.shared.u8 %0, [%2];\n}" : "+r"(v) : "r"(kept), "r"(at));
        at += bit >= 7 ? kept >> (bit - 7) : kept << (7 - bit); // one down the column
    }
};

// The kept groups of the rows of a lane.
struct Kept {
    u32 mask, next[2], end; // of the record

    DEVICE void open(u32 record, int lane) {
        u32 quad;
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(quad) : "r"(record + (lane >> 2) * 4));
        const u32 units = record + GROUPS_HEAD;
        mask = quad & 0xffffu;
        next[0] = units + (quad >> 16 & 0xffu) * 16 + (lane & 3) * 4;
        next[1] = next[0] + __popc(quad & 0xffu) * 16;
        end = units + (quad >> 24) * 16;
    }
    // The next word; `bit` is known when this is compiled. Dropped codes are those of 0.
    DEVICE u32 word(int bit) {
        const u32 kept = mask & 1u << bit;
        u32 v = 0x88888888u, &at = next[bit >> 3 & 1];
        asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %1, 0;\n@p ld.shared.u32 %0, [%2];\n}" : "+r"(v) : "r"(kept), "r"(at));
        at += bit >= 4 ? kept >> (bit - 4) : kept << (4 - bit);
        return v;
    }
};
