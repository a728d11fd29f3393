// From a matrix of 16-bit numbers to the records of sparse.cuh: a warp per record, once to count and once to write.
#include <nibblas/base.cuh>
#include <nibblas/scheduler.cuh>
#include <nibblas/sparse.cuh>

struct PackArgs {
    const u16 *w;  // [n][k]; codes of int8 are bytes, 128 more than the number
    u32 *offsets;  // counting: 16-byte pieces of each record; writing: where it begins
    char *records;
    int n, k, chunks, tiles;
    int structure, bytes; // of a number
};

DEVICE u32 entry(const PackArgs &a, int row, int k) { return row < a.n && k < a.k ? a.w[(i64)row * a.k + k] : 0; }

template <int BYTES> DEVICE u32 number(const PackArgs &a, int row, int k) {
    if (row >= a.n || k >= a.k) return 0;
    return BYTES == 1 ? ((const u8 *)a.w)[(i64)row * a.k + k] ^ 0x80u : a.w[(i64)row * a.k + k];
}

// A record, and the lane that packs it.
struct Spot {
    int row, k, lane;
    i64 record;
    DEVICE explicit Spot(const PackArgs &a) : lane(threadIdx.x & 31) {
        record = ((i64)blockIdx.x * blockDim.x + threadIdx.x) / 32;
        row = (int)(record / a.chunks) * RECORD_ROWS;
        k = (int)(record % a.chunks) * RECORD_K * halves_of(a.structure);
    }
    DEVICE bool outside(const PackArgs &a) const { return record >= (i64)a.tiles * a.chunks; }
    DEVICE char *at(const PackArgs &a) const { return a.records + (i64)a.offsets[record] * 16; }
};

// The lists of a record: what each lane keeps, and where it lies.
template <int UNIT, int BYTES> struct Lists : Bitmap<UNIT, BYTES> {
    using B = Bitmap<UNIT, BYTES>;
    u32 mask[2][B::WORDS];
    int starts[B::LISTS]; // in bytes, of the second half
    int height;           // of the columns, the same for all lanes

    static DEVICE u32 unit(const PackArgs &a, const Spot &s, int half, int place) {
        u32 v = 0;
        for (int i = 0; i < UNIT; i++) {
            // From the order of units to that of products.
            constexpr int PER = 4 / BYTES, TILE = B::STEPS * 4;
            const int of = place * UNIT + i, r = of / PER, e = (((r % TILE / 4) * 2 + r / TILE) * 4 + r % 4) * PER + of % PER;
            v |= ::number<BYTES>(a, s.row + entry_row<BYTES>(s.lane, e), s.k + half * RECORD_K + entry_k<BYTES>(s.lane, e))
                 << (8 * BYTES * i);
        }
        return v;
    }
    DEVICE int count(int half, int list) const {
        int sum = 0;
        for (int w = 0; w < B::UNITS / 32; w++) sum += __popc(mask[half][list * (B::UNITS / 32) + w]);
        return sum;
    }
    // Where a lane stands in the order of `count`.
    static DEVICE int rank(int count, int lane) {
        int below = 0;
        for (int i = 0; i < 32; i++) {
            const int other = __shfl_sync(0xffffffffu, count, i);
            below += other < count || (other == count && i < lane);
        }
        return below;
    }
    DEVICE Lists(const PackArgs &a, const Spot &s) {
        for (int half = 0; half < 2; half++)
            for (int w = 0; w < B::WORDS; w++) {
                mask[half][w] = 0;
                for (int i = 0; i < 32; i++) mask[half][w] |= (u32)(unit(a, s, half, w * 32 + i) != 0) << i;
            }
        height = 0;
        for (int i = 0; i < B::LISTS; i++) {
            const int above = count(0, i), below = count(1, i);
            const int mine = rank(above, s.lane), wanted = 31 - rank(below, s.lane);
            int column = 0;
            for (int l = 0; l < 32; l++)
                if (__shfl_sync(0xffffffffu, mine, l) == wanted) column = l;
            const int row = __shfl_sync(0xffffffffu, above, column);
            starts[i] = row * 128 + column * 4 + i * B::WIDTH;
            height = max(height, row + below);
        }
        for (int by = 16; by > 0; by /= 2) height = max(height, __shfl_xor_sync(0xffffffffu, height, by));
    }
    DEVICE int bytes() const { return B::HEAD + height * 128; }
    DEVICE void write(const PackArgs &a, const Spot &s) const {
        char *to = s.at(a);
        for (int half = 0; half < 2; half++)
            for (int w = 0; w < B::WORDS; w++) ((u32 *)to)[(half * 32 + s.lane) * B::WORDS + w] = mask[half][w];
        for (int i = 0; i < B::LISTS; i++) ((u16 *)(to + B::STARTS))[s.lane * B::LISTS + i] = (u16)starts[i];
        if (s.lane == 0) *(u32 *)(to + B::LENGTH) = bytes();
        for (int list = 0; list < 2 * B::LISTS; list++) {
            const int half = list / B::LISTS, side = list % B::LISTS;
            char *at = to + B::HEAD + (half ? starts[side] : s.lane * 4 + side * B::WIDTH);
            for (int i = 0; i < B::UNITS; i++) {
                const u32 v = unit(a, s, half, side * B::UNITS + i);
                if (!v) continue;
                if (B::WIDTH == 4)
                    *(u32 *)at = v;
                else if (B::WIDTH == 2)
                    *(u16 *)at = (u16)v;
                else
                    *at = (char)v;
                at += 128;
            }
        }
    }
};

