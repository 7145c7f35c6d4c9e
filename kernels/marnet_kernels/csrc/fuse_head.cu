// What comes after the persistent loop, in one cooperative launch for a few rows, where launches and not bytes cost:
//
//   aligned = leaky_relu(Wp x_v + bp)      [images, aligned]
//   x_CDR   = W4 h3 + b4                   [rows, semantic]      rows = images * samples
//   fused   = FUSION(aligned, x_CDR)       [rows, fused]
//   logits  = Wc fused + bc                [rows, classes]
//
// and, in a launch of its own before the loop, the condition q = Wq x_v + bq  [images, hidden].
//
// A warp makes one feature, for ROWS rows at a time (a power of two, on which no answer depends): the weights are read
// 16 bytes a lane, 512 neighbouring bytes a warp, from the L2 cache once and for further rows from L1; the rows, which
// all warps read, come from the caches, too. Weights are OPERAND (fp16 or bf16); rows, products and sums are float32.
// The classifier needs every fused feature of its row, so between the two parts all blocks meet once.

#define THREADS 256
#define WARPS (THREADS / 32)
#define CHUNK (ROWS > 1 ? 2 : 4)  // 16-byte loads of weights in flight for one product; rows take registers, too
#define STEP (CHUNK * 32 * 8)     // weights that a warp takes at once
#define LANES (32 / ROWS)         // that end with the sum of the same row
#define JOIN(a, b) a##b
#define FROM(type) JOIN(from_, type)

struct Arguments {                  // fuse_head.py mirrors this field for field
    const unsigned short* weights;  // Wp [aligned], W4 [semantic], Wc [classes]; rows padded with zeros to 8 values
    const float* biases;            // bp, b4, bc, one after another
    const float* vision;            // x_v [images, vision_width]
    const float* hidden;            // h3 [rows, hidden_width]
    unsigned* counter;              // 0 before the launch
    float* logits;                  // [rows, classes]
    float* fused;                   // [rows, fused]
    int images, samples, vision_width, hidden_width, aligned_width, semantic_width, classes;
    int fusion;  // 0 concat, 1 add, 2 mul, 3 sum, 4 hm
    float slope;
};

struct ConditionArguments {         // fuse_head.py mirrors this field for field
    const unsigned short* weights;  // Wq [hidden_width], rows padded with zeros to 8 values
    const float* biases;            // bq
    const float* vision;            // x_v [images, vision_width]
    float* condition;               // q [images, hidden_width]
    int images, vision_width, hidden_width;
};

static_assert(sizeof(Arguments) == 96 && sizeof(ConditionArguments) == 48, "fuse_head.py builds 96 and 48 bytes");

typedef uint4 Chunk[CHUNK];

__device__ inline int padded(int width) { return (width + 7) / 8 * 8; }

__device__ inline int lane_index() { return threadIdx.x % 32; }

// Beyond the width, what is read is the start of the row, and the weights become 0: without a branch, all loads of a
// chunk are under way at once.
__device__ inline void fetch(Chunk& chunk, const unsigned short* weights, int from, int width) {
    #pragma unroll
    for (int g = 0; g < CHUNK; g++) {
        const int k = from + 256 * g + 8 * lane_index();
        chunk[g] = load_constant(weights + (k < width ? k : 0));
        if (k >= width) chunk[g] = make_uint4(0u, 0u, 0u, 0u);
    }
}

__device__ inline float value_of(unsigned pair, int upper) {
    return FROM(OPERAND)((unsigned short)(upper ? pair >> 16 : pair & 0xffffu));
}

__device__ inline float dot(unsigned low, unsigned high, float4 x, float sum) {
    sum = fmaf(value_of(low, 0), x.x, sum);
    sum = fmaf(value_of(low, 1), x.y, sum);
    sum = fmaf(value_of(high, 0), x.z, sum);
    return fmaf(value_of(high, 1), x.w, sum);
}

// Rows first .. first + N - 1 of an input with `rows` rows, of which `repeat` neighbours share one in memory. Rows
// beyond the last repeat it.
struct Rows {
    const float* x;
    int first, rows, repeat, width;
};

__device__ inline const float* row_at(const Rows& in, int r) {
    return in.x + min(in.first + r, in.rows - 1) / in.repeat * in.width;
}

// Each lane's part of one row of weights times N rows; its `chunk` has the first weights already. Plain loads, not
// ld.global.nc: other blocks may have written the rows in this launch.
template <int N>
__device__ inline void multiply(float (&sum)[N], Chunk& chunk, const unsigned short* weights, const Rows& in) {
    const int width = in.width;
    const float* x[N];
    #pragma unroll
    for (int r = 0; r < N; r++) sum[r] = 0.f, x[r] = row_at(in, r);
    if (width % 4) {  // rows are not aligned to 16 bytes
        #pragma unroll 1
        for (int k = lane_index(); k < width; k += 32) {
            const float weight = FROM(OPERAND)(weights[k]);
            #pragma unroll
            for (int r = 0; r < N; r++) sum[r] = fmaf(weight, x[r][k], sum[r]);
        }
        return;
    }
    #pragma unroll 1
    for (int from = 0; from < width; from += STEP) {
        if (from) fetch(chunk, weights, from, width);
        #pragma unroll
        for (int g = 0; g < CHUNK; g++) {
            const int k = from + 256 * g + 8 * lane_index();
            const int low = k < width ? k : 0, high = k + 4 < width ? k + 4 : 0;
            #pragma unroll
            for (int r = 0; r < N; r++) {
                sum[r] = dot(chunk[g].x, chunk[g].y, *(const float4*)(x[r] + low), sum[r]);
                sum[r] = dot(chunk[g].z, chunk[g].w, *(const float4*)(x[r] + high), sum[r]);
            }
        }
    }
}

