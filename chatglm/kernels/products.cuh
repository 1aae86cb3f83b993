// What linear.cu is made of: weights to fp values, x in shared memory, and what comes after the sums.
// To be defined: BITS, IN_FEATURES (K), ROWS of x at the most (a power of two); STAGED, NORM, BIAS,
// GELU, RESIDUAL as they are wanted.
//
// The products are tensor core ones, m16n8k16: 16 rows of the weight, 8 of x. With one row of x seven
// eighths of them are of zeros, but the time is that of reading the weight. The order of k within a
// product is free as long as weight and x agree, so that a lane's 16 bytes of a weight row are used
// as they were read.

#define WARPS 8
#define THREADS (WARPS * 32)
#define PER_VECTOR (128 / BITS)                  // weights in 16 bytes
#define ROW_VECTORS (IN_FEATURES / PER_VECTOR)   // 16-byte vectors of a weight row
#define STRIDE (IN_FEATURES + 32)                // of x in shared memory, against bank conflicts
#define TILES ((ROWS + 7) / 8)                   // of 8 rows of x
#define OUTPUTS ((ROWS * 16 + THREADS - 1) / THREADS)  // of a tile, a thread

#ifdef BF16
#define KIND "bf16"
#else
#define KIND "f16"
#endif

DEVICE void multiply(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." KIND "." KIND ".f32"
                 " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32"
                 " {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(b0));
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32"
                 " {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a2), "r"(a3), "r"(b1));
#endif
}

DEVICE u32 fused(u32 value, u32 factor, u32 addend) {  // value * factor + addend, both halves
    u32 out;
#ifdef BF16
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(value), "r"(factor), "r"(addend));
#else
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(value), "r"(factor), "r"(addend));
#endif
    return out;
}

// Eight weights of a row as four pairs of T, exact.
#if BITS == 16
DEVICE void eight(const uint4& v, int, u32* pairs) {
    pairs[0] = v.x; pairs[1] = v.y; pairs[2] = v.z; pairs[3] = v.w;
}
#elif BITS == 8
DEVICE void four(u32 word, u32* pairs) {
    u32 shifted = word ^ 0x80808080;  // value + 128
#ifdef BF16
#pragma unroll
    for (int half = 0; half < 2; half++) {  // 2^23 + byte as fp32, less 2^23 + 128
        float first = __uint_as_float(__byte_perm(shifted, 0x4b000000, half ? 0x7442 : 0x7440));
        float second = __uint_as_float(__byte_perm(shifted, 0x4b000000, half ? 0x7443 : 0x7441));
        pairs[half] = pack(first - 8388736.f, second - 8388736.f);
    }
#else
    // 0x64 before a byte is 1024 + byte in fp16
    pairs[0] = fused(__byte_perm(shifted, 0x64646464, 0x4140), 0x3c003c00, 0xe480e480);
    pairs[1] = fused(__byte_perm(shifted, 0x64646464, 0x4342), 0x3c003c00, 0xe480e480);
#endif
}
DEVICE void eight(const uint4& v, int part, u32* pairs) {
    four(part ? v.z : v.x, pairs);
    four(part ? v.w : v.y, pairs + 2);
}
#else
// A byte holds the even column in its high nibble; the pairs are columns (1, 5) (0, 4) (3, 7) (2, 6).
DEVICE void eight(const uint4& v, int part, u32* pairs) {
    u32 word = part == 0 ? v.x : part == 1 ? v.y : part == 2 ? v.z : v.w;
    u32 w = word ^ 0x88888888;  // value + 8
#ifdef BF16
#pragma unroll
    for (int i = 0; i < 4; i++)  // 0x43 before a nibble is 128 + nibble
        pairs[i] = fused(((w >> (4 * i)) & 0x000f000f) | 0x43004300, 0x3f803f80, 0xc308c308);
#else
    pairs[0] = fused((w & 0x000f000f) | 0x64006400, 0x3c003c00, 0xe408e408);
    pairs[1] = fused((w & 0x00f000f0) | 0x64006400, 0x2c002c00, 0xd480d480);  // times 1/16
    w >>= 8;
    pairs[2] = fused((w & 0x000f000f) | 0x64006400, 0x3c003c00, 0xe408e408);
    pairs[3] = fused((w & 0x00f000f0) | 0x64006400, 0x2c002c00, 0xd480d480);
#endif
}
#endif

DEVICE void order_like_weights(uint4& x) {
#if BITS == 4
    uint4 y;
    y.x = __byte_perm(x.x, x.z, 0x7632);
    y.y = __byte_perm(x.x, x.z, 0x5410);
    y.z = __byte_perm(x.y, x.w, 0x7632);
    y.w = __byte_perm(x.y, x.w, 0x5410);
    x = y;
#endif
}

#ifdef STAGED
// Eights of x as they are read together: one of each of the four lanes that share a row.
DEVICE int staged_place(int i) {
    constexpr int eights = PER_VECTOR / 8;
    const int within = i % (4 * eights);
    return i - within + within % eights * 4 + within / eights;
}
#endif

