// Y = X W^T for sm_90a and more than a few rows of X: wgmma with the decoded weights as the register operand.
//
// A block has WG warpgroups, each with 64 rows of W, and T rows of X that all of them read from shared memory. Two more warps
// do nothing but ask the copy engine for chunks, of W and of X, as slots become free. (Ordinary copies would need a proxy
// fence per chunk, which waits for every copy in flight.) Weights are decoded to the numbers they stand for without their scale
// (integers or entries of a table), so that a group needs one fused multiply-add per output when it ends. While the tensor
// cores work on a block of 32 k the next one is decoded, across chunks and rows. Results leave through shared memory, as whole
// lines of Y: of 16 bits by the copy engine, while the next rows are multiplied.
//
// Where there are fewer tiles of Y than multiprocessors, the SPLIT blocks of a cluster share out K of one tile. Their sums
// meet in shared memory, which they read from each other, each for some of the rows of X.
//
// int8 products of codes that stand for u - 2^(BITS-1): LIFT leaves a code at the top of its byte, where the offset is one
// bit, and a power of two is taken out of the scale.
//
// Where a group ends its sums have to be scaled. HALVES = 2, for groups of a chunk: the rows of X are multiplied in two halves,
// a chunk of W at a time, and the sums of one are scaled while products of the other are under way.
//
// Set on the command line, as NB_ACT and so on: ACT BITS T WG SPLIT GROUPED ZERO STAGES MUL, as in gemm.cu; HALVES; LIFT;
// WHOLE: blocks take all of K, or with SPLIT > 1 their part of it, of one tile; CHAIN: they hand sums on in order where they
// do not; OUT: Y has 16 bits and aligned rows; RESIDENT: blocks of a multiprocessor. ZERO is 0 or 1, with zero points below
// 128; 8-bit codes of int8 products stand for u - 128.
#include <nibblas/base.cuh>
#include <nibblas/bulk.cuh>
#include <nibblas/decode.cuh>
#include <nibblas/scheduler.cuh>
#include <nibblas/wgmma.cuh>

constexpr int ACT = NB_ACT, BITS = NB_BITS, T = NB_T, WG = NB_WG, SPLIT = NB_SPLIT, STAGES = NB_STAGES, MUL = NB_MUL;
constexpr int GROUPED = NB_GROUPED, ZERO = NB_ZERO, HALVES = NB_HALVES, OUT = NB_OUT, WHOLE = NB_WHOLE, CHAIN = NB_CHAIN;
constexpr int LIFT = NB_LIFT ? 8 - BITS : 0;

constexpr int R = 64 * WG, THREADS = 128 * WG; // threads that multiply
// The warps that copy, and their company where registers are handed over: HANDED for each thread that multiplies, KEPT for
// the others, no more in all than the block was launched with.
constexpr int HANDED = WG == 4 ? 112 : T < 128 ? 0 : WG == 3 ? 160 : WG == 2 ? 232 : 0;
constexpr int KEPT = WG == 4 ? 24 : WG == 3 ? 32 : 40;
constexpr int EXTRA = HANDED ? 128 : 64;
constexpr bool INT = ACT == ACT_S8, BYTES = INT || ACT == ACT_E4M3; // of activations
constexpr int PARTS = BYTES ? 1 : 2; // of 128 bytes, in a row of a chunk
constexpr int X_STAGE = T * 128 * PARTS;
constexpr int W_PART = 1024 * BITS; // of a warpgroup
constexpr int SB = SCALE_BYTES;
constexpr int S_AT = X_STAGE + WG * W_PART;
constexpr int Z_AT = S_AT + GROUPED * R * SB;
constexpr int FETCHED = Z_AT + (ZERO ? GROUPED * R : 0);
constexpr int SLOT = (FETCHED + 1023) / 1024 * 1024;
constexpr int C = T / 2;          // accumulators of a thread
constexpr int OUT_ROW = 64 + 4;   // floats of a row of X on its way out: no two lanes of a store share a bank
constexpr int OUT_PART = OUT ? 8192 : 32 * OUT_ROW * 4; // of a warpgroup; OUT: two times 32 rows of 128 bytes
constexpr bool FLUSH = GROUPED && !INNER; // sums of a group are scaled when it ends
constexpr int PER = GROUPED ? 4 / GROUPED : 4; // blocks of 32 k that share a scale, or all
static_assert(HALVES == 1 || (HALVES == 2 && INT && FLUSH && GROUPED == 1), "only scaled sums are to be taken in turns");
static_assert(!CHAIN || (FLUSH && !WHOLE), "other sums may be cut anywhere");
static_assert(SPLIT == 1 || (WHOLE && !(INT && FLUSH)), "sums that must run along K are not to be cut");
static_assert(SPLIT == 1 || STAGES * SLOT >= THREADS * C * 4, "the ring holds the sums of a block");

