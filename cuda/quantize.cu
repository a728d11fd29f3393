// Weights to codes by the rtn rules, with the bits of the CPU: a warp per group, every operation the IEEE one of
// rust/core/src/format, in its order. What the CPU refuses raises a flag here, and the host lets the CPU say why.
#include <nibblas/base.cuh>

// How a group gets its scale before it is rounded.
enum Fit { FIT_OVER = 0, FIT_RANGE = 1, FIT_POWER = 2 };          // absmax / divisor, (max - min) / divisor, a power of two
enum Code { CODE_NEAR = 0, CODE_ODD = 1, CODE_TABLE = 2 };
enum Stored { STORED_F32 = 0, STORED_F16 = 1, STORED_BF16 = 2, STORED_E8M0 = 3 };
enum Mode { MODE_FLOOR = 0, MODE_RCEIL = 1, MODE_CEIL = 2, MODE_EVEN = 3 };

struct Args {
    const void *x;
    u8 *codes;   // one per byte, [n][k]
    u8 *packed;  // [n][row_bytes]
    void *scales;
    u8 *zeros;
    float *bounds;
    int *flag;
    const int *cuts; // of a table: a key above cuts[i] is above the i-th half-way mark
    const u8 *order;
    const float *sorted;
    i64 x_row, x_col; // elements
    int kind, n, k, group, groups, bits, row_bytes;
    int fit, code, stored, mode, mantissa, count, lowest, highest, zero, nan;
    float divisor, top, unit;
};

DEVICE u32 warp_max(u32 v) { return __reduce_max_sync(0xffffffffu, v); }

// floor(log2 v) of a positive, finite number.
DEVICE int floor_log2(float v) {
    const u32 b = __float_as_uint(v);
    return b >> 23 ? (int)(b >> 23) - 127 : -118 - __clz((int)b);
}
DEVICE double power(int e) { return __longlong_as_double((i64)(e + 1023) << 52); }
DEVICE float shared_power(const Args &a, float absmax) {
    const int e = floor_log2(absmax), t = floor_log2(a.top);
    int up = e;
    if (a.mode == MODE_CEIL) up += power(e) < (double)absmax;
    if (a.mode == MODE_RCEIL) up += (double)a.top * power(e - t) < (double)absmax;
    if (a.mode == MODE_EVEN) up += (double)absmax + power(e - a.mantissa) / 2.0 >= power(e + 1);
    return __double2float_rn(power(min(max(up - t, -127), 127)));
}
// The nearest stored scale, not 0, and not so large that the largest code would leave float32.
DEVICE float stored(const Args &a, float s) {
    u32 step = 1;
    if (a.stored == STORED_F16) s = f32_of_f16(f16_of_f32(s)), step = 1u << 13;
    if (a.stored == STORED_BF16) s = f32_of_bf16(bf16_of_f32(s)), step = 1u << 16;
    if (s == 0.0f) return a.stored == STORED_F16 ? f32_of_f16(1) : a.stored == STORED_BF16 ? f32_of_bf16(1) : __uint_as_float(1);
    while (isfinite(s) && !isfinite(__fmul_rn(s, a.top))) s = __uint_as_float(__float_as_uint(s) - step);
    return s;
}
// Orders floats as integers: -0 is -1, +0 is 0.
DEVICE int key(float t) {
    const int b = __float_as_int(t);
    return b ^ (int)((u32)(b >> 31) >> 1);
}

