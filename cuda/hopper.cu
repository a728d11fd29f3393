// Y = X W^T for sm_90a and more than a few rows of X: wgmma with the decoded weights as the register operand.
//
// A block has WG warpgroups, each with 64 rows of W, and T rows of X that all of them read from shared memory. One more warp
// does nothing but ask the copy engine for chunks, as slots become free. (Ordinary copies would need a proxy fence per
// chunk, which waits for every copy in flight.) Weights are decoded to the numbers they stand for without their scale (integers, exact in every type), so that a group needs one
// fused multiply-add per output when it ends. While the tensor cores work on a block of 32 k the next one is decoded.
//
// Set on the command line, as NB_ACT and so on: ACT BITS T WG GROUPED ZERO SC16 STAGES MUL, as in gemm.cu. ZERO is 0 or 1,
// with zero points below 128; 8-bit codes of int8 products stand for u - 128.
#include <nibblas/base.cuh>
#include <nibblas/bulk.cuh>
#include <nibblas/decode.cuh>
#include <nibblas/scheduler.cuh>
#include <nibblas/wgmma.cuh>

constexpr int ACT = NB_ACT, BITS = NB_BITS, T = NB_T, WG = NB_WG, STAGES = NB_STAGES, MUL = NB_MUL;
constexpr int GROUPED = NB_GROUPED, ZERO = NB_ZERO, SC16 = NB_SC16;

constexpr int R = 64 * WG, THREADS = 128 * WG; // threads that multiply
// The warp that copies, and its company where registers are handed over: HANDED for each thread that multiplies, no more in
// all than the block was launched with.
constexpr int HANDED = WG == 4 ? 112 : WG == 2 && T >= 128 ? 240 : 0;
constexpr int EXTRA = HANDED ? 128 : 32;
constexpr bool INT = ACT == ACT_S8;
constexpr int PARTS = INT ? 1 : 2; // of 128 bytes, in a row of a chunk
constexpr int X_STAGE = T * 128 * PARTS;
constexpr int W_PART = 1024 * BITS; // of a warpgroup
constexpr int SB = SC16 ? 2 : 4;
constexpr int S_AT = X_STAGE + WG * W_PART;
constexpr int Z_AT = S_AT + GROUPED * R * SB;
constexpr int BYTES = Z_AT + (ZERO ? GROUPED * R : 0);
constexpr int SLOT = (BYTES + 1023) / 1024 * 1024;
constexpr int C = T / 2;          // accumulators of a thread

template <bool I> struct Number {
    typedef float type;
};
template <> struct Number<true> {
    typedef int type;
};
typedef Number<INT>::type Sum;

DEVICE float scale_at(const void *p, int i) {
    return SC16 ? f32_of_f16(((const u16 *)p)[i]) : ((const float *)p)[i];
}

DEVICE u32 fma2(u32 a, u32 b, u32 c) {
    u32 r;
    if (ACT == ACT_F16)
        asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    else
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}
DEVICE u32 twice(u16 h) { return (u32)h * 0x00010001u; }
DEVICE u16 typed(float f) { return ACT == ACT_F16 ? f16_of_f32(f) : bf16_of_f32(f); }

// What is subtracted from the codes of a row, in the form that `centred` wants.
DEVICE u32 centre(int sub) {
    if (INT) return (u32)(MUL == 2 ? (sub + 1) / 2 : sub) * 0x01010101u;
    if (MUL == 2 || (ACT == ACT_BF16 && BITS == 8)) return (u32)sub;
    return twice(typed(-(float)((ACT == ACT_F16 ? 1024 : 128) + sub)));
}

// Two codes in the low bits of the halves -> mul*u - sub.
DEVICE u32 centred(u32 v, u32 by) {
    if (ACT == ACT_BF16 && BITS == 8) {
        u32 r;
        const float low = __fmaf_rn((float)MUL, __uint2float_rn(v & 0xffffu), -(float)(int)by);
        const float high = __fmaf_rn((float)MUL, __uint2float_rn(v >> 16), -(float)(int)by);
        asm("prmt.b32 %0, %1, %2, 0x7632;" : "=r"(r) : "r"(__float_as_uint(low)), "r"(__float_as_uint(high)));
        return r;
    }
    constexpr u32 one = ACT == ACT_F16 ? 0x3c003c00u : 0x3f803f80u, two = ACT == ACT_F16 ? 0x40004000u : 0x40004000u;
    v |= ACT == ACT_F16 ? 0x64006400u : 0x43004300u;
    if (MUL == 1) return fma2(v, one, by);
    // 2048 + 2u - sub has no exact constant: first u, then 2u - sub.
    v = fma2(v, one, ACT == ACT_F16 ? 0xe400e400u : 0xc300c300u);
    return fma2(v, two, twice(typed(-(float)(int)by)));
}

