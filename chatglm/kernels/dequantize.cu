// The matrix (N, K) of T behind packed int8 or int4 and the scale of each row, as dequantize_rows in
// quantization/linear.py gives it: the scale rounded to T, then the product. A thread makes eight
// values, so that both what a warp reads and what it writes are in one piece.

#define THREADS 256

extern "C" __global__ void __launch_bounds__(THREADS) dequantize(
    const u32* weight, const u16* scale, uint4* out, int eights) {
    const int row = blockIdx.x, i = blockIdx.y * THREADS + threadIdx.x;
    if (i >= eights) return;
    const long long place = (long long)row * eights + i;
    const float factor = to_float(from_float(half_to_float(scale[row])));
    u32 pairs[4];
#if BITS == 8
    const uint2 packed = ((const uint2*)weight)[place];
#pragma unroll
    for (int p = 0; p < 4; p++) {
        const int word = (int)(p < 2 ? packed.x : packed.y) >> p % 2 * 16;
        pairs[p] = pack((float)(signed char)word * factor,
                        (float)(signed char)(word >> 8) * factor);
    }
#else
    const u32 packed = weight[place];
#pragma unroll
    for (int p = 0; p < 4; p++) {  // the even column is the high nibble of its byte
        const int high = (int)(packed << (24 - 8 * p)) >> 28;
        const int low = (int)(packed << (28 - 8 * p)) >> 28;
        pairs[p] = pack(high * factor, low * factor);
    }
#endif
    out[place] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}
