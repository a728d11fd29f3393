// From a matrix of 16-bit numbers to the records of sparse.cuh: a warp per record, once to count and once to write.
#include <nibblas/base.cuh>
#include <nibblas/scheduler.cuh>
#include <nibblas/sparse.cuh>

struct PackArgs {
    const u16 *w;  // [n][k]
    u32 *offsets;  // counting: 16-byte pieces of each record; writing: where it begins
    char *records;
    int n, k, chunks, tiles;
    int structure;
};

DEVICE u32 entry(const PackArgs &a, int row, int k) { return row < a.n && k < a.k ? a.w[(i64)row * a.k + k] : 0; }

DEVICE u32 pair_of(const PackArgs &a, int tile, int chunk, int lane, int pair) {
    const int row = tile * RECORD_ROWS + entry_row(lane, pair), k = chunk * RECORD_K + entry_k(lane, pair);
    return entry(a, row, k) | entry(a, row, k + 1) << 16;
}

extern "C" __global__ void count_units(const PackArgs a) {
    const i64 record = ((i64)blockIdx.x * blockDim.x + threadIdx.x) / 32;
    const int lane = threadIdx.x & 31;
    if (record >= (i64)a.tiles * a.chunks) return;
    const int tile = (int)(record / a.chunks), chunk = (int)(record % a.chunks);
    int count = 0;
    for (int p = 0; p < 64; p++) {
        const u32 v = pair_of(a, tile, chunk, lane, p);
        count += a.structure == BITMAP_PAIRS ? v != 0 : ((v & 0xffffu) != 0) + (v >> 16 != 0);
    }
    count = lanes_below(count, lane) + count;
    if (lane == 31)
        a.offsets[record] = a.structure == BITMAP_PAIRS ? 16 + (count + 3) / 4 : 32 + (count + 7) / 8;
}

extern "C" __global__ void write_bits(const PackArgs a) {
    const i64 record = ((i64)blockIdx.x * blockDim.x + threadIdx.x) / 32;
    const int lane = threadIdx.x & 31;
    if (record >= (i64)a.tiles * a.chunks) return;
    const int tile = (int)(record / a.chunks), chunk = (int)(record % a.chunks);
    const bool pairs = a.structure == BITMAP_PAIRS;
    char *to = a.records + (i64)a.offsets[record] * 16;
    char *end = a.records + (i64)a.offsets[record + 1] * 16;
    const int words = pairs ? 2 : 4, per = pairs ? 32 : 16; // pairs of a word
    int count = 0;
    for (int w = 0; w < words; w++) {
        u32 mask = 0;
        for (int i = 0; i < per; i++) {
            const u32 v = pair_of(a, tile, chunk, lane, w * per + i);
            mask |= pairs ? (u32)(v != 0) << i : ((u32)((v & 0xffffu) != 0) | (u32)(v >> 16 != 0) << 1) << (2 * i);
        }
        ((u32 *)to)[lane * words + w] = mask;
        count += __popc(mask);
    }
    const int below = lanes_below(count, lane);
    char *value = to + 128 * words + below * (pairs ? 4 : 2);
    for (int p = 0; p < 64; p++) {
        const u32 v = pair_of(a, tile, chunk, lane, p);
        if (pairs) {
            if (v) *(u32 *)value = v, value += 4;
        } else {
            if (v & 0xffffu) *(u16 *)value = (u16)v, value += 2;
            if (v >> 16) *(u16 *)value = (u16)(v >> 16), value += 2;
        }
    }
    if (lane == 31)
        for (; value < end; value += 2) *(u16 *)value = 0;
}

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

// Units 0 to 127 of a record, in the order they lie: quad * 16 + block * 4 + tile * 2 + half of the tile.
DEVICE int unit_row(const GroupArgs &a, i64 record, int unit) {
    return (int)(record / a.chunks) * RECORD_ROWS + (unit & 3) * 8 + (unit >> 4);
}
DEVICE int unit_k(const GroupArgs &a, i64 record, int unit) {
    return (int)(record % a.chunks) * RECORD_K + (unit >> 2 & 3) * 32;
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

extern "C" __global__ void count_groups(const GroupArgs a) {
    const i64 record = ((i64)blockIdx.x * blockDim.x + threadIdx.x) / 32;
    const int lane = threadIdx.x & 31;
    if (record >= (i64)a.tiles * a.chunks) return;
    int count = 0;
    for (int j = 0; j < 4; j++) count += __popc(__ballot_sync(0xffffffffu, is_kept(a, record, j * 32 + lane)));
    if (lane == 0) a.offsets[record] = GROUPS_HEAD / 16 + count;
}

extern "C" __global__ void write_groups(const GroupArgs a) {
    const i64 record = ((i64)blockIdx.x * blockDim.x + threadIdx.x) / 32;
    const int lane = threadIdx.x & 31;
    if (record >= (i64)a.tiles * a.chunks) return;
    char *to = a.records + (i64)a.offsets[record] * 16;
    const int row = (int)(record / a.chunks) * RECORD_ROWS + lane, group = (int)(record % a.chunks) / a.chunks_per_group;
    ((u16 *)(to + 32))[lane] = row < a.n ? a.scales[(i64)row * a.groups + group] : 0;
    int before = 0;
    for (int j = 0; j < 4; j++) {
        const int unit = j * 32 + lane;
        const bool kept = is_kept(a, record, unit);
        const u32 mask = __ballot_sync(0xffffffffu, kept);
        // 32 units are those of two quads.
        if ((lane & 15) == 0)
            ((u32 *)to)[unit >> 4] = (mask >> lane & 0xffffu) | (u32)(before + __popc(mask & ((1u << lane) - 1))) << 16;
        u32 *words = (u32 *)(to + GROUPS_HEAD + (before + __popc(mask & ((1u << lane) - 1))) * 16);
        before += __popc(mask);
        if (!kept) continue;
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
