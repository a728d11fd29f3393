// The copy engine of sm_90: boxes of a matrix into shared memory, completion counted in bytes by a barrier there.
#pragma once
#include "base.cuh"

// A tensor map, made by the driver.
struct alignas(64) Map {
    u64 opaque[16];
};

DEVICE void barrier_init(u32 bar, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory");
}
// Makes the initialisation visible to the copy engine.
DEVICE void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// A warp arrives once, by a lane that has met the others. racecheck follows arrivals thread by thread and
// does not see such meetings: for it, with NB_EVERY_LANE, each lane arrives for itself.
#ifndef NB_EVERY_LANE
#define NB_EVERY_LANE 0
#endif
constexpr int ARRIVALS = NB_EVERY_LANE ? 32 : 1; // of a warp, by `warp_arrive`
// Barriers of a ring of slots: what is copied into one completes `ready`, which `fills` threads announce; `users` arrivals
// give it back. A barrier of the block must follow.
template <int SLOTS> DEVICE void ring_init(u64 (&ready)[SLOTS], int fills, u64 (&empty)[SLOTS], int users) {
#pragma unroll
    for (int i = 0; i < SLOTS; i++) {
        barrier_init(shared_address(&ready[i]), fills);
        barrier_init(shared_address(&empty[i]), users);
    }
    barrier_init_fence();
}
DEVICE void barrier_expect(u32 bar, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
DEVICE void barrier_arrive(u32 bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
// Arrives for a warp: what its lanes have read and written until now is over.
DEVICE void warp_arrive(u32 empty, int lane) {
    __syncwarp();
    if (NB_EVERY_LANE || lane == 0) barrier_arrive(empty);
}
DEVICE void barrier_wait(u32 bar, int phase) {
    asm volatile("{\n.reg .pred p;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
                 "@p bra done;\n"
                 "bra again;\n"
                 "done:\n}" ::"r"(bar),
                 "r"(phase)
                 : "memory");
}
// One lane of a warp that is together, always the same.
DEVICE bool elected() {
    u32 one;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(one));
    return one;
}
// Elements from (row, column) on; those outside of the matrix are zeros.
DEVICE void copy_box(u32 to, const Map *map, u32 bar, int column, int row) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(to),
                 "l"(map), "r"(bar), "r"(column), "r"(row)
                 : "memory");
}
// A run of bytes, a multiple of 16.
DEVICE void copy_run(u32 to, const void *from, int bytes, u32 bar) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from),
                 "r"(bytes), "r"(bar)
                 : "memory");
}

// The way back: a box of shared memory to a matrix; what lies outside of the matrix is not written.
DEVICE void store_box(const Map *map, u32 from, int column, int row) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];\n"
                 "cp.async.bulk.commit_group;" ::"l"(map),
                 "r"(from), "r"(column), "r"(row)
                 : "memory");
}
// Until all but the last PENDING boxes of this thread have been read, or all have arrived.
template <int PENDING> DEVICE void store_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}
DEVICE void store_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
// Shows the copy engine what this thread has written.
DEVICE void store_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Clusters: blocks that run together and reach each other's shared memory.
DEVICE void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
// A number at an address of this block, but of another one of the cluster.
DEVICE float load_of(int block, u32 address) {
    float v;
    asm volatile("{\n.reg .b32 there;\n"
                 "mapa.shared::cluster.u32 there, %1, %2;\n"
                 "ld.shared::cluster.f32 %0, [there];\n}"
                 : "=f"(v)
                 : "r"(address), "r"(block)
                 : "memory");
    return v;
}