// The products of a record that meet nothing but zeros are dropped.
template <int BYTES> struct Kept16 {
    static constexpr int UNITS = 8 * BYTES;
    u32 mask = 0;

    static DEVICE u32 word(const PackArgs &a, const Spot &s, int number_) {
        u32 v = 0;
        for (int i = 0; i < 4 / BYTES; i++) {
            const int e = number_ * (4 / BYTES) + i;
            v |= number<BYTES>(a, s.row + entry_row<BYTES>(s.lane, e), s.k + entry_k<BYTES>(s.lane, e)) << (8 * BYTES * i);
        }
        return v;
    }
    DEVICE Kept16(const PackArgs &a, const Spot &s) {
        for (int u = 0; u < UNITS; u++) {
            u32 any = 0;
            for (int r = 0; r < 4; r++) any |= word(a, s, u * 4 + r);
            mask |= (u32)(__ballot_sync(0xffffffffu, any != 0) != 0) << u;
        }
    }
    DEVICE int bytes() const { return 16 + __popc(mask) * 512; }
    DEVICE void write(const PackArgs &a, const Spot &s) const {
        u32 *to = (u32 *)s.at(a);
        if (s.lane < 4) to[s.lane] = s.lane ? 0 : mask;
        to += 4 + s.lane * 4;
        for (int u = 0; u < UNITS; u++) {
            if (!(mask >> u & 1)) continue;
            for (int r = 0; r < 4; r++) to[r] = word(a, s, u * 4 + r);
            to += 128;
        }
    }
};

template <class Record> DEVICE void pack(const PackArgs &a, const Spot &s, bool count) {
    const Record record(a, s);
    if (!count)
        record.write(a, s);
    else if (s.lane == 0)
        a.offsets[s.record] = record.bytes() / 16;
}
DEVICE void pack(const PackArgs &a, bool count) {
    const Spot s(a);
    if (s.outside(a)) return;
    if (a.structure == BITMAP_ENTRIES && a.bytes == 2) pack<Lists<1, 2>>(a, s, count);
    if (a.structure == BITMAP_ENTRIES && a.bytes == 1) pack<Lists<1, 1>>(a, s, count);
    if (a.structure == BITMAP_PAIRS && a.bytes == 2) pack<Lists<2, 2>>(a, s, count);
    if (a.structure == BITMAP_PAIRS && a.bytes == 1) pack<Lists<2, 1>>(a, s, count);
    if (a.structure == TILES && a.bytes == 2) pack<Kept16<2>>(a, s, count);
    if (a.structure == TILES && a.bytes == 1) pack<Kept16<1>>(a, s, count);
}

