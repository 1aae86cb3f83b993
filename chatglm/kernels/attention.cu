// Attention of one new token a row over the filled part of its cache, rotary positions included.
//
// A block takes KEYS keys of one head and row; the last block of a head to finish joins the parts
// (flash decoding, Dao et al. 2023). The block at the cache's end puts the new key and value there.
// Compiled for MOST_KEYS, the room of the cache that is looked at. With DRAFTS the rows are tokens of
// one sequence that follow each other; their query comes turned, and their keys and values stand in
// the cache already (rotate.cu). With CACHE8 the cache is int8, with a scale for each key and value.
// With PAGED the cache is pages of KEYS keys (pages, H, KEYS, D), and a row's are named in a table
// (rows, SPLITS): a block has a page.

#define D 128
#define KEYS 64
#define THREADS 128
#define SPLITS ((MOST_KEYS + KEYS - 1) / KEYS)
static_assert(SPLITS <= THREADS, "a thread reads the largest score of a part");
#define STEPS (KEYS / 8)  // 16 lanes hold a key, 128 threads 8 of them

// Eight values of a key or value as they are stored.
#ifdef CACHE8
typedef signed char Stored;
typedef uint2 Eight;
DEVICE void unpack(const Eight& eight, float* out) {
#pragma unroll
    for (int j = 0; j < 8; j++)
        out[j] = (float)(signed char)((j < 4 ? eight.x : eight.y) >> j % 4 * 8);
}
#else
typedef u16 Stored;
typedef uint4 Eight;
DEVICE void unpack(const Eight& eight, float* out) {
    const u32* pairs = (const u32*)&eight;
#pragma unroll
    for (int j = 0; j < 4; j++) out[2 * j] = low(pairs[j]), out[2 * j + 1] = high(pairs[j]);
}
#endif

#ifdef CACHE8
// A thread's value, rounded to what the cache holds of it; the scale is that of all D threads.
DEVICE float rounded(float value, Stored* to, float* scale_to, float* scratch) {
    float most = fabsf(value);
#pragma unroll
    for (int step = 16; step; step >>= 1)
        most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, step));
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = most;
    __syncthreads();
    most = fmaxf(fmaxf(scratch[0], scratch[1]), fmaxf(scratch[2], scratch[3]));
    __syncthreads();
    const float scale = most / 127.f, steps = most > 0 ? rintf(value / scale) : 0.f;
    to[threadIdx.x] = (Stored)steps;
    if (threadIdx.x == 0) *scale_to = scale;
    return steps * scale;
}
#endif

// One of the D values of a head, turned by its position; the fellow of i in its half's quarter.
DEVICE float rotated(const u16* head, int i, float cosine, float sine) {
    const float x = to_float(head[i]), fellow = to_float(head[i ^ 32]);
    const float turned = (i % 64) < 32 ? -fellow : fellow;
    return __fmaf_rn(x, cosine, turned * sine);  // as in rotate.cu, to the last bit
}

extern "C" __global__ void __launch_bounds__(THREADS) attention(
    const u16* mixed, Stored* keys, Stored* values, float* scales, const float* cosines,
    const float* sines, const int* lengths, const int* text_positions, const int* first_blocks,
    float* parts, int* counters, u16* out, int sequences, int heads, int capacity, float scale,
    const int* pages) {
    let_next_start();
    const int split = blockIdx.x, head = blockIdx.y, row = blockIdx.z, i = threadIdx.x;
#ifdef DRAFTS
    wait_for_previous();
    const int length = __ldcg(lengths) + row, cached = length + 1, sequence = 0;
#else
    const int length = __ldcg(lengths + row);  // of the cache, the new token not counted
    const int cached = length;
#ifndef PAGED
    const int sequence = row;
#endif
#endif
    const int first = split * KEYS;
    if (first > length) return;
#ifdef PAGED
    const int sequence = __ldcg(pages + row * SPLITS + split), skipped = first;
#else
    const int skipped = 0;
#endif
    __shared__ float query[D], new_key[D], new_value[D], sums[THREADS / 32][D];
    __shared__ float scores[KEYS], warp_weights[THREADS / 32];
    __shared__ bool is_last;
    const int lane = i % 16, slot = i / 16;
    const long long place = (((long long)sequence * heads + head) * capacity - skipped) * D;
    // All of the block's keys and values are asked for before anything else.
    Eight k[STEPS], v[STEPS];
    float k_scales[STEPS], v_scales[STEPS];  // all 1 but for CACHE8
#ifdef CACHE8
    float* own_scales = scales + ((long long)sequence * heads + head) * capacity - skipped;
    const long long to_values = (long long)sequences * heads * capacity;
#endif
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        const int key = first + s * 8 + slot;
        k[s] = v[s] = Eight();
        k_scales[s] = v_scales[s] = 1;
        if (key < cached) {
            k[s] = __ldcg((const Eight*)(keys + place + (long long)key * D + lane * 8));
            v[s] = __ldcg((const Eight*)(values + place + (long long)key * D + lane * 8));
#ifdef CACHE8
            k_scales[s] = __ldcg(own_scales + key);
            v_scales[s] = __ldcg(own_scales + to_values + key);
#endif
        }
    }
