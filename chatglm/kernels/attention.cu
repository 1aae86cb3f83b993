// Attention of one new token a row over the filled part of its cache, rotary positions included.
//
// The blocks of a head and row share its pages of KEYS keys: of `gridDim.x` blocks, one takes every
// gridDim.x-th page, and asks for the next one while it reckons with the one before. The last block
// of a head to finish joins the parts (flash decoding, Dao et al. 2023). The block with the cache's
// end puts the new key and value there. With DRAFTS the rows are tokens of one sequence that follow
// each other; their query comes turned, and their keys and values stand in the cache already
// (rotate.cu). With CACHE8 the cache is int8, with a scale for each key and value. With PAGED the
// pages stand apart, (pages, H, KEYS, D), and those of a row are named in a table (rows, columns).
// With WAITS the kernel before may have written to the cache.

#define D 128
#define KEYS 64
#define THREADS 128
#define WARPS (THREADS / 32)
#define STEPS 8  // 16 lanes hold a key, so that a half of a warp has 8 of the warp's 16 keys of a page

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
    const int* pages, int columns) {
    let_next_start();
    const int split = blockIdx.x, head = blockIdx.y, row = blockIdx.z, i = threadIdx.x;
    const int groups = gridDim.x;
#if defined(DRAFTS) || defined(WAITS)
    wait_for_previous();
#endif
#ifdef DRAFTS
    const int length = __ldcg(lengths) + row, cached = length + 1, sequence = 0;
#else
    const int length = __ldcg(lengths + row);  // of the cache, the new token not counted
    const int cached = length, sequence = row;
#endif
    const int used = length / KEYS + 1;
    if (split >= used) return;
    const int blocks = min(used, groups);
    __shared__ float query[D], new_key[D], new_value[D], sums[WARPS][D];
    __shared__ float warp_most[WARPS], warp_all[WARPS], factors[THREADS], shares[THREADS];
    __shared__ bool is_last;
    const int lane = i % 16, warp = i / 32, half = i % 32 / 16;
    const int first_key = warp * 16 + half;  // of a page; then every second one

    // Where the page number p stands, and the keys of a page of this head, counted in keys.
    auto page_of = [&](int p) {
#ifdef PAGED
        return p < used ? __ldcg(pages + (long long)row * columns + p) : 0;
#else
        return p;
#endif
    };
    auto start_of = [&](int page) {
#ifdef PAGED
        return ((long long)page * heads + head) * KEYS;
#else
        return ((long long)sequence * heads + head) * capacity + page * KEYS;
#endif
    };
    const long long to_value_scales = (long long)sequences * heads * capacity;
    Eight k[STEPS], v[STEPS];
    float k_scales[STEPS], v_scales[STEPS];  // with CACHE8
    auto ask = [&](Eight* to, const Stored* from, float* scales_to, long long to_scales, int page,
                   int p) {
        const long long start = start_of(page);
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
            const int key = first_key + 2 * s;
            const bool is_there = p * KEYS + key < cached;
            to[s] = Eight();
            if (is_there) to[s] = __ldcg((const Eight*)(from + (start + key) * D + lane * 8));
#ifdef CACHE8
            scales_to[s] = is_there ? __ldcg(scales + to_scales + start + key) : 1.f;
#endif
        }
    };
    // The first page's keys and values are asked for before anything else.
    int page = page_of(split), next_page = page_of(split + groups);
    ask(k, keys, k_scales, 0, page, split);
    ask(v, values, v_scales, to_value_scales, page, split);
#ifdef DRAFTS
    query[i] = to_float(mixed[((long long)head * gridDim.z + row) * D + i]);
#else
    const int position = i < 64 ? text_positions[row] : length - first_blocks[row];
    const float cosine = cosines[position * 64 + i % 32], sine = sines[position * 64 + i % 32];
    wait_for_previous();  // what stands above was written a step ago
    const u16* own = mixed + ((long long)row * heads + head) * 3 * D;
    query[i] = to_float(from_float(rotated(own, i, cosine, sine)));
    if ((used - 1) % groups == split) {
        const u16 key = from_float(rotated(own + D, i, cosine, sine)), value = own[2 * D + i];
        const long long place = start_of(page_of(used - 1)) + length % KEYS;
        Stored *key_to = keys + place * D, *value_to = values + place * D;
#ifdef CACHE8
        new_key[i] = rounded(to_float(key), key_to, scales + place, warp_most);
        new_value[i] = rounded(to_float(value), value_to, scales + to_value_scales + place, warp_most);
#else
        key_to[i] = key;
        value_to[i] = value;
        new_key[i] = to_float(key);
        new_value[i] = to_float(value);
#endif
    }
