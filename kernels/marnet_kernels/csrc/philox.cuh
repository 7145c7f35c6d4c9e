// Counter-based noise, the same numbers as `marnet_kernels/philox.py`, which defines them.

// Philox4x32-10: 128 random bits for a counter of 128 bits and a key of 64.
__device__ inline uint4 philox4x32_10(uint4 counter, uint2 key) {
    for (int round = 0; round < 10; round++) {
        const unsigned low0 = 0xD2511F53u * counter.x, high0 = multiply_high(0xD2511F53u, counter.x);
        const unsigned low1 = 0xCD9E8D57u * counter.z, high1 = multiply_high(0xCD9E8D57u, counter.z);
        counter = make_uint4(high1 ^ counter.y ^ key.x, low1, high0 ^ counter.w ^ key.y, low0);
        key = make_uint2(key.x + 0x9E3779B9u, key.y + 0xBB67AE85u);
    }
    return counter;
}

// Two standard normals of two words. u1 in (0, 1] has a finite logarithm; both are exact in float32.
__device__ inline float2 box_muller(unsigned word0, unsigned word1) {
    const float u1 = ((float)(word0 >> 8) + 1.f) * 0x1p-24f, u2 = (float)(word1 >> 8) * 0x1p-24f;
    const float radius = sqrtf(-2.f * logf(u1));
    float sine, cosine;
    sincos_turns(u2, &sine, &cosine);
    return make_float2(radius * cosine, radius * sine);
}

// Elements 4 g .. 4 g + 3 of one draw: counter = (g, step, low and high word of the trajectory), key = (low and high
// word of the seed).
__device__ inline float4 normal4(uint4 counter, uint2 key) {
    const uint4 bits = philox4x32_10(counter, key);
    const float2 first = box_muller(bits.x, bits.y), second = box_muller(bits.z, bits.w);
    return make_float4(first.x, first.y, second.x, second.y);
}
