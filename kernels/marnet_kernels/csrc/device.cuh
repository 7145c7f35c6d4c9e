// What needs PTX, under names that say what it does. tests/kernels/emulator/emulator.h has the same functions for the
// CPU, so a kernel written with these and plain CUDA C++ also runs there.
//
// `compile.source` puts this text before every kernel. It includes nothing: NVRTC compiles it without a CUDA toolkit.

// All shared memory of a kernel is dynamic: one array of bytes, 16-byte aligned, that the kernel divides itself.
#define SHARED(type, name) extern __shared__ __align__(16) type name[]

// 16 bytes written by other blocks: read from the L2 cache, where all blocks see the same.
__device__ inline uint4 load_relaxed(const void* address) {
    uint4 v;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(address)
                 : "memory");
    return v;
}

// The same where `there`, else zeros, and without a branch: lanes must not part on the way to an mma.
__device__ inline uint4 load_relaxed_if(bool there, const void* address) {
    uint4 v = make_uint4(0, 0, 0, 0);
    asm volatile(
        "{ .reg .pred p; setp.ne.s32 p, %5, 0; @p ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4]; }"
        : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
        : "l"(address), "r"((int)there)
        : "memory");
    return v;
}

__device__ inline void store_relaxed(unsigned* address, unsigned value) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

__device__ inline void store_relaxed(uint4* address, uint4 value) {
    asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(value.x), "r"(value.y),
                 "r"(value.z), "r"(value.w)
                 : "memory");
}

// 16 bytes that nobody writes while the kernel runs.
__device__ inline uint4 load_constant(const void* address) {
    uint4 v;
    asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(address));
    return v;
}

// Adds 1. Who sees the sum with load_acquire also sees everything that this thread wrote before, and, where a barrier
// of the block came first, everything that its block wrote.
__device__ inline void add_release(unsigned* counter) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}

__device__ inline unsigned load_acquire(const unsigned* counter) {
    unsigned value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
    return value;
}

// The body of every loop that waits for another thread, which counts how often it has asked. After 2^24 times, many
// seconds, the launch ends with CUDA_ERROR_LAUNCH_FAILED, rather than to keep the GPU for ever. (The CPU runs the other
// threads there, and knows itself when none can run.)
__device__ inline void wait(unsigned& asked) {
    if (++asked == 1u << 24) asm volatile("trap;");
}

// d += a b on a warp, 16 x 16 times 16 x 8, in the fragment layout of PTX ISA, "Matrix Fragments for mma.m16n8k16 with
// floating point type". Products are exact; the hardware may truncate their sum.
#define MARNET_MMA(name, type)                                                                                \
    __device__ inline void name(float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, \
                                unsigned b1) {                                                                \
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                   \
                     ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                   \
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                         \
                     : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));                                 \
    }
MARNET_MMA(mma_fp16, "f16")
MARNET_MMA(mma_bf16, "bf16")
#undef MARNET_MMA

// Two values, `low` in the lower 16 bits, each to nearest, ties to even; beyond the range is infinite; every NaN
// becomes 0x7fff.
__device__ inline unsigned pack_fp16(float low, float high) {
    unsigned bits;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}

__device__ inline unsigned pack_bf16(float low, float high) {
    unsigned bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}
