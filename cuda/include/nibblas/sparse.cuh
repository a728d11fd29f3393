// Sparse weights, stored as kept entries and expanded in registers.
//
// A record is a tile of 32 rows by 128 k: two tiles of 16 rows, eight steps of 16 k. Of step s and tile i the lane (g, t)
// owns the four registers of the first operand of mma.m16n8k16: pairs of neighbours along K at (row g, 2t), (g+8, 2t),
// (g, 2t+8), (g+8, 2t+8). Pairs are numbered (2s + i) * 4 + register, 64 of a lane.
//
//   bitmap   16-bit numbers. A unit is one entry or a pair of entries; a bit per unit, in the order of pairs:
//              masks   [lane][words]   units 0 to 31 in the first word; 4 words for entries, 2 for pairs
//              values  of lane 0 in order, then lane 1, ...; filled up to 16 bytes
//            The lane's values begin where those of the lanes below end, which their counts tell.
//   2:4      half of the entries, in the order of mma.sp (register r holds what is kept of one four of 16-bit numbers, of
//            two fours of int8). Steps are of 32 k, of 64 for int8.
//              places  16 bits: [lane][step], two bits per kept entry; lanes 2i and 2i + 1 of a quad speak for tile i
//                      int8: [step][tile][lane]
//              values  [step][tile][lane][4 registers]
//   groups   4-bit codes; a unit is 32 k of a row, the words of four lanes, as decode.cuh has them
//              quads   [g] 16 bits, one per unit of the rows of the lanes (g, t): (block of 32 k) * 4 + tile * 2 + half of
//                      the tile; 16 bits, units before them
//              scales  [row], float16
//              units   in the order of quads, then bits
//
// Records lie in the order of row tiles, then k; `offsets` says where each begins, in 16 bytes.
#pragma once
#include "base.cuh"
#include <nibblas/scheduler.cuh>

enum Structure { BITMAP_ENTRIES = 1, BITMAP_PAIRS = 2, TWO_OF_FOUR = 3, GROUPS = 4 };
constexpr int RECORD_ROWS = 32, RECORD_K = 128;

// planes[0] holds the records.
struct SparseArgs : Args {
    const u32 *offsets;
    int slot;    // bytes of the longest run of records
    int records; // of a row
};

// Row and column of an entry of a lane in its record.
DEVICE int entry_row(int lane, int pair) { return (pair >> 2 & 1) * 16 + (pair & 1) * 8 + (lane >> 2); }
DEVICE int entry_k(int lane, int pair) { return (pair >> 3) * 16 + (pair >> 1 & 1) * 8 + (lane & 3) * 2; }

// Bytes of a record of kept groups before its units.
constexpr int GROUPS_HEAD = 32 + RECORD_ROWS * 2;

DEVICE int lanes_below(int count, int lane) {
    int sum = count;
#pragma unroll
    for (int by = 1; by < 32; by *= 2) {
        const int other = __shfl_up_sync(0xffffffffu, sum, by);
        if (lane >= by) sum += other;
    }
    return sum - count;
}

DEVICE void load_four(u32 r[4], u32 at) {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at));
}

// The bitmap of a lane, and where its next value is.
template <int UNIT> struct Bits {
    static constexpr int WORDS = 4 / UNIT;
    u32 mask[WORDS];
    u32 next, end; // of the record: filled up to 16 bytes

    DEVICE void open(u32 record, int lane) {
        int count = 0;
        if (UNIT == 1)
            asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(mask[0]), "=r"(mask[1]), "=r"(mask[WORDS - 2]), "=r"(mask[WORDS - 1])
                         : "r"(record + lane * 16));
        else
            asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(mask[0]), "=r"(mask[1]) : "r"(record + lane * 8));
#pragma unroll
        for (int w = 0; w < WORDS; w++) count += __popc(mask[w]);
        next = record + 128 * WORDS + lanes_below(count, lane) * (2 * UNIT);
        end = (__shfl_sync(0xffffffffu, next + count * (2 * UNIT), 31) + 15) & ~15u;
    }
    // The next pair; `pair` is known when this is compiled. Every address has a register of its own: one that changed
    // would have to wait until the load before has read it.
    DEVICE u32 expand(int pair) {
        if (UNIT == 2) {
            u32 v = 0;
            load(v, pair);
            return v;
        }
        u32 low = 0, high = 0;
        load(low, 2 * pair);
        load(high, 2 * pair + 1);
        return high * 0x10000u + low;
    }
    DEVICE void load(u32 &v, int unit) {
        const int bit = unit & 31;
        const u32 kept = mask[(unit >> 5) % WORDS] & 1u << bit;
        if (UNIT == 2)
            asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %1, 0;\n@p ld.shared.u32 %0, [%2];\n}" : "+r"(v) : "r"(kept), "r"(next));
        else
            asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %1, 0;\n@p ld.shared.u16 %0, [%2];\n}" : "+r"(v) : "r"(kept), "r"(next));
        next += bit >= UNIT ? kept >> (bit - UNIT) : kept << (UNIT - bit);
    }
};

// The kept groups of the rows of a lane.
struct Kept {
    u32 mask, next, end; // of the record

    DEVICE void open(u32 record, int lane) {
        u32 quad, last;
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(quad) : "r"(record + (lane >> 2) * 4));
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(last) : "r"(record + 7 * 4));
        end = record + GROUPS_HEAD + 16 * ((last >> 16) + __popc(last & 0xffffu));
        mask = quad & 0xffffu;
        next = record + GROUPS_HEAD + (quad >> 16) * 16 + (lane & 3) * 4;
    }
    // The next word; `bit` is known when this is compiled. Dropped codes are those of 0.
    DEVICE u32 word(int bit) {
        const u32 kept = mask & 1u << bit;
        u32 v = 0x88888888u;
        asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %1, 0;\n@p ld.shared.u32 %0, [%2];\n}" : "+r"(v) : "r"(kept), "r"(next));
        next += bit >= 4 ? kept >> (bit - 4) : kept << (4 - bit);
        return v;
    }
};
