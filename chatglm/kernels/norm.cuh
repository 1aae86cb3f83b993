// What layer_norm.cu and layer_norm_backward.cu share. To be defined: WIDTH (K, a multiple of 8).

#define THREADS 256
#define EIGHTS (WIDTH / 8)
#define MINE ((EIGHTS + THREADS - 1) / THREADS)  // eights of a row, a thread

struct Eight {
    float x[8];
};

DEVICE Eight unpacked(const uint4& v) {
    const u32* p = (const u32*)&v;
    Eight out;
#pragma unroll
    for (int j = 0; j < 4; j++) out.x[2 * j] = low(p[j]), out.x[2 * j + 1] = high(p[j]);
    return out;
}

DEVICE uint4 packed(const Eight& v) {
    uint4 out;
    u32* p = (u32*)&out;
#pragma unroll
    for (int j = 0; j < 4; j++) p[j] = pack(v.x[2 * j], v.x[2 * j + 1]);
    return out;
}