// The warp's sum of row lane / (32 / N). Each exchange halves the rows that a lane still adds up.
template <int N> __device__ inline float warp_sum(float (&sum)[N]) {
    int mask = 16;
    #pragma unroll
    for (int half = N / 2; half > 0; half /= 2, mask /= 2) {
        const bool upper = lane_index() & mask;
        #pragma unroll
        for (int r = 0; r < half; r++) {
            const float given = upper ? sum[r] : sum[r + half], kept = upper ? sum[r + half] : sum[r];
            sum[r] = kept + __shfl_xor_sync(~0u, given, mask);
        }
    }
    #pragma unroll
    for (; mask > 0; mask /= 2) sum[0] += __shfl_xor_sync(~0u, sum[0], mask);
    return sum[0];
}

// exp never overflows here, so the logarithm of the sigmoid is finite wherever x is.
__device__ inline float log_sigmoid(float x) { return (x < 0.f ? x : 0.f) - log1pf(expf(-fabsf(x))); }

__device__ inline float fuse(int fusion, float a, float b) {
    if (fusion == 1) return a + b;
    if (fusion == 2) return a * b;
    if (fusion == 3) return log_sigmoid(a + b);
    const float log_h = log_sigmoid(a) + log_sigmoid(b);
    return log_h - log1pf(expf(log_h));
}

// All blocks have written what they wrote before. Reads after it may be plain ones: the acquire makes them fresh.
__device__ inline void meet(unsigned* counter) {
    __syncthreads();
    if (threadIdx.x == 0) {
        add_release(counter);
        unsigned asked = 0;
        while (load_acquire(counter) < gridDim.x) wait(asked);
    }
    __syncthreads();
}

// Feature i of aligned and x_CDR, and what becomes of them, for rows first .. first + ROWS - 1. Only concat has
// features of one without the other; what is missing is a product over no inputs.
__device__ inline void make_feature(const Arguments& a, int i, int first, int fused_width) {
    const int rows = a.images * a.samples, row = first + lane_index() / LANES;
    const int vision = i < a.aligned_width ? a.vision_width : 0, hidden = i < a.semantic_width ? a.hidden_width : 0;
    const int stride = padded(a.vision_width);
    const unsigned short* of_vision = a.weights + min(i, a.aligned_width - 1) * stride;
    const unsigned short* of_hidden =
        a.weights + a.aligned_width * stride + min(i, a.semantic_width - 1) * a.hidden_width;
    Chunk chunk, next;
    fetch(chunk, of_vision, 0, vision);
    fetch(next, of_hidden, 0, hidden);
    float sum[ROWS];
    multiply(sum, chunk, of_vision, {a.vision, first, rows, a.samples, vision});
    float aligned = warp_sum(sum) + (vision ? a.biases[i] : 0.f);
    aligned = aligned > 0.f ? aligned : a.slope * aligned;
    multiply(sum, next, of_hidden, {a.hidden, first, rows, 1, hidden});
    const float refined = warp_sum(sum) + (hidden ? a.biases[a.aligned_width + i] : 0.f);
    if (lane_index() % LANES || row >= rows) return;
    float* out = a.fused + row * fused_width + i;
    if (a.fusion) *out = fuse(a.fusion, aligned, refined);
    else {
        if (vision) *out = aligned;
        if (hidden) out[a.aligned_width] = refined;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) fuse_head(const Arguments a) {
    const int first_warp = blockIdx.x * WARPS + threadIdx.x / 32, warps = gridDim.x * WARPS;
    const int rows = a.images * a.samples;
    const int fused_width = a.fusion == 0 ? a.aligned_width + a.semantic_width : a.aligned_width;
    #pragma unroll 1
    for (int i = first_warp; i < max(a.aligned_width, a.semantic_width); i += warps) {
        #pragma unroll 1
        for (int row = 0; row < rows; row += ROWS) make_feature(a, i, row, fused_width);
    }

    // A warp makes one class of one row. The weights of its first are on their way while the blocks wait.
    const unsigned short* class_weights =
        a.weights + a.aligned_width * padded(a.vision_width) + a.semantic_width * a.hidden_width;
    const float* class_biases = a.biases + a.aligned_width + a.semantic_width;
    const int logits = rows * a.classes, stride = padded(fused_width);
    Chunk chunk;
    fetch(chunk, class_weights + first_warp % a.classes * stride, 0, fused_width);
    meet(a.counter);
    #pragma unroll 1
    for (int i = first_warp; i < logits; i += warps) {
        const unsigned short* weights = class_weights + i % a.classes * stride;
        if (i != first_warp) fetch(chunk, weights, 0, fused_width);
        float sum[1];
        multiply(sum, chunk, weights, {a.fused, i / a.classes, rows, 1, fused_width});
        const float logit = warp_sum(sum) + class_biases[i % a.classes];
        if (lane_index() == 0) a.logits[i] = logit;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) condition(const ConditionArguments a) {
    const int i = blockIdx.x * WARPS + threadIdx.x / 32;
    if (i >= a.hidden_width) return;
    const unsigned short* weights = a.weights + i * padded(a.vision_width);
    #pragma unroll 1
    for (int first = 0; first < a.images; first += ROWS) {
        Chunk chunk;
        fetch(chunk, weights, 0, a.vision_width);
        float sum[ROWS];
        multiply(sum, chunk, weights, {a.vision, first, a.images, 1, a.vision_width});
        const float q = warp_sum(sum) + a.biases[i];
        const int row = first + lane_index() / LANES;
        if (lane_index() % LANES == 0 && row < a.images) a.condition[row * a.hidden_width + i] = q;
    }
}
