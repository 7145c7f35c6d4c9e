// The scheduler behind emulator.h.
#include <sys/mman.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#if !defined(__x86_64__) || defined(PORTABLE_SWITCH)
#include <ucontext.h>
#endif

#include "emulator.h"

uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace {

constexpr unsigned LANES = 32;
// A multiple of 16 but not of 4096: equal frames of many fibers would else compete for a few sets of the cache.
constexpr size_t STACK_BYTES = 32 * 1024 + 9 * 64;
constexpr size_t STACK_RESERVE = 1024;  // closer than this to its end, a stack counts as too small
constexpr unsigned PATIENCE = 100;      // rounds in which no fiber gets anywhere, before it is a deadlock
constexpr size_t GUARD_BYTES = 256;     // on both sides of a block's shared memory
constexpr char GUARD = '\xA5';

#if defined(__x86_64__) && !defined(PORTABLE_SWITCH)

struct Context {
    char* stack_pointer;
};

extern "C" void emulator_switch(char** from, char* to);
asm(R"(
.text
.hidden emulator_switch
.globl emulator_switch
.type emulator_switch, @function
emulator_switch:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
)");

void switch_to(Context& from, const Context& to) { emulator_switch(&from.stack_pointer, to.stack_pointer); }

void prepare(Context& context, char* stack, void (*entry)()) {
    // What emulator_switch pops: six registers and the address to go to. Above it, where a function expects it, the
    // address that it would return to; at the start of a function it is 8 bytes below a multiple of 16.
    uintptr_t top = reinterpret_cast<uintptr_t>(stack + STACK_BYTES) & ~uintptr_t{15};
    void** slot = reinterpret_cast<void**>(top);
    *--slot = nullptr;
    *--slot = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; i++) *--slot = nullptr;
    context.stack_pointer = reinterpret_cast<char*>(slot);
}

bool overflowed(const Context& context, const char* stack) { return context.stack_pointer < stack + STACK_RESERVE; }

#else  // slower, as it saves the signal mask with a system call

using Context = ucontext_t;

void switch_to(Context& from, const Context& to) { swapcontext(&from, &to); }

void prepare(Context& context, char* stack, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = STACK_BYTES;
    makecontext(&context, entry, 0);
}

bool overflowed(const Context&, const char*) { return false; }

#endif

using emulator::Operation;
using emulator::Request;

enum class State { ready, spinning, at_warp, at_block, done };

struct Thread {
    Context context;
    char* stack;
    Request* request;  // while at_warp
    State state;
};

struct Block {
    std::vector<Thread> threads;  // empty before the first and after the last turn
    std::unique_ptr<char[]> shared;
    unsigned alive = 0;
    bool finished = false;
};

// In which order the members of a group run.
struct Order {
    unsigned count, start;
    bool backwards;
    unsigned operator()(unsigned i) const { return (start + (backwards ? count - i : i)) % count; }
};

class Launch {
   public:
    Launch(const emulator::Shape& shape, const emulator::Call& call)
        : shape(shape), call(call), blocks(size_t{shape.grid_x} * shape.grid_y), random_state(shape.seed) {}
    ~Launch() {
        for (char* stacks : all_stacks) munmap(stacks, stacks_bytes());
    }

    void schedule();
    void suspend(State state);
    uint64_t random();

    const emulator::Shape& shape;
    const emulator::Call& call;
    std::string error;
    uint64_t progress = 0;  // changes whenever a fiber gets somewhere
    Block* block = nullptr;
    Thread* thread = nullptr;

   private:
    std::vector<Block> blocks;
    std::vector<char*> all_stacks, free_stacks;  // each for a whole block
    Context scheduler;
    uint64_t random_state;

    size_t stacks_bytes() const { return STACK_BYTES * shape.block; }
    Order order(unsigned count);
    bool begin(Block& block);
    void end(Block& block);
    void turn(unsigned index);
    void run_warp(Thread* lanes, unsigned first, unsigned count);
    bool meet_lanes(Thread* lanes, unsigned count);
    void resume(Thread& next);
    std::string deadlock() const;
};