// What a block goes through, of `rows` blocks of Y that those of one blockIdx.y have.
template <int CHAINED> struct Walk : Place<1> {
    DEVICE Walk(const Args &a, int, int chunks) {
        // Blocks that take all of K count their own units from 0.
        const int block = blockIdx.x / SPLIT;
        const int begin = WHOLE ? 0 : span_start(block, a);
        start(begin, WHOLE ? (a.per + (block < a.rest)) * chunks : span_start(block + 1, a), chunks);
    }
};
template <> struct Walk<1> : Chained {
    DEVICE Walk(const Args &a, int rows, int) { start(rows, a); }
};

template <bool I> struct Number {
    typedef float type;
};
template <> struct Number<true> {
    typedef int type;
};
typedef Number<INT>::type Sum;

DEVICE u32 fma2(u32 a, u32 b, u32 c) {
    u32 r;
    if (ACT == ACT_F16)
        asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    else
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}
template <int N> struct Const {
    static constexpr int value = N;
};
// The warpgroup, read anew where registers are scarce.
DEVICE int warpgroup() {
    int tid;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(tid));
    return tid >> 7;
}
DEVICE u16 typed(float f) { return ACT == ACT_F16 ? f16_of_f32(f) : bf16_of_f32(f); }
DEVICE u32 and_or(u32 a, u32 b, u32 c) {
    u32 r;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}

// Fields that are left where they are, 2^high up: float16 has the room.
constexpr bool IN_PLACE = ACT == ACT_F16 && Direct<BITS>::value;
DEVICE constexpr int high(int row, int step) {
    return !IN_PLACE ? 0 : BITS == 4 ? 4 * step : BITS == 2 ? 4 * step + 2 * row : 2 * step + row;
}
DEVICE constexpr bool two_steps(int row, int step) { return MUL == 2 && high(row, step) == 0; }

// What is subtracted from the codes of a row, in the form that `centred` wants.
DEVICE u32 centre(int sub, int row, int step) {
    if (BYTES) return (u32)(MUL == 2 ? (sub + 1) / 2 : sub) * 0x01010101u;
    if (two_steps(row, step) || (ACT == ACT_BF16 && BITS == 8)) return (u32)sub;
    const int whole = MUL * (ACT == ACT_F16 ? 1024 : 128) >> high(row, step);
    return both(typed(-(float)(whole + sub)));
}

// Two codes in the halves of a word, `high` bits up, other bits 0 -> mul*u - sub. `field` is where they may have bits.
DEVICE u32 centred(u32 word, u32 field, u32 magic, u32 by, int row, int step) {
    if (ACT == ACT_BF16 && BITS == 8) {
        const float low = __fmaf_rn((float)MUL, __uint2float_rn(word & 0xffu), -(float)(int)by);
        const float up = __fmaf_rn((float)MUL, __uint2float_rn(word >> 16 & 0xffu), -(float)(int)by);
        return permute(__float_as_uint(low), __float_as_uint(up), 0x7632);
    }
    const u32 v = and_or(word, field, magic);
    constexpr u32 one = ACT == ACT_F16 ? 0x3c003c00u : 0x3f803f80u, two = ACT == ACT_F16 ? 0x40004000u : 0x40004000u;
    if (two_steps(row, step)) // 2048 + 2u - sub has no exact constant: first u, then 2u - sub.
        return fma2(fma2(v, one, ACT == ACT_F16 ? 0xe400e400u : 0xc300c300u), two, both(typed(-(float)(int)by)));
    return fma2(v, (MUL == 2 ? two : one) - both(high(row, step) << 10), by);
}