#ifdef NORM
DEVICE void normalise(uint4& x, const uint4& weight, const uint4& bias, float mean, float scale) {
    u32* p = (u32*)&x;
    const u32 *w = (const u32*)&weight, *b = (const u32*)&bias;
#pragma unroll
    for (int j = 0; j < 4; j++)
        p[j] = pack((low(p[j]) - mean) * scale * low(w[j]) + low(b[j]),
                    (high(p[j]) - mean) * scale * high(w[j]) + high(b[j]));
}

DEVICE float sum_of(const uint4& x, float mean, bool squares) {
    const u32* p = (const u32*)&x;
    float sum = 0;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const float first = low(p[j]) - mean, second = high(p[j]) - mean;
        sum += squares ? first * first + second * second : first + second;
    }
    return sum;
}

// A single row of x by the whole block; what doesn't depend on x is read ahead of it.
#define MINE (IN_FEATURES / 8 / THREADS)
struct NormWeights {
    uint4 weight[MINE], bias[MINE];
};

DEVICE void load(NormWeights& w, const u16* weight, const u16* bias) {
#pragma unroll
    for (int i = 0; i < MINE; i++) {
        w.weight[i] = ((const uint4*)weight)[i * THREADS + threadIdx.x];
        w.bias[i] = ((const uint4*)bias)[i * THREADS + threadIdx.x];
    }
}

DEVICE void normalise_one(const u16* x, u16* to, u16* copy, const NormWeights& w, float epsilon,
                          float* scratch) {
    uint4 v[MINE];
    float sum = 0;
#pragma unroll
    for (int i = 0; i < MINE; i++) {
        v[i] = ((const uint4*)x)[i * THREADS + threadIdx.x];
        sum += sum_of(v[i], 0, false);
    }
    const float mean = block_sum<WARPS>(sum, scratch) / IN_FEATURES;
    sum = 0;
#pragma unroll
    for (int i = 0; i < MINE; i++) sum += sum_of(v[i], mean, true);
    const float scale = rsqrtf(block_sum<WARPS>(sum, scratch + WARPS) / IN_FEATURES + epsilon);
#pragma unroll
    for (int i = 0; i < MINE; i++) {
        normalise(v[i], w.weight[i], w.bias[i], mean, scale);
        if (copy) ((uint4*)copy)[i * THREADS + threadIdx.x] = v[i];
        order_like_weights(v[i]);
        ((uint4*)to)[staged_place(i * THREADS + threadIdx.x)] = v[i];
    }
}

// A row by each warp, read three times, from L1 but for the first: there are no registers for it. The
// sums go in the order of normalise_one, so that a row comes out the same alone and among others.
DEVICE float sum_of_row(const u16* x, float mean, bool squares, int lane) {
    float total = 0;
#pragma unroll 4
    for (int warp = 0; warp < WARPS; warp++) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < MINE; i++)
            sum += sum_of(((const uint4*)x)[i * THREADS + warp * 32 + lane], mean, squares);
        total += warp_sum(sum);
    }
    return total;
}

DEVICE void normalise_rows(const u16* x, u16* to, u16* copy, const u16* weight, const u16* bias,
                           float epsilon, int lane) {
    const float mean = sum_of_row(x, 0, false, lane) / IN_FEATURES;
    const float scale = rsqrtf(sum_of_row(x, mean, true, lane) / IN_FEATURES + epsilon);
#pragma unroll 2
    for (int i = lane; i < IN_FEATURES / 8; i += 32) {
        uint4 v = ((const uint4*)x)[i];
        normalise(v, ((const uint4*)weight)[i], ((const uint4*)bias)[i], mean, scale);
        if (copy) ((uint4*)copy)[i] = v;
        order_like_weights(v);
        ((uint4*)to)[staged_place(i)] = v;
    }
}
#endif

#ifdef STAGED
// All rows of x in shared memory, through the norm if there is one. Block 0 writes normed rows out.
struct Norm {
    const u16 *weight, *bias;
    u16* normed;
    float epsilon;
};

#ifdef NORM
DEVICE void stage(const u16* x, u16* xs, const Norm& norm, const NormWeights& ahead, int rows,
                  float* scratch) {
    u16* copy = blockIdx.x == 0 ? norm.normed : 0;
    if (rows == 1) {
        normalise_one(x, xs, copy, ahead, norm.epsilon, scratch);
    } else {
        for (int row = threadIdx.x / 32; row < rows; row += WARPS)
            normalise_rows(x + row * IN_FEATURES, xs + row * STRIDE,
                           copy ? copy + row * IN_FEATURES : 0, norm.weight, norm.bias,
                           norm.epsilon, threadIdx.x % 32);
    }
    __syncthreads();
}
#else
DEVICE void stage(const u16* x, u16* xs, int rows) {
    for (int row = 0; row < rows; row++) {
#pragma unroll 4
        for (int i = threadIdx.x; i < IN_FEATURES / 8; i += THREADS) {
            uint4 v = ((const uint4*)(x + row * IN_FEATURES))[i];
            order_like_weights(v);
            ((uint4*)(xs + row * STRIDE))[staged_place(i)] = v;
        }
    }
    __syncthreads();
}
#endif
#endif

