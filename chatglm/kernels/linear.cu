// out (B, N) = x (B, K) times the weight (N, K), for few rows x, on any card from sm_75 on.
//
// A block of 8 warps takes 16 rows of the weight at a time; each warp takes an eighth of K, and the
// eighths are added in shared memory. The next UNROLL steps of a weight are in registers on their way
// while the present ones are multiplied, across the ends of tiles too.

#include "products.cuh"

#define ITERATIONS (ROW_VECTORS / 4 / WARPS)  // a warp reads 4 vectors of 16 rows in each
#define GROUPS (ITERATIONS / UNROLL)

struct Weights {
    uint4 upper[UNROLL], lower[UNROLL];
};

DEVICE void load(Weights& w, const uint4* rows, int first) {
#pragma unroll
    for (int i = 0; i < UNROLL; i++) {
        const uint4* from = rows + (threadIdx.x / 32 * ITERATIONS + first + i) * 4;
        w.upper[i] = load_once(from);
        w.lower[i] = load_once(from + 8 * ROW_VECTORS);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) linear(
    const u16* x, const uint4* weight, const u16* scale, const u16* bias, u16* out,
    const u16* norm_weight, const u16* norm_bias, u16* normed, const u16* residual,
    int rows, int out_features, float epsilon, float alpha) {
    let_next_start();
    __shared__ float sums[2][WARPS][ROWS][16];
    const int warp = threadIdx.x / 32, tiles = out_features / 16;
    const uint4* mine = weight + (long long)(threadIdx.x % 32 / 4) * ROW_VECTORS + threadIdx.x % 4;
    int tile = blockIdx.x;
    Weights current;
    load(current, mine + (long long)tile * 16 * ROW_VECTORS, 0);
#ifdef NORM
    NormWeights ahead_of_x;
    if (rows == 1) load(ahead_of_x, norm_weight, norm_bias);
#endif
    Ahead ahead_of_sums;
    ask(ahead_of_sums, scale, bias, out_features);
    extern __shared__ uint4 staged[];
    wait_for_previous();
    ask_for_residual(ahead_of_sums, residual, alpha, rows, out_features);
#ifdef STAGED
    u16* xs = (u16*)staged;
    float* after = (float*)(xs + ROWS * STRIDE);
#ifdef NORM
    const Norm norm = {norm_weight, norm_bias, normed, epsilon};
    stage(x, xs, norm, ahead_of_x, rows, &sums[0][0][0][0]);
#else
    stage(x, xs, rows);
#endif
#else
    const u16* xs = x;
    float* after = (float*)staged;
#endif
    put(ahead_of_sums, after, out_features);
    for (int buffer = 0; tile < tiles; buffer ^= 1) {
        float c[TILES][2][4] = {};  // two chains of products, since each waits for the one before
        const int next = tile + gridDim.x;
#pragma unroll 1
        for (int g = 0; g < GROUPS; g++) {
            Weights ahead;
            if (g + 1 < GROUPS)
                load(ahead, mine + (long long)tile * 16 * ROW_VECTORS, (g + 1) * UNROLL);
            else if (next < tiles)
                load(ahead, mine + (long long)next * 16 * ROW_VECTORS, 0);
#pragma unroll
            for (int i = 0; i < UNROLL; i++)
                multiply_vectors(c, current.upper[i], current.lower[i], xs,
                                 warp * ITERATIONS + g * UNROLL + i, rows);
            current = ahead;
        }
        put(c, sums[buffer][warp]);
        __syncthreads();
        finish(sums[buffer], after, out, tile, rows, out_features);
        after += AFTER;
        tile = next;
    }
}
