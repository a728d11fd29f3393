// Y = X W^T for sparse W, which is loaded as stored and multiplied by the tensor cores as if dense.
//
// A block owns R = 32*WR rows of W and T = 8*NT rows of X. The grid is persistent, as in gemm.cu: spans of equal work, in
// chunks, here runs of SPAN records of 128 k each. The warps of a block:
//   DRAIN   bring away the sums of a row block while the others go on
//   WR x WK multiply, WR along the rows of W, WK along K: chunks i, i + WK, ... of the matrix, wherever a span begins
//   WK      drive the copy engine, a lane for each of the WR warps that share X: their records go to rings of their own
//
// Set on the command line: STRUCTURE (sparse.cuh), ACT (as in decode.cuh), NT, WR, WK, SPAN, STAGES, RESIDENT (blocks of a
// multiprocessor), DRAIN, TURNS; SETS for kept groups; NATURAL where int8 X is as it came, with scale 1.
#include <nibblas/base.cuh>
#include <nibblas/bulk.cuh>
#include <nibblas/decode.cuh>
#include <nibblas/mma.cuh>
#include <nibblas/scheduler.cuh>
#include <nibblas/sparse.cuh>

constexpr int STRUCTURE = NB_STRUCTURE, ACT = NB_ACT, NT = NB_NT, WR = NB_WR, WK = NB_WK, SPAN = NB_SPAN, STAGES = NB_STAGES, DRAIN = NB_DRAIN;
constexpr bool INT = ACT == ACT_S8, BF16 = ACT == ACT_BF16;
constexpr bool FOURS = STRUCTURE == TWO_OF_FOUR, KEPT_GROUPS = STRUCTURE == GROUPS;
constexpr int R = RECORD_ROWS * WR, T = 8 * NT, WARPS = WR * WK, DRAINERS = 32 * DRAIN;
constexpr bool TURNS = NB_TURNS; // warps along K add up in one place, in turn
constexpr int PLANES = TURNS ? 1 : WK; // of sums in shared memory
constexpr int PITCH = R + 4; // of a row of them: the lanes that write them meet no bank twice
constexpr int WIDTH = INT ? 1 : 2, PARTS = WIDTH; // bytes of a number of X; runs of 128 bytes in a row of a record's X
constexpr int STEPS = 4 * WIDTH; // products of a record, along K
constexpr int HALVES = halves_of(STRUCTURE), PLACES = RECORD_K * HALVES; // of a record along K
constexpr int X_HALF = T * 128 * PARTS, X_RECORD = HALVES * X_HALF, X_STAGE = SPAN * X_RECORD;
constexpr u32 FOURS_PIECES = INT ? 160 : 288; // of a record
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

