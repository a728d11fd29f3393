// Activations as bipolar numbers, straight to the bit planes that bits.cu multiplies: what nb.quantize(x, "bipolar<b>")
// says (s = absmax/(2^b - 1), of one bit mean|x|; the nearest odd integer), with RMSNorm before it where asked for.
#include <nibblas/base.cuh>
#include <nibblas/rows.cuh>

struct Args {
    const void *x;
    const void *gain; // RMSNorm: of every column; null without
    u8 *planes;       // [bits][rows][bytes], the first k in the lowest bit
    int *sums;        // of the codes of a row
    float *scales;    // NaN where a row has a NaN or an infinity
    i64 x_row, x_col; // elements
    int m, k, kind, gain_kind, bits, rows, bytes;
    int plain; // rows of whole runs of 16, 16-byte aligned, without gaps
    float eps;
};

// Codes of a run: floor(t/2) and what makes it positive, t = x/s. A product with 1/s is within 2^-15 of the quotient: the
// division itself is for numbers that near to a step.
DEVICE void codes_of(const float v[16], float s, float inverse, float edge, int u[16]) {
    const int lift = ((int)edge + 1) / 2;
    float near = 1.0f;
#pragma unroll
    for (int i = 0; i < 16; i++) {
        const float half = __fmul_rn(fminf(fmaxf(__fmul_rn(v[i], inverse), -edge), edge), 0.5f);
        u[i] = (int)floorf(half) + lift;
        if (v[i] != 0.0f) near = fminf(near, fabsf(__fsub_rn(half, rintf(half))));
    }
    if (near < 0x1p-15f || s < 0x1p-126f)
#pragma unroll
        for (int i = 0; i < 16; i++) u[i] = (int)floorf(fminf(fmaxf(__fdiv_rn(v[i], s), -edge), edge) * 0.5f) + lift;
}

extern "C" __global__ void __launch_bounds__(1024) planes(const Args a) {
    follow();
    const i64 m = blockIdx.x;
    const float edge = (float)((1 << a.bits) - 1);
    const bool there = m < a.m;
    float v[16], s = 1.0f;
    bool bad = false;
    if (there) {
        double total = 0.0;
        const Survey seen = survey(a, m, v, [&](float x) {
            if (a.bits == 1) total += (double)fabsf(x);
        });
        bad = seen.bad;
        if (a.bits == 1)
            s = (float)(block_sum(total) / (double)a.k);
        else
            s = __fdiv_rn(__uint_as_float(seen.top), edge);
        if (s == 0.0f) s = __uint_as_float(1); // as the CPU: there is no code of 0
        if (!bad && !isfinite(__fmul_rn(s, edge))) s = __uint_as_float(__float_as_uint(s) - 1);
        if (threadIdx.x == 0) a.scales[m] = bad ? __uint_as_float(0x7fc00000u) : __fmul_rn(s, seen.factor);
    }
    const float inverse = __frcp_rn(s);
    int sum = 0;
    for (int run = threadIdx.x; run < a.bytes / 2; run += blockDim.x) {
        int u[16];
        const int count = there && !bad ? min(max(a.k - 16 * run, 0), 16) : 0;
        if (count) {
            if (!a.plain) {
#pragma unroll
                for (int i = 0; i < 16; i++) v[i] = i < count ? value_at(a, m, 16 * run + i) : 0.0f;
            } else if (run >= blockDim.x) {
                load_run(a, m, run, v);
            }
            codes_of(v, s, inverse, edge, u);
        }
#pragma unroll
        for (int i = 0; i < 16; i++) {
            if (i >= count) u[i] = 0;
            sum += u[i];
        }
        for (int plane = 0; plane < a.bits; plane++) {
            u32 bits = 0;
#pragma unroll
            for (int i = 0; i < 16; i++) bits |= (u32)(u[i] >> plane & 1) << i;
            *(u16 *)(a.planes + ((i64)plane * a.rows + m) * a.bytes + 2 * run) = (u16)bits;
        }
    }
    sum = block_sum(sum);
    if (there && threadIdx.x == 0) a.sums[m] = sum;
}