DEVICE float scale_of(const void *p, int i) { return scale_at(p, i) * (1.0f / (1 << LIFT)); }

DEVICE u32 centred8(u32 q, u32 by, u32 times) {
    u32 v;
    if (BITS == 8)
        v = q ^ 0x80808080u;
    else if (INNER)
        v = (q * times + by) ^ 0x80808080u; // carries between bytes cancel: every sum is a byte
    else
        v = ((q | 0x80808080u) - by) ^ 0x80808080u;
    if (MUL == 2) v = ((v << 1) & 0xfefefefeu) | 0x01010101u;
    return v;
}

extern __shared__ __align__(1024) char dynamic[];

#if NB_SPLIT > 1
#define CLUSTER __cluster_dims__(NB_SPLIT, 1, 1)
#else
#define CLUSTER
#endif
extern "C" __global__ void CLUSTER __launch_bounds__(THREADS + EXTRA, NB_RESIDENT) hopper(const __grid_constant__ Args a, const __grid_constant__ Map map
#if NB_OUT
                                                                               , const __grid_constant__ Map map_y
#endif
) {
    const int tid = threadIdx.x, lane = tid & 31;
    const int warp = tid >> 5;
    const int g = lane >> 2, t = lane & 3;
    // The chunks of this block, of all there are.
    const int rank = blockIdx.x % SPLIT, lead = rank * a.chunks / SPLIT, chunks = (rank + 1) * a.chunks / SPLIT - lead;
    __shared__ u64 ready[STAGES], empty[STAGES];
    let_next_begin();
    char *shared = dynamic + ((1024 - (shared_address(dynamic) & 1023)) & 1023);
    char *table = shared + STAGES * SLOT;
    char *leaving = table + Book<ACT>::BYTES; // of the first warpgroup
    Book<ACT> book;
    book.load(table, a.book, tid, THREADS + EXTRA);
    if (tid == 0) ring_init(ready, 2, empty, 4 * WG * ARRIVALS);
    __syncthreads();
    Walk<CHAIN> here(a, a.row_blocks * ((a.m + T - 1) / T / gridDim.y), chunks);
    int stage = 0, phase = 0;
    // Where a unit lies. Blocks that take all of K, or hand it on, go through Y side by side, gridDim.y tiles of X at a
    // time: what these read stays in the cache.
    struct Tile {
        int row_block, m0;
    };
    auto tile_at = [&](int unit) -> Tile {
        int at = unit, pass = 0;
        if (WHOLE || CHAIN) {
            if (WHOLE) at = blockIdx.x / SPLIT + unit * (gridDim.x / SPLIT);
            pass = at / a.row_blocks;
            at -= pass * a.row_blocks;
        }
        return {at, (int)(pass * gridDim.y + blockIdx.y) * T};
    };

    if (tid >= THREADS) {
        if (HANDED) asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(KEPT));
        // Two warps, each going along as a whole while one lane asks, so that addresses are the warp's: loops of few
        // instructions, or chunks would wait for them.
        const int copier = __shfl_sync(0xffffffffu, tid >> 5, 0) - 4 * WG;
        const bool asks = elected();
        auto next = [&]() {
            here.next(chunks);
            if (++stage == STAGES) {
                stage = 0;
                phase ^= 1;
            }
        };
        if (copier == 0) { // of codes and scales, which do not wait for the kernel before
            const int last = a.n_padded / 64 - 1;
            int band = 0, group = 0, left = 0; // 64 rows of W; the group of the chunk, and chunks that it still has
            for (; !here.done(); next()) {
                const int chunk = lead + here.chunk;
                if (here.chunk == here.first) {
                    band = tile_at(here.row_block).row_block * WG;
                    group = GROUPED > 1 ? chunk * GROUPED : chunk / a.chunks_per_group;
                    left = a.chunks_per_group - (GROUPED == 1 ? chunk - group * a.chunks_per_group : 0);
                }
                const u32 bar = shared_address(&ready[stage]), to = shared_address(shared + stage * SLOT);
                barrier_wait(shared_address(&empty[stage]), phase ^ 1);
                if (asks) {
                    barrier_expect(bar, FETCHED - X_STAGE);
#pragma unroll
                    for (int w = 0; w < WG; w++)
#pragma unroll
                        for (int p = 0; p < Planes<BITS>::count; p++) {
                            const int pb = Planes<BITS>::bits(p), below = Planes<BITS>::below(p);
                            copy_run(to + X_STAGE + w * W_PART + below * 1024,
                                     a.planes[p] + (i64)(min(band + w, last) * a.chunks + chunk) * (1024 * pb), 1024 * pb, bar);
                        }
#pragma unroll
                    for (int q = 0; q < GROUPED; q++) {
                        const i64 row = (i64)min(group + q, a.groups - 1) * a.n_padded;
                        // Of the rows of the block, or where it reaches beyond the last, warpgroup by warpgroup.
                        const bool inside = band + WG - 1 <= last;
#pragma unroll
                        for (int w = 0; w < WG; w++) {
                            if (inside && w > 0) break;
                            const int rows = inside ? R : 64;
                            const i64 at = row + min(band + w, last) * 64;
                            copy_run(to + S_AT + (q * R + w * 64) * SB, (const char *)a.scales + at * SB, rows * SB, bar);
                            if (ZERO) copy_run(to + Z_AT + q * R + w * 64, (const char *)a.zeros + at, rows, bar);
                        }
                    }
                }
                if (GROUPED > 1) {
                    group += GROUPED;
                } else if (GROUPED == 1 && --left == 0) {
                    group++;
                    left = a.chunks_per_group;
                }
            }
        } else if (copier == 1) { // of X
            wait_for_previous();
            int m0 = 0;
            for (; !here.done(); next()) {
                if (here.chunk == here.first) m0 = tile_at(here.row_block).m0;
                const u32 bar = shared_address(&ready[stage]), to = shared_address(shared + stage * SLOT);
                barrier_wait(shared_address(&empty[stage]), phase ^ 1);
                if (asks) {
                    barrier_expect(bar, X_STAGE);
#pragma unroll
                    for (int p = 0; p < PARTS; p++) copy_box(to + p * T * 128, &map, bar, (lead + here.chunk) * 128 + p * 64, m0);
                }
            }
        }
        if (SPLIT > 1) {
            cluster_sync();
            cluster_sync();
        }
        return;
    }

    if (HANDED) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(HANDED ? HANDED : 24));
    wait_for_previous();
    constexpr int CH = C / HALVES;
    Sum acc[HALVES][CH];
    float total[FLUSH ? C : 1];
    u32 w[2][HALVES == 2 ? 16 : 8]; // a block that is multiplied and the one after it, or chunks of blocks of four
    // 1024 or 128, whose lowest bits are worth 1; in a register, for `and_or`.
    u32 magic;
    asm volatile("mov.b32 %0, %1;" : "=r"(magic) : "n"(ACT == ACT_F16 ? 0x64006400 : 0x43004300));