// Keeps the rings of one WK full: lane q copies the records of its warp q along the rows, lane 0 also X. Runs of records are
// of many lengths, so a ring holds as many as fit; `places` says where they begin. Where they lie in memory is looked up by all
// lanes at once, each for one of the AHEAD runs that follow, while those before are copied.
DEVICE void feed(const SparseArgs &a, const Map *map, int unit, int end, int m0, int lane, u32 x_ring, u32 w_ring, u32 *places, u32 ready,
                 u32 empty) {
    constexpr int AHEAD = 32 / WR;
    struct Run {
        u32 first, last; // 16-byte pieces
        int chunk;
    };
    const int tiles = a.n_padded / RECORD_ROWS, wr = lane % WR, turn = lane / WR;
    const bool copies = lane < WR;
    auto look = [&](int at) {
        if (at >= end) return Run{0, 0, 0};
        const int row_block = at / a.chunks, chunk = at - row_block * a.chunks, from = chunk * SPAN;
        const u32 tile = (u32)min(row_block * WR + wr, tiles - 1), first = tile * a.records + from, last = tile * a.records + min(from + SPAN, a.records);
        if (FOURS) return Run{first * FOURS_PIECES, last * FOURS_PIECES, chunk};
        return Run{a.offsets[first], a.offsets[last], chunk};
    };
    w_ring += wr * a.slot;
    places += wr * STAGES;
    Run now = look(unit + turn * WK);
    u32 phases = 0; // of the barriers, a bit per stage
    int stage = 0, oldest = 0, held = 0; // stages in use
    int next = 0, tail = 0; // of the ring: where there is room, and where the oldest run begins
    auto copy_x = [&](int chunk, int slot) {
        if (lane > 0) return;
        const int k = chunk * SPAN * PLACES;
#pragma unroll
        for (int p = 0; p < SPAN * HALVES * PARTS; p++)
            copy_box(x_ring + slot * X_STAGE + p * (T * 128), map, ready + slot * 8, k + p * (128 / WIDTH), m0);
    };
    // X may still be in the making: it follows once the rings are full of weights, or hold some.
    const int start = unit;
    bool waited = false;
    auto wait = [&]() {
        wait_for_previous();
        for (int i = 0; i < held; i++) copy_x((start + i * WK) % a.chunks, i);
        waited = true;
    };
    for (; unit < end; unit += AHEAD * WK) {
        const Run after = look(unit + (AHEAD + turn) * WK);
#pragma unroll 1
        for (int i = 0; i < AHEAD && unit + i * WK < end; i++) {
            const u32 first = __shfl_sync(~0u, now.first, i * WR + wr), last = __shfl_sync(~0u, now.last, i * WR + wr);
            const int chunk = __shfl_sync(~0u, now.chunk, i * WR), bytes = (int)(last - first) * 16;
            // Kept groups wait for what they read more than for memory: one run is enough of a start.
            if (KEPT_GROUPS && !waited && held > 0) wait();
            // Room for this run: none is cut in two.
            while (true) {
                if (held == 0) next = tail = 0;
                bool room = held == 0 || (next > tail ? next + bytes <= a.slot : next + bytes <= tail);
                if (!room && next > tail && bytes <= tail) {
                    next = 0;
                    room = true;
                }
                if (__all_sync(~0u, room || !copies) && held < STAGES) break;
                if (!waited) wait();
                barrier_wait(empty + oldest * 8, phases >> oldest & 1);
                phases ^= 1u << oldest;
                oldest = oldest + 1 == STAGES ? 0 : oldest + 1;
                held--;
                if (copies) tail = places[oldest];
            }
            const u32 bar = ready + stage * 8;
            if (copies) {
                places[stage] = next;
                barrier_expect(bar, bytes + (lane == 0 ? X_STAGE : 0));
                copy_run(w_ring + next, a.planes[0] + (i64)first * 16, bytes, bar);
            }
            if (waited) copy_x(chunk, stage);
            next += bytes;
            held++;
            stage = stage + 1 == STAGES ? 0 : stage + 1;
        }
        now = after;
    }
    if (!waited) wait();
}

// Sums of int8 are integers until they are whole.
DEVICE void add(float4 &v, float4 p) {
    auto plus = [](float p, float q) { return INT ? __int_as_float(__float_as_int(p) + __float_as_int(q)) : p + q; };
    v = make_float4(plus(v.x, p.x), plus(v.y, p.y), plus(v.z, p.z), plus(v.w, p.w));
}

// Of the sums, a lane has four rows of every 128, a warp every DRAIN-th column, at most so many of them at a time.
constexpr int BANDS = (R + 127) / 128, EACH = (T + DRAIN - 1) / DRAIN;
constexpr int at_a_time(int most) {
    const int turns = (EACH + most - 1) / most;
    return (EACH + turns - 1) / turns;
}

// What the rows of a lane need beside their sums.
struct Rows {
    float scale[BANDS][4], bias[BANDS][4];
    DEVICE Rows(const SparseArgs &a, int row_block, int lane) {
#pragma unroll
        for (int i = 0; i < BANDS; i++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int n = min(row_block * R + i * 128 + 4 * lane + e, a.n - 1);
                scale[i][e] = INT ? scale_at(a.scales, n) : 1.0f;
                bias[i][e] = a.bias ? a.bias[n] : 0.0f;
            }
    }
};

