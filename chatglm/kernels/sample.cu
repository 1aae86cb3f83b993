// The next token of each row from its scores (B, V), as choose_tokens in sampling.py has it, and what
// the next step needs: the token's embedding, and the counts.
//
// A block of 1024 threads takes a row. The k largest scores are found through the threads' own
// largest ones: k scores at least reach the k-th of those, and few more do. Drawing is by Philox
// 4x32-10 (Salmon et al. 2011) from a row's seed and step, so that a row's tokens do not depend on
// what else runs.
//
// With RING, the number of lines of a history that begins anew after its last one, of HISTORY_ROWS
// each, rows come and go: a row of a step below 0 is left as it is, and drawing is by a row's length.

#define THREADS 1024
#define NO_KEY 0ull
typedef unsigned long long u64;

// Larger scores first, of equal ones the lower index.
DEVICE u64 key_of(float value, int index) {
    const u32 bits = __float_as_uint(value);
    return (u64)(bits & 0x80000000 ? ~bits : bits | 0x80000000) << 32 | (u32)~index;
}
DEVICE float value_of(u64 key) {
    const u32 bits = (u32)(key >> 32);
    return __uint_as_float(bits & 0x80000000 ? bits & 0x7fffffff : ~bits);
}
DEVICE int index_of(u64 key) { return (int)~(u32)key; }

DEVICE float uniform(u32 seed, u32 stream, u32 step) {  // in [0, 1)
    u32 a = step, b = 0, c = 0, d = 0, low = seed, high = stream;
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const u32 a_high = __umulhi(0xd2511f53u, a), a_low = 0xd2511f53u * a;
        const u32 c_high = __umulhi(0xcd9e8d57u, c), c_low = 0xcd9e8d57u * c;
        a = c_high ^ b ^ low;
        b = c_low;
        c = a_high ^ d ^ high;
        d = a_low;
        low += 0x9e3779b9u;
        high += 0xbb67ae85u;
    }
    return (a >> 8) * (1.f / 16777216.f);
}

// Bitonic, the largest first; every thread holds one.
DEVICE u64 sorted(u64 key, u64* shared) {
    const int i = threadIdx.x;
    for (int size = 2; size <= THREADS; size *= 2) {
        for (int step = size / 2; step; step /= 2) {
            u64 fellow;
            if (step < 32) {
                fellow = __shfl_xor_sync(0xffffffff, key, step);
            } else {
                __syncthreads();
                shared[i] = key;
                __syncthreads();
                fellow = shared[i ^ step];
            }
            const bool larger = ((i & step) == 0) == ((i & size) == 0);
            key = (key > fellow) == larger ? key : fellow;
        }
    }
    __syncthreads();
    return key;
}

DEVICE float largest(float value, float* shared) {
#pragma unroll
    for (int step = 16; step; step >>= 1)
        value = fmaxf(value, __shfl_xor_sync(0xffffffff, value, step));
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
    __syncthreads();
    for (int w = 0; w < 32; w++) value = fmaxf(value, shared[w]);
    __syncthreads();
    return value;
}

DEVICE float running_sum(float value, float* shared) {  // of this thread and those before it
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const float before = __shfl_up_sync(0xffffffff, value, step);
        if (lane >= step) value += before;
    }
    if (lane == 31) shared[warp] = value;
    __syncthreads();
    for (int w = 0; w < warp; w++) value += shared[w];
    __syncthreads();
    return value;
}

// The larger of two pairs, NaN if there is one.
DEVICE u32 larger(u32 a, u32 b) {
    u32 out;
#if __CUDA_ARCH__ < 800
    out = pack(low(a) >= low(b) || low(a) != low(a) ? low(a) : low(b),
               high(a) >= high(b) || high(a) != high(a) ? high(a) : high(b));
#elif defined(BF16)
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
#else
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
#endif
    return out;
}
DEVICE float larger_half(u32 pair) { return fmaxf(low(pair), high(pair)); }

struct Scores {
    const uint4* eights;
    const u32* seen;  // a bit for each token of the row so far
    float penalty;

