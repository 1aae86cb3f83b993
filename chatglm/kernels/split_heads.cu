// Query, key and value of packed sequences (packed.py) out of their common projection (T, H * 3 * D):
// query and key turned by their positions, key and value put at their places among those of whole
// sequences. With PAGED they go to their places in a paged cache (pages, H, 64, D) too.
//
// 32 threads take a head of a token: 8 the query, 8 the key, each of them eight values and their
// fellows, 16 copy the value.

#include "turn.cuh"

#define D 128
#define THREADS 256
#define PAGE 64

extern "C" __global__ void __launch_bounds__(THREADS) split_heads(
    const u16* mixed, const float* cosines, const float* sines, const int* positions,
    const int* places, u16* query, u16* keys, u16* values, const int* slots, u16* cached_keys,
    u16* cached_values, int tokens, int heads) {
    let_next_start();
    wait_for_previous();
    const int token = blockIdx.x, i = threadIdx.x % 32;
    const int head = blockIdx.y * (THREADS / 32) + threadIdx.x / 32;
    if (head >= heads) return;
    const u16* from = mixed + ((long long)token * heads + head) * 3 * D;
    const long long place = ((long long)places[token] * heads + head) * D;
#ifdef PAGED
    const int slot = slots[token];
    const long long in_cache = (((long long)(slot / PAGE) * heads + head) * PAGE + slot % PAGE) * D;
#endif
    if (i >= 16) {
        const uint4 value = ((const uint4*)(from + 2 * D))[i - 16];
        ((uint4*)(values + place))[i - 16] = value;
#ifdef PAGED
        ((uint4*)(cached_values + in_cache))[i - 16] = value;
#endif
        return;
    }
    const int part = i % 8, half = part / 4, eight = part % 4;  // of a head: two halves by position
    const int at = half * 8 + eight;                            // in eights; the fellow is 4 on
    const int angles = positions[(long long)half * tokens + token] * 64 + eight * 8;
    const uint4* source = (const uint4*)(from + (i < 8 ? 0 : D));
    uint4 first = source[at], second = source[at + 4];
    turn(first, second, cosines + angles, sines + angles);
    uint4* to = (uint4*)(i < 8 ? query + ((long long)token * heads + head) * D : keys + place);
    to[at] = first;
    to[at + 4] = second;
#ifdef PAGED
    if (i < 8) return;
    ((uint4*)(cached_keys + in_cache))[at] = first;
    ((uint4*)(cached_keys + in_cache))[at + 4] = second;
#endif
}