DEVICE u32 centred8(u32 q, u32 by) {
    u32 v;
    if (BITS == 8)
        v = q ^ 0x80808080u;
    else
        v = ((q | 0x80808080u) - by) ^ 0x80808080u;
    if (MUL == 2) v = ((v << 1) & 0xfefefefeu) | 0x01010101u;
    return v;
}

extern __shared__ __align__(1024) char dynamic[];

extern "C" __global__ void __launch_bounds__(THREADS + EXTRA, 1) hopper(const __grid_constant__ Args a, const __grid_constant__ Map map) {
    const int tid = threadIdx.x, lane = tid & 31;
    const int warp = tid >> 5;
    const int g = lane >> 2, t = lane & 3;
    const int m0 = blockIdx.y * T;
    __shared__ u64 ready[STAGES], empty[STAGES];
    char *shared = dynamic + ((1024 - (shared_address(dynamic) & 1023)) & 1023);
    if (tid == 0) {
#pragma unroll
        for (int i = 0; i < STAGES; i++) {
            barrier_init(shared_address(&ready[i]), 1);
            barrier_init(shared_address(&empty[i]), 4 * WG);
        }
        barrier_init_fence();
    }
    __syncthreads();
    const int begin = span_start(blockIdx.x, a), end = span_start(blockIdx.x + 1, a);
    Place<1> here;
    here.start(begin, end, a.chunks);
    int stage = 0, phase = 0;

    if (tid >= THREADS) {
        if (HANDED) asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (tid == THREADS) {
            const int last = a.n_padded / 64 - 1;
            while (!here.done()) {
                const int chunk = here.chunk;
                const u32 bar = shared_address(&ready[stage]), to = shared_address(shared + stage * SLOT);
                barrier_wait(shared_address(&empty[stage]), phase ^ 1);
                barrier_expect(bar, BYTES);
#pragma unroll
                for (int p = 0; p < PARTS; p++) copy_box(to + p * (T * 128), &map, bar, chunk * 128 + p * 64, m0);
                const int group0 = GROUPED > 1 ? chunk * GROUPED : chunk / a.chunks_per_group;
#pragma unroll
                for (int w = 0; w < WG; w++) {
                    const int band = min(here.row_block * WG + w, last);
#pragma unroll
                    for (int p = 0; p < Planes<BITS>::count; p++) {
                        const int pb = Planes<BITS>::bits(p), below = Planes<BITS>::below(p);
                        copy_run(to + X_STAGE + w * W_PART + below * 1024,
                                 a.planes[p] + ((i64)band * a.chunks + chunk) * (1024 * pb), 1024 * pb, bar);
                    }
#pragma unroll
                    for (int q = 0; q < GROUPED; q++) {
                        const i64 at = (i64)min(group0 + q, a.groups - 1) * a.n_padded + band * 64;
                        copy_run(to + S_AT + (q * R + w * 64) * SB, (const char *)a.scales + at * SB, 64 * SB, bar);
                        if (ZERO) copy_run(to + Z_AT + q * R + w * 64, (const char *)a.zeros + at, 64, bar);
                    }
                }
                here.next(a.chunks);
                if (++stage == STAGES) {
                    stage = 0;
                    phase ^= 1;
                }
            }
        }
        return;
    }

    if (HANDED) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(HANDED ? HANDED : 24));
    Sum acc[C];
    float total[GROUPED ? C : 1];
    u32 w[2][8];
    int fresh; // the next product starts the sums anew
