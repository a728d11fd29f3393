// How a product is cut: every block of threads gets an equal span of units, a unit being R rows of W by one chunk of K (by
// all of K where the sum must not be cut), in the order of rows, then chunks.
#pragma once
#include "base.cuh"

struct Args {
    const char *planes[3]; // packed codes
    const void *book;      // values of the codes, of formats with a table
    const void *scales;    // [groups][rows, padded to 64]
    const float *outer;    // of rows, of two-level formats
    const void *zeros;     // the same, u8 or f32
    const char *x;         // 16-byte aligned rows
    const float *row_scale; // int8: of the rows of X
    const float *bias;
    void *y;
    float *work;
    int *counters;
    i64 ldx;      // bytes between rows of X
    i64 y_row, y_col; // elements
    int m, n, n_padded, k_bytes; // k_bytes: bytes of a row of X that may be read
    int chunks, groups, chunks_per_group;
    int row_blocks, y_kind;
    int wide; // rows of Y may be written four numbers at a time
    int mul, sub;
    float unit; // what 1 in a register is worth
    int per, rest, whole; // units of a block's span, blocks that have one more, and whether a unit is all of K
};

DEVICE int span_start(int block, const Args &a) {
    return (block * a.per + min(block, a.rest)) * (a.whole ? a.chunks : 1);
}
// The block whose span holds a chunk.
DEVICE int span_of(int at, const Args &a) {
    const int u = a.whole ? at / a.chunks : at;
    const int longer = a.rest * (a.per + 1);
    return u < longer ? u / (a.per + 1) : a.rest + (u - longer) / a.per;
}

// Where a block is in its span. STEP chunks are taken at a time, never across rows.
template <int STEP> struct Place {
    int unit, end, row_block = 0, chunk = 0, stop = 0, first = 0;
    DEVICE void start(int begin, int finish, int chunks) {
        unit = begin;
        end = finish;
        enter(chunks);
    }
    DEVICE void enter(int chunks) {
        if (unit >= end) return;
        row_block = unit / chunks;
        chunk = first = unit - row_block * chunks;
        stop = min(end - row_block * chunks, chunks);
    }
    DEVICE bool done() const { return unit >= end; }
    // Whether this is the last step of a run of chunks.
    DEVICE bool last() const { return chunk + STEP >= stop; }
    // The row block of the next run, or -1.
    DEVICE int after(int chunks) const { return row_block * chunks + stop < end ? row_block + 1 : -1; }
    DEVICE void next(int chunks) {
        chunk += STEP;
        if (chunk >= stop) finish(chunks);
    }
    DEVICE void finish(int chunks) {
        unit = row_block * chunks + stop;
        enter(chunks);
    }
};

// A barrier of some threads of the block.
template <int THREADS, int NUMBER> DEVICE void meet() {
    asm volatile("bar.sync %0, %1;" ::"n"(NUMBER), "n"(THREADS) : "memory");
}

