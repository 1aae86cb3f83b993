// The matrix (N, K) of T behind packed int8 or int4 and the scale of each row, as dequantize_rows in
// quantization/linear.py gives it: the scale rounded to T, then the product.

#define THREADS 256
#define PER_VECTOR (128 / BITS)

extern "C" __global__ void __launch_bounds__(THREADS) dequantize(
    const uint4* weight, const u16* scale, uint4* out, int rows, int in_features) {
    const int vectors = in_features / PER_VECTOR;
    const long long place = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (place >= (long long)rows * vectors) return;
    const float factor = to_float(from_float(half_to_float(scale[place / vectors])));
    const uint4 packed = load_once(weight + place);
    const u32* words = (const u32*)&packed;
#pragma unroll
    for (int e = 0; e < PER_VECTOR / 8; e++) {
        u32 pairs[4];
#pragma unroll
        for (int p = 0; p < 4; p++) {
            const int first = e * 8 + p * 2;
            float two[2];
#pragma unroll
            for (int j = 0; j < 2; j++) {
#if BITS == 8
                const int shift = (first + j) % 4 * 8;
                const int value = (int)(words[(first + j) / 4] << (24 - shift)) >> 24;
#else
                const int shift = first / 2 % 4 * 8 + (j ? 0 : 4);  // the even column is the high nibble
                const int value = (int)(words[first / 8] << (28 - shift)) >> 28;
#endif
                two[j] = value * factor;
            }
            pairs[p] = pack(two[0], two[1]);
        }
        out[place * (PER_VECTOR / 8) + e] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
}