#pragma unroll
    for (int i = 0; i < C; i++) acc[i / CH][i % CH] = 0;
    auto release = [&](int slot) { warp_arrive(shared_address(&empty[slot]), lane); };
    Words<BITS> words;
    u32 by[2][2]; // [row][step]
    u32 times[2] = {1, 1}; // of two levels: what multiplies a row of codes
    auto set_centre = [&](int row, int sub) {
        if (INNER) {
            by[row][0] = by[row][1] = (u32)(128 - sub * (int)times[row]) * 0x01010101u;
            return;
        }
        by[row][0] = centre(sub, row, 0);
        by[row][1] = centre(sub, row, 1);
    };
    if (!ZERO) {
        set_centre(0, a.sub);
        set_centre(1, a.sub);
    }
    // Reads the codes of a chunk; where there is none, whatever is there: codes that come on one of two ways would have the
    // compiler serialise the tensor cores.
    auto load = [&](int row_block, bool there) {
        if (there) barrier_wait(shared_address(&ready[stage]), phase);
        const char *codes = shared + stage * SLOT + X_STAGE + (warp >> 2) * W_PART;
#pragma unroll
        for (int p = 0; p < Planes<BITS>::count; p++) {
            const int pb = Planes<BITS>::bits(p), below = Planes<BITS>::below(p);
            const char *from = codes + below * 1024 + (warp & 3) * (256 * pb);
            if (pb == 1) {
                const uint2 v = *(const uint2 *)(from + lane * 8);
                words.w[2 * below] = v.x;
                words.w[2 * below + 1] = v.y;
            } else {
#pragma unroll
                for (int i = 0; i < pb / 2; i++) {
                    const uint4 v = *(const uint4 *)(from + i * 512 + lane * 16);
                    words.w[2 * below + i * 4] = v.x;
                    words.w[2 * below + i * 4 + 1] = v.y;
                    words.w[2 * below + i * 4 + 2] = v.z;
                    words.w[2 * below + i * 4 + 3] = v.w;
                }
            }
        }
        if (ZERO && !GROUPED) {
            const int n = min(row_block * R + warp * 16 + g, a.n_padded - 16);
            set_centre(0, ((const u8 *)a.zeros)[n]);
            set_centre(1, ((const u8 *)a.zeros)[n + 8]);
        }
    };
    auto decode = [&](int block, u32 *r) {
        if (INNER && block % PER == 0) {
            const u8 *t = (const u8 *)shared + stage * SLOT + S_AT + block / PER * R + warp * 16;
            times[0] = t[g];
            times[1] = t[g + 8];
            if (!ZERO) {
                set_centre(0, a.sub);
                set_centre(1, a.sub);
            }
        }
        if (ZERO && GROUPED && block % PER == 0) {
            const u8 *z = (const u8 *)shared + stage * SLOT + Z_AT + block / PER * R + warp * 16;
            set_centre(0, z[g]);
            set_centre(1, z[g + 8]);
        }
#pragma unroll
        for (int step = 0; step < 2; step++) {
            if (BYTES) {
#pragma unroll
                for (int row = 0; row < 2; row++) {
                    if (LIFT) {
                        constexpr int pb = Planes<BITS>::first;
                        const u32 word = words.w[Field<pb>::word(block, row, step)];
                        const u32 top = word << (LIFT - Field<pb>::shift(block, row, step));
                        r[2 * step + row] = (top & (0xffu >> LIFT << LIFT) * 0x01010101u) ^ 0x80808080u;
                        continue;
                    }
                    const u32 q = integers(book, words, block, row, step);
                    r[2 * step + row] = INT && NB_WORTH == LINE ? centred8(q, by[row][step], times[row]) : q;
                }
            } else if (NB_WORTH != LINE) {
                decode16(book, words, block, step, r + 4 * step);
            } else {
#pragma unroll
                for (int row = 0; row < 2; row++) {
                    constexpr int pb = Planes<BITS>::first;
                    u32 field = 0x00ff00ffu, word;
                    if (IN_PLACE) {
                        word = words.w[Field<pb>::word(block, row, step)] >> (BITS == 1 && (block & 1) ? 4 : 0);
                        field = both((1u << (pb & 7)) - 1) << high(row, step);
                    } else {
                        word = quad<BITS>(words, block, row, step);
                    }
                    r[4 * step + row] = centred(word, field, magic, by[row][step], row, step);
                    r[4 * step + 2 + row] = centred(word >> 8, field, magic, by[row][step], row, step);
                }
            }
        }
    };
    // The first block of a chunk, or all of it.
    auto decode_ahead = [&](u32 *r) {
#pragma unroll
        for (int block = 0; block < (HALVES == 2 ? 4 : 1); block++) decode(block, r + 4 * block);
    };
    load(tile_at(here.row_block).row_block, !here.done());
    decode_ahead(w[0]);
    int turn = 0; // which half of `leaving` is written next
    while (!here.done()) {
        const int row_block = tile_at(here.row_block).row_block, m0 = tile_at(here.row_block).m0;
        const Chain<THREADS> chain(a, R * T);
        if (FLUSH)
#pragma unroll
            for (int i = 0; i < C; i++) total[FLUSH ? i : 0] = 0.0f;
        if (CHAIN && here.first) {
            chain.take();
#pragma unroll
            for (int i = 0; i < C; i++) total[FLUSH ? i : 0] = __ldcg(chain.before() + i * THREADS + tid);
        }
        int fresh = 1; // the next product starts the sums anew
        int held = -1; // the slot of the chunk before, whose last products may be under way
        int left = GROUPED == 1 ? a.chunks_per_group - here.chunk % a.chunks_per_group : 1; // chunks of the group
        float s0 = 1.0f, s1 = 1.0f; // scales of the group
        // Adds the sums of a half, scaled.
        auto flush = [&](int half) {
#pragma unroll
            for (int i = 0; i < CH; i++) {
                pin(acc[half][i]);
                float &y = total[FLUSH ? half * CH + i : 0];
                y = __fmaf_rn((float)acc[half][i], i & 2 ? s1 : s0, y);
            }
        };
        auto read_scales = [&](const char *slot, int q) {
            const char *s_at = slot + S_AT + (q * R + warp * 16) * SB;
            s0 = scale_of(s_at, g);
            s1 = scale_of(s_at, g + 8);
        };
        // Where X of a slot lies. The compiler is to see that a warp has one.
        auto x_of = [&](const char *slot) { return describe(__shfl_sync(0xffffffffu, shared_address(slot), 0)); };
        // Goes on to the next slot, and reads what is there.
        auto advance = [&](bool last, u32 *r) {
            if (++stage == STAGES) {
                stage = 0;
                phase ^= 1;
            }
            const int after = last ? here.after(chunks) : here.row_block;
            load(tile_at(max(after, 0)).row_block, after >= 0);
            decode_ahead(r);
        };
        // Multiplies a chunk.
        auto step = [&](int chunk) {
            const int at_hand = stage;
            const char *slot = shared + at_hand * SLOT;
            const u64 x_at = x_of(slot);
            const bool ends = !INT || --left == 0 || chunk == chunks - 1; // whether the sums have to be scaled now
            if (left == 0) left = a.chunks_per_group;
#pragma unroll
            for (int block = 0; block < 4; block++) {
                u32 *r = w[block & 1];
                wgmma_fence();
                if (BYTES) {
                    Wgmma<ACT, T / HALVES>::multiply(acc[0], r, x_at + block * 2, !fresh);
                } else {
                    const u64 at = x_at + (block >> 1) * (T * 128 / 16) + (block & 1) * 4;
                    Wgmma<ACT, T / HALVES>::multiply(acc[0], r, at, !fresh);
                    Wgmma<ACT, T / HALVES>::multiply(acc[0], r + 4, at + 2, 1);
                }
                wgmma_commit();
                fresh = 0;
                // The registers of the block before are free now, and the slot of the chunk before.
                wgmma_wait<1>();
                if (block == 0 && held >= 0) release(held);
                if (block < 3)
                    decode(block + 1, w[(block + 1) & 1]);
                else
                    advance(chunk + 1 == here.stop, w[0]);
                if (FLUSH && (block + 1) % PER == 0 && (GROUPED > 1 || ends)) {
                    read_scales(slot, block / PER);
                    wgmma_wait<0>();
                    flush(0);
                    fresh = 1;
                }
            }
            held = at_hand;
        };
        // Multiplies a chunk that is a group, in two halves; its codes are in w[SET].
        auto step_halves = [&](auto set, int chunk) {
            const int at_hand = stage;
            const char *slot = shared + at_hand * SLOT;
            const u64 x_at = x_of(slot);
            auto multiply = [&](int half) {
                wgmma_fence();
#pragma unroll
                for (int block = 0; block < 4; block++)
                    Wgmma<ACT, T / HALVES>::multiply(acc[half], w[set.value] + 4 * block,
                                                     x_at + half * (T / HALVES * 128 / 16) + block * 2, block > 0);
                wgmma_commit();
            };
            multiply(0);
            wgmma_wait<1>();
            if (held >= 0) {
                release(held);
                flush(HALVES - 1);
            }
            multiply(HALVES - 1);
            read_scales(slot, 0);
            advance(chunk + 1 == here.stop, w[1 - set.value]);
            wgmma_wait<1>();
            flush(0);
            held = at_hand;
        };
        if constexpr (HALVES == 1) {
            for (int chunk = here.chunk; chunk < here.stop; chunk++) step(chunk);
            wgmma_wait<0>();
            pin(acc[0]);
        } else {
            auto finish = [&]() {
                wgmma_wait<0>();
                flush(HALVES - 1);
            };
            for (int chunk = here.chunk;;) {
                step_halves(Const<0>(), chunk);
                if (++chunk == here.stop) {
                    finish();
                    // The next run begins with w[0].
#pragma unroll
                    for (int i = 0; i < 16; i++) w[0][i] = w[HALVES - 1][i];
                    break;
                }
                step_halves(Const<1>(), chunk);
                if (++chunk == here.stop) {
                    finish();
                    break;
                }
            }
        }
        // The copies of the next rows need this slot while results leave.
        release(held);
        const bool whole = WHOLE || (here.first == 0 && here.stop == chunks);
        const int n0 = row_block * R + warp * 16 + g;
        if (!FLUSH) {
            const int p = min(n0, a.n_padded - 1), q = min(n0 + 8, a.n_padded - 1);
            s0 = INNER ? a.outer[p] : scale_of(a.scales, p);
            s1 = INNER ? a.outer[q] : scale_of(a.scales, q);
        }
        auto bits = [&](int i) -> float {
            if (FLUSH) return total[FLUSH ? i : 0];
            return INT ? __int_as_float((int)acc[0][i]) : (float)acc[0][i];
        };
        auto scaled = [&](int i, float v) -> float {
            if (FLUSH) return BYTES ? v : v * a.unit;
            const float s = i & 2 ? s1 : s0;
            if (INT) return __fmaf_rn((float)__float_as_int(v), s, 0.0f);
            return __fmul_rn(BYTES ? v : v * a.unit, s);
        };
#if NB_OUT
        __shared__ float x_scales[WG][2][32];
        float b0 = 0.0f, b1 = 0.0f;
        if (a.bias) {
            b0 = a.bias[min(n0, a.n - 1)];
            b1 = a.bias[min(n0 + 8, a.n - 1)];
        }
        // Hands 32 rows of X to the copy engine, 16 accumulators from `from` on.
        auto leave = [&](int from, const float v[16]) {
            const int wg = warpgroup();
            const u32 to = shared_address(leaving + wg * OUT_PART + turn * 4096);
            float *scales = x_scales[wg][turn];
            turn ^= 1;
            // The warpgroup's barrier: 1 belongs to Share.
            if ((tid & 127) == 0) store_wait_read<1>();
            if (BYTES && (tid & 127) < 32) scales[tid & 31] = a.row_scale[min(m0 + from * 2 + (tid & 31), a.m - 1)];
            asm volatile("bar.sync %0, 128;" ::"r"(2 + wg) : "memory");
#pragma unroll
            for (int half = 0; half < 2; half++) {
                u32 r[4];
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    float y[2];
#pragma unroll
                    for (int c = 0; c < 2; c++) {
                        const int i = 8 * half + 2 * j + c;
                        y[c] = scaled(i, v[i]);
                        if (BYTES) y[c] = __fmul_rn(y[c], scales[(i >> 2) * 8 + 2 * t + c]);
                        if (a.bias) y[c] = __fadd_rn(y[c], j & 1 ? b1 : b0);
                    }
                    r[j] = halves(y[0], y[1], a.y_kind);
                }
                const int row = (2 * half + (lane >> 4)) * 8 + (lane & 7), piece = (warp & 3) * 2 + (lane >> 3 & 1);
                store_transposed(to + row * 128 + (piece ^ (row & 7)) * 16, r);
            }
            store_fence();
            asm volatile("bar.sync %0, 128;" ::"r"(2 + wg) : "memory");
            if ((tid & 127) == 0) store_box(&map_y, to, row_block * R + wg * 64, m0 + from * 2);
        };
