// One step of a linear sampler in the carried space, fused with the activation that the next matrix product reads.
//
//   state  <- A state + B update + C previous + S noise[step]          [rows, width], float32
//   hidden <- leaky_relu(state + image_bias + time_bias[step])         [rows, width], float16, optional
//
// (A, B, C, S) is row `step` of a table, and `step` lives in device memory, so a CUDA graph captured once serves them all.

struct Arguments {  // step_update.py mirrors this field for field
    const int* step;             // one int32
    const float4* coefficients;  // [steps, 4]: A, B, C, S
    const float4* noise;         // [steps, width]: the same for every row
    const float4* update;        // [rows, width]
    const float4* image_bias;    // [rows, width], with hidden only
    const float4* time_bias;     // [steps, width], with hidden only
    float4* state;               // [rows, width], in place
    float4* previous;            // [rows, width] or null; holds this step's update afterwards
    uint2* hidden;               // [rows, width] float16 or null
    int rows, width4, steps;     // width4 = width / 4
    float slope;                 // leaky_relu's slope below zero
};

static_assert(sizeof(Arguments) == 88, "step_update.py builds 88 bytes");

__device__ inline float4 axpy(float a, float4 x, float4 y) {
    return make_float4(fmaf(a, x.x, y.x), fmaf(a, x.y, y.y), fmaf(a, x.z, y.z), fmaf(a, x.w, y.w));
}

__device__ inline float leaky_relu(float x, float slope) { return x > 0.f ? x : slope * x; }

extern "C" __global__ void __launch_bounds__(128) step_update(const Arguments a) {
    const int i = blockIdx.x * 128 + threadIdx.x;  // counts groups of four floats
    if (i >= a.rows * a.width4) return;
    const int step = *a.step;
    if (step < 0 || step >= a.steps) {  // a wrong step must show in the answer, not read past a table
        const float nan = __int_as_float(0x7fffffff);
        a.state[i] = make_float4(nan, nan, nan, nan);
        if (a.hidden) a.hidden[i] = make_uint2(0x7fff7fffu, 0x7fff7fffu);
        return;
    }
    const long long in_table = (long long)step * a.width4 + i % a.width4;
    const float4 c = a.coefficients[step];  // x = A, y = B, z = C, w = S
    const float4 update = a.update[i], old = a.state[i];

    // A term whose coefficient is zero is left out: its buffer may hold anything, and 0 * NaN is NaN.
    float4 state = make_float4(c.y * update.x, c.y * update.y, c.y * update.z, c.y * update.w);
    if (c.x != 0.f) state = axpy(c.x, old, state);
    if (c.w != 0.f) state = axpy(c.w, a.noise[in_table], state);
    if (a.previous) {
        if (c.z != 0.f) state = axpy(c.z, a.previous[i], state);
        a.previous[i] = update;
    }
    a.state[i] = state;

    if (a.hidden) {
        const float4 h = axpy(1.f, state, axpy(1.f, a.image_bias[i], a.time_bias[in_table]));
        a.hidden[i] = make_uint2(pack_fp16(leaky_relu(h.x, a.slope), leaky_relu(h.y, a.slope)),
                                 pack_fp16(leaky_relu(h.z, a.slope), leaky_relu(h.w, a.slope)));
    }
}
