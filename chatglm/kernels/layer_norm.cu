// Layer norm of rows x (B, K), a row a block; with RESIDUAL of x + alpha * residual. Sums are fp32.
//
// hidden: what was normed, if it is wanted. stats: mean and 1 / deviation of each row, fp32, likewise.
// normed may be the residual, and hidden x: a block has read its row before it writes it.

#include "norm.cuh"

extern "C" __global__ void __launch_bounds__(THREADS) layer_norm(
    const u16* x, const u16* residual, const u16* weight, const u16* bias, u16* hidden, u16* normed,
    float2* stats, float epsilon, float alpha) {
    let_next_start();
    __shared__ float scratch[2][THREADS / 32];
    const long long row = (long long)blockIdx.x * WIDTH;
    wait_for_previous();
    Eight mine[MINE];
    float sum = 0;
#pragma unroll
    for (int n = 0; n < MINE; n++) {
        const int i = n * THREADS + threadIdx.x;
        if (i >= EIGHTS) continue;
        mine[n] = unpacked(((const uint4*)(x + row))[i]);
#ifdef RESIDUAL
        const Eight other = unpacked(((const uint4*)(residual + row))[i]);
#pragma unroll
        for (int j = 0; j < 8; j++) mine[n].x[j] += alpha * other.x[j];
        const uint4 rounded = packed(mine[n]);  // what a later pass would read
        mine[n] = unpacked(rounded);
        if (hidden) ((uint4*)(hidden + row))[i] = rounded;
#endif
#pragma unroll
        for (int j = 0; j < 8; j++) sum += mine[n].x[j];
    }
    const float mean = block_sum<THREADS / 32>(sum, scratch[0]) / WIDTH;
    sum = 0;
#pragma unroll
    for (int n = 0; n < MINE; n++) {
        if (n * THREADS + threadIdx.x >= EIGHTS) continue;
#pragma unroll
        for (int j = 0; j < 8; j++) sum += (mine[n].x[j] - mean) * (mine[n].x[j] - mean);
    }
    const float scale = rsqrtf(block_sum<THREADS / 32>(sum, scratch[1]) / WIDTH + epsilon);
    if (stats && threadIdx.x == 0) stats[blockIdx.x] = make_float2(mean, scale);
#pragma unroll
    for (int n = 0; n < MINE; n++) {
        const int i = n * THREADS + threadIdx.x;
        if (i >= EIGHTS) continue;
        const Eight w = unpacked(((const uint4*)weight)[i]), b = unpacked(((const uint4*)bias)[i]);
#pragma unroll
        for (int j = 0; j < 8; j++) mine[n].x[j] = (mine[n].x[j] - mean) * scale * w.x[j] + b.x[j];
        ((uint4*)(normed + row))[i] = packed(mine[n]);
    }
}