#else
        // Hands 32 rows of X to memory, 16 accumulators from `from` on.
        auto leave = [&](int from, const float v[16]) {
            const int wg = warpgroup();
            float *out = (float *)(leaving + wg * OUT_PART);
            // The warpgroup's barrier: 1 belongs to Share.
            asm volatile("bar.sync %0, 128;" ::"r"(2 + wg) : "memory");
#pragma unroll
            for (int i = 0; i < 16; i++)
                out[((i >> 2) * 8 + 2 * t + (i & 1)) * OUT_ROW + (warp & 3) * 16 + g + (i & 2) * 4] = scaled(i, v[i]);
            asm volatile("bar.sync %0, 128;" ::"r"(2 + wg) : "memory");
            const int column = (tid & 15) * 4, n = row_block * R + wg * 64 + column;
#pragma unroll 1
            for (int row = (tid & 127) >> 4; row < 32; row += 8) {
                const int m = m0 + from * 2 + row;
                if (m >= a.m || n >= a.n) break;
                const float4 f = *(const float4 *)(out + row * OUT_ROW + column);
                float y[4] = {f.x, f.y, f.z, f.w};
                if (BYTES) {
                    const float s = a.row_scale[m];
#pragma unroll
                    for (int e = 0; e < 4; e++) y[e] = __fmul_rn(y[e], s);
                }
                if (a.bias)
#pragma unroll
                    for (int e = 0; e < 4; e++) y[e] = __fadd_rn(y[e], a.bias[min(n + e, a.n - 1)]);
                const i64 at = m * a.y_row + n * a.y_col;
                if (a.wide)
                    store_four(a.y, at, a.y_kind, y);
                else
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        if (n + e < a.n) store_float(a.y, at + e * a.y_col, a.y_kind, y[e]);
            }
        };
