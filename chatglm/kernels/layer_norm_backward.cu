// The way back of layer_norm.cu: the gradient of what was normed, hidden (B, K), out of that of normed.
//
// carried: a second gradient of normed, alpha times which is added to the first; may be null. With
// OWN the block also sums, over the rows that it takes, the gradients of the norm's weight and bias,
// (blocks, 2, K) fp32.

#include "norm.cuh"

extern "C" __global__ void __launch_bounds__(THREADS) layer_norm_backward(
    const u16* gradient, const u16* carried, const u16* hidden, const float2* stats,
    const u16* weight, u16* of_hidden, float* of_own, int rows, float alpha) {
    let_next_start();
    __shared__ float scratch[4][THREADS / 32];
    wait_for_previous();
#ifdef OWN
    Eight of_weight[MINE] = {}, of_bias[MINE] = {};
#endif
    for (int number = 0, r = blockIdx.x; r < rows; r += gridDim.x, number ^= 2) {
        const long long row = (long long)r * WIDTH;
        const float2 stat = stats[r];
        Eight of_x[MINE], x[MINE];  // of the normalised value, and it
        float sum = 0, product = 0;
#pragma unroll
        for (int n = 0; n < MINE; n++) {
            const int i = n * THREADS + threadIdx.x;
            if (i >= EIGHTS) continue;
            Eight g = unpacked(((const uint4*)(gradient + row))[i]);
            if (carried) {
                const Eight more = unpacked(((const uint4*)(carried + row))[i]);
#pragma unroll
                for (int j = 0; j < 8; j++) g.x[j] += alpha * more.x[j];
            }
            x[n] = unpacked(((const uint4*)(hidden + row))[i]);
            const Eight w = unpacked(((const uint4*)weight)[i]);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                x[n].x[j] = (x[n].x[j] - stat.x) * stat.y;
                of_x[n].x[j] = g.x[j] * w.x[j];
                sum += of_x[n].x[j];
                product += of_x[n].x[j] * x[n].x[j];
#ifdef OWN
                of_weight[n].x[j] += g.x[j] * x[n].x[j];
                of_bias[n].x[j] += g.x[j];
#endif
            }
        }
        const float mean = block_sum<THREADS / 32>(sum, scratch[number]) / WIDTH;
        const float along = block_sum<THREADS / 32>(product, scratch[number + 1]) / WIDTH;
#pragma unroll
        for (int n = 0; n < MINE; n++) {
            const int i = n * THREADS + threadIdx.x;
            if (i >= EIGHTS) continue;
#pragma unroll
            for (int j = 0; j < 8; j++)
                of_x[n].x[j] = stat.y * (of_x[n].x[j] - mean - x[n].x[j] * along);
            ((uint4*)(of_hidden + row))[i] = packed(of_x[n]);
        }
    }
#ifdef OWN
#pragma unroll
    for (int n = 0; n < MINE; n++) {
        const int i = n * THREADS + threadIdx.x;
        if (i >= EIGHTS) continue;
        float* to = of_own + (long long)blockIdx.x * 2 * WIDTH + i * 8;
#pragma unroll
        for (int j = 0; j < 8; j++) to[j] = of_weight[n].x[j], to[WIDTH + j] = of_bias[n].x[j];
    }
#endif
}