    DEVICE float value(int place, const u32* pairs, int j) const {
        const float score = j % 2 ? high(pairs[j / 2]) : low(pairs[j / 2]);
        if (penalty == 1.f || !(seen[place / 4] >> (place % 4 * 8 + j) & 1)) return score;
        return score < 0 ? score * penalty : score / penalty;
    }

    // The largest of eight; `magnitude` becomes the largest of all, as a pair.
    DEVICE float most(int place, u32& magnitude) const {
        const uint4 eight = eights[place];
        const u32* pairs = (const u32*)&eight;
        u32 top = pairs[0];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            top = larger(top, pairs[j]);
            magnitude = larger(magnitude, pairs[j] & 0x7fff7fff);
        }
        if (penalty == 1.f) return larger_half(top);
        float best = value(place, pairs, 0);
        for (int j = 1; j < 8; j++) best = fmaxf(best, value(place, pairs, j));
        return best;
    }

    DEVICE void keys(int place, u64* out) const {
        const uint4 eight = eights[place];
#pragma unroll
        for (int j = 0; j < 8; j++)
            out[j] = key_of(value(place, (const u32*)&eight, j), place * 8 + j);
    }
};

DEVICE int reaching(const Scores& scores, u32 bound, int vocabulary, int* count) {
    __syncthreads();
    if (threadIdx.x == 0) *count = 0;
    __syncthreads();
    int mine = 0;
    for (int place = threadIdx.x; place < vocabulary / 8; place += THREADS) {
        u64 keys[8];
        scores.keys(place, keys);
#pragma unroll
        for (int j = 0; j < 8; j++) mine += (u32)(keys[j] >> 32) >= bound;
    }
    if (mine) atomicAdd(count, mine);
    __syncthreads();
    return *count;
}

// Puts the keys that reach the bound into shared memory; how many there are.
DEVICE int collect(const Scores& scores, u32 bound, int vocabulary, u64* shared, int* count) {
    __syncthreads();
    shared[threadIdx.x] = NO_KEY;
    if (threadIdx.x == 0) *count = 0;
    __syncthreads();
    const float least = value_of((u64)bound << 32);
    u32 magnitude = 0;
#pragma unroll 4
    for (int place = threadIdx.x; place < vocabulary / 8; place += THREADS) {
        if (scores.most(place, magnitude) < least) continue;
        u64 keys[8];
        scores.keys(place, keys);
        for (int j = 0; j < 8; j++) {
            if ((u32)(keys[j] >> 32) < bound) continue;
            const int at = atomicAdd(count, 1);
            if (at < THREADS) shared[at] = keys[j];
        }
    }
    __syncthreads();
    return *count;
}

// Puts the keys of one score behind those that are there, the lower indices first, as far as there is
// room.
DEVICE void append_equal(const Scores& scores, u32 bound, int vocabulary, u64* shared, float* sums,
                         int* count) {
    for (int first = 0; first < vocabulary / 8 && *count < THREADS; first += THREADS) {
        const int place = first + threadIdx.x, base = *count;
        u64 keys[8] = {};
        int mine = 0;
        if (place < vocabulary / 8) scores.keys(place, keys);
#pragma unroll
        for (int j = 0; j < 8; j++) mine += (u32)(keys[j] >> 32) == bound;
        const int upto = base + (int)running_sum(mine, sums);
        int at = upto - mine;
        for (int j = 0; j < 8; j++)
            if ((u32)(keys[j] >> 32) == bound && at < THREADS) shared[at++] = keys[j];
        if (threadIdx.x == THREADS - 1) *count = upto;
        __syncthreads();
    }
}