extern "C" __global__ void __launch_bounds__(256) quantize(const __grid_constant__ Args a) {
    const int lane = threadIdx.x & 31;
    const i64 id = (i64)blockIdx.x * 8 + (threadIdx.x >> 5);
    if (id >= (i64)a.n * a.groups) return;
    const int n = (int)(id / a.groups), group = (int)(id % a.groups);
    const int first = group * a.group, end = min(first + a.group, a.k);
    auto at = [&](int k) { return load_float(a.x, n * a.x_row + k * a.x_col, a.kind); };
    // Magnitudes of the largest positive and negative number, as bits: floats without a sign are in order.
    u32 high = 0, low = 0;
    for (int k = first + lane; k < end; k += 32) {
        const u32 b = __float_as_uint(at(k));
        if (b >> 31)
            low = max(low, b & 0x7fffffffu);
        else
            high = max(high, b);
    }
    high = warp_max(high);
    low = warp_max(low);
    const u32 top = max(high, low);
    u8 *out = a.codes + (i64)n * a.k;
    float scale, zero = 0.0f, error = 0.0f;
    if (top >= 0x7f800000u) {
        if (!a.nan) {
            if (lane == 0) *a.flag = 1;
            return;
        }
        for (int k = first + lane; k < end; k += 32) out[k] = (u8)a.zero;
        scale = __uint_as_float(0x7fc00000u);
    } else {
        const float absmax = __uint_as_float(top);
        if (top == 0 && a.code != CODE_ODD) {
            scale = 1.0f;
        } else {
            if (a.fit == FIT_POWER)
                scale = shared_power(a, absmax);
            else if (a.fit == FIT_RANGE)
                scale = stored(a, __fdiv_rn(__fsub_rn(__uint_as_float(high), -__uint_as_float(low)), a.divisor));
            else
                scale = stored(a, __fdiv_rn(absmax, a.divisor));
            if (!isfinite(scale)) {
                if (lane == 0) *a.flag = 1;
                return;
            }
        }
        int middle = a.zero; // the code that is worth 0
        if (a.fit == FIT_RANGE) {
            zero = top == 0 ? 0.0f : fminf(fmaxf(rintf(__fdiv_rn(__uint_as_float(low), scale)), 0.0f), (float)a.highest);
            middle = (int)zero;
        }
        const float s = __fmul_rn(scale, a.unit);
        u32 worst = 0;
        for (int k = first + lane; k < end; k += 32) {
            const float x = at(k), t = __fdiv_rn(x, s);
            float v;
            int u;
            if (a.code == CODE_TABLE) {
                // How many cuts lie below the key; they are in order.
                const int q = key(t);
                int from = 0, to = a.count;
                while (from < to) {
                    const int mid = (from + to) / 2;
                    if (q > a.cuts[mid])
                        from = mid + 1;
                    else
                        to = mid;
                }
                v = a.sorted[from];
                u = a.order[from];
            } else if (a.code == CODE_ODD) {
                const float edge = (float)a.highest; // the largest odd integer is the largest code
                v = 2.0f * floorf(fminf(fmaxf(t, -edge), edge) * 0.5f) + 1.0f;
                v = fminf(v, edge);
                u = ((int)v + a.highest) >> 1;
            } else {
                v = rintf(fminf(fmaxf(t, (float)(a.lowest - middle)), (float)(a.highest - middle)));
                u = (int)v + middle;
            }
            worst = max(worst, __float_as_uint(__fsub_rn(x, __fmul_rn(v, s))) & 0x7fffffffu);
            out[k] = (u8)u;
        }
        worst = warp_max(worst);
        error = __uint_as_float(worst ? worst + 1 : 0); // a bound of what rounds to it
    }
    if (lane) return;
    a.bounds[id] = error;
    if (a.zeros) a.zeros[id] = (u8)(int)zero;
    const u32 b = __float_as_uint(scale);
    if (a.stored == STORED_F32) ((float *)a.scales)[id] = scale;
    if (a.stored == STORED_F16) ((u16 *)a.scales)[id] = f16_of_f32(scale);
    if (a.stored == STORED_BF16) ((u16 *)a.scales)[id] = (u16)(b >> 16);
    if (a.stored == STORED_E8M0) ((u8 *)a.scales)[id] = scale != scale ? 255 : (u8)(b >> 23);
}

// Codes of `bits` bits, the first in the lowest: a thread per byte.
extern "C" __global__ void pack_codes(const __grid_constant__ Args a) {
    const i64 id = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (id >= (i64)a.n * a.row_bytes) return;
    const i64 row = id / a.row_bytes, bit = id % a.row_bytes * 8;
    u32 v = 0;
    for (i64 k = bit / a.bits; k < a.k && k * a.bits < bit + 8; k++) {
        const i64 to = k * a.bits - bit;
        const u32 u = a.codes[row * a.k + k];
        v |= to >= 0 ? u << to : u >> -to;
    }
    a.packed[id] = (u8)v;
}
