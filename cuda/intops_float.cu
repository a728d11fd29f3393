// Requantising with rounding="float": the one operator that is defined by float32 arithmetic, halves to even.
#include <nibblas/intops.cuh>

struct Args {
    const void *x;
    void *y;
    const float *factors; // [channels]
    i64 n;
    u64 inner, channels;
    int x_kind, y_kind, lo, hi, zero;
};
DEVICE i64 rounded(float v) {
    // Rust's conversion: saturating, and rintf of a number beyond 2^23 is itself.
    v = rintf(v);
    return v >= 2147483648.0f ? 2147483647ll : v < -2147483648.0f ? -2147483648ll : (i64)(int)v;
}
extern "C" __global__ void __launch_bounds__(256) requantize_float(const __grid_constant__ Args a) {
    const i64 step = (i64)gridDim.x * blockDim.x;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < a.n; i += step) {
        int v[4];
        load_ints(a.x, i, 1, a.x_kind, false, v);
        const float f = a.factors[a.channels == 1 ? 0 : (u64)i / a.inner % a.channels];
        v[0] = saturate(rounded(__fmul_rn((float)v[0], f)) + a.zero, a.lo, a.hi);
        store_ints(a.y, i, 1, a.y_kind, false, v);
    }
}
