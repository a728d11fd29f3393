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
constexpr int TILE = 64, DEEP = 16, EACH = 4;
extern "C" __global__ void __launch_bounds__(256) lmul_matmul(const __grid_constant__ Args a) {
    __shared__ u32 left[DEEP][TILE + 4], right[DEEP][TILE];
    const i64 n0 = (i64)blockIdx.x * TILE, m0 = (i64)blockIdx.y * TILE;
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    float acc[EACH][EACH] = {};
    for (i64 k0 = 0; k0 < a.k; k0 += DEEP) {
        const int deep = a.k - k0 < DEEP ? (int)(a.k - k0) : DEEP;
        int special = 0;
        auto number = [&](const void *p, i64 i) {
            const u32 v = flushed(load_number(p, i, a.from), a.model);
            special |= (v & MAGNITUDE) >= INFINITE;
            return v;
        };
        for (int i = threadIdx.x; i < TILE * DEEP; i += blockDim.x) {
            const int r = i / DEEP, c = i % DEEP;
            left[c][r] = m0 + r < a.m && c < deep ? number(a.a, (m0 + r) * a.k + k0 + c) : 0;
        }
        for (int i = threadIdx.x; i < TILE * DEEP; i += blockDim.x) {
            const int r = i / TILE, c = i % TILE;
            right[r][c] = n0 + c < a.n && r < deep ? number(a.b, (k0 + r) * a.n + n0 + c) : 0;
        }
        special = __syncthreads_or(special);
        for (int k = 0; k < deep; k++) {
            u32 x[EACH], w[EACH];
#pragma unroll
            for (int e = 0; e < EACH; e++) x[e] = left[k][ty * EACH + e], w[e] = right[k][tx * EACH + e];
            if (special) {
#pragma unroll
                for (int i = 0; i < EACH * EACH; i++)
                    acc[i / EACH][i % EACH] += __uint_as_float(product(x[i / EACH], w[i % EACH], a.model));
            } else {
#pragma unroll
                for (int i = 0; i < EACH * EACH; i++)
                    acc[i / EACH][i % EACH] += __uint_as_float(term(x[i / EACH], w[i % EACH], a.model));
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