// A run of chunks that is not all of K: its sums go to the workspace, and the last block to arrive adds those of all
// blocks, in the order of K, which makes the result the same every time.
struct Share {
    int first, last, lo; // blocks that have a part
    float *slots;
    int size;
    DEVICE Share(const Args &a, int row_block, int size_) : size(size_) {
        lo = row_block * a.chunks;
        first = span_of(lo, a);
        last = span_of(lo + a.chunks - 1, a);
        slots = a.work + (i64)blockIdx.y * 2 * gridDim.x * size;
    }
    // Two slots a block: for a run that began before the span's first whole row, and for the rest.
    DEVICE float *slot(int block, const Args &a) const {
        return slots + (i64)(2 * block + (block == first && span_start(block, a) < lo)) * size;
    }
    // Whether every part is there; to be called by the block's first THREADS threads, their part written.
    template <int THREADS> DEVICE bool complete(const Args &a, int row_block) const {
        __shared__ int arrived;
        __threadfence();
        meet<THREADS, 1>();
        if (threadIdx.x == 0) {
            int *counter = a.counters + blockIdx.y * a.row_blocks + row_block;
            arrived = atomicAdd(counter, 1);
            if (arrived == last - first) *counter = 0; // as the next launch expects it
        }
        meet<THREADS, 1>();
        const bool all = arrived == last - first;
        if (all) __threadfence();
        return all;
    }
    // Then: calls out(place, sum) for the first `count` places of a slot, a multiple of 4, on the same threads. What two
    // parts are together is said by `add`.
    template <int THREADS, class Add, class Out> DEVICE void sum(const Args &a, int count, Add add, Out out) const {
        for (int q = 4 * threadIdx.x; q < count; q += 4 * THREADS) {
            float4 v = __ldcg((const float4 *)(slot(first, a) + q));
#pragma unroll 4
            for (int b = first + 1; b <= last; b++) {
                const float4 p = __ldcg((const float4 *)(slots + (i64)(2 * b) * size + q));
                v.x = add(v.x, p.x);
                v.y = add(v.y, p.y);
                v.z = add(v.z, p.z);
                v.w = add(v.w, p.w);
            }
            out(q, v.x);
            out(q + 1, v.y);
            out(q + 2, v.z);
            out(q + 3, v.w);
        }
    }
};

// Sums that run along K in order although K is cut: where a span ends inside of a row of chunks, its block hands what it
// has to the next block, which goes on from there. A span has at least a row of chunks and is gone through backward (K runs
// forward all the same), so what a block takes was given long before. Whole rows come after the span, one for every block
// of the grid at a time, `waves` of them; rows are counted through all of Y that the blocks of one blockIdx.y have.
struct Chained {
    int begin, unit, waves, row_block = 0, chunk = 0, stop = 0, first = 0;
    DEVICE void start(int rows, const Args &a) {
        waves = max(rows / (int)gridDim.x - 1, 0);
        const int at = waves * gridDim.x * a.chunks;
        begin = at + span_start(blockIdx.x, a);
        unit = at + span_start(blockIdx.x + 1, a);
        enter(a.chunks);
    }
    DEVICE int after(int chunks) const {
        return unit > begin ? (unit - 1) / chunks : waves > 0 ? (waves - 1) * (int)gridDim.x + (int)blockIdx.x : -1;
    }
    DEVICE void enter(int chunks) {
        row_block = after(chunks);
        if (unit > begin) {
            first = max(begin - row_block * chunks, 0);
            stop = unit - row_block * chunks;
            unit = row_block * chunks + first;
        } else {
            waves--;
            first = 0;
            stop = chunks;
        }
        chunk = first;
    }
    DEVICE bool done() const { return row_block < 0; }
    DEVICE void next(int chunks) {
        if (++chunk >= stop) enter(chunks);
    }
    DEVICE void finish(int chunks) { enter(chunks); }
};

// How sums are handed on: a warp to the same warp of the next block, by a flag of its own.
template <int THREADS> struct Chain {
    float *slots; // a part of `size` for every block, in the order of the threads
    int *flags, size;
    DEVICE Chain(const Args &a, int size_) : size(size_) {
        const i64 block = blockIdx.y * gridDim.x + blockIdx.x;
        slots = a.work + block * size;
        flags = a.counters + block * (THREADS / 32) + threadIdx.x / 32;
    }
    DEVICE float *mine() const { return slots; }
    DEVICE const float *before() const { return slots - size; }
    // Once the warp's part is written.
    DEVICE void give() const {
        __syncwarp();
        if (threadIdx.x % 32 == 0) {
            __threadfence();
            atomicExch(flags, 1);
        }
    }
    // Waits for the part of the block before.
    DEVICE void take() const {
        if (threadIdx.x % 32 == 0) {
            int *flag = flags - THREADS / 32;
            while (atomicAdd(flag, 0) == 0) {
            }
            *flag = 0; // as the next launch expects it
            __threadfence();
        }
        __syncwarp();
    }
};