#endif
    __syncthreads();
    float q[8], sum[8] = {}, most = -1e30f, all = 0;
#pragma unroll
    for (int j = 0; j < 8; j++) q[j] = query[lane * 8 + j];
    for (int p = split; p < used; p += groups) {
        float scores[STEPS], top = most;
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
            const int key = p * KEYS + first_key + 2 * s;
            float x[8], dot = 0;
            unpack(k[s], x);
#ifdef CACHE8
#pragma unroll
            for (int j = 0; j < 8; j++) x[j] *= k_scales[s];
#endif
            if (key == length && key >= cached) {
#pragma unroll
                for (int j = 0; j < 8; j++) x[j] = new_key[lane * 8 + j];
            }
#pragma unroll
            for (int j = 0; j < 8; j++) dot += q[j] * x[j];
#pragma unroll
            for (int step = 8; step; step >>= 1) dot += __shfl_xor_sync(0xffffffff, dot, step);
            scores[s] = key <= length ? dot * scale : -1e30f;
            top = fmaxf(top, scores[s]);
        }
        const bool goes_on = p + groups < used;
        if (goes_on) ask(k, keys, k_scales, 0, next_page, p + groups);
        top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 16));
        const float factor = __expf(most - top);
        most = top;
        all *= factor;
#pragma unroll
        for (int j = 0; j < 8; j++) sum[j] *= factor;
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
            const int key = p * KEYS + first_key + 2 * s;
            const float weight = key <= length ? __expf(scores[s] - top) : 0.f;
            all += weight;
            float x[8];
            unpack(v[s], x);
#ifdef CACHE8
#pragma unroll
            for (int j = 0; j < 8; j++) x[j] *= v_scales[s];
#endif
            if (key == length && key >= cached) {
#pragma unroll
                for (int j = 0; j < 8; j++) x[j] = new_value[lane * 8 + j];
            }
#pragma unroll
            for (int j = 0; j < 8; j++) sum[j] += weight * x[j];
        }
        if (goes_on) {
            ask(v, values, v_scales, to_value_scales, next_page, p + groups);
            next_page = page_of(p + 2 * groups);
        }
    }
#pragma unroll
    for (int j = 0; j < 8; j++) sum[j] += __shfl_xor_sync(0xffffffff, sum[j], 16);
    all += __shfl_xor_sync(0xffffffff, all, 16);
    if (half == 0) {
#pragma unroll
        for (int j = 0; j < 8; j++) sums[warp][lane * 8 + j] = sum[j];
        if (lane == 0) warp_most[warp] = most, warp_all[warp] = all;
    }
    __syncthreads();
    float top = -1e30f, total = 0, share = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) top = fmaxf(top, warp_most[w]);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        const float factor = __expf(warp_most[w] - top);
        total += factor * sums[w][i];
        share += factor * warp_all[w];
    }
    u16* to = out + ((long long)row * heads + head) * D;
    if (blocks == 1) {
        to[i] = from_float(total / share);
        return;
    }
    // Of a part: its D sums, then its largest score and the sum of its weights.
    float* all_parts = parts + ((long long)row * heads + head) * groups * (D + 2);
    float* part = all_parts + split * (D + 2);
    part[i] = total;
    if (i == 0) part[D] = top, part[D + 1] = share;
    __threadfence();
    __syncthreads();
    if (i == 0) is_last = atomicAdd(counters + row * heads + head, 1) == blocks - 1;
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    if (i < blocks) {
        factors[i] = __ldcg(all_parts + i * (D + 2) + D);
        shares[i] = __ldcg(all_parts + i * (D + 2) + D + 1);
    }
    __syncthreads();
    float highest = -1e30f, value = 0, whole = 0;
    for (int s = 0; s < blocks; s++) highest = fmaxf(highest, factors[s]);
#pragma unroll 4
    for (int s = 0; s < blocks; s++) {
        const float factor = __expf(factors[s] - highest);
        value += factor * __ldcg(all_parts + s * (D + 2) + i);
        whole += factor * shares[s];
    }
    to[i] = from_float(value / whole);
    if (i == 0) counters[row * heads + head] = 0;
}
