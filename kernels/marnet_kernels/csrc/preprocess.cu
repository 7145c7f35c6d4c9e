// Photographs of any sizes, uint8 RGB, -> one normalised batch, in two launches for all of them:
//
//   first              one axis of every image is resized, as far as the crop needs it
//   second_32, _16     the other axis, and each grey level is replaced by its normalised value
//
// The arithmetic is Pillow's for 8 bits a channel, to the bit: weights are integers of 22 fractional bits, sums are
// integers, and each pass rounds to a grey level. preprocess.py makes the weights, and says of each image which axis
// comes first. Where the crop is larger than the resized picture all weights are 0, which gives black. A position reads
// a number of taps that is a multiple of 4; the weights of those it does not have are 0.

#define THREADS 256
#define ROWS 4           // that a thread resizes across with the weights it has loaded
#define HALF (1u << 21)  // of a grey level, in 22 fractional bits
#define LOOKUP_BYTES 3072

struct Image {                 // preprocess.py mirrors this field for field
    long long source;          // bytes before the first pixel that the crop needs
    long long scratch;         // bytes before its half resized pixels
    int pitch;                 // bytes of a source row
    int rows, columns;         // of the source that the crop needs
    int across, across_quads;  // filter over columns: int32s before it, and its number of taps / 4
    int down, down_quads;      // filter over rows
    int down_first;            // whether rows are resized first
};

struct Arguments {                // preprocess.py mirrors this field for field
    const unsigned char* source;  // HWC; each starts at a multiple of 16, with 16 bytes or more after its last pixel
    const unsigned char* tables;  // [3][256] values of the output's type in 3072 bytes; Image [images]; filters
    unsigned char* scratch;       // of an image: down_first [height][row_bytes] HWC, else [3][rows][stride]
    void* out;                    // [images, 3, height, width], float or 16 bits
    int images, height, width;
    int stride;  // width up to a multiple of 4
};

static_assert(sizeof(Image) == 48 && sizeof(Arguments) == 48, "preprocess.py builds 48 and 48 bytes");

// A filter is: the first tap [positions] and the weights [quads][positions][4], both int32. Neighbouring threads have
// neighbouring positions, so a warp reads 512 contiguous bytes.
struct Filter {
    const int* starts;
    const uint4* weights;
    int positions, quads;
};

__device__ inline const Image& image_at(const Arguments& a, int index) {
    return ((const Image*)(a.tables + LOOKUP_BYTES))[index];
}

__device__ inline Filter filter_at(const Arguments& a, int offset, int length, int quads) {
    const int positions = (length + 3) / 4 * 4;
    const int* starts = (const int*)(a.tables + LOOKUP_BYTES + a.images * sizeof(Image)) + offset;
    return {starts, (const uint4*)(starts + positions), positions, quads};
}

__device__ inline int row_bytes(const Image& image) { return (3 * image.columns + 3) / 4 * 4; }

__device__ inline unsigned byte_of(unsigned word, int index) { return word >> (8 * index) & 255u; }

// The four bytes that start `shift` bits into two words.
__device__ inline unsigned four_bytes(unsigned low, unsigned high, int shift) {
    return (unsigned)(((unsigned long long)high << 32 | low) >> shift);
}

// Weights may be negative: sums are taken modulo 2^32, and what they wrap around to is the signed sum, which fits.
__device__ inline unsigned grey_level(unsigned sum) { return (unsigned)min(max((int)sum >> 22, 0), 255); }

struct Pixel {
    unsigned red, green, blue;  // sums before they are rounded
};

// Column x of rows first .. first + ROWS - 1 (the last of them again beyond it), of HWC pixels that start anywhere in
// a word: words are read, and shifted by what the row is off.
__device__ inline void across(Pixel (&sum)[ROWS], const unsigned char* pixels, long long start, int pitch, int first,
                              int rows, const Filter& filter, int x) {
    const unsigned* words[ROWS];
    int shift[ROWS];
    unsigned low[ROWS];
    #pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const long long at = start + (long long)min(first + r, rows - 1) * pitch + 3 * filter.starts[x];
        words[r] = (const unsigned*)(pixels + (at & ~3ll));
        shift[r] = 8 * (int)(at & 3);
        low[r] = *words[r];
        sum[r] = {HALF, HALF, HALF};
    }
    for (int quad = 0; quad < filter.quads; quad++) {
        const uint4 k = filter.weights[quad * filter.positions + x];
        #pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const unsigned w1 = words[r][1], w2 = words[r][2], w3 = words[r][3];
            words[r] += 3;
            const unsigned a = four_bytes(low[r], w1, shift[r]);  // red, green, blue, red
            const unsigned b = four_bytes(w1, w2, shift[r]);      // green, blue, red, green
            const unsigned c = four_bytes(w2, w3, shift[r]);      // blue, red, green, blue
            low[r] = w3;
            sum[r].red += k.x * byte_of(a, 0) + k.y * byte_of(a, 3) + k.z * byte_of(b, 2) + k.w * byte_of(c, 1);
            sum[r].green += k.x * byte_of(a, 1) + k.y * byte_of(b, 0) + k.z * byte_of(b, 3) + k.w * byte_of(c, 2);
            sum[r].blue += k.x * byte_of(a, 2) + k.y * byte_of(b, 1) + k.z * byte_of(c, 0) + k.w * byte_of(c, 3);
        }
    }
}