Launch* now;  // the launch that runs

void enter() {
    now->call.thread(now->call.arguments);
    now->block->alive--;
    now->progress++;
    now->suspend(State::done);
}

uint64_t Launch::random() {  // splitmix64
    uint64_t z = random_state += 0x9E3779B97F4A7C15;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    return z ^ z >> 31;
}

Order Launch::order(unsigned count) {
    if (!shape.seed) return {count, 0, false};
    const uint64_t bits = random();
    return {count, static_cast<unsigned>((bits >> 1) % count), (bits & 1) != 0};
}

void Launch::schedule() {
    size_t unfinished = blocks.size();
    unsigned idle = 0;
    while (unfinished) {
        const uint64_t before = progress;
        const Order visit = order(blocks.size());
        for (unsigned i = 0; i < blocks.size(); i++) {
            const unsigned index = visit(i);
            if (blocks[index].finished) continue;
            turn(index);
            if (!error.empty()) return;
            unfinished -= blocks[index].finished;
        }
        idle = progress == before ? idle + 1 : 0;
        if (idle > PATIENCE) {
            error = deadlock();
            return;
        }
    }
}

bool Launch::begin(Block& block) {
    if (free_stacks.empty()) {
        void* stacks = mmap(nullptr, stacks_bytes(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                            -1, 0);
        if (stacks == MAP_FAILED) return false;
        madvise(stacks, stacks_bytes(), MADV_NOHUGEPAGE);  // most of a stack is never touched
        all_stacks.push_back(static_cast<char*>(stacks));
        free_stacks.push_back(static_cast<char*>(stacks));
    }
    char* stacks = free_stacks.back();
    free_stacks.pop_back();
    block.threads.resize(shape.block);
    block.alive = shape.block;
    for (unsigned i = 0; i < shape.block; i++) {
        Thread& thread = block.threads[i];
        thread.stack = stacks + STACK_BYTES * i;
        thread.state = State::ready;
        prepare(thread.context, thread.stack, enter);
    }
    block.shared.reset(new char[shape.shared_bytes + 2 * GUARD_BYTES]);
    memset(block.shared.get(), GUARD, shape.shared_bytes + 2 * GUARD_BYTES);
    memset(block.shared.get() + GUARD_BYTES, 0xFF, shape.shared_bytes);  // every float is NaN
    return true;
}

void Launch::end(Block& block) {
    const char* before = block.shared.get();
    const char* after = before + GUARD_BYTES + shape.shared_bytes;
    for (size_t i = 0; i < GUARD_BYTES; i++) {
        if (before[i] != GUARD || after[i] != GUARD) {
            error = "the kernel wrote outside of the " + std::to_string(shape.shared_bytes) +
                    " bytes of shared memory that it was launched with";
            break;
        }
    }
    free_stacks.push_back(block.threads.front().stack);
    block.threads = {};
    block.shared.reset();
    block.finished = true;
}

// Runs a block until each of its threads has exited or waits for another block.
void Launch::turn(unsigned index) {
    block = &blocks[index];
    blockIdx = {index % shape.grid_x, index / shape.grid_x, 0};
    if (block->threads.empty() && !begin(*block)) {
        error = "no memory for the stacks of a block; launch fewer blocks";
        return;
    }
    std::vector<Thread>& threads = block->threads;
    for (Thread& t : threads) {
        if (t.state == State::spinning) t.state = State::ready;
    }
    for (bool again = true; again;) {
        const Order visit = order((shape.block + LANES - 1) / LANES);
        for (unsigned i = 0; i < visit.count && error.empty(); i++) {
            const unsigned first = visit(i) * LANES;
            run_warp(&threads[first], first, std::min(LANES, shape.block - first));
        }
        unsigned waiting = 0;
        for (const Thread& t : threads) waiting += t.state == State::at_block;
        again = error.empty() && waiting && waiting == block->alive;
        if (!again) continue;
        progress++;
        for (Thread& t : threads) {
            if (t.state == State::at_block) t.state = State::ready;
        }
    }
    if (error.empty() && !block->alive) end(*block);
}

void Launch::run_warp(Thread* lanes, unsigned first, unsigned count) {
    do {
        const Order visit = order(count);
        for (unsigned i = 0; i < count; i++) {
            Thread& next = lanes[visit(i)];
            if (next.state != State::ready) continue;
            threadIdx = {first + visit(i), 0, 0};
            resume(next);
            if (!error.empty()) return;
        }
    } while (meet_lanes(lanes, count));
}

void Launch::resume(Thread& next) {
    thread = &next;
    switch_to(scheduler, next.context);
    if (overflowed(next.context, next.stack)) error = "a thread's stack is too small for its local variables";
}

void Launch::suspend(State state) {
    thread->state = state;
    switch_to(thread->context, scheduler);
}

// d += a b. As in the twin of the reverse sampler, one rounding: the sum is in float64, and starts from d.
void multiply(Thread* lanes, float (*value)(unsigned short)) {
    double a[16][16], b[16][8], d[16][8];
    for (unsigned lane = 0; lane < LANES; lane++) {
        const unsigned g = lane / 4, t = lane % 4;
        const Request& request = *lanes[lane].request;
        for (unsigned i = 0; i < 8; i++) {  // two of each register, the lower half first
            a[g + 8 * (i / 2 % 2)][2 * t + i % 2 + 8 * (i / 4)] = value(request.words[i / 2] >> 16 * (i % 2));
        }
        for (unsigned i = 0; i < 4; i++) {
            b[2 * t + i % 2 + 8 * (i / 2)][g] = value(request.words[4 + i / 2] >> 16 * (i % 2));
            d[g + 8 * (i / 2)][2 * t + i % 2] = request.sums[i];
        }
    }
    for (unsigned row = 0; row < 16; row++) {
        for (unsigned i = 0; i < 4; i++) {
            for (unsigned t = 0; t < 4; t++) {
                const unsigned k = 2 * t + i % 2 + 8 * (i / 2);
                for (unsigned column = 0; column < 8; column++) d[row][column] += a[row][k] * b[k][column];
            }
        }
    }
    for (unsigned lane = 0; lane < LANES; lane++) {
        const unsigned g = lane / 4, t = lane % 4;
        for (unsigned i = 0; i < 4; i++) lanes[lane].request->sums[i] = d[g + 8 * (i / 2)][2 * t + i % 2];
    }
}

const char* exchange(Thread* lanes, unsigned mask, bool exclusive_or) {
    unsigned values[LANES];
    for (unsigned lane = 0; lane < LANES; lane++) {
        if (mask >> lane & 1) values[lane] = lanes[lane].request->words[0];
    }
    for (unsigned lane = 0; lane < LANES; lane++) {
        if (!(mask >> lane & 1)) continue;
        Request& request = *lanes[lane].request;
        const unsigned source = (exclusive_or ? lane ^ request.words[1] : request.words[1]) % LANES;
        if (!(mask >> source & 1)) return "a shuffle reads from a lane that its mask does not name";
        request.words[0] = values[source];
    }
    return "";
}

bool all_came(const Thread* lanes, unsigned count, const Request& request) {
    for (unsigned lane = 0; lane < LANES; lane++) {
        if (!(request.mask >> lane & 1)) continue;
        if (lane >= count || lanes[lane].state != State::at_warp) return false;
        const Request& other = *lanes[lane].request;
        if (other.operation != request.operation || other.mask != request.mask) return false;
    }
    return true;
}

// Does the warp's operations for which all lanes have come; whether there was one.
bool Launch::meet_lanes(Thread* lanes, unsigned count) {
    unsigned done = 0;
    for (unsigned lane = 0; lane < count; lane++) {
        if (done >> lane & 1 || lanes[lane].state != State::at_warp) continue;
        const Request& request = *lanes[lane].request;
        if (!(request.mask >> lane & 1)) error = "a lane's mask does not name the lane itself";
        if (!error.empty() || !all_came(lanes, count, request)) continue;
        switch (request.operation) {
            case Operation::meet: break;
            case Operation::shuffle: error = exchange(lanes, request.mask, false); break;
            case Operation::shuffle_xor: error = exchange(lanes, request.mask, true); break;
            case Operation::mma_fp16: multiply(lanes, emulator::fp16_value); break;
            case Operation::mma_bf16: multiply(lanes, emulator::bf16_value); break;
        }
        for (unsigned i = 0; i < count; i++) {
            if (request.mask >> i & 1) lanes[i].state = State::ready;
        }
        done |= request.mask;
        progress++;
    }
    return done && error.empty();
}

std::string Launch::deadlock() const {
    std::string text = "deadlock: ";
    unsigned told = 0, unfinished = 0;
    for (unsigned index = 0; index < blocks.size(); index++) {
        if (blocks[index].finished) continue;
        unfinished++;
        if (told++ >= 4) continue;
        unsigned counts[5] = {};
        for (const Thread& t : blocks[index].threads) counts[static_cast<int>(t.state)]++;
        const auto part = [&](State state, const char* what) {
            const unsigned n = counts[static_cast<int>(state)];
            return n ? std::to_string(n) + " " + what + ", " : std::string();
        };
        std::string line = part(State::spinning, "in wait()") + part(State::at_block, "at __syncthreads()") +
                           part(State::at_warp, "at an operation of their warp") + part(State::done, "exited");
        if (line.size() > 1 && line[line.size() - 2] == ',') line.resize(line.size() - 2);
        text += "block " + std::to_string(index) + " has threads " + line + "; ";
    }
    return text + std::to_string(unfinished) + " of " + std::to_string(blocks.size()) + " blocks never finish";
}

}  // namespace

