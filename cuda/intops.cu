// Integer operators of single values: rescaling, sums of two tensors, activation functions, roots.
//
// A thread takes four neighbours at a time; kinds of integers are known at run time, as are all parameters, so that one
// compilation serves every call. No instruction here is one on floats (tests/test_cuda_arithmetic.py reads the machine code).
#include <nibblas/intops.cuh>

struct Io {
    const void *x;
    void *y;
    i64 n;
    int x_kind, y_kind, lo, hi;
    int four; // whether runs of four are aligned
};

// y[i] = rule(i, x[i]), saturated.
template <class Rule> DEVICE void each(const Io &a, const Rule &rule) {
    const i64 step = (i64)gridDim.x * blockDim.x * 4;
    for (i64 i = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * 4; i < a.n; i += step) {
        const int left = a.n - i < 4 ? (int)(a.n - i) : 4;
        int v[4];
        load_ints(a.x, i, left, a.x_kind, a.four, v);
#pragma unroll
        for (int e = 0; e < 4; e++) v[e] = saturate(rule(i + e, v[e]), a.lo, a.hi);
        store_ints(a.y, i, left, a.y_kind, a.four, v);
    }
}

struct Rescale {
    Io io;
    const Factor *factors; // [channels], null for one
    Factor same;
    u64 by_inner, by_channels; // ceil(2^64 / d), 0 for d = 1
    u64 channels;
    int zero;
};
// i / d for a divisor known in advance.
DEVICE u64 over(u64 i, u64 magic) { return magic ? __umul64hi(i, magic) : i; }
template <class Rule> DEVICE void rescale(const Rescale &a, const Rule &rule) {
    if (!a.factors) return each(a.io, [&](i64, int x) { return rule(x, a.same) + a.zero; });
    each(a.io, [&](i64 i, int x) {
        const u64 run = over((u64)i, a.by_inner), c = run - over(run, a.by_channels) * a.channels;
        // The last run of four may pass the end.
        return i < a.io.n ? rule(x, a.factors[c]) + a.zero : 0;
    });
}
extern "C" __global__ void __launch_bounds__(256) requantize_single(const __grid_constant__ Rescale a) {
    rescale(a, [](int x, Factor f) { return requantized(x, f); });
}
extern "C" __global__ void __launch_bounds__(256) requantize_gemmlowp(const __grid_constant__ Rescale a) {
    rescale(a, [](int x, Factor f) { return requantized_twice(x, f); });
}

struct Add {
    Io io;
    const void *b;
    Ratio ra, rb;
    int b_kind;
    int each; // whether both terms are rounded before their sum
};
extern "C" __global__ void __launch_bounds__(256) add(const __grid_constant__ Add a) {
    const i64 step = (i64)gridDim.x * blockDim.x * 4;
    const i64 half = 1 << (FRACTION - 1), keep = a.each ? -1ll << FRACTION : -1ll, nudge = a.each ? half : 0;
    for (i64 i = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * 4; i < a.io.n; i += step) {
        const int left = a.io.n - i < 4 ? (int)(a.io.n - i) : 4;
        int v[4], w[4];
        load_ints(a.io.x, i, left, a.io.x_kind, a.io.four, v);
        load_ints(a.b, i, left, a.b_kind, a.io.four, w);
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const i64 x = (at_ratio(v[e], a.ra) + nudge) & keep, y = (at_ratio(w[e], a.rb) + nudge) & keep;
            v[e] = saturate((x + y + half - nudge) >> FRACTION, a.io.lo, a.io.hi);
        }
        store_ints(a.io.y, i, left, a.io.y_kind, a.io.four, v);
    }
}

struct Bend {
    Io io;
    Reach reach, place;
    Ratio unit, whole;
    Short brief;
    Pieces pieces;
};
extern "C" __global__ void __launch_bounds__(256) apply_exp(const __grid_constant__ Bend a) {
    each(a.io, [&](i64, int x) { return exp_of(x, a.reach, a.unit); });
}
extern "C" __global__ void __launch_bounds__(256) apply_sigmoid(const __grid_constant__ Bend a) {
    each(a.io, [&](i64, int x) { return sigmoid_of(x, a.reach, a.unit); });
}
extern "C" __global__ void __launch_bounds__(256) apply_silu(const __grid_constant__ Bend a) {
    each(a.io, [&](i64, int x) { return silu_of(x, a.reach, a.place, a.whole, a.unit); });
}
extern "C" __global__ void __launch_bounds__(256) apply_gelu_short(const __grid_constant__ Bend a) {
    each(a.io, [&](i64, int x) { return gelu_short(x, a.brief); });
}
extern "C" __global__ void __launch_bounds__(256) apply_gelu(const __grid_constant__ Bend a) {
    __shared__ Tables t;
    fill(t, a.pieces);
    each(a.io, [&](i64, int x) {
        return gelu_scaled(x, bump_of(x, t, a.pieces), a.pieces.fraction, a.whole);
    });
}
extern "C" __global__ void __launch_bounds__(256) apply_gelu_direct(const __grid_constant__ Bend a) {
    __shared__ Tables t;
    fill(t, a.pieces);
    each(a.io, [&](i64, int x) {
        return gelu_direct(x, bump_of(x, t, a.pieces), a.pieces.fraction);
    });
}

struct Roots {
    const void *x;
    void *y;
    i64 n;
};
template <class T> DEVICE void roots(const Roots &a) {
    const i64 step = (i64)gridDim.x * blockDim.x;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < a.n; i += step)
        ((T *)a.y)[i] = floor_sqrt(((const T *)a.x)[i]);
}
extern "C" __global__ void __launch_bounds__(256) sqrt32(const __grid_constant__ Roots a) { roots<u32>(a); }
extern "C" __global__ void __launch_bounds__(256) sqrt64(const __grid_constant__ Roots a) { roots<u64>(a); }
