// The whole reverse-sampling loop in one launch. reverse_sampler.py defines the formulas, what is where in memory, who
// owns what and the order of additions; persistent.py launches it. Macros: HP is the padded width of the hidden layers;
// OPERAND is fp16 or bf16; EPOCH chooses the exchange; TILES, ROWS and COPIES are fields of persistent.Variant.

#define JOIN_NAMES(a, b) a##b
#define JOIN(a, b) JOIN_NAMES(a, b)
#define MMA JOIN(mma_, OPERAND)
#define PACK JOIN(pack_, OPERAND)

constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int FEATURES = 8 * TILES;            // of a block
constexpr int STACKS = (TILES + 1) / 2;        // of 16 features, the rows of an mma; 8 of them are zero with one tile
constexpr int BLOCKS = HP / FEATURES;          // of one group, which shares its rows with no other
constexpr int GROUPS = HP / (32 * WARPS);      // of 32 input features, in the part of one warp
constexpr int TILE = 8;                        // rows of activations: columns of an mma
constexpr int PAIRS = FEATURES / 2;            // of neighbouring features in a row
constexpr int LARGEST = TILES == 4 ? 16 : 32;  // with which every pair of a chunk has a thread
constexpr int CHUNK = ROWS < LARGEST ? ROWS : LARGEST;  // rows whose partial sums are in shared memory at a time
constexpr int CHUNKS = ROWS / CHUNK;
constexpr int STRIDE = FEATURES + 4;     // floats between rows of a partial sum: whoever writes meets each bank once
constexpr int PARTIAL = CHUNK * STRIDE;  // floats of one warp
// Registers: for weights, for all that is kept through the loop (about), and for loads that are under way.
constexpr int WEIGHTS = 8 * STACKS * 3 * GROUPS;
constexpr int HELD = WEIGHTS + 16 * (CHUNKS - 1);
constexpr int LOADS = HELD <= 104 ? 64 : HELD <= 144 ? 32 : 16;
constexpr bool CROWDED = WEIGHTS > 144;

static_assert(HP % 256 == 0 && (TILES == 1 || TILES == 2 || TILES == 4) && COPIES >= 1, "sizes");
static_assert(ROWS % TILE == 0 && ROWS % CHUNK == 0, "sizes");
static_assert(CHUNK * PAIRS <= THREADS, "every pair of a chunk has its thread");

struct Arguments {  // persistent.py mirrors this field for field
    const uint4* weights;
    const float* biases;
    const float4* coefficients;
    const float* bias;
    const float* condition;
    unsigned short* exchange;
    unsigned* counter;
    float* out;
    int images, samples, noises, steps;
    float slope;
};

static_assert(sizeof(Arguments) == 88, "persistent.py builds 88 bytes");

// ---- Exchange between blocks -----------------------------------------------------------------------------------------
//
// EPOCH 0. A block publishes, meets itself, and adds 1 to the counter of its group with release; whoever has read the
// full count with acquire sees what all of them published.
//
// EPOCH 1. There is no counter and no fence. Two activations travel as one 32-bit word, written and read as a whole,
// and the lowest bit of the word is the parity of the step. A reader takes a word once it has the parity that it waits
// for. The buffer starts with the other one, as the launch clears it, so what an earlier launch left there is never
// taken for an answer. Why no older and no younger value can be taken either:
//   - A word is written once a step, by one thread, so its parity alternates in the order of coherence of that word.
//   - Not older than one step: a thread that has read step i at this address can read nothing older there afterwards
//     (coherence of reads), and step i - 1 has the other parity.
//   - Not younger: the writer writes h1 of step i + 1 only with values of h3 of step i from all blocks; each of them
//     published that after its threads had met behind their reads of h1 and h2 of step i. So every word is overwritten
//     only after every reader has had it, and the writes that follow depend on these reads. The same holds around the
//     loop for h2 and h3.
// Words of different addresses may become visible in any order: nothing relies on it.

__device__ inline unsigned word(float low, float high, unsigned parity) {
    unsigned bits = PACK(low, high);
#if EPOCH
    // One bit less for the lower value, to nearest with ties to even. Numbers only: NaN would become zero.
    if ((bits & 0x7fffu) <= 0x7c00u) bits += bits & (bits >> 1) & 1u;
    bits = (bits & ~1u) | parity;
#endif
    return bits;
}

