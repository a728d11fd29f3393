// Y = X W^T for sparse W, which is loaded as stored and multiplied by the tensor cores as if dense.
//
// A block owns R = 32*WR rows of W and T = 8*NT rows of X. Its warps lie WR along the rows of W and WK along K: a warp takes
// every WK-th run of SPAN records, of 128 k each. WK more warps drive the copy engine, a lane for each of the WR warps that share X: their
// records go to rings of their own. The grid is persistent, as in gemm.cu: spans of equally many runs.
//
// Set on the command line: STRUCTURE (sparse.cuh), ACT (as in decode.cuh), NT, WR, WK, SPAN, STAGES, RESIDENT (blocks of a
// multiprocessor); SETS for kept groups; NATURAL where int8 X is as it came, with scale 1.
#include <nibblas/base.cuh>
#include <nibblas/bulk.cuh>
#include <nibblas/decode.cuh>
#include <nibblas/mma.cuh>
#include <nibblas/scheduler.cuh>
#include <nibblas/sparse.cuh>

constexpr int STRUCTURE = NB_STRUCTURE, ACT = NB_ACT, NT = NB_NT, WR = NB_WR, WK = NB_WK, SPAN = NB_SPAN, STAGES = NB_STAGES;
constexpr bool INT = ACT == ACT_S8, BF16 = ACT == ACT_BF16;
constexpr bool FOURS = STRUCTURE == TWO_OF_FOUR, KEPT_GROUPS = STRUCTURE == GROUPS;
constexpr int R = RECORD_ROWS * WR, T = 8 * NT, WARPS = WR * WK, THREADS = 32 * WARPS; // that multiply
constexpr int WIDTH = INT ? 1 : 2, PARTS = WIDTH; // bytes of a number of X; runs of 128 bytes in a row of a record's X
constexpr int X_RECORD = T * 128 * PARTS, X_STAGE = SPAN * X_RECORD;
constexpr int SETS = KEPT_GROUPS ? Sets<ACT, 4>::value : 1;

template <bool I> struct Number {
    typedef float type;
};
template <> struct Number<true> {
    typedef int type;
};
typedef Number<INT>::type Sum;

// A tile of 16 rows by 32 k (int8: 64) of which two of every four are kept; SPEAKER names the lanes of a quad that hold the
// places, where not all do.
template <int SPEAKER> DEVICE void mma_fours(float c[4], const u32 a[4], const u32 b[4], u32 places) {
    if (BF16)
        asm("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
            "{%8,%9,%10,%11}, {%0,%1,%2,%3}, %12, %13;"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(places), "n"(SPEAKER));
    else
        asm("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
            "{%8,%9,%10,%11}, {%0,%1,%2,%3}, %12, %13;"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(places), "n"(SPEAKER));
}
template <int SPEAKER> DEVICE void mma_fours(int c[4], const u32 a[4], const u32 b[4], u32 places) {
    asm("mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9,%10,%11}, {%0,%1,%2,%3}, %12, 0;"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(places));
}

// x*y + z of two 16-bit numbers each.
DEVICE u32 add_product(u32 x, u32 y, u32 z) {
    u32 r;
    if (BF16)
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(x), "r"(y), "r"(z));
    else
        asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(x), "r"(y), "r"(z));
    return r;
}

