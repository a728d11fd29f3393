// Integer operators of rows: softmax, layer norm, RMS norm. A block takes a row; what is done once per row (a quotient, a
// root) one warp does, while the other blocks of the multiprocessor work on theirs. No instruction here is one on floats.
#include <nibblas/intops.cuh>

struct Rows {
    const void *x;
    void *y;
    i64 rows;
    int cols;
    int x_kind, y_kind, lo, hi;
    int four; // whether rows begin where runs of four are aligned
    int kept; // whether a row's values fit shared memory between passes
};

extern __shared__ uint4 kept[];

DEVICE void keep(int i, const int v[4]) { kept[i / 4] = make_uint4((u32)v[0], (u32)v[1], (u32)v[2], (u32)v[3]); }
DEVICE void kept_at(int i, int v[4]) {
    const uint4 w = kept[i / 4];
    v[0] = (int)w.x, v[1] = (int)w.y, v[2] = (int)w.z, v[3] = (int)w.w;
}
// What a thread has of a row: runs of four, block by block. It meets its own values alone, so that no barrier stands between
// what is kept and what is read again. Rows that are kept and aligned choose their types outside of the loops.
template <class T, class Wide, class F> DEVICE void load_row(const Rows &a, i64 row, F f) {
    for (int i = threadIdx.x * 4; i < a.cols; i += blockDim.x * 4) {
        int v[4];
        load_run<T, Wide>(a.x, row * a.cols + i, 4, true, v);
        keep(i, v);
        f(i, 4, v);
    }
}
template <class T, class Wide, class F> DEVICE void store_row(const Rows &a, i64 row, F f) {
    for (int i = threadIdx.x * 4; i < a.cols; i += blockDim.x * 4) {
        int v[4], y[4];
        kept_at(i, v);
        f(i, 4, v, y);
        store_run<T, Wide>(a.y, row * a.cols + i, 4, true, y);
    }
}
// Calls f(column, how many of the four exist, values), the first time from memory.
template <class F> DEVICE void first(const Rows &a, i64 row, F f) {
    if (a.four && a.kept) {
        switch (a.x_kind) {
        case INT_I8: return load_row<i8, u32>(a, row, f);
        case INT_U8: return load_row<u8, u32>(a, row, f);
        case INT_I16: return load_row<short, uint2>(a, row, f);
        case INT_U16: return load_row<u16, uint2>(a, row, f);
        default: return load_row<int, uint4>(a, row, f);
        }
    }
    for (int i = threadIdx.x * 4; i < a.cols; i += blockDim.x * 4) {
        const int left = a.cols - i < 4 ? a.cols - i : 4;
        int v[4];
        load_ints(a.x, row * a.cols + i, left, a.x_kind, a.four, v);
        if (a.kept) keep(i, v);
        f(i, left, v);
    }
}
template <class F> DEVICE void again(const Rows &a, i64 row, F f) {
    for (int i = threadIdx.x * 4; i < a.cols; i += blockDim.x * 4) {
        const int left = a.four || a.cols - i > 4 ? 4 : a.cols - i;
        int v[4];
        if (a.kept)
            kept_at(i, v);
        else
            load_ints(a.x, row * a.cols + i, left, a.x_kind, a.four, v);
        f(i, left, v);
    }
}
// Stores what f(column, how many, values, results) makes of them.
template <class F> DEVICE void last(const Rows &a, i64 row, F f) {
    if (a.four && a.kept) {
        switch (a.y_kind) {
        case INT_I8: return store_row<i8, u32>(a, row, f);
        case INT_U8: return store_row<u8, u32>(a, row, f);
        case INT_I16: return store_row<short, uint2>(a, row, f);
        case INT_U16: return store_row<u16, uint2>(a, row, f);
        default: return store_row<int, uint4>(a, row, f);
        }
    }
    again(a, row, [&](int i, int left, const int *v) {
        int y[4];
        f(i, left, v, y);
        store_ints(a.y, row * a.cols + i, left, a.y_kind, a.four, y);
    });
}
DEVICE bool first_warp() { return threadIdx.x < NB_WARP; }