__device__ inline bool carries(uint4 v, unsigned parity) {
    return !(((v.x ^ parity) | (v.y ^ parity) | (v.z ^ parity) | (v.w ^ parity)) & 1u);
}

__device__ inline void announce(unsigned* counter) {
#if !EPOCH
    __syncthreads();
    if (threadIdx.x == 0) add_release(counter);
#endif
}

// Returns when all that was announced can be read (counter), or is likely to be there (epoch). `source`: the first of
// `rows` rows of Hp activations.
__device__ inline void await(const unsigned* counter, unsigned arrivals, const unsigned short* source, int rows,
                             unsigned parity) {
#if EPOCH
    // Asking for everything again and again would keep the L2 cache busy while others store into it. So with more than
    // a few rows, a warp asks for its part of the last one, and for the rest when that is there.
    const int few = 2, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    __syncwarp();
    if (rows > few && lane < 4 * GROUPS) {
        const unsigned short* at = source + (rows - 1) * HP + (warp * 4 * GROUPS + lane) * 8;
        unsigned asked = 0;
        while (!carries(load_relaxed(at), parity)) wait(asked);
    }
    __syncwarp();
#else
    if (threadIdx.x == 0) {
        unsigned asked = 0;
        while (load_acquire(counter) < arrivals) wait(asked);
    }
    __syncthreads();
#endif
}

// This lane's 16 bytes of group `s` of a tile of rows; zeros in place of a row that does not exist.
template <int G>
__device__ inline uint4 fetch(const unsigned short* at, int tile, int s, int rows) {
    const int row = TILE * tile + threadIdx.x % 32 / 4;
    return load_relaxed_if(row < rows, at + TILE * tile * 256 * G + 32 * s);
}

// Waits until N tiles from `first` that were fetched are there, and takes the parity away.
template <int N, int G>
__device__ inline void settle(uint4 (&words)[N][G], const unsigned short* at, int first, int rows, unsigned parity) {
#if EPOCH
    unsigned asked = 0;
    for (bool again = true; again;) {  // all that is missing is asked for at once
        again = false;
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int s = 0; s < G; s++)
                if (TILE * (first + n) + threadIdx.x % 32 / 4 < rows && !carries(words[n][s], parity)) {
                    words[n][s] = fetch<G>(at, first + n, s, rows);
                    again = true;
                }
        if (again) wait(asked);
    }
    __syncwarp();
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int s = 0; s < G; s++) {
            uint4& v = words[n][s];
            v = make_uint4(v.x & ~1u, v.y & ~1u, v.z & ~1u, v.w & ~1u);
        }
#endif
}

// ---- One layer -------------------------------------------------------------------------------------------------------

// partial[warp][row][feature] of one chunk: weights times the `rows` first rows of `source`.
template <int G>
__device__ inline void product(const uint4 (&weights)[TILES][G], const unsigned short* source, int rows,
                               unsigned parity, float* partial) {
    constexpr int TILES_OF_ROWS = CHUNK / TILE;
    constexpr int FIT = LOADS / (4 * G) < 2 ? 1 : LOADS / (4 * G) < 4 ? 2 : 4;
    constexpr int N = FIT < TILES_OF_ROWS ? FIT : TILES_OF_ROWS;  // tiles of rows that are fetched ahead
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const unsigned short* at = source + g * 256 * G + 32 * warp * G + 8 * t;
    float* sums = partial + warp * PARTIAL + 2 * t * STRIDE + g;
    uint4 words[TILES_OF_ROWS / N][N][G];  // registers of one part are free when those of the next are fetched
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int s = 0; s < G; s++) words[0][n][s] = fetch<G>(at, n, s, rows);
#pragma unroll
    for (int tile = 0; tile < TILES_OF_ROWS; tile++) {
        if (tile && TILE * tile >= rows) break;
        const int part = tile / N, n = tile % N;
        if (n == 0) settle(words[part], at, tile, rows, parity);
#pragma unroll
        for (int m = 0; m < STACKS; m++) {
            float first[4] = {0.f, 0.f, 0.f, 0.f}, second[4] = {0.f, 0.f, 0.f, 0.f};
            const bool two = TILES > 1;
#pragma unroll
            for (int s = 0; s < G; s++) {
                const uint4 v = words[part][n][s], low = weights[2 * m][s], high = weights[two ? 2 * m + 1 : 0][s];
                MMA(first, low.x, two ? high.x : 0u, low.y, two ? high.y : 0u, v.x, v.y);
                MMA(second, low.z, two ? high.z : 0u, low.w, two ? high.w : 0u, v.z, v.w);
                if (m == STACKS - 1 && tile + N < TILES_OF_ROWS)
                    words[part + 1][n][s] = fetch<G>(at, tile + N, s, rows);
            }
            float* to = sums + TILE * tile * STRIDE + 16 * m;
            to[0] = first[0] + second[0];
            to[STRIDE] = first[1] + second[1];
            if (two) {
                to[8] = first[2] + second[2];
                to[STRIDE + 8] = first[3] + second[3];
            }
        }
    }
}