// A warp takes its columns of sums from shared memory to Y, or to `part` of the workspace.
DEVICE void bring(const SparseArgs &a, const Rows &rows, int row_block, int m0, int warp, int lane, const float *sums, const u8 *not_finite,
                  float *part) {
    constexpr int TOGETHER = at_a_time(NB_TOGETHER);
    const int columns = min(T, a.m - m0);
#pragma unroll
    for (int i = 0; i < BANDS; i++) {
        const int row = i * 128 + 4 * lane, n = row_block * R + row;
        if (row >= R) continue;
        for (int col = warp; col < columns; col += DRAIN * TOGETHER) {
            float4 v[TOGETHER];
            float row_scale[TOGETHER];
#pragma unroll
            for (int c = 0; c < TOGETHER; c++) {
                const int at = min(col + c * DRAIN, columns - 1);
                row_scale[c] = INT && a.row_scale ? a.row_scale[m0 + at] : 1.0f;
                v[c] = *(const float4 *)(sums + at * PITCH + row);
#pragma unroll
                for (int w = 1; w < PLANES; w++) add(v[c], *(const float4 *)(sums + (w * T + at) * PITCH + row));
                // A column of X that is not finite is so for every row.
                if (FOURS && !INT && not_finite[at]) v[c].x = v[c].y = v[c].z = v[c].w = __uint_as_float(0x7fc00000u);
            }
#pragma unroll
            for (int c = 0; c < TOGETHER; c++) {
                const int at = col + c * DRAIN, m = m0 + at;
                if (at >= columns) break;
                if (part) {
                    *(float4 *)(part + at * R + row) = v[c];
                    continue;
                }
                const float sum[4] = {v[c].x, v[c].y, v[c].z, v[c].w};
                float y[4];
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    y[e] = INT ? __fmul_rn(__fmul_rn((float)__float_as_int(sum[e]), rows.scale[i][e]), row_scale[c]) : sum[e];
                    if (a.bias) y[e] = __fadd_rn(y[e], rows.bias[i][e]);
                }
                if (a.wide && n + 3 < a.n)
                    store_four(a.y, m * a.y_row + n, a.y_kind, y);
                else
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        if (n + e < a.n) store_float(a.y, m * a.y_row + (n + e) * a.y_col, a.y_kind, y[e]);
            }
        }
    }
}

// Brings sums away, row block after row block. A run that is not all of K goes to the workspace, but that from the first
// chunk on: its block comes to it last, and those of the others, which came to theirs first, wait in shared memory for its own
// to be added. So no block waits for one with a lower number, and the order of the sum is always the same.
DEVICE void drain(const SparseArgs &a, int block, int m0, float *sums, u8 *not_finite, u32 full, u32 free) {
    constexpr int PIECE = at_a_time(8); // of what waits in the workspace
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, columns = min(T, a.m - m0);
    float *slots = a.work + (i64)blockIdx.y * gridDim.x * (R * T);
    auto counter_of = [&](int row_block) { return a.counters + blockIdx.y * a.row_blocks + row_block; };
    // The last block that has a part of a row block.
    auto last_of = [&](int row_block) {
        int last = block;
        while (a.starts[last + 1] < (row_block + 1) * a.chunks) last++;
        return last;
    };
    auto wait_for_others = [&](int row_block) {
        const int others = last_of(row_block) - block;
        int there;
        do {
            asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(there) : "l"(counter_of(row_block)) : "memory");
            if (there < others) __nanosleep(100);
        } while (there < others);
    };
    Place<1> here;
    int phase = 0;
    wait_for_previous();
    for (here.start(a.starts[block], a.starts[block + 1], a.chunks); !here.done(); here.finish(a.chunks), phase ^= 1) {
        const int end = (here.row_block + 1) * a.chunks; // of the row block
        const bool whole = here.first == 0, collects = whole && here.end < end;
        // What the rows need is read before the sums are there.
        const Rows rows(a, here.row_block, lane);
        if (collects) {
            const bool waited = here.unit - a.chunks >= a.starts[block]; // as below
            if (!waited) wait_for_others(here.row_block);
            const int last = last_of(here.row_block);
            for (int row = 4 * lane; row < R; row += 128)
                for (int col = warp; col < columns; col += DRAIN * PIECE) {
                    float4 others[PIECE];
                    auto part = [&](int b, int c) { return __ldcg((const float4 *)(slots + (i64)b * (R * T) + min(col + c * DRAIN, columns - 1) * R + row)); };
#pragma unroll
                    for (int c = 0; c < PIECE; c++) others[c] = part(block + 1, c);
                    for (int b = block + 2; b <= last; b++)
#pragma unroll
                        for (int c = 0; c < PIECE; c++) add(others[c], part(b, c));
#pragma unroll
                    for (int c = 0; c < PIECE; c++)
                        if (col + c * DRAIN < columns) *(float4 *)(sums + (col + c * DRAIN) * PITCH + row) = others[c];
                }
        }
        warp_arrive(free, lane);
        // What the run after this one adds to is waited for now: it may be a short one. Not before a part of a row block is
        // brought away, which another block waits for.
        if (whole && here.end > end && here.end < end + a.chunks) wait_for_others(here.row_block + 1);
        barrier_wait(full, phase);
        bring(a, rows, here.row_block, m0, warp, lane, sums, not_finite, whole ? nullptr : slots + (i64)block * (R * T));
        if (FOURS && !INT && here.end > end) {
            meet<DRAINERS, 2>();
            for (int q = tid; q < T; q += DRAINERS) not_finite[q] = 0;
        }
        if (!whole) __threadfence();
        if (!whole || collects) meet<DRAINERS, 1>();
        if (!whole && tid == 0) atomicAdd(counter_of(here.row_block), 1);
        if (collects && tid == 0) *counter_of(here.row_block) = 0; // as the next launch expects it
    }
}