struct Softmax {
    Rows io;
    Reach reach;
    int digits;
};
// Maximum, exponentials in Q30, their sum in 64 bits, one reciprocal, one rounding. The lowest int32 is minus infinity.
extern "C" __global__ void __launch_bounds__(256, 8) softmax(const __grid_constant__ Softmax a) {
    __shared__ int tops[32];
    __shared__ u64 sums[32];
    __shared__ u32 inverse_of_row;
    __shared__ int shift_of_row;
    constexpr int lowest = -2147483647 - 1;
    for (i64 row = blockIdx.x; row < a.io.rows; row += gridDim.x) {
        int top = lowest;
        first(a.io, row, [&](int, int left, const int *v) {
#pragma unroll
            for (int e = 0; e < 4; e++) top = e < left && v[e] > top ? v[e] : top;
        });
        top = over_block(top, tops, Larger());
        auto exponential = [&](int v) { return v == lowest ? 0 : decay((u32)top - (u32)v, a.reach); };
        u64 sum = 0;
        again(a.io, row, [&](int i, int left, const int *v) {
            int e[4];
#pragma unroll
            for (int j = 0; j < 4; j++) e[j] = j < left ? exponential(v[j]) : 0;
            // Two of them fit 32 bits.
            sum += (u64)((u32)e[0] + (u32)e[1]) + ((u32)e[2] + (u32)e[3]);
            if (a.io.kept) keep(i, e);
        });
        leave(sum, sums, Sum());
        __syncthreads();
        if (first_warp()) {
            sum = fold(sums, Sum());
            // A power of two over the sum, with 31 significant bits: nothing is lost where the sum is large.
            if (sum == 0) sum = 1;
            const int bits = width(sum);
            const u64 inverse = ratio_of(1ull << 63, sum << (64 - bits), 31);
            if (threadIdx.x == 0) {
                inverse_of_row = (u32)inverse;
                shift_of_row = 30 + bits - a.digits;
            }
        }
        __syncthreads();
        const u32 inverse = inverse_of_row;
        const int shift = shift_of_row;
        const u64 half = (1ull << shift) >> 1;
        auto fraction = [&](int e) {
            // Past 62 the sum is so large that no fraction reaches half a step.
            if (shift > 62) return 0u;
            // The usual case: lower halves are dropped, and what is added has none.
            if (shift > 32) return (__umulhi((u32)e, inverse) + (u32)(half >> 32)) >> (shift - 32);
            return (u32)(((u64)(u32)e * inverse + half) >> shift);
        };
        last(a.io, row, [&](int, int, const int *v, int *y) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const u32 p = fraction(a.io.kept ? v[j] : exponential(v[j]));
                y[j] = (int)(p < (u32)a.io.hi ? p : (u32)a.io.hi);
            }
        });
    }
}

// How a row is normalised: see Shape in rust/ops/src/intops/norm.rs.
struct Shape {
    int centre; // whether the mean is subtracted
    int bits;   // that the largest deviation fills
    int fraction;
    int log_cols;
    u64 eps; // eps / scale^2 * cols = eps * 2^-eps_shift, below 2^62
    int eps_shift;
};
// What a row's deviations are made with, and multiplied by.
struct Row {
    i64 offset; // the mean, lifted
    int lift;
    u32 root, shift; // root * 2^-shift is 1 over the root of the mean square, or 0
};
struct Statistics {
    i64 sums[32];
    u64 squares[32], products[32];
    int tops[32], lows[32];
    Row row;
};

