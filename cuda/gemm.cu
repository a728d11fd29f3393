// Y = X W^T with tensor cores (mma.sync), for any number of rows of X; made for few.
//
// A block of threads owns R = 16*WN*WR rows of W and T = 8*NT rows of X. Its warps lie WR along the rows of W and WK along
// K: a warp takes every WK-th chunk of 128 k. Packed codes lie in the order of the lanes, so a warp copies its own and waits
// for nobody; X goes through shared memory.
//
// The grid is persistent: the work, (rows of W / R) * (chunks of K) units, is cut into one equal span per block. Where a
// span ends inside a row of units, its sums go to a workspace and the last block to arrive adds them, in the order of K.
//
// Set on the command line, as NB_ACT and so on:
//   GROUPED  scales per chunk: 0 one group per row; 1, 2, 4: groups of a multiple of 128, 64, 32
//   ZERO     0 none, 1 integer, 2 float zero points
//            (float zero points of int8 products want GROUPED, as one group if need be)
//   SCALE    how scales are stored; bytes (two levels) multiply integer sums, and all of K is one sum
//   PARK     int8 with groups and WK > 1: the integer sums of groups wait in shared memory for so many steps of all warps,
//            then one thread per output adds them to its float sum, in order
//   ASCALE   int8 with one scale per group of activations: row_scale is [rows of X][groups]
//   BULK     copies by the copy engine (sm_90a): one lane asks for all of them; else every lane copies (cp.async)
#include <nibblas/base.cuh>
#include <nibblas/bulk.cuh>
#include <nibblas/decode.cuh>
#include <nibblas/mma.cuh>
#include <nibblas/scheduler.cuh>

constexpr int ACT = NB_ACT, BITS = NB_BITS, NT = NB_NT, WN = NB_WN, WR = NB_WR, WK = NB_WK, STAGES = NB_STAGES;
constexpr int GROUPED = NB_GROUPED, ZERO = NB_ZERO, PARK = NB_PARK, BULK = NB_BULK, ASCALE = NB_ASCALE;

constexpr int R = 16 * WN * WR, T = 8 * NT, THREADS = 32 * WR * WK;
constexpr bool INT = ACT == ACT_S8;
constexpr int PARTS = INT ? 1 : 2; // of 128 bytes, in a row of a chunk of X
constexpr int X_STAGE = T * 128 * PARTS;
constexpr int W_STAGE = WN * 256 * BITS;
constexpr int SB = SCALE_BYTES;
constexpr int ZB = ZERO == 1 ? 1 : ZERO == 2 ? 4 : 0;
constexpr int S_STAGE = GROUPED ? GROUPED * WN * 16 * SB : 0;
constexpr int Z_STAGE = GROUPED ? GROUPED * WN * 16 * ZB : 0;
constexpr int SETS = Sets<ACT, BITS>::value;
static_assert(WR == 1 || WK <= 14, "a barrier for every warp along K");

template <bool I> struct Number {
    typedef float type;
};
template <> struct Number<true> {
    typedef int type;
};
typedef Number<INT>::type Sum;
// Sums that have met the scales of groups: integers where those are.
typedef Number<INNER>::type Total;
constexpr bool WHOLE = INT && (!GROUPED || INNER); // integers leave, and the row's scale is met last

DEVICE int int_zero_at(const void *p, int i) { return ((const u8 *)p)[i]; }
DEVICE float float_zero_at(const void *p, int i) { return ((const float *)p)[i]; }

DEVICE void finish(const Args &a, int m, int n, float v) {
    if (INT) v = __fmul_rn(v, ASCALE ? a.unit : a.row_scale[m]);
    if (a.bias) v = __fadd_rn(v, a.bias[n]);
    store_float(a.y, m * a.y_row + n * a.y_col, a.y_kind, v);
}

// A sum of one whole row of W, without groups, on its way out.
DEVICE float scaled(const Args &a, int n, Sum d) {
    const float s = INNER ? a.outer[n] : scale_at(a.scales, n);
    // The integer contract starts from +0.
    return INT ? __fmaf_rn((float)d, s, 0.0f) : __fmul_rn((float)d * a.unit, s);
}

extern __shared__ __align__(1024) char dynamic[];

