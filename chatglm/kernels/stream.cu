// linear.cu for Hopper and later, which can copy whole stretches of memory by themselves.
//
// One more warp asks for the weight, 1 KB of each of 16 rows at a time, STAGES of them ahead, into
// shared memory; 16 warps multiply. Nothing of the weight waits in registers, so a block takes half a
// processor, and the block of the next kernel stands beside it with its first stages filled when its
// turn comes. AHEAD more stages are on their way into the L2 cache. So the memory goes on reading
// while one product ends and the next looks at its x.

#define WARPS 16
DEVICE void barrier() { asm volatile("bar.sync 1, %0;" ::"n"(WARPS * 32) : "memory"); }
#include "products.cuh"

#define CHUNK 1024                                   // bytes of a row in a stage
#define CHUNKS (IN_FEATURES * BITS / 8 / CHUNK)
#define ROW_STRIDE (CHUNK + 64)                      // in a stage, against bank conflicts
#define STAGE (16 * ROW_STRIDE)

DEVICE u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }
DEVICE void init(u32 barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
DEVICE void arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
DEVICE void expect(u32 barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 ::"r"(barrier), "r"(bytes) : "memory");
}
DEVICE void wait(u32 barrier, int parity) {
    asm volatile("{\n.reg .pred done;\n"
                 "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;\n}" ::"r"(barrier), "r"(parity) : "memory");
}
DEVICE void copy(u32 to, const u8* from, int bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
                 " [%0], [%1], %2, [%3];"
                 ::"r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}
DEVICE void prefetch(const u8* from, int bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

// A place in the ring of stages; the parity tells one round from the next.
struct Turn {
    int stage, parity;
    DEVICE void advance() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

// Where the block's chunk number n of a tile's row stands.
DEVICE const u8* chunk_of_row(const u8* weight, int n, int row) {
    const int tile = blockIdx.x + n / CHUNKS * gridDim.x;
    return weight + ((long long)tile * 16 + row) * (IN_FEATURES * BITS / 8) + n % CHUNKS * CHUNK;
}

DEVICE void ask_for_weights(const u8* weight, u8* stages, u32 full, u32 empty, int tiles) {
    const int lane = threadIdx.x % 32;
    const int count = (tiles - (int)blockIdx.x + (int)gridDim.x - 1) / (int)gridDim.x * CHUNKS;
    Turn turn = {0, 0};
    for (int n = min(0, STAGES - AHEAD); n < count; n++) {
        const int later = n + AHEAD;
        if (AHEAD && later >= STAGES && later < count && lane < 16)
            prefetch(chunk_of_row(weight, later, lane), CHUNK);
        if (n < 0) continue;
        wait(empty + turn.stage * 8, turn.parity ^ 1);
        if (lane == 0) expect(full + turn.stage * 8, 16 * CHUNK);
        __syncwarp();
        if (lane < 16)
            copy(shared_address(stages + turn.stage * STAGE + lane * ROW_STRIDE),
                 chunk_of_row(weight, n, lane), CHUNK, full + turn.stage * 8);
        turn.advance();
    }
}

extern "C" __global__ void __launch_bounds__(THREADS + 32, 2) stream(
    const u16* x, const u8* weight, const u16* scale, const u16* bias, u16* out,
    const u16* norm_weight, const u16* norm_bias, u16* normed, const u16* residual, int rows,
    int out_features, float epsilon, float alpha) {
    let_next_start();
    extern __shared__ __align__(128) u8 memory[];
    __shared__ float sums[2][WARPS][ROWS][16];
    __shared__ __align__(8) unsigned long long barriers[2][STAGES];
    u16* xs = (u16*)(memory + STAGES * STAGE);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, tiles = out_features / 16;
    const u32 full = shared_address(barriers[0]), empty = shared_address(barriers[1]);
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            init(full + s * 8, 1);
            init(empty + s * 8, WARPS);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (warp == WARPS) {
        ask_for_weights(weight, memory, full, empty, tiles);
        return;
    }
#ifdef NORM
    NormWeights ahead_of_x;
    if (rows == 1) load(ahead_of_x, norm_weight, norm_bias);
#endif
    Ahead ahead_of_sums;
    ask(ahead_of_sums, scale, bias, out_features);
    wait_for_previous();
    ask_for_residual(ahead_of_sums, residual, alpha, rows, out_features);
#ifdef NORM
    const Norm norm = {norm_weight, norm_bias, normed, epsilon};
    stage(x, xs, norm, ahead_of_x, rows, &sums[0][0][0][0]);
#else
    stage(x, xs, rows);
#endif
    float* after = (float*)(xs + ROWS * STRIDE);
    put(ahead_of_sums, after, out_features);
    Turn turn = {0, 0};
    for (int tile = blockIdx.x, buffer = 0; tile < tiles; tile += gridDim.x, buffer ^= 1) {
        float c[TILES][2][4] = {};
#pragma unroll 1
        for (int chunk = 0; chunk < CHUNKS; chunk++) {
            wait(full + turn.stage * 8, turn.parity);
            const u8* from = memory + turn.stage * STAGE + lane / 4 * ROW_STRIDE + warp * 64
                             + lane % 4 * 16;
            const uint4 upper = *(const uint4*)from, lower = *(const uint4*)(from + 8 * ROW_STRIDE);
            __syncwarp();
            if (lane == 0) arrive(empty + turn.stage * 8);
            turn.advance();
            multiply_vectors(c, upper, lower, xs, chunk * WARPS + warp, rows);
        }
        put(c, sums[buffer][warp]);
        barrier();
        finish(sums[buffer], after, out, tile, rows, out_features);
        after += AFTER;
    }
}