// A deviation, lifted to fill its bits.
DEVICE int lifted(int v, const Row &r) {
    // The difference has 32 bits.
    if (r.lift >= 0) return (int)(((u32)v << r.lift) - (u32)r.offset);
    return (int)(((i64)v - r.offset + ((i64)1 << (-r.lift - 1))) >> -r.lift);
}
// v * 2^shift in 128 bits, at most 2^100.
DEVICE void scaled(u64 v, int shift, u64 &high, u64 &low) {
    high = low = 0;
    if (v == 0) return;
    if (shift >= 0) {
        if (shift >= 64 + __clzll((i64)v) - 27)
            high = 1ull << 36;
        else if (shift >= 64)
            high = v << (shift - 64);
        else
            low = v << shift, high = shift ? v >> (64 - shift) : 0;
    } else if (shift > -64) {
        low = v >> -shift;
    }
}
// 1 over the root of the mean square of a row, from the sum of squares.
DEVICE void normaliser(u64 squares, int lift, int cols, const Shape &s, Row &r) {
    u64 high, low;
    scaled(s.eps, 2 * lift - s.eps_shift, high, low);
    low += squares;
    high += low < squares;
    r.root = 0;
    r.shift = 60;
    if (!(high | low)) return;
    // At most 64 bits, an even number of bits dropped.
    const int drop = high ? (width(high) + 1) & ~1 : 0;
    u64 total = drop == 0 ? low : drop == 64 ? high : high << (64 - drop) | low >> drop;
    const int bits = width(total), wanted = 61 + bits - s.log_cols, t = wanted + (wanted & 1);
    const u64 mean = ratio_of((u64)cols << (64 - s.log_cols), total << (64 - bits), t + s.log_cols - bits);
    const u64 root = floor_sqrt(mean);
    r.root = root > 0xffffffffull ? 0xffffffffu : (u32)root;
    r.shift = (u32)(t + drop) / 2;
}
// Reads a row twice: its mean and reach, its squares. Every thread gets the same.
DEVICE Row prepare(const Rows &a, i64 row, const Shape &s, Statistics &room) {
    i64 sum = 0;
    int high = -2147483647 - 1, low = 2147483647;
    first(a, row, [&](int, int left, const int *v) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            if (e >= left) continue;
            sum += v[e];
            high = v[e] > high ? v[e] : high;
            low = v[e] < low ? v[e] : low;
        }
    });
    leave(sum, room.sums, Sum());
    leave(high, room.tops, Larger());
    leave(low, room.lows, Smaller());
    __syncthreads();
    if (first_warp()) {
        sum = fold(room.sums, Sum());
        high = fold(room.tops, Larger());
        low = fold(room.lows, Smaller());
        const i64 n = a.cols, mean = s.centre ? floor_div(sum, n) : 0, rest = s.centre ? sum - mean * n : 0;
        i64 reach = high - mean > mean - low ? high - mean : mean - low;
        reach = (reach > 0 ? reach : 0) + s.centre;
        Row r;
        r.lift = s.bits - width((u64)reach);
        r.offset = mean;
        if (r.lift >= 0) r.offset = (mean << r.lift) + (i64)quotient(((u64)rest << r.lift) + (u64)(n / 2), (u64)n);
        if (threadIdx.x == 0) room.row = r;
    }
    __syncthreads();
    Row r = room.row;
    u64 squares = 0;
    again(a, row, [&](int, int left, const int *v) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const i64 d = e < left ? lifted(v[e], r) : 0;
            squares += (u64)(d * d);
        }
    });
    leave(squares, room.squares, Sum());
    __syncthreads();
    if (first_warp()) {
        normaliser(fold(room.squares, Sum()), r.lift, a.cols, s, r);
        if (threadIdx.x == 0) room.row = r;
    }
    __syncthreads();
    return room.row;
}

struct alignas(16) Four {
    i64 v[4];
};
struct Norm {
    Rows io;
    Shape shape;
    const int *gain; // runs of four, as the bias
    const i64 *bias; // with the half step that rounds; null for that alone
    int shift;
};
// y = (xhat * gain + bias) >> shift, rounded once; a constant row gives the bias.
extern "C" __global__ void __launch_bounds__(256, 8) norm_rows(const __grid_constant__ Norm a) {
    __shared__ Statistics room;
    const i64 half = (i64)1 << (a.shift - 1);
    for (i64 row = blockIdx.x; row < a.io.rows; row += gridDim.x) {
        const Row r = prepare(a.io, row, a.shape, room);
        int down = (int)r.shift - a.shape.fraction;
        // Where eps is that large nothing is left of the row.
        const i64 root = down > 62 ? 0 : (i64)r.root;
        down = down > 62 || down < 0 ? 0 : down;
        last(a.io, row, [&](int i, int, const int *v, int *y) {
            int gain[4];
            i64 bias[4];
            load_run<int, uint4>(a.gain, i, 4, true, gain);
#pragma unroll
            for (int e = 0; e < 4; e++) bias[e] = half;
            if (a.bias) load_run<i64, Four>(a.bias, i, 4, true, bias);
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const i64 xhat = (int)((lifted(v[e], r) * root) >> down);
                y[e] = saturate((xhat * gain[e] + bias[e]) >> a.shift, a.io.lo, a.io.hi);
            }
        });
    }
}