// This thread's pair of every chunk. Partial sums alternate between two places, so one barrier is enough: who writes a
// place again is behind the barrier that all have passed after they read it.
template <int G>
__device__ inline void layer(float2 (&sums)[CHUNKS], const uint4 (&weights)[TILES][G], const unsigned short* source,
                             int rows, unsigned parity, float* partial, unsigned& turn) {
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        if (c && CHUNK * c >= rows) break;
        float* place = partial + (turn ^= 1u) * (WARPS * PARTIAL);
        product(weights, source + c * CHUNK * 256 * G, rows - c * CHUNK, parity, place);
        __syncthreads();
        const int row = threadIdx.x / PAIRS;
        sums[c] = make_float2(0.f, 0.f);
        if (row < CHUNK && c * CHUNK + row < rows) {
            const float* at = place + row * STRIDE + threadIdx.x % PAIRS * 2;
#pragma unroll
            for (int w = 0; w < WARPS; w++) {
                const float2 part = *(const float2*)(at + w * PARTIAL);
                sums[c] = make_float2(sums[c].x + part.x, sums[c].y + part.y);
            }
        }
    }
}

template <int G>
__device__ inline void load_weights(uint4 (&weights)[TILES][G], const uint4* matrix) {
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int s = 0; s < G; s++) {
            const int cta = blockIdx.x * TILES + tile, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
            weights[tile][s] = load_constant(matrix + ((cta * WARPS + warp) * G + s) * 32 + lane);
        }
}

__device__ inline float leaky_relu(float x, float slope) { return x > 0.f ? x : slope * x; }

__device__ inline float2 activation(float2 x, float2 bias, float slope) {
    return make_float2(leaky_relu(x.x + bias.x, slope), leaky_relu(x.y + bias.y, slope));
}