#pragma unroll
    for (int i = 0; i < C; i++) acc[i] = 0;
    int held = -1; // the slot of the chunk before, whose last products may be under way
    while (!here.done()) {
        fresh = 1;
        if (GROUPED)
#pragma unroll
            for (int i = 0; i < C; i++) total[GROUPED ? i : 0] = 0.0f;
        for (int chunk = here.chunk; chunk < here.stop; chunk++) {
            const char *slot = shared + stage * SLOT;
            const u64 x_at = describe(shared_address(slot));
            const char *codes = slot + X_STAGE + (warp >> 2) * W_PART;
            barrier_wait(shared_address(&ready[stage]), phase);
            Words<BITS> words;
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
            u32 by[2] = {centre(a.sub), centre(a.sub)};
            if (ZERO && !GROUPED) {
                const int n = min(here.row_block * R + warp * 16 + g, a.n_padded - 16);
                by[0] = centre(((const u8 *)a.zeros)[n]);
                by[1] = centre(((const u8 *)a.zeros)[n + 8]);
            }
#pragma unroll
            for (int block = 0; block < 4; block++) {
                if (ZERO && GROUPED && block % (4 / (GROUPED ? GROUPED : 1)) == 0) {
                    const u8 *z = (const u8 *)slot + Z_AT + block / (4 / (GROUPED ? GROUPED : 1)) * R + warp * 16;
                    by[0] = centre(z[g]);
                    by[1] = centre(z[g + 8]);
                }
                u32 *r = w[block & 1];
                wgmma_wait<1>();
                if (block == 1 && held >= 0) {
                    if (lane == 0) barrier_arrive(shared_address(&empty[held]));
                    held = -1;
                }
                if (INT) {
#pragma unroll
                    for (int step = 0; step < 2; step++)
#pragma unroll
                        for (int row = 0; row < 2; row++)
                            r[2 * step + row] = centred8(quad<BITS>(words, block, row, step), by[row]);
                } else {
#pragma unroll
                    for (int step = 0; step < 2; step++)
#pragma unroll
                        for (int row = 0; row < 2; row++) {
                            const u32 q = quad<BITS>(words, block, row, step);
                            r[4 * step + row] = centred(q & 0x00ff00ffu, by[row]);
                            r[4 * step + 2 + row] = centred((q >> 8) & 0x00ff00ffu, by[row]);
                        }
                }
                wgmma_fence();
                if (INT) {
                    Wgmma<ACT, T>::multiply(acc, r, x_at + block * 2, !fresh);
                } else {
                    const u64 at = x_at + (block >> 1) * (T * 128 / 16) + (block & 1) * 4;
                    Wgmma<ACT, T>::multiply(acc, r, at, !fresh);
                    Wgmma<ACT, T>::multiply(acc, r + 4, at + 2, 1);
                }
                wgmma_commit();
                fresh = 0;
                if (GROUPED && (block + 1) % (4 / (GROUPED ? GROUPED : 1)) == 0) {
                    const int q = block / (4 / (GROUPED ? GROUPED : 1));
                    const bool ends = GROUPED > 1 || !INT || chunk % a.chunks_per_group == a.chunks_per_group - 1 ||
                                      chunk == a.chunks - 1;
                    if (ends) {
                        const char *s_at = slot + S_AT + (q * R + warp * 16) * SB;
                        const float s0 = scale_at(s_at, g), s1 = scale_at(s_at, g + 8);
                        wgmma_wait<0>();
                        pin(acc);
#pragma unroll
                        for (int i = 0; i < C; i++) {
                            float &y = total[GROUPED ? i : 0];
                            y = __fmaf_rn((float)acc[i], i & 2 ? s1 : s0, y);
                        }
                        fresh = 1;
                    }
                }
            }
            held = stage;
            if (++stage == STAGES) {
                stage = 0;
                phase ^= 1;
            }
        }
        wgmma_wait<0>();
        pin(acc);
        const int row_block = here.row_block;
        const bool whole = here.first == 0 && here.stop == a.chunks;
        const Share share(a, row_block, R * T);
        const int n0 = row_block * R + warp * 16 + g;
        float s0 = 1.0f, s1 = 1.0f;
        if (!GROUPED) {
            s0 = scale_at(a.scales, min(n0, a.n_padded - 1));
            s1 = scale_at(a.scales, min(n0 + 8, a.n_padded - 1));
        }
        auto bits = [&](int i) -> float {
            if (GROUPED) return total[GROUPED ? i : 0];
            return INT ? __int_as_float((int)acc[i]) : (float)acc[i];
        };
        auto put = [&](int i, float v) {
            const int n = n0 + (i & 2) * 4, m = m0 + (i >> 2) * 8 + 2 * t + (i & 1);
            if (n >= a.n || m >= a.m) return;
            const float s = i & 2 ? s1 : s0;
            if (!GROUPED) v = INT ? __fmaf_rn((float)__float_as_int(v), s, 0.0f) : __fmul_rn(v, s);
            if (INT) v = __fmul_rn(v, a.row_scale[m]);
            if (a.bias) v = __fadd_rn(v, a.bias[n]);
            store_float(a.y, m * a.y_row + n * a.y_col, a.y_kind, v);
        };
        if (whole) {
#pragma unroll
            for (int i = 0; i < C; i++) put(i, bits(i));
        } else {
            // Threads keep their own outputs: the last block adds in registers.
            float *mine = share.slot(blockIdx.x, a);
#pragma unroll
            for (int i = 0; i < C; i++) mine[i * THREADS + tid] = bits(i);
            if (share.complete<THREADS>(a, row_block)) {
#pragma unroll
                for (int i = 0; i < C; i++) {
                    float v = __ldcg(share.slot(share.first, a) + i * THREADS + tid);
#pragma unroll 4
                    for (int b = share.first + 1; b <= share.last; b++) {
                        const float p = __ldcg(share.slots + (i64)(2 * b) * share.size + i * THREADS + tid);
                        v = INT && !GROUPED ? __int_as_float(__float_as_int(v) + __float_as_int(p)) : v + p;
                    }
                    put(i, v);
                }
            }
        }
        here.finish(a.chunks);
    }
}
