// Products of bipolar matrices from their bit planes where X has at most 64 rows: what counts is how soon the first result
// is there. All planes of a run of 1024 k come at once; KG warpgroups take turns along K, each with accumulators of its own
// for every i + j, so that nothing waits between the pairs of planes. Their sums meet in shared memory.
//
// Set on the command line: P, Q (planes of W and X), T (rows of W of a block), KG, STAGES.
#include <nibblas/base.cuh>
#include <nibblas/bulk.cuh>
#include <nibblas/counts.cuh>
#include <nibblas/wgmma.cuh>

constexpr int P = NB_P, Q = NB_Q, T = NB_T, KG = NB_KG, STAGES = NB_STAGES;
constexpr int THREADS = 128 * KG, LEVELS = P + Q - 1;
constexpr int X_PLANE = 64 * 128, W_PLANE = T * 128, SLOT = Q * X_PLANE + P * W_PLANE;
constexpr int C = T / 2;

extern __shared__ __align__(1024) char dynamic[];

extern "C" __global__ void __launch_bounds__(THREADS + 32, 1)
    bits_few(const __grid_constant__ Args a, const __grid_constant__ Map map_w, const __grid_constant__ Map map_x) {
    const int tid = threadIdx.x, lane = tid & 31;
    const int group = __shfl_sync(0xffffffffu, tid >> 7, 0); // the compiler sees that a warp has one
    __shared__ u64 ready[STAGES], empty[STAGES];
    let_next_begin();
    char *shared = dynamic + ((1024 - (shared_address(dynamic) & 1023)) & 1023);
    int *parts = (int *)(shared + STAGES * SLOT);
    if (tid == 0) ring_init(ready, 1, empty, 4 * ARRIVALS);
    __syncthreads();

    if (group == KG) {
        const bool asks = elected();
        auto fetch_w = [&](int slot, int tile, int chunk) {
            if (!asks) return;
            const u32 bar = shared_address(&ready[slot]), to = shared_address(shared + slot * SLOT) + Q * X_PLANE;
            barrier_expect(bar, (Q * a.x_box + P * T) * 128);
#pragma unroll
            for (int i = 0; i < P; i++) copy_box(to + i * W_PLANE, &map_w, bar, chunk * 128, i * a.w_rows + tile * T);
        };
        // X may be of the kernel before: planes of W fill the ring meanwhile.
        int filled = min(STAGES, a.chunks);
        for (int chunk = 0; chunk < filled; chunk++) fetch_w(chunk, blockIdx.x, chunk);
        wait_for_previous();
        int stage = 0, phase = 0;
        for (int tile = blockIdx.x; tile < a.n_blocks; tile += gridDim.x)
            for (int chunk = 0; chunk < a.chunks; chunk++) {
                if (filled > 0) {
                    filled--;
                } else {
                    barrier_wait(shared_address(&empty[stage]), phase ^ 1);
                    fetch_w(stage, tile, chunk);
                }
                const u32 bar = shared_address(&ready[stage]), to = shared_address(shared + stage * SLOT);
                if (asks)
#pragma unroll
                    for (int j = 0; j < Q; j++) copy_box(to + j * X_PLANE, &map_x, bar, chunk * 128, j * a.x_rows);
                if (++stage == STAGES) {
                    stage = 0;
                    phase ^= 1;
                }
            }
        return;
    }

    wait_for_previous();
    int slots = 0; // that went by
    for (int tile = blockIdx.x; tile < a.n_blocks; tile += gridDim.x, slots += a.chunks) {
        int acc[LEVELS][C];
        int chunk = group; // there are at least KG
        do {
            const int at = slots + chunk, stage = at % STAGES;
            barrier_wait(shared_address(&ready[stage]), at / STAGES & 1);
            const u64 x = describe(shared_address(shared + stage * SLOT)), w = x + Q * X_PLANE / 16;
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < 4; k++)
#pragma unroll
                for (int i = 0; i < P; i++)
#pragma unroll
                    for (int j = 0; j < Q; j++)
                        BitWgmma<T>::multiply(acc[i + j], x + j * (X_PLANE / 16) + 2 * k, w + i * (W_PLANE / 16) + 2 * k,
                                                k || (i && j < Q - 1) || chunk != group);
            wgmma_commit();
            wgmma_wait<0>();
            warp_arrive(shared_address(&empty[stage]), lane);
            chunk += KG;
        } while (chunk < a.chunks);
#pragma unroll
        for (int l = 0; l < LEVELS; l++) pin(acc[l]);
        int sum[C];
#pragma unroll
        for (int i = 0; i < C; i++) {
            sum[i] = 0;
#pragma unroll
            for (int l = 0; l < LEVELS; l++) sum[i] += acc[l][i] << l;
            if (group) parts[((group - 1) * C + i) * 128 + (tid & 127)] = sum[i];
        }
        if (KG > 1) asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
        if (group == 0) {
#pragma unroll
            for (int i = 0; i < C; i++)
#pragma unroll
                for (int g = 1; g < KG; g++) sum[i] += parts[((g - 1) * C + i) * 128 + tid];
            leave(a, 0, tile * T, sum);
        }
        if (KG > 1 && tile + gridDim.x < a.n_blocks) asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
    }
}