// A token of a row; `best` is the largest of each thread's own scores.
DEVICE int draw(const Scores& scores, float best, int vocabulary, int top_k, float top_p,
                float inverse_temperature, float chance, u64* shared, float* sums, int* count) {
    const int i = threadIdx.x;
    shared[i] = sorted(key_of(best, i), shared);
    __syncthreads();
    u32 bound = (u32)(shared[top_k - 1] >> 32), highest = (u32)(shared[0] >> 32);
    // With top_k near the number of threads, more may reach the bound than there is room for.
    while (collect(scores, bound, vocabulary, shared, count) > THREADS && bound < highest) {
        while (bound < highest) {
            const u32 middle = bound + (highest - bound + 1) / 2;
            if (reaching(scores, middle, vocabulary, count) < top_k)
                highest = middle - 1;
            else
                bound = middle;
        }
        if (collect(scores, bound, vocabulary, shared, count) > THREADS) {  // of equal ones
            collect(scores, bound + 1, vocabulary, shared, count);
            append_equal(scores, bound, vocabulary, shared, sums, count);
        }
        break;
    }
    const u64 key = sorted(shared[i], shared);
    shared[i] = key;
    __syncthreads();
    const float most = value_of(shared[0]), least = value_of(shared[top_k - 1]);
    bool kept = key != NO_KEY && (i < top_k || value_of(key) == least);
    const float weight = kept ? __expf((value_of(key) - most) * inverse_temperature) : 0.f;
    float before = running_sum(weight, sums);
    if (i == THREADS - 1) sums[32] = before;
    __syncthreads();
    kept = kept && (i == 0 || before - weight < top_p * sums[32]);
    __syncthreads();
    before = running_sum(kept ? weight : 0.f, sums);
    if (i == THREADS - 1) sums[32] = before;
    if (i == 0) *count = THREADS;
    __syncthreads();
    if (kept && before > chance * sums[32]) atomicMin(count, i);
    __syncthreads();
    return index_of(shared[*count < THREADS ? *count : 0]);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) sample(
    const u16* scores, u32* seen, const int* seeds, const int* top_ks, const float* rules,
    int* tokens, int* lengths, int* steps, int* history, const u16* embedding, u16* hidden,
    int vocabulary, int width, int guard_token) {
    __shared__ u64 shared[THREADS];
    __shared__ float sums[33];
    __shared__ int count, is_broken;
    const int row = blockIdx.x, i = threadIdx.x, step = steps[row], top_k = top_ks[row];
#ifdef RING
    if (step < 0) {
        wait_for_previous();
        let_next_start();
        return;
    }
    const int counter = lengths[row], place_in_history = step % RING * HISTORY_ROWS + row;
#else
    const int counter = step, place_in_history = step * gridDim.x + row;
#endif
    const float top_p = rules[row * 3], inverse_temperature = rules[row * 3 + 1];
    u32* marks = seen + (long long)row * (vocabulary / 32);
    const Scores mine = {(const uint4*)(scores + (long long)row * vocabulary), marks,
                         rules[row * 3 + 2]};
    if (i == 0) is_broken = 0;
    wait_for_previous();
    __syncthreads();
    float best = __int_as_float(0xff800000);
    u32 magnitude = 0;
#pragma unroll 4
    for (int place = i; place < vocabulary / 8; place += THREADS)
        best = fmaxf(best, mine.most(place, magnitude));
    if (!(larger_half(magnitude) < __int_as_float(0x7f800000)) || low(magnitude) != low(magnitude)
        || high(magnitude) != high(magnitude))
        is_broken = 1;
    if (i == 0) count = vocabulary;
    __syncthreads();
    int token;
    if (is_broken) {
        token = guard_token;
    } else if (top_k == 1) {
        const float most = largest(best, sums);
        for (int place = i; best == most && place < vocabulary / 8; place += THREADS) {
            u64 keys[8];
            mine.keys(place, keys);
            for (int j = 0; j < 8; j++)
                if (value_of(keys[j]) == most) atomicMin(&count, place * 8 + j);
        }
        __syncthreads();
        token = count;
    } else {
        const float chance = uniform(seeds[row * 2], seeds[row * 2 + 1], counter);
        token = draw(mine, best, vocabulary, top_k, top_p, inverse_temperature, chance, shared,
                     sums, &count);
    }
    for (int v = i; v < width / 8; v += THREADS)
        ((uint4*)hidden)[row * (width / 8) + v] = ((const uint4*)embedding)[(long long)token * (width / 8) + v];
    if (i == 0) {
        tokens[row] = token;
        history[place_in_history] = token;
        marks[token / 32] |= 1u << token % 32;
        steps[row] = step + 1;
        lengths[row] += 1;
        __threadfence();  // the next step's attention looks at lengths before it waits
    }
    __syncthreads();
    let_next_start();
}