extern __shared__ __align__(1024) char dynamic[];

extern "C" __global__ void __launch_bounds__(32 * (DRAIN + WARPS + WK), NB_RESIDENT) sparse(const __grid_constant__ SparseArgs a, const __grid_constant__ Map map) {
    const int tid = threadIdx.x, lane = tid & 31, warp = (tid >> 5) - DRAIN;
    const int m0 = blockIdx.y * T;
    const int block = gridDim.x - 1 - blockIdx.x; // the last spans start first: see drain
    const int begin = a.starts[block], end = a.starts[block + 1];

    let_next_begin();
    char *shared = dynamic + ((1024 - (shared_address(dynamic) & 1023)) & 1023);
    const u32 x_rings = shared_address(shared), w_rings = x_rings + WK * STAGES * X_STAGE;
    float *sums = (float *)(shared + WK * STAGES * X_STAGE + WARPS * a.slot);

    __shared__ u8 not_finite[FOURS ? T : 1];
    __shared__ u32 places[WARPS * STAGES];
    __shared__ u64 ready[WK * STAGES], empty[WK * STAGES], full[WK], free[WK]; // the last two: of the sums
    if (FOURS && tid < T) not_finite[tid] = 0;
    if (tid == 0) {
        ring_init(ready, WR, empty, WR * ARRIVALS);
        ring_init(full, (TURNS ? WR : WARPS) * ARRIVALS, free, DRAIN * ARRIVALS);
    }
    __syncthreads();
    if (warp < 0) {
        drain(a, block, m0, sums, not_finite, shared_address(&full[TURNS ? WK - 1 : 0]), shared_address(free));
        return;
    }

    const bool feeds = warp >= WARPS;
    const int wr = warp % WR, wk = feeds ? warp - WARPS : warp / WR;
    const u32 x_ring = x_rings + wk * STAGES * X_STAGE;
    const u32 bar = shared_address(ready) + wk * STAGES * 8, back = shared_address(empty) + wk * STAGES * 8;
    int unit = begin + (wk + WK - begin % WK) % WK; // the first of this WK
    if (feeds) {
        feed(a, &map, unit, end, m0, lane, x_ring, w_rings + wk * WR * a.slot, places + wk * WR * STAGES, bar, back);
        return;
    }
    const int g = lane >> 2, t = lane & 3;
    const u32 w_ring = w_rings + warp * a.slot;

    Sum acc[2][NT][SETS][4]; // kept groups: of the record at hand
    float ones[KEPT_GROUPS ? NT : 1][4]; // sums of X, which take the zero of the codes out
    u32 nothing[FOURS ? NT : 1]; // 2:4: X times 0, which dropped entries are worth: NaN where X is not finite
    float total[KEPT_GROUPS ? 2 : 1][KEPT_GROUPS ? NT : 1][4];
    // Calls f(tile, eight columns, element) for every output of a thread.
    auto each = [&](auto f) {
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int j = 0; j < NT; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) f(i, j, e);
    };
    auto clear = [&]() {
        each([&](int i, int j, int e) {
#pragma unroll
            for (int s = 0; s < SETS; s++) acc[i][j][s][e] = 0;
            ones[KEPT_GROUPS ? j : 0][e] = 0.0f;
            nothing[FOURS ? j : 0] = 0;
        });
    };
    auto clear_total = [&]() {
        if (KEPT_GROUPS) each([&](int i, int j, int e) { total[KEPT_GROUPS ? i : 0][KEPT_GROUPS ? j : 0][e] = 0.0f; });
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
            const int row = j * 8 + (NB_NATURAL ? lane & 7 : g);
            const u32 from = xs + row * 128;
            if (NB_NATURAL)
                load_matrices(b[j], from + (((step * 4 + (lane >> 3)) ^ (row & 7)) * 16));
            else
#pragma unroll
                for (int q = 0; q < 4; q++) {
                    u32 low, high;
                    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                                 : "=r"(low), "=r"(high)
                                 : "r"(from + (((step * 4 + q) ^ (row & 7)) * 16) + (t & 1) * 8));
                    b[j][q] = permute(low, high, t >> 1 ? 0x7531 : 0x6420);
                }
        }
    };
    u32 x_steps[NT][4]; // of two steps
    auto load_steps = [&](u32 xs, int two) {
        if (INT)
            load_bytes(xs, two, x_steps);
        else
            load_x(xs, two, x_steps);
    };
    auto multiply = [&](int tile, int step, const u32 w[4]) {
#pragma unroll
        for (int j = 0; j < NT; j++)
            mma(acc[tile][j][0], w, x_steps[j][step % 2 * 2], x_steps[j][step % 2 * 2 + 1], INT ? 1 : BF16);
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
        Bits<STRUCTURE == BITMAP_PAIRS ? 2 : 1, WIDTH> bits;
#pragma unroll 1
        for (int half = 0; half < 2; half++, xs += X_HALF) {
            bits.open(record, half, lane);
#pragma unroll
            for (int step = 0; step < STEPS; step++) {
                if (step % 2 == 0) load_steps(xs, step / 2);
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    u32 w[4];
#pragma unroll
                    for (int r = 0; r < 4; r++) w[r] = bits.expand(bits.number(i, step, r));
                    multiply(i, step, w);
                }
            }
        }
        return SPAN == 1 ? record : bits.end(record);
    };
    auto multiply_tiles = [&](u32 record, u32 xs) {
        u32 mask;
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(mask) : "r"(record));
        record += 16;
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            if (step % 2 == 0 && mask >> (step * 2) & 15u) load_steps(xs, step / 2);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                if (!(mask >> (step * 2 + i) & 1u)) continue;
                u32 w[4];
                load_four(w, record + lane * 16);
                multiply(i, step, w);
                record += 512;
            }
        }
        return record;
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
                for (int row = 0; row < 2; row++) words.w[block * 2 + row] = kept.word(i * 8 + block * 2 + row);
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

    // Sums leave a warp at the end of a row block.
    auto leave = [&](int phase, bool collects) {
        bool later = TURNS && wk > 0;
        if (later)
            barrier_wait(shared_address(&full[wk - 1]), phase);
        else
            barrier_wait(shared_address(free), phase);
        if (wk == 0 && collects) later = true;
        if (FOURS && !INT)
#pragma unroll
            for (int j = 0; j < NT; j++)
                if (nothing[j] & 0x7fff7fffu) not_finite[j * 8 + g] = 1;
        Sum *mine = (Sum *)sums + ((TURNS ? 0 : wk) * T + 2 * t) * PITCH + wr * RECORD_ROWS + g;
        auto place = [](int i, int j, int e) { return (j * 8 + (e & 1)) * PITCH + i * 16 + (e >> 1) * 8; };
        auto value = [&](int i, int j, int e) -> Sum & {
            return KEPT_GROUPS ? (Sum &)total[KEPT_GROUPS ? i : 0][KEPT_GROUPS ? j : 0][e] : acc[i][j][0][e];
        };
        if (later) each([&](int i, int j, int e) { value(i, j, e) += mine[place(i, j, e)]; });
        each([&](int i, int j, int e) { mine[place(i, j, e)] = value(i, j, e); });
        warp_arrive(shared_address(&full[TURNS ? wk : 0]), lane);
    };

    u32 phases = 0;
    bool whole = begin % a.chunks == 0;
    int stage = 0, left = 0;
    for (int row_block = begin / a.chunks; row_block * a.chunks < end; row_block++) {
        const int stop = min(end, (row_block + 1) * a.chunks);
        clear();
        clear_total();
        for (; unit < stop; unit += WK) {
            barrier_wait(bar + stage * 8, phases >> stage & 1);
            phases ^= 1u << stage;
            const int count = SPAN == 1 ? 1 : min(SPAN, a.records - (unit - row_block * a.chunks) * SPAN);
            u32 record = w_ring + places[warp * STAGES + stage], xs = x_ring + stage * X_STAGE;
            // Two records of groups side by side: one waits while the other multiplies.
            if (KEPT_GROUPS && NT == 1 && SPAN == 2 && count == 2) {
                record = multiply_groups(record, xs);
                multiply_groups(record, xs + X_RECORD);
            } else {
#pragma unroll 1
                for (int i = 0; i < count; i++, xs += X_RECORD) {
                    if constexpr (KEPT_GROUPS)
                        record = multiply_groups(record, xs);
                    else if constexpr (FOURS && INT)
                        record = multiply_fours8(record, xs);
                    else if constexpr (FOURS)
                        record = multiply_fours(record, xs);
                    else if constexpr (STRUCTURE == TILES)
                        record = multiply_tiles(record, xs);
                    else
                        record = multiply_bits(record, xs);
                }
            }
            warp_arrive(back + stage * 8, lane);
            stage = stage + 1 == STAGES ? 0 : stage + 1;
        }
        leave(left, whole && end < (row_block + 1) * a.chunks);
        whole = true;
        left ^= 1;
    }
}