#if NB_BULK
extern "C" __global__ void __launch_bounds__(THREADS) gemm(const __grid_constant__ Args a, const __grid_constant__ Map map) {
#else
extern "C" __global__ void __launch_bounds__(THREADS) gemm(const __grid_constant__ Args a) {
#endif
    const int tid = threadIdx.x, lane = tid & 31;
    const int warp = __shfl_sync(0xffffffffu, tid >> 5, 0); // the compiler sees that a warp has one
    const int wr = warp % WR, wk = warp / WR;
    const int g = lane >> 2, t = lane & 3;
    const int m0 = blockIdx.y * T;
    const int tiles = a.n_padded / 16;

    let_next_begin();
    // X of the warps that share a chunk, the table, codes and scales of this warp.
    char *shared = dynamic + ((1024 - (shared_address(dynamic) & 1023)) & 1023);
    const u32 x_base = shared_address(shared + wk * STAGES * X_STAGE);
    char *table = shared + WK * STAGES * X_STAGE;
    char *w_ring = table + Book<ACT>::BYTES + warp * STAGES * W_STAGE;
    char *s_ring = table + Book<ACT>::BYTES + WR * WK * STAGES * W_STAGE + warp * STAGES * (S_STAGE + Z_STAGE);
    char *rest = table + Book<ACT>::BYTES + WR * WK * STAGES * (W_STAGE + S_STAGE + Z_STAGE);

    Book<ACT> book;
    book.load(table, a.book, tid, THREADS);
#if NB_BULK
    __shared__ u64 ready[WK][STAGES];
    if (tid == 0) {
#pragma unroll
        for (int i = 0; i < WK * STAGES; i++) barrier_init(shared_address(&ready[i / STAGES][i % STAGES]), WR);
        barrier_init_fence();
    }
    u32 phases = 0; // of the barriers, a bit each
#endif
    if (BULK || Book<ACT>::BYTES) __syncthreads();

    const int begin = span_start(blockIdx.x, a), end = span_start(blockIdx.x + 1, a);
    const int columns = min(T, a.m - m0);
    const bool asks = BULK && elected();
    Place<WK> load, here;
    load.start(begin, end, a.chunks);
    here.start(begin, end, a.chunks);

    // No division where a chunk is a group.
    auto group_of = [&](int chunk) { return a.chunks_per_group == 1 ? chunk : chunk / a.chunks_per_group; };
    // Asks for what this warp needs of the chunk at hand, and goes on to the next: of W, of X, or of both.
    auto issue = [&](Place<WK> &at_hand, int stage, bool of_w, bool of_x) {
        const bool mine = !at_hand.done() && at_hand.chunk + wk < at_hand.stop;
        if (mine && (!BULK || asks)) {
            const int chunk = at_hand.chunk + wk;
            const int tile0 = min(at_hand.row_block * (WN * WR) + wr * WN, tiles - WN);
            const i64 at = ((i64)(tile0 >> 2) * a.chunks + chunk) * 4 + (tile0 & 3);
            const int group0 = GROUPED > 1 ? chunk * GROUPED : GROUPED ? group_of(chunk) : 0;
            const u32 to = shared_address(w_ring + stage * W_STAGE);
            const u32 st = shared_address(s_ring + stage * (S_STAGE + Z_STAGE)), xt = x_base + stage * X_STAGE;
#if NB_BULK
            const u32 bar = shared_address(&ready[wk][stage]);
            if (of_w) {
                barrier_expect(bar, W_STAGE + S_STAGE + Z_STAGE + (wr == 0 ? X_STAGE : 0));
#pragma unroll
                for (int p = 0; p < Planes<BITS>::count; p++) {
                    const int pb = Planes<BITS>::bits(p);
                    copy_run(to + WN * Planes<BITS>::below(p) * 256, a.planes[p] + at * (256 * pb), WN * 256 * pb, bar);
                }
#pragma unroll
                for (int q = 0; q < GROUPED; q++) {
                    const i64 row = (i64)min(group0 + q, a.groups - 1) * a.n_padded + tile0 * 16;
                    copy_run(st + q * WN * 16 * SB, (const char *)a.scales + row * SB, WN * 16 * SB, bar);
                    if (ZERO) copy_run(st + S_STAGE + q * WN * 16 * ZB, (const char *)a.zeros + row * ZB, WN * 16 * ZB, bar);
                }
            }
            if (of_x && wr == 0)
#pragma unroll
                for (int p = 0; p < PARTS; p++) copy_box(xt + p * (T * 128), &map, bar, chunk * 128 + p * 64, m0);
#else
            // Calls f(i) for i below `count`, from `first` on in steps of `step`.
            auto share_out = [&](int count, int first, int step, auto f) {
#pragma unroll
                for (int j = 0; j < (count + step - 1) / step; j++)
                    if (count % step == 0 || j * step + first < count) f(j * step + first);
            };
#pragma unroll
            for (int p = 0; p < Planes<BITS>::count; p++) {
                const int pb = Planes<BITS>::bits(p);
                const char *from = a.planes[p] + at * (256 * pb);
                const u32 dst = to + WN * Planes<BITS>::below(p) * 256;
                share_out(WN * 16 * pb, lane, 32, [&](int i) { copy16(dst + i * 16, from + i * 16); });
            }
            // Scales, zero points: rows of 16-byte pieces, a row per group.
            auto per_group = [&](u32 to, const void *from, int size) {
                const int per = max(WN * size, 1);
                share_out(GROUPED * per, lane, 32, [&](int i) {
                    const i64 row = (i64)min(group0 + i / per, a.groups - 1) * a.n_padded + tile0 * 16;
                    copy16(to + i * 16, (const char *)from + row * size + (i % per) * 16);
                });
            };
            per_group(st, a.scales, SB);
            if (ZERO) per_group(st + S_STAGE, a.zeros, ZB);
            // X as the copy engine would leave it: pieces of 16 bytes exchanged so that no two rows of a matrix share
            // banks.
            share_out(T * 8 * PARTS, wr * 32 + lane, 32 * WR, [&](int i) {
                const int part = i / (T * 8), row = i / 8 % T, piece = i % 8;
                const int byte = (chunk * PARTS + part) * 128 + piece * 16;
                int valid = a.k_bytes - byte;
                valid = m0 + row < a.m ? min(max(valid, 0), 16) : 0;
                const char *from = valid > 0 ? a.x + (m0 + row) * a.ldx + byte : a.x;
                copy16(xt + part * (T * 128) + row * 128 + ((piece ^ (row & 7)) * 16), from, valid);
            });
#endif
        }
        if (!BULK) commit();
        if (!at_hand.done()) at_hand.next(a.chunks);
    };
    // Waits for the chunk of this warp in a slot, and for the other warps to be done with the one before.
    auto arrive = [&](int stage, bool mine) {
#if NB_BULK
        if (mine) {
            barrier_wait(shared_address(&ready[wk][stage]), phases >> stage & 1);
            phases ^= 1u << stage;
        }
#else
        wait_pending<STAGES - 2>();
#endif
        // The warps that share X; barrier 1 belongs to Share.
        if (WR > 1)
            asm volatile("bar.sync %0, %1;" ::"r"(2 + wk), "n"(32 * WR) : "memory");
        else
            __syncwarp();
    };

    Sum acc[WN][NT][SETS][4];   // of the group at hand
    Sum ones[NT][4];            // sums of X over the same stretch
    Total total[GROUPED && !PARK ? WN : 1][GROUPED && !PARK ? NT : 1][4];
    // Calls f(tile, eight columns, element, row of the block, column of the block) for every output of a thread.
    auto each = [&](auto f) {
#pragma unroll
        for (int i = 0; i < WN; i++)
#pragma unroll
            for (int j = 0; j < NT; j++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    f(i, j, e, (wr * WN + i) * 16 + (e >> 1) * 8 + g, j * 8 + 2 * t + (e & 1));
    };
    auto clear = [&]() {
        each([&](int i, int j, int e, int, int) {
#pragma unroll
            for (int s = 0; s < SETS; s++) acc[i][j][s][e] = 0;
            ones[j][e] = 0;
        });
    };
    auto clear_total = [&]() {
        if (GROUPED && !PARK) each([&](int i, int j, int e, int, int) { total[GROUPED && !PARK ? i : 0][GROUPED && !PARK ? j : 0][e] = 0; });
    };
    // sum over the stretch of x * (mul*u - z), or of x * mul*u where z is a float
    auto difference = [&](int i, int j, int e, int z) -> Sum {
        const int row = e >> 1;
        if (NB_WORTH != LINE) return acc[i][j][0][e];
        if (INT) {
            const int sub = ZERO == 1 ? z : a.sub;
            return (Sum)(a.mul * (int)acc[i][j][0][e] - (ZERO == 2 ? 0 : sub * (int)ones[j][e]));
        } else {
            float v = (float)acc[i][j][0][e] * (inverse_unit<ACT, BITS>() / (1 << excess<ACT, BITS>(row, 0)));
            if (SETS == 2)
                v = __fmaf_rn((float)acc[i][j][SETS - 1][e], inverse_unit<ACT, BITS>() / (1 << excess<ACT, BITS>(row, 1)), v);
            const float mul = (float)a.mul;
            const float sub = (ZERO == 1 ? (float)z : (float)a.sub) + mul * offset<ACT, BITS>();
            return (Sum)__fmaf_rn(-sub, (float)ones[j][e], mul * v);
        }
    };
    // What waits: integer sums [group of the round][row of X][row of W], scales, float sums so far.
    constexpr int PITCH = R + 4; // no two lanes of a store share a bank
    const int wide = min(T, a.m);
    int round = 0, parked_from = 0; // the first chunk and the first group of the round
    const int most = GROUPED > 1 || a.chunks_per_group == 1 ? PARK * WK * GROUPED : a.groups; // groups of a round
    int *parked = (int *)rest;
    float *parked_scales = (float *)(parked + most * wide * PITCH), *so_far = parked_scales + most * R;
    // Adds the sums of group `q` of the chunk in stage `stage`.
    auto flush = [&](int stage, int q, int group) {
        const char *s_at = s_ring + stage * (S_STAGE + Z_STAGE) + q * WN * 16 * SB;
        const char *z_at = s_ring + stage * (S_STAGE + Z_STAGE) + S_STAGE + q * WN * 16 * ZB;
        float of_x[NT][2]; // scales of the activations
        if (ASCALE && !PARK)
#pragma unroll
            for (int j = 0; j < NT; j++)
#pragma unroll
                for (int c = 0; c < 2; c++)
                    of_x[j][c] = a.row_scale[(i64)min(m0 + j * 8 + 2 * t + c, a.m - 1) * a.groups + group];
#pragma unroll
        for (int i = 0; i < WN; i++)
#pragma unroll
            for (int row = 0; row < 2; row++) {
                const int at = i * 16 + row * 8 + g;
                const float s = scale_at(s_at, at);
                const int z = ZERO == 1 ? int_zero_at(z_at, at) : 0;
                if (PARK && t == 0) parked_scales[(group - parked_from) * R + wr * WN * 16 + at] = s;
                const float zf = ZERO == 2 ? float_zero_at(z_at, at) : 0.0f;
#pragma unroll
                for (int j = 0; j < NT; j++)
#pragma unroll
                    for (int c = 0; c < 2; c++) {
                        const int e = row * 2 + c;
                        const Sum d = difference(i, j, e, z);
                        if (PARK) {
                            const int col = j * 8 + 2 * t + c;
                            if (col >= wide) continue;
                            int *park = parked + ((group - parked_from) * wide + col) * PITCH + wr * WN * 16 + at;
                            if (GROUPED > 1 || a.chunks_per_group == 1)
                                *park = (int)d;
                            else
                                atomicAdd(park, (int)d);
                        } else {
                            Total &y = total[GROUPED && !PARK ? i : 0][GROUPED && !PARK ? j : 0][e];
                            const float both = ASCALE ? __fmul_rn(s, of_x[j][c]) : s;
                            if (INNER) {
                                y += (Total)((int)s * (int)d);
                            } else if (INT) {
                                y = __fmaf_rn((float)d, both, y);
                                if (ZERO == 2) y = __fmaf_rn((float)ones[j][e], -__fmul_rn(both, zf), y);
                            } else if (ZERO == 2) {
                                y = __fmaf_rn(s, __fmaf_rn(-zf, (float)ones[j][e], (float)d), y);
                            } else {
                                y = __fmaf_rn((float)d, s, y);
                            }
                        }
                    }
            }
        clear();
    };

    // What leaves a warp at the end of a run of chunks: float sums, or integers without groups.
    auto leave = [&](int row_block, int from, int to) {
        const bool whole = from == 0 && to == a.chunks;
        const Share share(a, row_block, R * T);
        float *mine = share.slot(blockIdx.x, a);
        auto value = [&](int i, int j, int e) -> float {
            if (GROUPED) {
                const Total v = total[GROUPED && !PARK ? i : 0][GROUPED && !PARK ? j : 0][e];
                return INNER ? __int_as_float((int)v) : INT ? (float)v : (float)v * a.unit;
            }
            const int n = min((row_block * WN * WR + wr * WN + i) * 16 + (e >> 1) * 8 + g, a.n - 1);
            const int z = ZERO == 1 ? int_zero_at(a.zeros, n) : 0;
            Sum d = difference(i, j, e, z);
            if (INT) return __int_as_float((int)d);
            if (ZERO == 2) d = (Sum)__fmaf_rn(-float_zero_at(a.zeros, n), (float)ones[j][e], (float)d);
            return scaled(a, n, d);
        };
        auto add = [&](float p, float q) -> float {
            return WHOLE ? __int_as_float(__float_as_int(p) + __float_as_int(q)) : p + q;
        };
        auto out = [&](int row, int col, float v) {
            const int n = row_block * R + row, m = m0 + col;
            if (n >= a.n || m >= a.m) return;
            if (WHOLE) v = scaled(a, n, (Sum)__float_as_int(v));
            finish(a, m, n, v);
        };
        if (WK > 1) {
            // Eight columns at a time: room for all would be missing in the rings.
            float *red = (float *)rest;
#pragma unroll
            for (int j = 0; j < NT; j++) {
                if (j * 8 >= columns) break;
                if (j) __syncthreads();
#pragma unroll
                for (int i = 0; i < WN; i++)
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        red[(wk * 8 + 2 * t + (e & 1)) * R + (wr * WN + i) * 16 + (e >> 1) * 8 + g] = value(i, j, e);
                __syncthreads();
                const int places = R * min(8, columns - j * 8);
                for (int q = tid; q < places; q += THREADS) {
                    float v = red[q];
#pragma unroll
                    for (int w = 1; w < WK; w++) v = add(v, red[w * R * 8 + q]);
                    if (whole)
                        out(q % R, j * 8 + q / R, v);
                    else
                        mine[j * 8 * R + q] = v;
                }
            }
        } else {
            each([&](int i, int j, int e, int row, int col) {
                const float v = value(i, j, e);
                if (whole)
                    out(row, col, v);
                else if (col < columns)
                    mine[col * R + row] = v;
            });
        }
        if (!whole && share.complete<THREADS>(a, row_block))
            share.sum<THREADS>(a, R * columns, add, [&](int q, float v) { out(q % R, q / R, v); });
        if (WK > 1) __syncthreads();
    };
    // Adds the sums of the groups of a round, which ends before chunk `stop`, to what there is.
    auto settle = [&](int row_block, int stop) {
        __syncthreads();
        const int upto = min(GROUPED > 1 ? stop * GROUPED : group_of(stop - 1) + 1, a.groups);
        const int count = upto - parked_from;
        for (int q = tid; q < R * columns; q += THREADS) {
            const int row = q % R, col = q / R, n = row_block * R + row, m = m0 + col;
            float c = round ? so_far[col * PITCH + row] : 0.0f;
#pragma unroll 8
            for (int k = 0; k < count; k++) {
                float s = parked_scales[k * R + row];
                if (ASCALE) s = __fmul_rn(s, a.row_scale[(i64)m * a.groups + parked_from + k]);
                c = __fmaf_rn((float)parked[(k * wide + col) * PITCH + row], s, c);
            }
            if (stop < a.chunks)
                so_far[col * PITCH + row] = c;
            else if (n < a.n)
                finish(a, m, n, c);
        }
        round = stop < a.chunks ? stop : 0;
        parked_from = round ? upto : 0;
        __syncthreads();
    };
    auto clear_park = [&]() {
        if (PARK && GROUPED == 1 && a.chunks_per_group > 1) {
            for (int q = tid; q < most * wide * PITCH; q += THREADS) parked[q] = 0;
            __syncthreads();
        }
    };
    // X of a block of 32 k as the second operand.
    auto load_x = [&](u32 xs, int block, u32 b[NT][4]) {
        if (INT) {
            // One load covers two blocks; loading per block keeps fewer registers.
#pragma unroll
            for (int j = 0; j < NT; j += 2) {
                const int row = (NT > 1 ? j * 8 + (lane >> 4) * 8 : 0) + (lane & 7);
                const int piece = block * 2 + ((lane >> 3) & 1);
                u32 r[4];
                load_matrices(r, xs + row * 128 + ((piece ^ (row & 7)) * 16));
                b[j][0] = r[0];
                b[j][1] = r[1];
                if (j + 1 < NT) {
                    b[j + 1 < NT ? j + 1 : j][0] = r[2];
                    b[j + 1 < NT ? j + 1 : j][1] = r[3];
                }
            }
        } else {
#pragma unroll
            for (int j = 0; j < NT; j++) {
                const int row = j * 8 + (lane & 7), piece = (block & 1) * 4 + (lane >> 3);
                load_matrices(b[j], xs + (block >> 1) * (T * 128) + row * 128 + ((piece ^ (row & 7)) * 16));
            }
        }
    };
    // Words of a block, as they are first needed. 8 bits: a vector per block; 4: one per two; 2: one for all.
    auto load_words = [&](int stage, int block, Words<BITS> words[WN]) {
#pragma unroll
        for (int i = 0; i < WN; i++)
#pragma unroll
            for (int p = 0; p < Planes<BITS>::count; p++) {
                const int pb = Planes<BITS>::bits(p), below = Planes<BITS>::below(p);
                const char *from = w_ring + stage * W_STAGE + (WN * below + i * pb) * 256;
                if (pb == 1) {
                    if (block == 0) {
                        const uint2 v = *(const uint2 *)(from + lane * 8);
                        words[i].w[2 * below] = v.x;
                        words[i].w[2 * below + 1] = v.y;
                    }
                } else if (block * pb % 8 == 0) {
                    const int v4 = block * pb / 8;
                    const uint4 v = *(const uint4 *)(from + v4 * 512 + lane * 16);
                    words[i].w[2 * below + v4 * 4] = v.x;
                    words[i].w[2 * below + v4 * 4 + 1] = v.y;
                    words[i].w[2 * below + v4 * 4 + 2] = v.z;
                    words[i].w[2 * below + v4 * 4 + 3] = v.w;
                }
            }
    };

    // X may be of the kernel before: codes and scales are on their way meanwhile.
    if (!BULK) wait_for_previous();
    Place<WK> behind = load;
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) issue(load, s, true, !BULK);
    if (BULK) {
        wait_for_previous();
#pragma unroll
        for (int s = 0; s < STAGES - 1; s++) issue(behind, s, false, true);
    }
    clear();
    clear_total();
    clear_park();
    int stage = 0;
    // bfloat16 or float16; signed or unsigned codes.
    constexpr bool kind = INT ? NB_WORTH != LINE : ACT == ACT_BF16;
    const bool sums = NB_WORTH == LINE && (ZERO || a.sub != 0 || ACT == ACT_BF16);
    while (!here.done()) {
        const int chunk = here.chunk + wk;
        arrive(stage, chunk < here.stop);
        issue(load, stage == 0 ? STAGES - 1 : stage - 1, true, true);
        if (chunk < here.stop) {
            Words<BITS> words[WN];
#pragma unroll
            for (int block = 0; block < 4; block++) {
                load_words(stage, block, words);
                u32 b[NT][4];
                load_x(x_base + stage * X_STAGE, block, b);
                constexpr u32 pair = INT ? 0x01010101u : ACT == ACT_BF16 ? 0x3f803f80u : 0x3c003c00u;
                const u32 one[4] = {pair, pair, pair, pair};
                if (sums)
#pragma unroll
                    for (int j = 0; j < NT; j++) {
                        mma(ones[j], one, b[j][0], b[j][1], kind);
                        if (!INT) mma(ones[j], one, b[j][2], b[j][3], kind);
                    }
#pragma unroll
                for (int i = 0; i < WN; i++)
#pragma unroll
                    for (int step = 0; step < PARTS; step++) {
                        u32 w[4];
                        if (INT)
                            decode8(book, words[i], block, w);
                        else
                            decode16(book, words[i], block, step, w);
#pragma unroll
                        for (int j = 0; j < NT; j++)
                            mma(acc[i][j][step % SETS], w, b[j][2 * step], b[j][2 * step + 1], kind);
                    }
                if (GROUPED > 1 && (block + 1) % (4 / GROUPED) == 0) {
                    const int q = block / (4 / GROUPED);
                    const int group = chunk * GROUPED + q;
                    // After the last group of a row X is 0, and a branch would keep the next block's codes waiting for
                    // these products.
                    if (!PARK && !ASCALE)
                        flush(stage, q, group);
                    else if (group < a.groups)
                        flush(stage, q, group);
                    else
                        clear();
                }
            }
            if (GROUPED == 1) {
                // Float sums and parked sums may be cut anywhere; the integers of a group must be whole.
                const int group = group_of(chunk);
                const bool whole = chunk == a.chunks - 1 || group_of(chunk + 1) != group;
                if (!INT || INNER || PARK || whole) flush(stage, 0, group);
            }
        }
        if (PARK && (here.last() || here.chunk + WK == round + PARK * WK)) {
            settle(here.row_block, min(here.chunk + WK, a.chunks));
            clear_park();
        }
        if (here.last()) {
            if (!PARK) leave(here.row_block, here.first, here.stop);
            clear();
            clear_total();
        }
        here.next(a.chunks);
        stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
    if (!BULK) wait_pending<0>();
}