// Keeps the rings of one WK full: lane q copies the records of its warp q along the rows, lane 0 also X.
DEVICE void feed(const SparseArgs &a, const Map *map, int begin, int end, int m0, int wk, int wr, u32 x_ring, u32 w_rings, u32 ready,
                 u32 empty) {
    if (wr >= WR) return;
    struct Bounds {
        u32 first, last;
    };
    const int tiles = a.n_padded / RECORD_ROWS;
    Place<WK> place, ahead;
    place.start(begin, end, a.chunks);
    ahead.start(begin, end, a.chunks);
    // Where records begin is read two steps ahead of the copies.
    auto look = [&]() {
        Bounds b = {0, 0};
        if (ahead.done()) return b;
        if (ahead.chunk + wk < ahead.stop) {
            const int from = (ahead.chunk + wk) * SPAN;
            const u32 *row = a.offsets + (i64)min(ahead.row_block * WR + wr, tiles - 1) * a.records;
            b = {row[from], row[min(from + SPAN, a.records)]};
        }
        ahead.next(a.chunks);
        return b;
    };
    Bounds now = look(), then = look();
    u32 phases = 0; // of the barriers, a bit per stage
    int stage = 0;
    while (!place.done()) {
        const Bounds after = look();
        const int chunk = place.chunk + wk;
        if (chunk < place.stop) {
            const u32 bar = ready + stage * 8;
            const int bytes = (int)(now.last - now.first) * 16;
            barrier_wait(empty + stage * 8, ~phases >> stage & 1);
            phases ^= 1u << stage;
            barrier_expect(bar, bytes + (wr == 0 ? X_STAGE : 0));
            copy_run(w_rings + (wr * STAGES + stage) * a.slot, a.planes[0] + (i64)now.first * 16, bytes, bar);
            if (wr == 0)
#pragma unroll
                for (int p = 0; p < SPAN * PARTS; p++)
                    copy_box(x_ring + stage * X_STAGE + p * (T * 128), map, bar, chunk * SPAN * RECORD_K + p * (128 / WIDTH), m0);
        }
        now = then;
        then = after;
        place.next(a.chunks);
        stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
}

extern __shared__ __align__(1024) char dynamic[];

extern "C" __global__ void __launch_bounds__(THREADS + 32 * WK, NB_RESIDENT) sparse(const __grid_constant__ SparseArgs a, const __grid_constant__ Map map) {
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
    const int m0 = blockIdx.y * T;
    const int begin = span_start(blockIdx.x, a), end = span_start(blockIdx.x + 1, a);

    char *shared = dynamic + ((1024 - (shared_address(dynamic) & 1023)) & 1023);
    const u32 x_rings = shared_address(shared), w_rings = x_rings + WK * STAGES * X_STAGE;
    float *sums = (float *)(shared + WK * STAGES * X_STAGE + WARPS * STAGES * a.slot);

    __shared__ u8 not_finite[FOURS ? T : 1];
    __shared__ u64 ready[WK * STAGES], empty[WK * STAGES];
    if (FOURS && tid < T) not_finite[tid] = 0;
    if (tid == 0) ring_init(ready, WR, empty, WR);
    __syncthreads();

    const bool feeds = warp >= WARPS;
    const int wr = warp % WR, wk = feeds ? warp - WARPS : warp / WR;
    const u32 x_ring = x_rings + wk * STAGES * X_STAGE;
    const u32 bar = shared_address(ready) + wk * STAGES * 8, back = shared_address(empty) + wk * STAGES * 8;
    if (feeds) {
        feed(a, &map, begin, end, m0, wk, lane, x_ring, w_rings + wk * WR * STAGES * a.slot, bar, back);
        return;
    }
    const int g = lane >> 2, t = lane & 3;
    const int columns = min(T, a.m - m0);
    const u32 w_ring = w_rings + warp * STAGES * a.slot;

    Sum acc[2][NT][SETS][4]; // kept groups: of the record at hand
    float ones[KEPT_GROUPS ? NT : 1][4]; // sums of X, which take the zero of the codes out
    u32 nothing[FOURS ? NT : 1]; // 2:4: X times 0, which dropped entries are worth: NaN where X is not finite
    float total[KEPT_GROUPS ? 2 : 1][KEPT_GROUPS ? NT : 1][4];
    // Calls f(tile, eight columns, element, row of the block, column of the block) for every output of a thread.
    auto each = [&](auto f) {
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int j = 0; j < NT; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) f(i, j, e, (wr * 2 + i) * 16 + (e >> 1) * 8 + g, j * 8 + 2 * t + (e & 1));
    };
    auto clear = [&]() {
        each([&](int i, int j, int e, int, int) {
#pragma unroll
            for (int s = 0; s < SETS; s++) acc[i][j][s][e] = 0;
            ones[KEPT_GROUPS ? j : 0][e] = 0.0f;
            nothing[FOURS ? j : 0] = 0;
        });
    };
    auto clear_total = [&]() {
        if (KEPT_GROUPS) each([&](int i, int j, int e, int, int) { total[KEPT_GROUPS ? i : 0][KEPT_GROUPS ? j : 0][e] = 0.0f; });
    };
    auto load_x = [&](u32 xs, int block, u32 b[NT][4]) {
#pragma unroll
        for (int j = 0; j < NT; j++) {
            const int row = j * 8 + (lane & 7), piece = (block & 1) * 4 + (lane >> 3);
            load_matrices(b[j], xs + (block >> 1) * (T * 128) + row * 128 + ((piece ^ (row & 7)) * 16));
        }
    };
    // int8: 64 k, from the order of the quads (decode.cuh) to that of the fours, unless X is in that.
    auto load_bytes = [&](u32 xs, int step, u32 b[NT][4]) {
#pragma unroll
        for (int j = 0; j < NT; j++) {
            if (NB_NATURAL) {
                const int row = j * 8 + (lane & 7), piece = step * 4 + (lane >> 3);
                load_matrices(b[j], xs + row * 128 + ((piece ^ (row & 7)) * 16));
                continue;
            }
#pragma unroll
            for (int q = 0; q < 4; q++) {
                const int row = j * 8 + g, piece = step * 4 + q;
                u32 low, high;
                asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                             : "=r"(low), "=r"(high)
                             : "r"(xs + row * 128 + ((piece ^ (row & 7)) * 16) + (t & 1) * 8));
                b[j][q] = permute(low, high, t >> 1 ? 0x7531 : 0x6420);
            }
        }
    };
    // Each multiplies by one record, and returns where the next begins.
    auto multiply_fours8 = [&](u32 record, u32 xs) {
#pragma unroll
        for (int step = 0; step < 2; step++) {
            u32 b[NT][4];
            load_bytes(xs, step, b);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                u32 w[4], places;
                asm volatile("ld.shared.u32 %0, [%1];" : "=r"(places) : "r"(record + (step * 2 + i) * 128 + lane * 4));
                load_four(w, record + 512 + (step * 2 + i) * 512 + lane * 16);
#pragma unroll
                for (int j = 0; j < NT; j++) mma_fours<0>(acc[i][j][0], w, b[j], places);
            }
        }
        return record + 2560;
    };
    auto multiply_fours = [&](u32 record, u32 xs) {
        u32 places[4];
        load_four(places, record + lane * 16);
#pragma unroll
        for (int block = 0; block < 4; block++) {
            u32 b[NT][4], w[2][4];
            load_x(xs, block, b);
#pragma unroll
            for (int i = 0; i < 2; i++) load_four(w[i], record + 512 + (block * 2 + i) * 512 + lane * 16);
#pragma unroll
            for (int j = 0; j < NT; j++) {
                mma_fours<0>(acc[0][j][0], w[0], b[j], places[block]);
                mma_fours<1>(acc[1][j][0], w[1], b[j], places[block]);
            }
            // The warps along the rows look at a part of X each.
            if (block % WR == wr)
#pragma unroll
                for (int j = 0; j < NT; j++)
#pragma unroll
                    for (int q = 0; q < 4; q++) nothing[j] = add_product(b[j][q], 0, nothing[j]);
        }
        return record + 4608;
    };
    auto multiply_bits = [&](u32 record, u32 xs) {
        Bits<STRUCTURE == BITMAP_PAIRS ? 2 : 1> bits;
        bits.open(record, lane);
#pragma unroll
        for (int block = 0; block < 4; block++) {
            u32 b[NT][4];
            load_x(xs, block, b);
#pragma unroll
            for (int step = 0; step < 2; step++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    u32 w[4];
#pragma unroll
                    for (int r = 0; r < 4; r++) w[r] = bits.expand(((block * 2 + step) * 2 + i) * 4 + r);
#pragma unroll
                    for (int j = 0; j < NT; j++) mma(acc[i][j][0], w, b[j][2 * step], b[j][2 * step + 1], BF16);
                }
        }
        return bits.end;
    };
    // The record's scales meet its sums, less the zero of the codes.
    auto flush = [&](u32 record) {
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int row = 0; row < 2; row++) {
                u16 half;
                asm volatile("ld.shared.u16 %0, [%1];" : "=h"(half) : "r"(record + 32 + (i * 16 + row * 8 + g) * 2));
                const float scale = f32_of_f16(half);
#pragma unroll
                for (int j = 0; j < NT; j++)
#pragma unroll
                    for (int e = 2 * row; e < 2 * row + 2; e++) {
                        float v = (float)acc[i][j][0][e] * inverse_unit<ACT, 4>();
                        if (SETS == 2)
                            v = __fmaf_rn((float)acc[i][j][SETS - 1][e], inverse_unit<ACT, 4>() / (1 << excess<ACT, 4>(row, 1)), v);
                        const float d = __fmaf_rn(-(8.0f + offset<ACT, 4>()), ones[KEPT_GROUPS ? j : 0][e], v);
                        float &y = total[KEPT_GROUPS ? i : 0][KEPT_GROUPS ? j : 0][e];
                        y = __fmaf_rn(d, scale, y);
                    }
            }
        clear();
    };
    auto multiply_groups = [&](u32 record, u32 xs) {
        Kept kept;
        Book<ACT> book;
        kept.open(record, lane);
        constexpr u32 pair = BF16 ? 0x3f803f80u : 0x3c003c00u;
        const u32 one[4] = {pair, pair, pair, pair};
#pragma unroll
        for (int block = 0; block < 4; block++) {
            u32 b[NT][4];
            load_x(xs, block, b);
#pragma unroll
            for (int j = 0; j < NT; j++) {
                mma(ones[KEPT_GROUPS ? j : 0], one, b[j][0], b[j][1], BF16);
                mma(ones[KEPT_GROUPS ? j : 0], one, b[j][2], b[j][3], BF16);
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
                Words<4> words;
#pragma unroll
                for (int row = 0; row < 2; row++) words.w[block * 2 + row] = kept.word(block * 4 + i * 2 + row);
#pragma unroll
                for (int step = 0; step < 2; step++) {
                    u32 w[4];
                    decode16<ACT, 4>(book, words, block, step, w);
#pragma unroll
                    for (int j = 0; j < NT; j++) mma(acc[i][j][step % SETS], w, b[j][2 * step], b[j][2 * step + 1], BF16);
                }
            }
        }
        flush(record);
        return kept.end;
    };

    // Sums leave a warp at the end of a run of records: as results, or to the workspace where a run is not all of K.
    auto leave = [&](int row_block, int from, int to) {
        const bool whole = from == 0 && to == a.chunks;
        const Share share(a, row_block, R * T);
        float *mine = share.slot(blockIdx.x, a);
        // Sums of int8 are integers until they are whole.
        auto add = [&](float p, float q) { return INT ? __int_as_float(__float_as_int(p) + __float_as_int(q)) : p + q; };
        auto out = [&](int row, int col, float v) {
            const int n = row_block * R + row, m = m0 + col;
            if (n >= a.n || m >= a.m) return;
            if (INT) {
                v = __fmaf_rn((float)__float_as_int(v), scale_at(a.scales, n), 0.0f);
                if (a.row_scale) v = __fmul_rn(v, a.row_scale[m]);
            }
            if (a.bias) v = __fadd_rn(v, a.bias[n]);
            store_float(a.y, m * a.y_row + n * a.y_col, a.y_kind, v);
        };
        if (FOURS && !INT) {
            // A column of X that is not finite is so for every row.
#pragma unroll
            for (int j = 0; j < NT; j++)
                if (nothing[j] & 0x7fff7fffu) not_finite[j * 8 + g] = 1;
            meet<THREADS, 2>();
        }
        auto value = [&](int i, int j, int e) -> float {
            if (KEPT_GROUPS) return total[KEPT_GROUPS ? i : 0][KEPT_GROUPS ? j : 0][e];
            if (INT) return __int_as_float((int)acc[i][j][0][e]);
            if (FOURS && not_finite[j * 8 + 2 * t + (e & 1)]) return __uint_as_float(0x7fc00000u);
            return (float)acc[i][j][0][e];
        };
        if (WK > 1) {
            each([&](int i, int j, int e, int row, int col) {
                if (col < columns) sums[(wk * T + col) * R + row] = value(i, j, e);
            });
            meet<THREADS, 2>();
            for (int q = tid; q < R * columns; q += THREADS) {
                float v = sums[q];
#pragma unroll
                for (int w = 1; w < WK; w++) v = add(v, sums[w * R * T + q]);
                if (whole)
                    out(q % R, q / R, v);
                else
                    mine[q] = v;
            }
        } else {
            each([&](int i, int j, int e, int row, int col) {
                if (whole)
                    out(row, col, value(i, j, e));
                else if (col < columns)
                    mine[col * R + row] = value(i, j, e);
            });
        }
        if (!whole && share.complete<THREADS>(a, row_block)) {
            for (int q = 4 * tid; q < R * columns; q += 4 * THREADS) {
                float4 v = __ldcg((const float4 *)(share.slot(share.first, a) + q));
#pragma unroll 4
                for (int b = share.first + 1; b <= share.last; b++) {
                    const float4 p = __ldcg((const float4 *)(share.slots + (i64)(2 * b) * share.size + q));
                    v.x = add(v.x, p.x);
                    v.y = add(v.y, p.y);
                    v.z = add(v.z, p.z);
                    v.w = add(v.w, p.w);
                }
                out(q % R, q / R, v.x);
                out(q % R + 1, q / R, v.y);
                out(q % R + 2, q / R, v.z);
                out(q % R + 3, q / R, v.w);
            }
        }
        if (WK > 1 || (FOURS && !INT)) meet<THREADS, 2>();
        if (FOURS && !INT) {
            if (tid < T) not_finite[tid] = 0;
            meet<THREADS, 2>();
        }
    };

    clear();
    clear_total();
    Place<WK> here;
    here.start(begin, end, a.chunks);
    u32 phases = 0;
    int stage = 0;
    while (!here.done()) {
        if (here.chunk + wk < here.stop) {
            barrier_wait(bar + stage * 8, phases >> stage & 1);
            phases ^= 1u << stage;
            const int count = SPAN == 1 ? 1 : min(SPAN, a.records - (here.chunk + wk) * SPAN);
            u32 record = w_ring + stage * a.slot, xs = x_ring + stage * X_STAGE;
#pragma unroll 1
            for (int i = 0; i < count; i++, xs += X_RECORD) {
                if constexpr (KEPT_GROUPS)
                    record = multiply_groups(record, xs);
                else if constexpr (FOURS && INT)
                    record = multiply_fours8(record, xs);
                else if constexpr (FOURS)
                    record = multiply_fours(record, xs);
                else
                    record = multiply_bits(record, xs);
            }
            __syncwarp();
            if (lane == 0) barrier_arrive(back + stage * 8);
        }
        if (here.last()) {
            leave(here.row_block, here.first, here.stop);
            clear();
            clear_total();
        }
        here.next(a.chunks);
        stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
}
