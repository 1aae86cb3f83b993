// The way back of split_heads.cu: the gradient of the common projection (T, H * 3 * D) out of those of
// the query, of contexts (C, H, D) and of the others, and of key and value. A context's key has two,
// as part of its whole sequence and as one of its context's keys.

#include "turn.cuh"

#define D 128
#define THREADS 256

DEVICE void add(uint4& to, const uint4& other) {
    u32* a = (u32*)&to;
    const u32* b = (const u32*)&other;
#pragma unroll
    for (int j = 0; j < 4; j++) a[j] = pack(low(a[j]) + low(b[j]), high(a[j]) + high(b[j]));
}

extern "C" __global__ void __launch_bounds__(THREADS) join_heads(
    const u16* of_context_queries, const u16* of_other_queries, const u16* of_keys,
    const u16* of_values, const u16* of_context_keys, const u16* of_context_values,
    const float* cosines, const float* sines, const int* positions, const int* places,
    const int* context_places, u16* mixed, int tokens, int context_tokens, int heads) {
    let_next_start();
    wait_for_previous();
    const int token = blockIdx.x, i = threadIdx.x % 32;
    const int head = blockIdx.y * (THREADS / 32) + threadIdx.x / 32;
    if (head >= heads) return;
    const bool in_context = token < context_tokens;
    const long long place = ((long long)places[token] * heads + head) * D;
    const long long context_place =
        in_context ? ((long long)context_places[token] * heads + head) * D : 0;
    u16* to = mixed + ((long long)token * heads + head) * 3 * D;
    if (i >= 16) {
        uint4 value = ((const uint4*)(of_values + place))[i - 16];
        if (in_context) add(value, ((const uint4*)(of_context_values + context_place))[i - 16]);
        ((uint4*)(to + 2 * D))[i - 16] = value;
        return;
    }
    const int part = i % 8, half = part / 4, eight = part % 4, at = half * 8 + eight;
    const int angles = positions[(long long)half * tokens + token] * 64 + eight * 8;
    const u16* of_query = in_context
        ? of_context_queries + ((long long)token * heads + head) * D
        : of_other_queries + ((long long)(token - context_tokens) * heads + head) * D;
    const uint4* source = (const uint4*)(i < 8 ? of_query : of_keys + place);
    uint4 first = source[at], second = source[at + 4];
    if (i >= 8 && in_context) {
        add(first, ((const uint4*)(of_context_keys + context_place))[at]);
        add(second, ((const uint4*)(of_context_keys + context_place))[at + 4]);
    }
    turn(first, second, cosines + angles, sines + angles, -1);
    uint4* out = (uint4*)(to + (i < 8 ? 0 : D));
    out[at] = first;
    out[at + 4] = second;
}