// ---- The loop --------------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS, 1) reverse_sampler(const Arguments a) {
    SHARED(float, partial);  // [2][WARPS][CHUNK][STRIDE], then what threads keep
    const int all = a.images * a.samples, share = (all + gridDim.y - 1) / gridDim.y;
    const int first = blockIdx.y * share, rows = min(share, all - first);
    if (rows <= 0) return;  // a group without rows, all its blocks

    const int matrix = HP / 8 * WARPS * GROUPS * 32;  // 16-byte loads
    uint4 hidden2[TILES][GROUPS], hidden3[TILES][GROUPS], carry[TILES][GROUPS];
    load_weights(hidden2, a.weights);
    load_weights(hidden3, a.weights + matrix);
    load_weights(carry, a.weights + 2 * matrix);

    // This thread's pair: two features of one row in every chunk. What it keeps from step to step is in shared memory,
    // where no other thread looks at it: the weights need the registers.
    const int column = blockIdx.x * FEATURES + threadIdx.x % PAIRS * 2, row = threadIdx.x / PAIRS;
    float2* const kept = (float2*)(partial + 2 * WARPS * PARTIAL) + threadIdx.x;
    float2 &bias2 = kept[0], &bias3 = kept[THREADS];
    const auto state = [&](int c) -> float2& { return kept[(2 + 4 * c) * THREADS]; };
    const auto previous = [&](int c) -> float2& { return kept[(3 + 4 * c) * THREADS]; };
    const auto condition = [&](int c) -> float2& { return kept[(4 + 4 * c) * THREADS]; };
    const auto bias = [&](int c) -> float2& { return kept[(5 + 4 * c) * THREADS]; };  // of the step
    const auto own = [&](int c) { return row < CHUNK && c * CHUNK + row < rows; };

    bias2 = *(const float2*)(a.biases + column);
    bias3 = *(const float2*)(a.biases + HP + column);
    int table_row[CHUNKS] = {};  // of the bias, of the next step
    const auto table = [&](int c) { return *(const float2*)(a.bias + (long long)table_row[c] * HP + column); };
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        if (!own(c)) continue;
        const int r = first + c * CHUNK + row, image = r / a.samples;
        table_row[c] = (a.noises > 1 ? image : 0) * a.samples + r % a.samples;
        state(c) = previous(c) = make_float2(0.f, 0.f);
        condition(c) = *(const float2*)(a.condition + (long long)image * HP + column);
        bias(c) = table(c);
    }

    // exchange[layer][copy][row][feature]. Each block writes all copies and reads one: fewer blocks ask for a line.
    const int copy = all * HP, base = first * HP;
    unsigned* counter = a.counter + 32 * blockIdx.y;
    unsigned parity = 1, arrivals = 0, turn = 0;
    // One offset that moves on takes fewer registers than the addresses of three layers.
    int offset = base;
    const auto publish = [&](int c, float2 h) {
        unsigned short* to = a.exchange + (offset + (c * CHUNK + row) * HP + column);
        const unsigned bits = word(h.x, h.y, parity);
#pragma unroll
        for (int k = 0; k < COPIES; k++) store_relaxed((unsigned*)(to + k * copy), bits);
    };
    const auto source = [&] { return a.exchange + (offset + (int)(blockIdx.x % COPIES) * copy); };
    const auto move_on = [&] {
        offset += COPIES * copy;
        if (offset >= 3 * COPIES * copy) offset = base;
    };

    for (int step = 0;; step++, parity ^= 1u) {
        float2 sums[CHUNKS];
        const bool last = step == a.steps - 1;
#pragma unroll
        for (int c = 0; c < CHUNKS; c++)
            if (own(c)) {
                const float2 p = state(c), q = condition(c);
                publish(c, activation(make_float2(p.x + q.x, p.y + q.y), bias(c), a.slope));
            }
        announce(counter);
        // Rows of tables are asked for while this block has to wait anyway.
        float2 next[CHUNKS];
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            table_row[c] += a.noises * a.samples;
            if (own(c) && !last) next[c] = table(c);
        }
        const auto keep_next = [&] {
#pragma unroll
            for (int c = 0; c < CHUNKS; c++)
                if (own(c) && !last) bias(c) = next[c];
        };
        await(counter, arrivals += BLOCKS, source(), rows, parity);
        if (CROWDED) keep_next();  // later, nobody has to wait for them, but they take registers until then
        layer(sums, hidden2, source(), rows, parity, partial, turn);
        if (!CROWDED) keep_next();
        move_on();
#pragma unroll
        for (int c = 0; c < CHUNKS; c++)
            if (own(c)) publish(c, activation(sums[c], bias2, a.slope));
        announce(counter);
        await(counter, arrivals += BLOCKS, source(), rows, parity);
        layer(sums, hidden3, source(), rows, parity, partial, turn);
        move_on();
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            if (!own(c)) continue;
            const float2 h3 = activation(sums[c], bias3, a.slope);
            if (last)
                *(float2*)(a.out + (long long)(first + c * CHUNK + row) * HP + column) = h3;
            else
                publish(c, h3);
        }
        if (last) return;
        announce(counter);
        const float4 f = a.coefficients[step];
        await(counter, arrivals += BLOCKS, source(), rows, parity);
        layer(sums, carry, source(), rows, parity, partial, turn);
        move_on();
        // This order of operations, rounded after each (persistent.py forbids fusing them), is that of the twin.
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            if (!own(c)) continue;
            const float2 p = state(c), g = sums[c], before = previous(c);
            state(c) = make_float2(f.x * p.x + f.y * g.x + f.z * before.x,
                                   f.x * p.y + f.y * g.y + f.z * before.y);
            previous(c) = g;
        }
    }
}