// Row y of four neighbouring bytes, whatever they are: `start` is where they are in row 0.
__device__ inline void down(unsigned (&sum)[4], const unsigned char* bytes, long long start, int pitch, int rows,
                            const Filter& filter, int y) {
    const int first = filter.starts[y];
    #pragma unroll
    for (int p = 0; p < 4; p++) sum[p] = HALF;
    for (int quad = 0; quad < filter.quads; quad++) {
        const uint4 weights = filter.weights[quad * filter.positions + y];
        const unsigned k[4] = {weights.x, weights.y, weights.z, weights.w};
        #pragma unroll
        for (int j = 0; j < 4; j++) {
            // Beyond the last row the weight is 0.
            const long long at = start + (long long)min(first + 4 * quad + j, rows - 1) * pitch;
            const unsigned* word = (const unsigned*)(bytes + (at & ~3ll));
            const int shift = 8 * (int)(at & 3);
            const unsigned four = shift ? four_bytes(word[0], word[1], shift) : word[0];
            #pragma unroll
            for (int p = 0; p < 4; p++) sum[p] += k[j] * byte_of(four, p);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 3) first(const Arguments a) {
    const Image image = image_at(a, blockIdx.y);
    const int i = blockIdx.x * THREADS + threadIdx.x;
    unsigned char* scratch = a.scratch + image.scratch;
    if (image.down_first) {
        const int words = row_bytes(image) / 4, y = i / words, at = 4 * (i % words);
        if (y >= a.height) return;
        unsigned sum[4], word = 0u;
        down(sum, a.source, image.source + at, image.pitch, image.rows,
             filter_at(a, image.down, a.height, image.down_quads), y);
        #pragma unroll
        for (int p = 0; p < 4; p++) word |= grey_level(sum[p]) << (8 * p);
        *(unsigned*)(scratch + (long long)y * 4 * words + at) = word;
        return;
    }
    const int x = i % a.stride, row = i / a.stride * ROWS;
    if (row >= image.rows) return;
    Pixel sum[ROWS];
    across(sum, a.source, image.source, image.pitch, row, image.rows,
           filter_at(a, image.across, a.width, image.across_quads), x);
    const long long plane = (long long)image.rows * a.stride;
    #pragma unroll
    for (int r = 0; r < ROWS; r++) {
        if (row + r >= image.rows) return;
        unsigned char* out = scratch + (long long)(row + r) * a.stride + x;
        out[0] = (unsigned char)grey_level(sum[r].red);
        out[plane] = (unsigned char)grey_level(sum[r].green);
        out[2 * plane] = (unsigned char)grey_level(sum[r].blue);
    }
}

template <typename Value> struct alignas(4 * sizeof(Value)) Four { Value at[4]; };

template <typename Value> __device__ inline void second(const Arguments& a) {
    SHARED(char, memory);
    Value* normalised = (Value*)memory;  // [3][256]
    for (int c = 0; c < 3; c++) normalised[256 * c + threadIdx.x] = ((const Value*)a.tables)[256 * c + threadIdx.x];
    __syncthreads();

    const Image image = image_at(a, blockIdx.y);
    const int i = blockIdx.x * THREADS + threadIdx.x;
    const long long plane = (long long)a.height * a.width;
    Value* out = (Value*)a.out + 3 * plane * blockIdx.y;
    if (image.down_first) {
        const int x = i % a.stride, row = i / a.stride * ROWS;
        if (row >= a.height || x >= a.width) return;
        Pixel sum[ROWS];
        across(sum, a.scratch, image.scratch, row_bytes(image), row, a.height,
               filter_at(a, image.across, a.width, image.across_quads), x);
        #pragma unroll
        for (int r = 0; r < ROWS; r++) {
            if (row + r >= a.height) return;
            Value* pixel = out + (long long)(row + r) * a.width + x;
            pixel[0] = normalised[grey_level(sum[r].red)];
            pixel[plane] = normalised[256 + grey_level(sum[r].green)];
            pixel[2 * plane] = normalised[512 + grey_level(sum[r].blue)];
        }
        return;
    }
    const int words = a.stride / 4, x = 4 * (i % words), y = i / words % a.height, channel = i / words / a.height;
    if (channel >= 3) return;
    unsigned sum[4];
    down(sum, a.scratch, image.scratch + (long long)channel * image.rows * a.stride + x, a.stride, image.rows,
         filter_at(a, image.down, a.height, image.down_quads), y);
    Four<Value> four;
    #pragma unroll
    for (int p = 0; p < 4; p++) four.at[p] = normalised[256 * channel + grey_level(sum[p])];
    out += channel * plane + (long long)y * a.width + x;
    if (a.width % 4 == 0) {
        *(Four<Value>*)out = four;
        return;
    }
    #pragma unroll
    for (int p = 0; p < 4; p++)
        if (x + p < a.width) out[p] = four.at[p];
}

extern "C" __global__ void __launch_bounds__(THREADS, 3) second_32(const Arguments a) { second<float>(a); }
extern "C" __global__ void __launch_bounds__(THREADS, 3) second_16(const Arguments a) { second<unsigned short>(a); }
