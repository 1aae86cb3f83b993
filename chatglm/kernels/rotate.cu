// Query, key and value of a prompt out of their common projection (B, T, H * 3 * D): query and key
// turned by their positions, key and value put into the cache.
//
// With STEP `positions` are three numbers of one sequence whose tokens are all beyond its context: the
// cache's length, the text position, and the block position's offset, as attention.cu has them.
//
// 32 threads take a head of a token: 8 the query, 8 the key, each of them eight values and their
// fellows, 16 copy the value.

#include "turn.cuh"

#define D 128
#define THREADS 256

extern "C" __global__ void __launch_bounds__(THREADS) rotate(
    const u16* mixed, const float* cosines, const float* sines, const int* positions, u16* query,
    u16* keys, u16* values, int tokens, int heads, int capacity, int given_offset) {
    let_next_start();
    wait_for_previous();
#ifdef STEP
    const int offset = positions[0];
#else
    const int offset = given_offset;
#endif
    const int row = blockIdx.z, token = blockIdx.y, i = threadIdx.x % 32;
    const int head = blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    if (head >= heads) return;
    const u16* from = mixed + (((long long)row * tokens + token) * heads + head) * 3 * D;
    const long long place = (((long long)row * heads + head) * capacity + offset + token) * D;
    if (i >= 16) {
        ((uint4*)(values + place))[i - 16] = ((const uint4*)(from + 2 * D))[i - 16];
        return;
    }
    const int part = i % 8, half = part / 4, eight = part % 4;  // of a head: two halves by position
    const int at = half * 8 + eight;                            // in eights; the fellow is 4 on
#ifdef STEP
    const int position = half ? offset + token - positions[2] : positions[1];
#else
    const int position = positions[((long long)row * 2 + half) * tokens + token];
#endif
    const uint4* source = (const uint4*)(from + (i < 8 ? 0 : D));
    uint4 first = source[at], second = source[at + 4];
    turn(first, second, cosines + position * 64 + eight * 8, sines + position * 64 + eight * 8);
    uint4* to = (uint4*)(i < 8 ? query + (((long long)row * heads + head) * tokens + token) * D
                               : keys + place);
    to[at] = first;
    to[at + 4] = second;
}
