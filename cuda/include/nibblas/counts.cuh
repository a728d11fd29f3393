// From counts of common ones to products of bipolar numbers.
//
// A code of b bits stands for 2u - (2^b - 1). With a = 2^p - 1 for W and c = 2^q - 1 for X, sums over k:
//
//   sum (2u - a)(2v - c) = 4 sum uv - 2c sum u - 2a sum v + K a c,      sum uv = sum_ij 2^(i+j) popc(u_i & v_j)
//
// The sums of u and v are one number per row, made once.
#pragma once
#include "base.cuh"

struct Args {
    const int *w_sums, *x_sums;
    const float *w_scales, *x_scales, *bias;
    void *y;
    i64 y_row, y_col;
    int m, n, k, chunks;
    int w_rows, x_rows; // of a plane
    int p, q;           // planes of W and X
    int y_kind;         // -1: int32, the sums themselves
    int wide;           // pairs of a row of Y may be written at once
    int x_box;          // rows of X that are fetched: R, or fewer where there are fewer
    int m_blocks, n_blocks;
};

// What a row of Y needs: the offset of its row of X, and of W's rows n and n + 1 what is taken off.
struct Sums {
    int of_row, top_x;
    DEVICE Sums(const Args &a, int m) : top_x((1 << a.q) - 1) {
        const int top_w = (1 << a.p) - 1;
        of_row = a.k * top_w * top_x - 2 * top_w * a.x_sums[m];
    }
    DEVICE int2 pair(const Args &a, int n, int uv, int uv_next) const {
        const int2 w = *(const int2 *)(a.w_sums + n); // padded to whole tiles
        return make_int2(4 * uv + of_row - 2 * top_x * w.x, 4 * uv_next + of_row - 2 * top_x * w.y);
    }
};
DEVICE float2 numbers_of(const Args &a, int m, int n, int2 v) {
    const float s = a.x_scales[m];
    const float2 w = *(const float2 *)(a.w_scales + n);
    float2 y = make_float2(__fmul_rn(__fmaf_rn((float)v.x, w.x, 0.0f), s), __fmul_rn(__fmaf_rn((float)v.y, w.y, 0.0f), s));
    if (a.bias) {
        y.x = __fadd_rn(y.x, a.bias[min(n, a.n - 1)]);
        y.y = __fadd_rn(y.y, a.bias[min(n + 1, a.n - 1)]);
    }
    return y;
}

// Hands the sums uv of 64 rows of X from m0 on to memory, C/4 times eight rows of W from n0 on; by a warpgroup.
template <int C> DEVICE void leave(const Args &a, int m0, int n0, const int (&acc)[C]) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    // Calls put(place in Y, row of X, row of W, sums of it and the next) for the pairs of this thread.
    auto pairs = [&](auto put) {
#pragma unroll
        for (int row = 0; row < 2; row++) {
            const int m = m0 + (warp & 3) * 16 + row * 8 + g;
            if (m >= a.m) continue;
            const Sums sums(a, m);
#pragma unroll
            for (int j = 0; j < C / 4; j++) {
                const int n = n0 + j * 8 + 2 * t;
                if (n < a.n) put(m * a.y_row + n * a.y_col, m, n, sums.pair(a, n, acc[4 * j + 2 * row], acc[4 * j + 2 * row + 1]));
            }
        }
    };
    auto numbers = [&](auto put) {
        pairs([&](i64 at, int m, int n, int2 v) { put(at, n, numbers_of(a, m, n, v)); });
    };
    if (a.y_kind < 0 && a.wide)
        pairs([&](i64 at, int, int, int2 v) { *(int2 *)((int *)a.y + at) = v; });
    else if (a.y_kind < 0)
        pairs([&](i64 at, int, int n, int2 v) {
            ((int *)a.y)[at] = v.x;
            if (n + 1 < a.n) ((int *)a.y)[at + a.y_col] = v.y;
        });
    else if (a.y_kind == KIND_F32 && a.wide)
        numbers([&](i64 at, int, float2 v) { *(float2 *)((float *)a.y + at) = v; });
    else
        numbers([&](i64 at, int n, float2 v) {
            store_float(a.y, at, a.y_kind, v.x);
            if (n + 1 < a.n) store_float(a.y, at + a.y_col, a.y_kind, v.y);
        });
}