// What the sums are multiplied with and what is added: asked for ahead, of all the block's tiles. While
// the memory is busy with weights, an answer takes longer than a tile's products.
#if defined(BIAS) || defined(RESIDUAL)
#define ADDENDS (ROWS * 16)
#else
#define ADDENDS 0
#endif
#define FACTORS (BITS < 16 ? 16 : 0)
#define AFTER (FACTORS + ADDENDS)  // floats of a tile in shared memory; products.py reckons with it

struct Ahead {  // of one column of one of the block's tiles, a thread
    float factor, addend[ROWS];
};

DEVICE int own_column(int out_features) {  // the thread's, or out_features if it has none
    const int tile = blockIdx.x + threadIdx.x / 16 * gridDim.x;
    return min(tile * 16 + (int)threadIdx.x % 16, out_features);
}

DEVICE void ask(Ahead& ahead, const u16* scale, const u16* bias, int out_features) {
    const int column = own_column(out_features);
    float addend = 0;
    ahead.factor = 1;
    if (column < out_features) {
#if BITS < 16
        ahead.factor = half_to_float(scale[column]);
#endif
#ifdef BIAS
        addend = to_float(bias[column]);
#endif
    }
#pragma unroll
    for (int row = 0; row < ROWS; row++) ahead.addend[row] = addend;
}

DEVICE void ask_for_residual(Ahead& ahead, const u16* residual, float alpha, int rows,
                             int out_features) {
#ifdef RESIDUAL
    const int column = own_column(out_features);
#pragma unroll
    for (int row = 0; row < ROWS; row++)
        if (row < rows && column < out_features)
            ahead.addend[row] += alpha * to_float(residual[row * out_features + column]);
#endif
}

// The barrier of the first tile makes it seen.
DEVICE void put(const Ahead& ahead, float* after, int out_features) {
    if (AFTER == 0 || own_column(out_features) == out_features) return;
    float* to = after + threadIdx.x / 16 * AFTER + threadIdx.x % 16;
    if (FACTORS) to[0] = ahead.factor;
    if (ADDENDS) {
#pragma unroll
        for (int row = 0; row < ROWS; row++) to[FACTORS + row * 16] = ahead.addend[row];
    }
}

// A warp's sums, two chains of them, into shared memory.
DEVICE void put(const float (*c)[2][4], float (*sums)[16]) {
    const int group = threadIdx.x % 32 / 4, part = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < TILES; n++) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const int row = n * 8 + part * 2 + j;
            if (ROWS < 8 && row >= ROWS) continue;
            sums[row][group] = c[n][0][j] + c[n][1][j];
            sums[row][group + 8] = c[n][0][j + 2] + c[n][1][j + 2];
        }
    }
}

// after: that of the tile.
DEVICE void finish(const float (*sums)[ROWS][16], const float* after, u16* out, int tile, int rows,
                   int out_features) {
#pragma unroll
    for (int o = 0; o < OUTPUTS; o++) {
        const int i = o * THREADS + threadIdx.x, row = i / 16;
        if (i >= rows * 16) continue;
        float value = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) value += sums[w][row][i % 16];
        if (FACTORS) value *= after[i % 16];
        if (ADDENDS) value += after[FACTORS + i];
#ifdef GELU
        value *= 0.5f + 0.5f * tanhf(0.7978845608f * (value + 0.044715f * value * value * value));
#endif
        out[row * out_features + tile * 16 + i % 16] = from_float(value);
    }
}

// The products of 16 bytes of each of 16 weight rows; step counts four lanes' vectors of a row.
DEVICE void multiply_vectors(float (*c)[2][4], const uint4& upper, const uint4& lower, const u16* xs,
                             int step, int rows) {
    const int group = threadIdx.x % 32 / 4, part = threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < PER_VECTOR / 8; j++) {
#ifdef STAGED
        const int k = step * 4 * PER_VECTOR + (j * 4 + part) * 8, stride = STRIDE;
#else
        const int k = (step * 4 + part) * PER_VECTOR + j * 8, stride = IN_FEATURES;
#endif
        u32 a[4], b[4];
        eight(upper, j, a);
        eight(lower, j, b);
#pragma unroll
        for (int n = 0; n < TILES; n++) {
            const int row = n * 8 + group;
            uint4 v = make_uint4(0, 0, 0, 0);
            if (row < rows) v = *(const uint4*)(xs + row * stride + k);
#ifndef STAGED
            order_like_weights(v);
#endif
            multiply(c[n][0], a[0], b[0], a[1], b[1], v.x, v.y);
            multiply(c[n][1], a[2], b[2], a[3], b[3], v.z, v.w);
        }
    }
}