#endif
        const Share share(a, row_block, R * T);
        bool out = CHAIN ? here.stop == chunks : whole;
        if (CHAIN && !out) {
#pragma unroll
            for (int i = 0; i < C; i++) chain.mine()[i * THREADS + tid] = total[FLUSH ? i : 0];
            chain.give();
        } else if (!CHAIN && !whole) {
            // Threads keep their own outputs: the last block adds in registers.
            float *mine = share.slot(blockIdx.x, a);
#pragma unroll
            for (int i = 0; i < C; i++) mine[i * THREADS + tid] = bits(i);
            out = share.complete<THREADS>(a, row_block);
        }
        auto add = [](float p, float q) -> float {
            return INT && !FLUSH ? __int_as_float(__float_as_int(p) + __float_as_int(q)) : p + q;
        };
        // The sums of a block of the cluster, in the order of the threads.
        const u32 parts = shared_address(shared) + tid * 4;
        if (SPLIT > 1) {
            meet<THREADS, 1>(); // the ring has served
#pragma unroll
            for (int i = 0; i < C; i++) *(float *)(shared + (i * THREADS + tid) * 4) = bits(i);
            cluster_sync();
        }
        if (out)
#pragma unroll
            for (int from = 0; from < C; from += 16) {
                if (SPLIT > 1 && from / 16 % SPLIT != rank) continue;
                float v[16];
#pragma unroll
                for (int i = 0; i < 16; i++) v[i] = SPLIT > 1 ? load_of(0, parts + (from + i) * THREADS * 4) : bits(from + i);
#pragma unroll
                for (int b = 1; b < SPLIT; b++)
#pragma unroll
                    for (int i = 0; i < 16; i++) v[i] = add(v[i], load_of(b, parts + (from + i) * THREADS * 4));
                if (!CHAIN && !whole) {
                    const float *part = share.slot(share.first, a) + from * THREADS + tid;
#pragma unroll
                    for (int i = 0; i < 16; i++) v[i] = __ldcg(part + i * THREADS);
#pragma unroll 1
                    for (int b = share.first + 1; b <= share.last; b++) {
                        part = share.slots + (i64)(2 * b) * share.size + from * THREADS + tid;
                        float p[16]; // asked for together
#pragma unroll
                        for (int i = 0; i < 16; i++) p[i] = __ldcg(part + i * THREADS);
#pragma unroll
                        for (int i = 0; i < 16; i++) v[i] = add(v[i], p[i]);
                    }
                }
                if (m0 + from * 2 < a.m) leave(from, v);
            }
        here.finish(chunks);
    }
    if (OUT && (tid & 127) == 0) store_wait();
    if (SPLIT > 1) cluster_sync(); // others read here until now
}
