// L-Mul of arrays and of matrices. A model of arithmetic, not a faster one: tensor cores multiply for less.
#include <nibblas/lmul.cuh>

struct Args {
    const void *a, *b;
    void *y;
    i64 m, n, k; // of single products: n of them
    Model model;
    Layout from, to;
    int kind;  // of floats to round
    int *flag; // set where one of them is not finite: 1 for infinities, 2 for NaN
};

extern "C" __global__ void __launch_bounds__(256) lmul(const __grid_constant__ Args a) {
    const i64 step = (i64)gridDim.x * blockDim.x;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < a.n; i += step)
        store_number(a.y, i, a.to, product(load_number(a.a, i, a.from), load_number(a.b, i, a.from), a.model));
}

// Floats to the nearest numbers of a format, kept as float32.
extern "C" __global__ void __launch_bounds__(256) round_numbers(const __grid_constant__ Args a) {
    const i64 step = (i64)gridDim.x * blockDim.x;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < a.n; i += step) {
        const u32 r = rounded(__float_as_uint(load_float(a.a, i, a.kind)), a.to.mantissa, a.model);
        if ((r & MAGNITUDE) >= INFINITE) atomicOr(a.flag, (r & MAGNITUDE) == INFINITE ? 1 : 2);
        ((u32 *)a.y)[i] = r;
    }
}

// y[m][n] = sum over k of a[m][k] * b[k][n], float32 sums in ascending k from +0: a thread has 4 x 4 of them, a block 64 x 64.
//
// Tiles hold magnitudes and signs apart. The left magnitudes have lost the offset, so that a product is one addition. Where no
// product of a tile can overflow, and none is special, products that live are those of at least the smallest number, as signed
// integers: a right zero is so low a number that no sum with it lives, a left zero is a predicate of the row.
constexpr int TILE = 64, DEEP = 16, EACH = 4;
constexpr u32 RIGHT_ZERO = 0u - 0x41000000u;
struct Side {
    u32 size[DEEP][TILE + 4], sign[DEEP][TILE + 4];
};
DEVICE void take(const u32 *from, u32 to[EACH]) {
    const uint4 v = *(const uint4 *)from;
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}
extern "C" __global__ void __launch_bounds__(256) lmul_matmul(const __grid_constant__ Args a) {
    __shared__ __align__(16) Side left, right;
    const i64 n0 = (i64)blockIdx.x * TILE, m0 = (i64)blockIdx.y * TILE;
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    const u32 none = 0u - a.model.offset; // a left zero
    // Both operands up to here: no product passes the largest number.
    const u32 safe = (a.model.largest >> 1) + (a.model.offset >> 1);
    const int smallest = (int)a.model.smallest;
    float acc[EACH][EACH] = {};
    for (i64 k0 = 0; k0 < a.k; k0 += DEEP) {
        const int deep = a.k - k0 < DEEP ? (int)(a.k - k0) : DEEP;
        int special = 0;
        auto number = [&](const void *p, i64 i) {
            const u32 v = flushed(load_number(p, i, a.from), a.model);
            special |= (v & MAGNITUDE) > safe;
            return v;
        };
        for (int i = threadIdx.x; i < TILE * DEEP; i += blockDim.x) {
            const int r = i / DEEP, c = i % DEEP;
            const u32 v = m0 + r < a.m && c < deep ? number(a.a, (m0 + r) * a.k + k0 + c) : 0;
            left.size[c][r] = (v & MAGNITUDE) - a.model.offset;
            left.sign[c][r] = v & SIGN;
        }
        for (int i = threadIdx.x; i < TILE * DEEP; i += blockDim.x) {
            const int r = i / TILE, c = i % TILE;
            const u32 v = n0 + c < a.n && r < deep ? number(a.b, (k0 + r) * a.n + n0 + c) : 0;
            right.size[r][c] = (v & MAGNITUDE) ? v & MAGNITUDE : RIGHT_ZERO;
            right.sign[r][c] = v & SIGN;
        }
        special = __syncthreads_or(special);
        for (int k = 0; k < deep; k++) {
            u32 x[EACH], w[EACH], xs[EACH], ws[EACH];
            take(&left.size[k][ty * EACH], x);
            take(&left.sign[k][ty * EACH], xs);
            take(&right.size[k][tx * EACH], w);
            take(&right.sign[k][tx * EACH], ws);
            if (special) {
#pragma unroll
                for (int i = 0; i < EACH * EACH; i++) {
                    const u32 from = w[i % EACH] == RIGHT_ZERO ? 0 : w[i % EACH];
                    const u32 p = product((x[i / EACH] + a.model.offset) | xs[i / EACH], from | ws[i % EACH], a.model);
                    acc[i / EACH][i % EACH] += __uint_as_float(p);
                }
            } else {
#pragma unroll
                for (int i = 0; i < EACH * EACH; i++) {
                    const u32 r = x[i / EACH] + w[i % EACH];
                    // A product that does not live is a zero, which changes no sum: none is -0.
                    if (x[i / EACH] != none && (int)r >= smallest)
                        acc[i / EACH][i % EACH] += __uint_as_float(r ^ xs[i / EACH] ^ ws[i % EACH]);
                }
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < EACH * EACH; i++) {
        const i64 row = m0 + ty * EACH + i / EACH, col = n0 + tx * EACH + i % EACH;
        if (row < a.m && col < a.n) ((float *)a.y)[row * a.n + col] = acc[i / EACH][i % EACH];
    }
}
