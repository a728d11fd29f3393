// Integer products: bytes with zero points on the tensor cores, and coded probabilities by shifts. No instruction here is one
// on floats.
//
//   sum (a - za)(b - zb) = sum ab - zb sum a - za sum b + K za zb
//
// Unsigned bytes lose 128, and so do their zero points: one signed product serves all four pairs of types. Sums are taken
// modulo 2^32 for int32 results, which the host has shown to fit; for int64 a launch sums 2^16 products and adds them to the last.
//
// A block has 128 x 128 sums, a warp 64 x 32 of them. 64 values of k at a time come through four stages of shared memory; a row
// of a stage is four segments of 16 bytes, exchanged by the row's number so that eight rows of ldmatrix meet all banks.
#include <nibblas/intops.cuh>

struct Bytes {
    const u8 *p;  // [batch][rows][k]
    i64 batch;    // bytes from one matrix to the next
    i64 zero;     // after the 128 is lost
    u32 flip;     // 0x80808080 for unsigned bytes
    int rows;
    const i64 *sums; // of rows, [batch][rows]; null where nothing needs them
    i64 sums_batch;
};
struct Product {
    Bytes a, b; // b by columns of the product: rows of its transpose
    void *y;
    const i64 *bias;  // per column, or null
    const i64 *zeros; // a zero point per column, or null
    i64 k, from, to; // of this launch: whole steps, or the end
    u64 by_tiles, tiles; // of columns
    int four;            // whether rows are whole and aligned runs of 16 bytes
};

constexpr int TILE = 128, DEEP = 64, STAGES = 4, STAGE = 2 * TILE * DEEP;

DEVICE void mma_s8(int d[4], const u32 a[4], const u32 b[2]) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// Four 8 x 16 matrices of bytes; lanes 8i to 8i+7 name the rows of the i-th.
DEVICE void load_matrices(u32 r[4], u32 from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from));
}
DEVICE u32 place(int row, int segment) { return row * DEEP + ((segment ^ (row >> 1)) & 3) * 16; }

// Fetches 16 bytes of a row into a stage, 0 beyond its end.
DEVICE void fetch(u8 *stage, const Bytes &m, const u8 *base, int first, int i, i64 k0, i64 k, bool whole) {
    const int row = i >> 2, segment = i & 3;
    const i64 at = k0 + segment * 16;
    u8 *to = stage + place(row, segment);
    const bool there = first + row < m.rows && at < k;
    const u8 *from = base + (there ? (first + row) * k + at : 0);
    if (whole) {
        copy16(shared_address(to), from, there ? 16 : 0);
        return;
    }
#pragma unroll 1
    for (int j = 0; j < 16; j++) to[j] = there && at + j < k ? from[j] : 0;
}

template <bool LONG> DEVICE void product_tile(const Product &p) {
    extern __shared__ uint4 stages[];
    u8 *room = (u8 *)stages;
    const u64 batch = p.by_tiles ? __umul64hi(blockIdx.x, p.by_tiles) : blockIdx.x;
    const int n0 = (int)(blockIdx.x - batch * p.tiles) * TILE, m0 = blockIdx.y * TILE;
    const u8 *a = p.a.p + (i64)batch * p.a.batch, *b = p.b.p + (i64)batch * p.b.batch;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int wm = (warp & 1) * 64, wn = (warp >> 1) * 32;
    const int first = (int)(p.from / DEEP), last = (int)((p.to + DEEP - 1) / DEEP);
    int acc[4][4][4] = {};
    auto stage = [&](int step) {
        if (step < last) {
            u8 *to = room + step % STAGES * STAGE;
#pragma unroll
            for (int e = 0; e < TILE * DEEP / 16 / 256; e++) {
                const int i = threadIdx.x + e * 256;
                fetch(to, p.a, a, m0, i, (i64)step * DEEP, p.k, p.four);
                fetch(to + TILE * DEEP, p.b, b, n0, i, (i64)step * DEEP, p.k, p.four);
            }
        }
        commit();
    };
#pragma unroll 1
    for (int s = 0; s < STAGES - 1; s++) stage(first + s);
    for (int step = first; step < last; step++) {
        wait_pending<STAGES - 2>();
        __syncthreads();
        stage(step + STAGES - 1);
        const u32 left = shared_address(room + step % STAGES * STAGE), right = left + TILE * DEEP;
#pragma unroll
        for (int s = 0; s < DEEP / 16; s += 2) {
            u32 x[4][4], w[4][2];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                load_matrices(x[i], left + place(wm + i * 16 + (lane & 15), s + (lane >> 4)));
#pragma unroll
                for (int j = 0; j < 4; j++) x[i][j] ^= p.a.flip;
            }
#pragma unroll
            for (int i = 0; i < 4; i += 2) {
                u32 both[4];
                load_matrices(both, right + place(wn + i * 8 + (lane >> 4) * 8 + (lane & 7), s + (lane >> 3 & 1)));
#pragma unroll
                for (int j = 0; j < 4; j++) w[i + j / 2][j % 2] = both[j] ^ p.b.flip;
            }
#pragma unroll
            for (int i = 0; i < 16; i++) mma_s8(acc[i / 4][i % 4], x[i / 4], w[i % 4]);
        }
    }
    // What lies beyond K was 0 before unsigned bytes lost 128.
    const i64 padding = p.a.flip && p.b.flip && p.to == p.k ? ((i64)last * DEEP - p.k) * 16384 : 0;
