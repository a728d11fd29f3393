// From the portable layout to the planes of decode.cuh: one thread per word of a plane. Rows and columns that only fill a
// tile up are codes of 0; so are the places between a group and its padded length.
#include <nibblas/base.cuh>
#include <nibblas/decode.cuh>

struct Args {
    const u8 *codes;
    u32 *out;
    i64 words; // of the plane
    i64 row_bytes;
    int n, k, bits, plane_bits, below; // below: bits of a code under this plane
    int group, padded;                 // length of a group and its places
    int chunks;
    int paired; // codes of a table of 16: a byte is a pair of neighbours
    int fill;   // two levels: places after the end of a group hold its first code, which is in range as 0 may not be
};

DEVICE u32 code_at(const Args &a, int n, int place, int mask) {
    const int group = place / a.padded, off = place - group * a.padded;
    i64 k = (i64)group * a.group + off;
    if (a.fill && (off >= a.group || k >= a.k)) k = (i64)group * a.group;
    if (n >= a.n || (off >= a.group && !a.fill) || k >= a.k) return 0;
    const i64 bit = k * a.bits + a.below;
    const u8 *row = a.codes + (i64)n * a.row_bytes;
    u32 v = row[bit >> 3];
    if ((bit >> 3) + 1 < a.row_bytes) v |= (u32)row[(bit >> 3) + 1] << 8;
    return (v >> (bit & 7)) & (a.paired ? (1u << a.bits) - 1 : mask); // three bits in the room of four
}

extern "C" __global__ void pack(const Args a) {
    const i64 id = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (id >= a.words) return;
    const int pb = a.plane_bits;
    // [64 rows][chunk][tile][vector][lane][words of a vector]
    const int per = pb == 1 ? 2 : 4, vectors = pb == 1 ? 1 : pb / 2;
    i64 r = id;
    const int w = r % per;
    r /= per;
    const int lane = r % 32;
    r /= 32;
    const int index = (int)(r % vectors) * per + w; // word of the lane
    r /= vectors;
    const int chunk = (int)(r / 4 % a.chunks), tile = (int)(r / 4 / a.chunks) * 4 + (int)(r % 4);
    const int g = lane >> 2, t = lane & 3;
    const u32 mask = (1u << pb) - 1;
    u32 word = 0;
    for (int f = 0; f < 8 / pb; f++) {
        int block, row, step;
        if (pb == 8) block = index / 4, row = index / 2 % 2, step = index % 2;
        else if (pb == 4) block = index / 2, row = index % 2, step = f;
        else if (pb == 2) block = index, row = f % 2, step = f / 2;
        else block = 2 * index + f / 4, row = f % 2, step = f / 2 % 2;
        for (int i = 0; i < 4; i++) {
            int k = step * 16 + 2 * t + (i >> 1) + (i & 1) * 8;
            if (a.paired) k = (i >> 1) * 16 + 2 * t + f + (i & 1) * 8;
            const u32 v = code_at(a, tile * 16 + row * 8 + g, chunk * 128 + block * 32 + k, mask);
            word |= v << (8 * i + pb * f);
        }
    }
    a.out[id] = word;
}

// Bit planes: one thread per byte of a plane of rows of `chunks` * 1024 bits; `n` rows are there, `padded` are written.
extern "C" __global__ void planes(const Args a) {
    const i64 id = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (id >= a.words) return;
    const int bytes = a.chunks * 128;
    const int byte = (int)(id % bytes);
    const i64 r = id / bytes;
    const int row = (int)(r % a.padded), plane = (int)(r / a.padded);
    u32 v = 0;
    if (row < a.n)
        for (int i = 0; i < 8; i++) {
            const i64 k = (i64)byte * 8 + i, bit = k * a.bits + plane;
            if (k < a.k) v |= ((u32)(a.codes[row * a.row_bytes + (bit >> 3)] >> (bit & 7)) & 1u) << i;
        }
    ((u8 *)a.out)[id] = (u8)v;
}

// Sums of the codes of rows, from their planes; a block of 128 threads per row. `out` holds the sums, `codes` the planes.
extern "C" __global__ void code_sums(const Args a) {
    __shared__ int parts[4];
    const int words = a.chunks * 32;
    int sum = 0;
    for (int plane = 0; plane < a.bits; plane++) {
        const u32 *from = (const u32 *)a.codes + ((i64)plane * a.padded + blockIdx.x) * words;
        for (int i = threadIdx.x; i < words; i += 128) sum += __popc(from[i]) << plane;
    }
    for (int i = 16; i; i /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, i);
    if ((threadIdx.x & 31) == 0) parts[threadIdx.x >> 5] = sum;
    __syncthreads();
    if (threadIdx.x == 0) ((int *)a.out)[blockIdx.x] = parts[0] + parts[1] + parts[2] + parts[3];
}