extern "C" __global__ void count_units(const PackArgs a) { pack(a, true); }
extern "C" __global__ void write_units(const PackArgs a) { pack(a, false); }

// Kept entries of a four and their places, two bits each: those that are not 0, then others so that there are two.
DEVICE void keep_two(const u32 v[4], u32 &values, u32 &places) {
    int first = -1, second = -1;
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (v[i]) {
            if (first < 0)
                first = i;
            else
                second = i;
        }
    if (first < 0) first = 0;
    if (second < 0) {
        second = first ? first : 1;
        first = first ? 0 : first;
    }
    values = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) values |= (i == first ? v[i] : 0) | (i == second ? v[i] << 16 : 0);
    places = (u32)(first | second << 2);
}

DEVICE void four_at(const PackArgs &a, int row, int k, u32 &values, u32 &places) {
    u32 v[4];
    for (int i = 0; i < 4; i++) v[i] = entry(a, row, k + i);
    keep_two(v, values, places);
}

extern "C" __global__ void write_fours(const PackArgs a) {
    const i64 record = ((i64)blockIdx.x * blockDim.x + threadIdx.x) / 32;
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    if (record >= (i64)a.tiles * a.chunks) return;
    const int row0 = (int)(record / a.chunks) * RECORD_ROWS, k0 = (int)(record % a.chunks) * RECORD_K;
    u32 *to = (u32 *)(a.records + record * 4608);
    for (int step = 0; step < 4; step++) {
        for (int i = 0; i < 2; i++)
#pragma unroll 1
            for (int r = 0; r < 4; r++) {
                u32 values, places;
                four_at(a, row0 + i * 16 + (r & 1) * 8 + g, k0 + step * 32 + (r >> 1) * 16 + 4 * t, values, places);
                to[128 + ((step * 2 + i) * 32 + lane) * 4 + r] = values;
            }
        // Lane 2i + h of a quad: of tile i the sixteen k of half h, row g in the low half and g + 8 in the high one.
        u32 word = 0;
        for (int q = 0; q < 8; q++) {
            u32 values, places;
            four_at(a, row0 + (t >> 1) * 16 + (q >> 2) * 8 + g, k0 + step * 32 + (t & 1) * 16 + (q & 3) * 4, values, places);
            word |= places << (4 * q);
        }
        to[lane * 4 + step] = word;
    }
}

// int8: codes are bytes, 128 more than the number; steps of 64 k.
extern "C" __global__ void write_fours8(const PackArgs a) {
    const i64 record = ((i64)blockIdx.x * blockDim.x + threadIdx.x) / 32;
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    if (record >= (i64)a.tiles * a.chunks) return;
    const int row0 = (int)(record / a.chunks) * RECORD_ROWS, k0 = (int)(record % a.chunks) * RECORD_K;
    const u8 *codes = (const u8 *)a.w;
    auto four = [&](int row, int k, u32 &values, u32 &places) {
        u32 v[4];
        for (int i = 0; i < 4; i++)
            v[i] = row < a.n && k + i < a.k ? codes[(i64)row * a.k + k + i] ^ 0x80u : 0;
        keep_two(v, values, places);
    };
    u32 *to = (u32 *)(a.records + record * 2560);
    for (int step = 0; step < 2; step++)
        for (int i = 0; i < 2; i++) {
            const int row = row0 + i * 16 + g;
            for (int r = 0; r < 4; r++) {
                u32 word = 0;
                for (int h = 0; h < 2; h++) {
                    u32 values, places;
                    four(row + (r & 1) * 8, k0 + step * 64 + (r >> 1) * 32 + t * 8 + h * 4, values, places);
                    word |= (values & 0xffu | values >> 8 & 0xff00u) << (16 * h);
                }
                to[128 + ((step * 2 + i) * 32 + lane) * 4 + r] = word;
            }
            // Lane 2h + r of a quad: the 32 k of half h, row g + 8r.
            u32 word = 0;
            for (int q = 0; q < 8; q++) {
                u32 values, places;
                four(row + (t & 1) * 8, k0 + step * 64 + (t >> 1) * 32 + q * 4, values, places);
                word |= places << (4 * q);
            }
            to[(step * 2 + i) * 32 + lane] = word;
        }
}