#ifdef DRAFTS
    query[i] = to_float(mixed[((long long)head * gridDim.z + row) * D + i]);
#else
    const int position = i < 64 ? text_positions[row] : length - first_blocks[row];
    const float cosine = cosines[position * 64 + i % 32], sine = sines[position * 64 + i % 32];
    wait_for_previous();  // what stands above was written a step ago
    const u16* own = mixed + ((long long)row * heads + head) * 3 * D;
    query[i] = to_float(from_float(rotated(own, i, cosine, sine)));
    const bool at_end = length < first + KEYS;
    if (at_end) {
        const u16 key = from_float(rotated(own + D, i, cosine, sine)), value = own[2 * D + i];
        Stored *key_to = keys + place + (long long)length * D;
        Stored *value_to = values + place + (long long)length * D;
#ifdef CACHE8
        new_key[i] = rounded(to_float(key), key_to, own_scales + length, warp_weights);
        new_value[i] = rounded(to_float(value), value_to, own_scales + to_values + length,
                               warp_weights);
#else
        key_to[i] = key;
        value_to[i] = value;
        new_key[i] = to_float(key);
        new_value[i] = to_float(value);
#endif
    }
#endif
    __syncthreads();
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        const int key = first + s * 8 + slot;
        float dot = 0, x[8];
        unpack(k[s], x);
#pragma unroll
        for (int j = 0; j < 8; j++) x[j] *= k_scales[s];
        if (key == length && key >= cached) {
#pragma unroll
            for (int j = 0; j < 8; j++) x[j] = new_key[lane * 8 + j];
        }
#pragma unroll
        for (int j = 0; j < 8; j++) dot += query[lane * 8 + j] * x[j];
#pragma unroll
        for (int step = 8; step; step >>= 1) dot += __shfl_xor_sync(0xffffffff, dot, step);
        if (lane == 0) scores[s * 8 + slot] = key <= length ? dot * scale : -1e30f;
    }
    __syncthreads();
    float most = -1e30f, weights = 0;
#pragma unroll 16
    for (int s = 0; s < KEYS; s++) most = fmaxf(most, scores[s]);
    float sum[8] = {};
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        const int key = first + s * 8 + slot;
        const float weight = key <= length ? __expf(scores[s * 8 + slot] - most) : 0.f;
        weights += weight;
        float x[8];
        unpack(v[s], x);
#pragma unroll
        for (int j = 0; j < 8; j++) x[j] *= v_scales[s];
        if (key == length && key >= cached) {
#pragma unroll
            for (int j = 0; j < 8; j++) x[j] = new_value[lane * 8 + j];
        }
#pragma unroll
        for (int j = 0; j < 8; j++) sum[j] += weight * x[j];
    }
#pragma unroll
    for (int j = 0; j < 8; j++) sum[j] += __shfl_xor_sync(0xffffffff, sum[j], 16);
    weights += __shfl_xor_sync(0xffffffff, weights, 16);  // of the warp's two keys a step
    if (i % 32 < 16) {
#pragma unroll
        for (int j = 0; j < 8; j++) sums[i / 32][lane * 8 + j] = sum[j];
        if (lane == 0) warp_weights[i / 32] = weights;
    }
    __syncthreads();
    const float total = sums[0][i] + sums[1][i] + sums[2][i] + sums[3][i];
    const float all = warp_weights[0] + warp_weights[1] + warp_weights[2] + warp_weights[3];
    const int used = length / KEYS + 1;
    u16* to = out + ((long long)row * heads + head) * D;
    if (used == 1) {
        to[i] = from_float(total / all);
        return;
    }
    // Of a part: its D sums, then its largest score and the sum of its weights.
    float* all_parts = parts + ((long long)row * heads + head) * SPLITS * (D + 2);
    float* part = all_parts + split * (D + 2);
    part[i] = total;
    if (i == 0) {
        part[D] = most;
        part[D + 1] = all;
    }
    __threadfence();
    __syncthreads();
    if (i == 0) is_last = atomicAdd(counters + row * heads + head, 1) == used - 1;
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    __shared__ float factors[SPLITS], shares[SPLITS];
    if (i < used) {
        factors[i] = __ldcg(all_parts + i * (D + 2) + D);
        shares[i] = __ldcg(all_parts + i * (D + 2) + D + 1);
    }
    __syncthreads();
    float top = -1e30f, value = 0, share = 0;
    for (int s = 0; s < used; s++) top = fmaxf(top, factors[s]);
    __syncthreads();
    if (i < used) factors[i] = __expf(factors[i] - top);
    __syncthreads();
#pragma unroll 8
    for (int s = 0; s < used; s++) {
        value += factors[s] * __ldcg(all_parts + s * (D + 2) + i);
        share += factors[s] * shares[s];
    }
    to[i] = from_float(value / share);
    if (i == 0) counters[row * heads + head] = 0;
}
