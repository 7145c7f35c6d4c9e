// The part of CUDA C++ that the kernels use, for the CPU: every CUDA thread is a fiber with a stack of its own, and one
// operating-system thread runs them in turn. A fiber runs until it has to wait for others. All blocks of a launch are
// resident at once, as in a cooperative launch. emulate.py puts this header before a kernel's source, in the place of
// csrc/device.cuh, whose functions it has, too.
//
// Not emulated: the memory model (every store is seen at once, in order). Not found: reads outside of an array, and
// loops that wait for another thread without calling wait(), which never end here.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#pragma GCC visibility push(hidden)  // every kernel is a library of its own, and several are loaded at once

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define SHARED(type, name) type* const name = reinterpret_cast<type*>(emulator::shared_memory())

// Vector types, with the alignment that CUDA's have.
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct uint3 { unsigned x, y, z; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

extern uint3 threadIdx, blockIdx, blockDim, gridDim;  // of the fiber that runs

namespace emulator {

struct Shape {  // of a launch; emulate.py mirrors it field for field
    uint32_t grid_x, grid_y, block, shared_bytes;
    uint64_t seed;  // 0: blocks, warps and lanes in order; else shuffled, and interrupted at loads and stores
};

enum class Operation { meet, shuffle, shuffle_xor, mma_fp16, mma_bf16 };

struct Request {  // what a lane brings to an operation of its warp, and takes from it
    Operation operation;
    unsigned mask;      // of the lanes that take part
    unsigned words[6];  // shuffle: value, lane; mma: a0 .. a3, b0, b1. Afterwards word 0 is a shuffle's result
    float* sums;        // of an mma: d
};

struct Call {  // of a kernel with its arguments
    void (*thread)(const void* arguments);
    const void* arguments;
};

const char* run(const Shape& shape, const Call& call);  // null, or what went wrong
[[noreturn]] void fail(const char* what);               // ends the launch
void meet_block();
void meet_warp(Request& request);
void spin();       // lets all others run
void touched();    // this fiber changed memory that others may wait for
void interrupt();  // with a seed: sometimes lets others run
char* shared_memory();
unsigned short fp16_bits(float value);
unsigned short bf16_bits(float value);
float fp16_value(unsigned short bits);
float bf16_value(unsigned short bits);

template <class Arguments>
const char* launch(void (*kernel)(Arguments), const void* given, uint64_t bytes, const Shape& shape) {
    if (bytes != sizeof(Arguments)) return "arguments: the structure does not have the size of the kernel's";
    struct Whole {
        void (*kernel)(Arguments);
        Arguments arguments;
    } whole{kernel, {}};
    memcpy(&whole.arguments, given, bytes);
    const auto thread = [](const void* called) {
        const Whole& whole = *static_cast<const Whole*>(called);
        whole.kernel(whole.arguments);
    };
    return run(shape, {thread, &whole});
}

inline void check_alignment(const void* address, unsigned bytes) {
    if (reinterpret_cast<uintptr_t>(address) % bytes) fail("misaligned address of a load or store");
}

template <class To, class From>
To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

template <class T>
T shuffle(Operation operation, unsigned mask, T value, int lane) {
    Request request{operation, mask, {bits_as<unsigned>(value), static_cast<unsigned>(lane)}, nullptr};
    meet_warp(request);
    return bits_as<T>(request.words[0]);
}

}  // namespace emulator

// CUDA's own functions.
inline void __syncthreads() { emulator::meet_block(); }
inline void __syncwarp(unsigned mask = ~0u) {
    emulator::Request request{emulator::Operation::meet, mask, {}, nullptr};
    emulator::meet_warp(request);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
    return emulator::shuffle(emulator::Operation::shuffle, mask, value, lane);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
    return emulator::shuffle(emulator::Operation::shuffle_xor, mask, value, lanes);
}
template <class T>
T atomicAdd(T* address, T value) {
    emulator::interrupt();
    const T old = *address;
    *address = old + value;
    emulator::touched();
    return old;
}
inline float __int_as_float(int bits) { return emulator::bits_as<float>(bits); }
inline float __uint_as_float(unsigned bits) { return emulator::bits_as<float>(bits); }
inline int __float_as_int(float value) { return emulator::bits_as<int>(value); }
inline unsigned __float_as_uint(float value) { return emulator::bits_as<unsigned>(value); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }

// Those of csrc/device.cuh.
inline uint4 load_relaxed(const void* address) {
    emulator::check_alignment(address, 16);
    emulator::interrupt();
    return *static_cast<const uint4*>(address);
}
inline uint4 load_relaxed_if(bool there, const void* address) {
    return there ? load_relaxed(address) : uint4{0, 0, 0, 0};
}
inline void store_relaxed(unsigned* address, unsigned value) {
    emulator::interrupt();
    *address = value;
    emulator::touched();
}
inline void store_relaxed(uint4* address, uint4 value) {
    emulator::check_alignment(address, 16);
    emulator::interrupt();
    *address = value;
    emulator::touched();
}
inline uint4 load_constant(const void* address) {
    emulator::check_alignment(address, 16);
    return *static_cast<const uint4*>(address);
}
inline void add_release(unsigned* counter) { atomicAdd(counter, 1u); }
inline unsigned load_acquire(const unsigned* counter) {
    emulator::interrupt();
    return *counter;
}
inline void wait(unsigned&) { emulator::spin(); }
inline void mma_fp16(float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    emulator::Request request{emulator::Operation::mma_fp16, ~0u, {a0, a1, a2, a3, b0, b1}, d};
    emulator::meet_warp(request);
}
inline void mma_bf16(float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    emulator::Request request{emulator::Operation::mma_bf16, ~0u, {a0, a1, a2, a3, b0, b1}, d};
    emulator::meet_warp(request);
}
inline unsigned pack_fp16(float low, float high) {
    return emulator::fp16_bits(low) | static_cast<unsigned>(emulator::fp16_bits(high)) << 16;
}
inline unsigned pack_bf16(float low, float high) {
    return emulator::bf16_bits(low) | static_cast<unsigned>(emulator::bf16_bits(high)) << 16;
}
