// Cross entropy of rows of scores (B, V) and their targets, a row a block, and in place of the scores
// its gradient, softmax - 1 at the target. Everything between is fp32.

#define THREADS 1024

struct Sum {  // of exponentials, as a multiple of exp(most)
    float most, sum;
};

DEVICE Sum joined(const Sum& a, const Sum& b) {
    const float most = fmaxf(a.most, b.most);
    return {most, a.sum * __expf(a.most - most) + b.sum * __expf(b.most - most)};
}

extern "C" __global__ void __launch_bounds__(THREADS) cross_entropy(
    u16* scores, const long long* targets, float* losses, int vocabulary) {
    let_next_start();
    __shared__ Sum sums[THREADS / 32];
    wait_for_previous();
    u16* row = scores + (long long)blockIdx.x * vocabulary;
    const int target = (int)targets[blockIdx.x], eights = vocabulary / 8;
    Sum own = {-1e30f, 0};
    for (int i = threadIdx.x; i < eights; i += THREADS) {
        const uint4 v = ((const uint4*)row)[i];
        const u32* p = (const u32*)&v;
        float most = own.most, x[8];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            x[2 * j] = low(p[j]), x[2 * j + 1] = high(p[j]);
            most = fmaxf(most, fmaxf(x[2 * j], x[2 * j + 1]));
        }
        own.sum *= __expf(own.most - most);
        own.most = most;
#pragma unroll
        for (int j = 0; j < 8; j++) own.sum += __expf(x[j] - most);
    }
#pragma unroll
    for (int step = 16; step; step >>= 1) {
        const Sum other = {__shfl_xor_sync(0xffffffff, own.most, step),
                           __shfl_xor_sync(0xffffffff, own.sum, step)};
        own = joined(own, other);
    }
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = own;
    const float of_target = to_float(row[target]);
    __syncthreads();
    own = sums[0];
    for (int w = 1; w < THREADS / 32; w++) own = joined(own, sums[w]);
    const float all = own.most + logf(own.sum);
    if (threadIdx.x == 0) losses[blockIdx.x] = all - of_target;
    for (int i = threadIdx.x; i < eights; i += THREADS) {
        uint4 v = ((uint4*)row)[i];
        u32* p = (u32*)&v;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int column = i * 8 + j * 2;
            p[j] = pack(__expf(low(p[j]) - all) - (column == target),
                        __expf(high(p[j]) - all) - (column + 1 == target));
        }
        ((uint4*)row)[i] = v;
    }
}
