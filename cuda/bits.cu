// Products of bipolar matrices from their bit planes, for sm_90a: counts of common ones (b1 wgmma, and + popc).
//
// What the counts say is in counts.cuh. Pairs of planes with the highest i + j come first and the counts
// are doubled from one i + j to the next, so all pairs share one set of accumulators.
//
// Here X is the first operand of the tensor cores: a thread's neighbouring accumulators are neighbours in a row of Y, and
// go there without a detour. Results leave while the copies of the next tile are under way.
//
// Set on the command line: T (rows of W of a block), WG (warpgroups, of 64 rows of X each), STAGES; OUT: Y has 32 bits and
// aligned rows, and the copy engine writes it while the next tile is multiplied.
#include <nibblas/base.cuh>
#include <nibblas/bulk.cuh>
#include <nibblas/counts.cuh>
#include <nibblas/wgmma.cuh>

constexpr int T = NB_T, WG = NB_WG, STAGES = NB_STAGES, OUT = NB_OUT;
constexpr int R = 64 * WG, THREADS = 128 * WG;
constexpr int SLOT = (R + T) * 128; // 1024 k
constexpr int C = T / 2;

// Blocks in bands of eight blocks of W, so that what is in the cache is used.
DEVICE void tile_of(int i, const Args &a, int &m0, int &n0) {
    const int band = 8, per = band * a.m_blocks;
    const int first = i / per * band, high = min(band, a.n_blocks - first), in = i % per;
    n0 = (first + in % high) * T;
    m0 = in / high * R;
}

extern __shared__ __align__(1024) char dynamic[];

extern "C" __global__ void __launch_bounds__(THREADS + 32, 1)
    bits(const __grid_constant__ Args a, const __grid_constant__ Map map_w, const __grid_constant__ Map map_x
#if NB_OUT
         , const __grid_constant__ Map map_y
#endif
    ) {
    const int tid = threadIdx.x, lane = tid & 31;
    const int warp = __shfl_sync(0xffffffffu, tid >> 5, 0); // the compiler sees that a warp has one
    __shared__ u64 ready[STAGES], empty[STAGES];
    let_next_begin();
    char *shared = dynamic + ((1024 - (shared_address(dynamic) & 1023)) & 1023);
    if (tid == 0) ring_init(ready, 1, empty, 4 * WG * ARRIVALS);
    __syncthreads();
    wait_for_previous();
    const int tiles = a.m_blocks * a.n_blocks, levels = a.p + a.q - 1;
    int stage = 0, phase = 0;

    if (warp == 4 * WG) {
        const bool asks = elected();
        for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
            int m0, n0;
            tile_of(tile, a, m0, n0);
            for (int level = levels - 1; level >= 0; level--)
                for (int i = max(0, level - a.q + 1); i <= min(a.p - 1, level); i++)
                    for (int chunk = 0; chunk < a.chunks; chunk++) {
                        const u32 bar = shared_address(&ready[stage]), to = shared_address(shared + stage * SLOT);
                        barrier_wait(shared_address(&empty[stage]), phase ^ 1);
                        if (asks) {
                            barrier_expect(bar, (a.x_box + T) * 128);
                            copy_box(to, &map_x, bar, chunk * 128, (level - i) * a.x_rows + m0);
                            copy_box(to + R * 128, &map_w, bar, chunk * 128, i * a.w_rows + n0);
                        }
                        if (++stage == STAGES) {
                            stage = 0;
                            phase ^= 1;
                        }
                    }
        }
        return;
    }

    int acc[C];
#pragma unroll
    for (int i = 0; i < C; i++) acc[i] = 0;
    int held = -1;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        int m0, n0;
        tile_of(tile, a, m0, n0);
        int add = 0;
        for (int level = levels - 1; level >= 0; level--) {
            const int pairs = min(a.p - 1, level) - max(0, level - a.q + 1) + 1;
            for (int step = 0; step < pairs * a.chunks; step++) {
                barrier_wait(shared_address(&ready[stage]), phase);
                const u32 at = shared_address(shared + stage * SLOT);
                const u64 x = describe(at + (warp >> 2) * 8192), w = describe(at + R * 128);
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    BitWgmma<T>::multiply(acc, x + 2 * k, w + 2 * k, add);
                    add = 1;
                }
                wgmma_commit();
                wgmma_wait<1>();
                if (held >= 0) warp_arrive(shared_address(&empty[held]), lane);
                held = stage;
                if (++stage == STAGES) {
                    stage = 0;
                    phase ^= 1;
                }
            }
            wgmma_wait<0>();
            pin(acc);
            if (level) {
#pragma unroll
                for (int i = 0; i < C; i++) acc[i] *= 2;
            }
            pin(acc);
        }
        // The copies of the next tile need this slot while results leave.
        if (held >= 0) warp_arrive(shared_address(&empty[held]), lane);
        held = -1;
#if NB_OUT
        // 64 rows by 32 numbers at a time, in two halves of what the warpgroup has.
        const int wg = warp >> 2, g = lane >> 2, t = lane & 3, top = m0 + wg * 64;
        const u32 room = shared_address(shared + STAGES * SLOT) + wg * 16384;
#pragma unroll
        for (int part = 0; part < C / 16; part++) {
            const u32 to = room + (part & 1) * 8192;
            if ((tid & 127) == 0) store_wait_read<1>();
            asm volatile("bar.sync %0, 128;" ::"r"(1 + wg) : "memory");
#pragma unroll
            for (int row = 0; row < 2; row++) {
                const int at = (warp & 3) * 16 + row * 8 + g, m = min(top + at, a.m - 1);
                const Sums sums(a, m);
#pragma unroll
                for (int j = 4 * part; j < 4 * part + 4; j++) {
                    const int n = n0 + j * 8 + 2 * t;
                    int2 v = sums.pair(a, n, acc[4 * j + 2 * row], acc[4 * j + 2 * row + 1]);
                    if (a.y_kind >= 0) {
                        const float2 f = numbers_of(a, m, n, v);
                        v = make_int2(__float_as_int(f.x), __float_as_int(f.y));
                    }
                    const u32 piece = (2 * (j & 3) + (t >> 1)) ^ (at & 7);
                    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(to + at * 128 + piece * 16 + (t & 1) * 8), "r"(v.x), "r"(v.y)
                                 : "memory");
                }
            }
            store_fence();
            asm volatile("bar.sync %0, 128;" ::"r"(1 + wg) : "memory");
            if ((tid & 127) == 0 && top < a.m) store_box(&map_y, to, n0 + part * 32, top);
        }
#else
        leave(a, m0 + (warp & ~3) * 16, n0, acc);
#endif
    }
    if (OUT && (tid & 127) == 0) store_wait();
}