namespace emulator {

const char* run(const Shape& shape, const Call& call) {
    static std::string message;  // outlives the call
    Launch launch(shape, call);
    now = &launch;
    blockDim = {shape.block, 1, 1};
    gridDim = {shape.grid_x, shape.grid_y, 1};
    launch.schedule();
    now = nullptr;
    message = launch.error;
    return message.empty() ? nullptr : message.c_str();
}

void fail(const char* what) {
    now->error = std::string(what) + " (block " + std::to_string(blockIdx.x + gridDim.x * blockIdx.y) + ", thread " +
                 std::to_string(threadIdx.x) + ")";
    now->suspend(State::done);
    __builtin_unreachable();  // a launch that failed resumes nobody
}

void meet_block() { now->suspend(State::at_block); }

void meet_warp(Request& request) {
    now->thread->request = &request;
    now->suspend(State::at_warp);
}

void spin() { now->suspend(State::spinning); }

void touched() { now->progress++; }

void interrupt() {
    if (now->shape.seed && now->random() % 16 == 0) spin();
}

char* shared_memory() { return now->block->shared.get() + GUARD_BYTES; }

unsigned short fp16_bits(float value) {
    const unsigned bits = bits_as<unsigned>(value), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000) return 0x7fff;         // NaN
    if (size >= 0x477ff000) return sign | 0x7c00;  // 65520 and more round to infinity
    if (size < 0x38800000) {                       // below 2^-14 the last place is 2^-24, as it is of a float at 0.5
        return sign | (bits_as<unsigned>(bits_as<float>(size) + 0.5f) - bits_as<unsigned>(0.5f));
    }
    const unsigned rounded = size + 0xfff + (size >> 13 & 1);  // half of the last place, ties to even
    return sign | (rounded - (112u << 23)) >> 13;
}

unsigned short bf16_bits(float value) {
    const unsigned bits = bits_as<unsigned>(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

float bf16_value(unsigned short bits) { return bits_as<float>(static_cast<unsigned>(bits) << 16); }

float fp16_value(unsigned short bits) {
    const unsigned sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023;
    if (exponent == 0) return bits_as<float>(sign | bits_as<unsigned>(fraction * 0x1p-24f));
    return bits_as<float>(sign | (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13);
}

}  // namespace emulator
