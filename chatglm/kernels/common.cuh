// Half-precision values as bits, so that nothing but the compiler is needed: no CUDA headers.
// T is fp16, or bf16 with -DBF16. Shapes: B rows of x, K in, N out, H heads, D head width.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;

#define DEVICE __device__ __forceinline__

#ifdef BF16
DEVICE float to_float(u16 value) { return __uint_as_float((u32)value << 16); }
DEVICE u16 from_float(float value) {
    u16 out;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out) : "f"(value));
    return out;
}
#else
DEVICE float to_float(u16 value) {
    float out;
    asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(value));
    return out;
}
DEVICE u16 from_float(float value) {
    u16 out;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out) : "f"(value));
    return out;
}
#endif

DEVICE float half_to_float(u16 value) {  // scales are fp16 whatever T is
    float out;
    asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(value));
    return out;
}

DEVICE float low(u32 pair) { return to_float((u16)(pair & 0xffff)); }
DEVICE float high(u32 pair) { return to_float((u16)(pair >> 16)); }
DEVICE u32 pack(float first, float second) {
    return (u32)from_float(first) | ((u32)from_float(second) << 16);
}

// Weights are read once: past L1, and whole lines at a time.
DEVICE uint4 load_once(const uint4* from) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
    return v;
}

// Programmatic dependent launch (sm_90): a kernel starts while the one before it drains, reads its
// weights, and waits here for what the other one writes.
DEVICE void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

DEVICE float warp_sum(float value) {
#pragma unroll
    for (int step = 16; step; step >>= 1) value += __shfl_xor_sync(0xffffffff, value, step);
    return value;
}

// Of all threads of a block of so many warps; scratch: a float for each warp, not in use since the
// last barrier but one.
template <int NUM_WARPS>
DEVICE float block_sum(float value, float* scratch) {
    value = warp_sum(value);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    __syncthreads();
    value = 0;
#pragma unroll
    for (int i = 0; i < NUM_WARPS; i++) value += scratch[i];
    return value;
}