struct GroupArgs {
    const u8 *codes;
    const u16 *scales; // [n][groups]
    u32 *offsets;
    char *records;
    i64 row_bytes;
    int n, k, chunks, tiles;
    int groups, chunks_per_group;
};

// Units 0 to 127 of a record, in the order they lie: quad * 16 + tile * 8 + block * 2 + half of the tile.
DEVICE int unit_row(const GroupArgs &a, i64 record, int unit) {
    return (int)(record / a.chunks) * RECORD_ROWS + (unit >> 3 & 1) * 16 + (unit & 1) * 8 + (unit >> 4);
}
DEVICE int unit_k(const GroupArgs &a, i64 record, int unit) {
    return (int)(record % a.chunks) * RECORD_K + (unit >> 1 & 3) * 32;
}
// Places past the end hold the code of 0.
DEVICE u32 code_at(const GroupArgs &a, int row, int k) {
    if (row >= a.n || k >= a.k) return 8;
    return a.codes[(i64)row * a.row_bytes + k / 2] >> (k & 1) * 4 & 15u;
}
DEVICE bool is_kept(const GroupArgs &a, i64 record, int unit) {
    const int row = unit_row(a, record, unit), k = unit_k(a, record, unit);
    bool kept = false;
    for (int i = 0; i < 32; i++) kept |= code_at(a, row, k + i) != 8;
    return kept;
}

// The masks of a record's quads, and where their units begin.
struct Quads {
    u32 mask[8];
    int starts[8], count = 0; // of all

    DEVICE Quads(const GroupArgs &a, i64 record, int lane) {
        for (int j = 0; j < 4; j++) {
            const u32 two = __ballot_sync(0xffffffffu, is_kept(a, record, j * 32 + lane));
            mask[2 * j] = two & 0xffffu;
            mask[2 * j + 1] = two >> 16;
        }
        for (int q = 0; q < 8; q++) {
            starts[q] = count;
            count += __popc(mask[q]);
        }
    }
    // Where a unit lies.
    DEVICE int place(int unit) const {
        const int q = unit >> 4;
        return starts[q] + __popc(mask[q] & ((1u << (unit & 15)) - 1));
    }
};

extern "C" __global__ void count_groups(const GroupArgs a) {
    const i64 record = ((i64)blockIdx.x * blockDim.x + threadIdx.x) / 32;
    const int lane = threadIdx.x & 31;
    if (record >= (i64)a.tiles * a.chunks) return;
    const Quads quads(a, record, lane);
    if (lane == 0) a.offsets[record] = GROUPS_HEAD / 16 + quads.count;
}

extern "C" __global__ void write_groups(const GroupArgs a) {
    const i64 record = ((i64)blockIdx.x * blockDim.x + threadIdx.x) / 32;
    const int lane = threadIdx.x & 31;
    if (record >= (i64)a.tiles * a.chunks) return;
    char *to = a.records + (i64)a.offsets[record] * 16;
    const int row = (int)(record / a.chunks) * RECORD_ROWS + lane, group = (int)(record % a.chunks) / a.chunks_per_group;
    ((u16 *)(to + 32))[lane] = row < a.n ? a.scales[(i64)row * a.groups + group] : 0;
    const Quads quads(a, record, lane);
    if (lane < 8) ((u32 *)to)[lane] = quads.mask[lane] | (u32)quads.starts[lane] << 16 | (u32)quads.count << 24;
    for (int j = 0; j < 4; j++) {
        const int unit = j * 32 + lane;
        if (!(quads.mask[unit >> 4] >> (unit & 15) & 1)) continue;
        u32 *words = (u32 *)(to + GROUPS_HEAD + quads.place(unit) * 16);
        for (int t = 0; t < 4; t++) {
            u32 word = 0;
            for (int i = 0; i < 8; i++) {
                const int k = (i & 1) * 16 + 2 * t + (i >> 2) + (i >> 1 & 1) * 8;
                word |= code_at(a, unit_row(a, record, unit), unit_k(a, record, unit) + k) << (4 * i);
            }
            words[t] = word;
        }
    }
}