#pragma unroll
    for (int i = 0; i < 64; i++) {
        const int row = m0 + wm + i / 16 * 16 + g + (i & 2) * 4, col = n0 + wn + i / 4 % 4 * 8 + t * 2 + (i & 1);
        if (row >= p.a.rows || col >= p.b.rows) continue;
        i64 v = acc[i / 16][i / 4 % 4][i % 4] - padding;
        if (p.from == 0) {
            const i64 za = p.a.zero, zb = p.b.zero + (p.zeros ? p.zeros[col] : 0);
            v += p.k * za * zb;
            if (p.a.sums) v -= zb * p.a.sums[(i64)batch * p.a.sums_batch + row];
            if (p.b.sums) v -= za * p.b.sums[(i64)batch * p.b.sums_batch + col];
            if (p.bias) v += p.bias[col];
        }
        const i64 at = ((i64)batch * p.a.rows + row) * p.b.rows + col;
        if (LONG)
            ((i64 *)p.y)[at] += v;
        else
            ((int *)p.y)[at] = (int)v;
    }
}
extern "C" __global__ void __launch_bounds__(256, 2) product32(const __grid_constant__ Product p) { product_tile<false>(p); }
extern "C" __global__ void __launch_bounds__(256, 2) product64(const __grid_constant__ Product p) { product_tile<true>(p); }

struct Sums {
    const u8 *p;
    i64 *sums;
    i64 rows, k;
    u32 flip;
};
// A warp sums a row.
extern "C" __global__ void __launch_bounds__(256) row_sums(const __grid_constant__ Sums a) {
    const i64 step = (i64)gridDim.x * (blockDim.x / NB_WARP);
    for (i64 row = (i64)blockIdx.x * (blockDim.x / NB_WARP) + threadIdx.x / NB_WARP; row < a.rows; row += step) {
        i64 sum = 0;
        for (i64 k = threadIdx.x % NB_WARP; k < a.k; k += NB_WARP) sum += (i8)(a.p[row * a.k + k] ^ (u8)a.flip);
#pragma unroll
        for (int o = NB_WARP / 2; o; o >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, o);
        if (threadIdx.x % NB_WARP == 0) a.sums[row] = sum;
    }
}

struct Shifts {
    const void *codes; // [batch][m][k], logarithms: code c stands for steps^-c
    const void *v;     // [batch][k][n]
    i64 *y;
    i64 m, n, k, codes_batch, v_batch;
    u64 by_tiles, tiles; // of columns
    int codes_kind, v_kind;
    int two;   // steps of sqrt(2): odd ones are summed apart
    int count; // of codes; the next one stands for 0
    int most;  // the longest shift
};
// A shift and an addition for each value: a thread has an output.
extern "C" __global__ void __launch_bounds__(128) shift_sums(const __grid_constant__ Shifts a) {
    const u64 batch = a.by_tiles ? __umul64hi(blockIdx.x, a.by_tiles) : blockIdx.x;
    const i64 n = (i64)(blockIdx.x - batch * a.tiles) * blockDim.x + threadIdx.x;
    if (n >= a.n) return;
    for (i64 m = blockIdx.y; m < a.m; m += gridDim.y) {
        i64 even = 0, odd = 0;
        for (i64 k = 0; k < a.k; k++) {
            int c[4], v[4];
            load_ints(a.codes, (i64)batch * a.codes_batch + m * a.k + k, 1, a.codes_kind, false, c);
            load_ints(a.v, (i64)batch * a.v_batch + k * a.n + n, 1, a.v_kind, false, v);
            if (c[0] >= a.count) continue;
            const int shift = a.two ? (c[0] + 1) >> 1 : c[0];
            const i64 term = (i64)((u64)(i64)v[0] << (a.most - shift));
            if (a.two && (c[0] & 1))
                odd += term;
            else
                even += term;
        }
        // sqrt(2) in Q30; high and low parts, so that 62 bits are enough.
        const i64 root = 1518500250;
        a.y[((i64)batch * a.m + m) * a.n + n] = even + (odd >> 30) * root + (((odd & ((1 << 30) - 1)) * root) >> 30);
    }
}