struct Codes {
    Rows io;
    Shape shape;
    const int *gain;
    int shift;   // weight = gain * 2^-shift
    int *scales; // [rows][2]: m * 2^-31 * 2^-n
};
struct Coded {
    i64 factor;
    int down, digits;
};
// 127 over the largest product of a row, and the row's scale.
DEVICE Coded code_of(u64 top, const Row &r, int shift, int *scales, bool write) {
    Coded c;
    c.down = width(top) > 31 ? width(top) - 31 : 0;
    const u64 top31 = top >> c.down > 1 ? top >> c.down : 1;
    u64 factor = quotient(127ull << 54, top31);
    const int small = width(factor) - 32;
    c.digits = 54;
    if (small > 0) {
        factor >>= small;
        c.digits -= small;
    }
    c.factor = (i64)factor;
    // top * root / 127 in 96 bits, digits of 32 bits; a constant divides by a product.
    const u64 low = (top & 0xffffffffu) * r.root, middle = (top >> 32) * r.root + (low >> 32);
    u64 part = middle >> 32;
    const u64 q2 = part / 127;
    part = (part - q2 * 127) << 32 | (middle & 0xffffffffu);
    const u64 q1 = part / 127;
    part = (part - q1 * 127) << 32 | (low & 0xffffffffu);
    const u64 q0 = part / 127;
    const u64 rest = q1 << 32 | q0;
    const int bits = q2 ? 64 + width(q2) : width(rest), from = bits - 31;
    const u64 m = from <= 0 ? rest << -from : q2 << (64 - from) | rest >> from;
    if (write) {
        scales[0] = (int)m;
        scales[1] = (int)r.shift + shift - bits;
    }
    return c;
}
// RMS norm whose rows are int8 with a scale each; the root of the mean square cancels and is in the scale.
extern "C" __global__ void __launch_bounds__(256, 8) norm_codes(const __grid_constant__ Codes a) {
    __shared__ Statistics room;
    __shared__ Coded coded;
    for (i64 row = blockIdx.x; row < a.io.rows; row += gridDim.x) {
        const Row r = prepare(a.io, row, a.shape, room);
        u64 top = 0;
        again(a.io, row, [&](int i, int left, const int *v) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                if (e >= left) continue;
                const i64 p = (i64)lifted(v[e], r) * a.gain[i + e];
                const u64 m = p < 0 ? 0ull - (u64)p : (u64)p;
                top = m > top ? m : top;
            }
        });
        top = over_block(top, room.products, Larger());
        const bool nothing = top == 0 || r.root == 0;
        int *scales = a.scales + 2 * row;
        if (first_warp()) {
            if (nothing) {
                if (threadIdx.x == 0) scales[0] = scales[1] = 0;
            } else {
                const Coded c = code_of(top, r, a.shift, scales, threadIdx.x == 0);
                if (threadIdx.x == 0) coded = c;
            }
        }
        __syncthreads();
        const Coded c = coded;
        last(a.io, row, [&](int i, int, const int *v, int *y) {
            int gain[4];
            load_run<int, uint4>(a.gain, i, 4, true, gain);
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const i64 p = ((i64)lifted(v[e], r) * gain[e]) >> c.down;
                y[e] = nothing ? 0 : saturate((p * c.factor + ((i64)1 << (c.digits - 1))) >> c.digits, -127, 127);
            }
        });
    }
}
