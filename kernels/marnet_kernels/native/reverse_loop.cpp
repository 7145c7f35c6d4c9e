// The reverse-sampling loop on CPU cores as one persistent job. Each thread owns a share of the outputs of all layers, so
// its weights stay in its core's cache over all steps; the threads meet after every layer at a barrier that spins for a
// bounded time and then sleeps. marnet_kernels/native/loop.py has the formulas, the layouts and the ctypes twins of the
// structs; nothing here checks its arguments, and Python does.
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <cstdint>
#include <cstring>
#include <new>
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#include <sys/auxv.h>
#endif

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "bytes are packed and taken apart with the lowest first");

namespace {

constexpr int UNIT = 64;          // outputs that are packed, and given to a thread, together
constexpr int MOST_ROWS = 16;     // at a time; more follow in turn
constexpr int MOST_THREADS = 64;
constexpr long SPIN_NS = 30000;   // longer than a layer takes, and much shorter than a time slice
constexpr float LEAST_SPAN = 1e-30f;  // of a row that has levels; a smaller one is nothing
enum Kind { FP32, FP16, BF16, INT8 };

struct Layer {
  const void* weights;        // int8 [out / 64][in / 4][64][4], others [out / 64][in][64]
  const float* bias;          // [out]
  const float* scale;         // [out], of int8 weights
  const int32_t* sums;        // [out], of int8 weights
  int32_t kind, in, out;      // in and out are multiples of 64
};
struct Loop {
  Layer condition, input, hidden2, hidden3, carry, output;  // input: of a carried feature
  float slope;
  int32_t feature;
};
struct Call {
  const float *x, *coefficients, *bias;  // [images, condition.in], [steps, 3], [steps, noises, samples, hidden2.in]
  float* out;                            // [images, samples, output.out]
  int32_t images, samples, noises, steps;
  float asleep;  // is set: the share of the threads' time that they slept at meetings
};

// The state and the activations of one call, float [rows][width] each, and each thread's bytes of an input.
enum Part { CONDITION, STATE, GAINED, H1, H2, H3, PARTS };
struct Space {
  const size_t rows, width;
  char* const memory;  // null where there is none

  Space(size_t rows, size_t width, size_t threads)
      : rows(rows), width(width),
        memory(static_cast<char*>(aligned_alloc(64, (PARTS * sizeof(float) + threads) * rows * width))) {}
  Space(const Space&) = delete;
  ~Space() { free(memory); }
  float* row(Part part, int r) const { return reinterpret_cast<float*>(memory) + (part * rows + r) * width; }
  char* bytes(int thread, int r) const { return memory + ((PARTS * sizeof(float) + thread) * rows + r) * width; }
};

// Rows of activations, as a layer reads them.
struct Input {
  int rows;
  const char* x[MOST_ROWS];  // floats, or the levels of an int8 layer
  float step[MOST_ROWS];     // between two levels
  int32_t zero[MOST_ROWS];   // the level of 0
};

// A thread's share of the outputs, in units.
struct Span {
  int first, last;
  Span(int out, int thread, int threads) : first(out / UNIT * thread / threads), last(out / UNIT * (thread + 1) / threads) {}
  size_t bytes() const { return size_t(last - first) * UNIT * sizeof(float); }
};

void futex(std::atomic<uint32_t>& word, int operation, uint32_t value) {
  syscall(SYS_futex, &word, operation | FUTEX_PRIVATE_FLAG, value, nullptr, nullptr, 0);
}

void pause_briefly() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("isb");
#endif
}

long now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000L + t.tv_nsec;
}

// Until the word is not `old`: spins, then sleeps; returns for how many nanoseconds it slept.
long wait_while(std::atomic<uint32_t>& word, uint32_t old, std::atomic<uint32_t>& sleepers) {
  const long end = now_ns() + SPIN_NS;
  do
    for (int i = 0; i < 64; i++) {
      if (word.load(std::memory_order_acquire) != old) return 0;
      pause_briefly();
    }
  while (now_ns() < end);
  sleepers.fetch_add(1);
  while (word.load() == old) futex(word, FUTEX_WAIT, old);
  sleepers.fetch_sub(1);
  return now_ns() - end;
}

struct Barrier {
  alignas(64) std::atomic<uint32_t> arrived{0};
  alignas(64) std::atomic<uint32_t> phase{0};
  std::atomic<uint32_t> sleepers{0};
  std::atomic<long> slept{0};  // nanoseconds of all threads

  void wait(uint32_t threads) {
    const uint32_t before = phase.load(std::memory_order_relaxed);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 < threads) {
      if (const long ns = wait_while(phase, before, sleepers)) slept.fetch_add(ns, std::memory_order_relaxed);
      return;
    }
    arrived.store(0, std::memory_order_relaxed);
    phase.store(before + 1);  // before the look at the sleepers, who count themselves before they look at the phase
    if (sleepers.load()) futex(phase, FUTEX_WAKE, INT_MAX);
  }
};

struct Job {
  const Loop* loop;
  Call* call;
  const Space* space;
  Barrier* barrier;
  int set, threads;
};

void meet(const Job& job) {
  if (job.threads > 1) job.barrier->wait(job.threads);
}

#define INSTRUCTIONS(name) __attribute__((target(name)))
#if defined(__x86_64__)

#define TARGET INSTRUCTIONS("avx512f,avx512bw,avx512vl,avx512vnni,fma")
#define SHIFT 0
#define LANES 16
#define ROWS 4
namespace avx512 {
typedef float F __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
TARGET static inline F fma(F a, F b, F sum) { return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum); }
TARGET static inline F of_fp16(const void* p) { return (F)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
TARGET static inline F of_bf16(const void* p) {
  return (F)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
}
TARGET static inline I dot(I sum, int32_t x, I w) {
  return (I)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(x), (__m512i)w);
}
#include "products.h"
}  // namespace avx512
#undef TARGET
#undef LANES
#undef ROWS

#define LANES 8
#define ROWS 2
#define AVX2                                                                                                                \
  typedef float F __attribute__((vector_size(32)));                                                                         \
  typedef int32_t I __attribute__((vector_size(32)));                                                                       \
  TARGET static inline F fma(F a, F b, F sum) { return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum); }             \
  TARGET static inline F of_fp16(const void* p) { return (F)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }          \
  TARGET static inline F of_bf16(const void* p) {                                                                           \
    return (F)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);                             \
  }
#define TARGET INSTRUCTIONS("avx2,fma,f16c,avxvnni")
namespace avxvnni {
AVX2
TARGET static inline I dot(I sum, int32_t x, I w) {
  return (I)_mm256_dpbusd_avx_epi32((__m256i)sum, _mm256_set1_epi32(x), (__m256i)w);
}
#include "products.h"
}  // namespace avxvnni
#undef TARGET

#define TARGET INSTRUCTIONS("avx2,fma,f16c")
namespace avx2 {
AVX2
TARGET static inline I dot(I sum, int32_t x, I w) {
  // The instruction adds two neighbours in 16 bits, which one product fits into and two do not.
  const __m256i even = _mm256_set1_epi32(x & 0x00FF00FF), odd = _mm256_set1_epi32(x & int32_t(0xFF00FF00));
  const __m256i one = _mm256_set1_epi16(1);
  const __m256i a = _mm256_madd_epi16(_mm256_maddubs_epi16(even, (__m256i)w), one);
  const __m256i b = _mm256_madd_epi16(_mm256_maddubs_epi16(odd, (__m256i)w), one);
  return (I)_mm256_add_epi32((__m256i)sum, _mm256_add_epi32(a, b));
}
#include "products.h"
}  // namespace avx2
#undef TARGET
#undef LANES
#undef ROWS
#undef SHIFT
#elif defined(__aarch64__)

#define LANES 4
#define ROWS 4
#define NEON                                                                                                                \
  typedef float F __attribute__((vector_size(16)));                                                                         \
  typedef int32_t I __attribute__((vector_size(16)));                                                                       \
  TARGET static inline F fma(F a, F b, F sum) { return (F)vfmaq_f32((float32x4_t)sum, (float32x4_t)a, (float32x4_t)b); }    \
  TARGET static inline F of_fp16(const void* p) {                                                                           \
    return (F)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t*)p)));                                             \
  }                                                                                                                         \
  TARGET static inline F of_bf16(const void* p) { return (F)vshll_n_u16(vld1_u16((const uint16_t*)p), 16); }
#if !defined(__clang__) || __clang_major__ >= 16  // older ones have its intrinsics only where all code may use them
#define HAS_DOTPROD
#define TARGET INSTRUCTIONS("arch=armv8.2-a+dotprod")
#define SHIFT 128
namespace dotprod {
NEON
TARGET static inline I dot(I sum, int32_t x, I w) {
  return (I)vdotq_s32((int32x4_t)sum, (int8x16_t)w, vreinterpretq_s8_s32(vdupq_n_s32(x)));
}
#include "products.h"
}  // namespace dotprod
#undef TARGET
#undef SHIFT
#endif

#define TARGET
#define SHIFT 0
namespace neon {
NEON
TARGET static inline I dot(I sum, int32_t x, I w) {
  const int16x8_t from = vreinterpretq_s16_u16(vmovl_u8(vreinterpret_u8_s32(vdup_n_s32(x))));
  const int32x4_t a = vpaddlq_s16(vmulq_s16(vmovl_s8(vget_low_s8((int8x16_t)w)), from));  // a product fits into 16 bits
  const int32x4_t b = vpaddlq_s16(vmulq_s16(vmovl_high_s8((int8x16_t)w), from));
  return sum + (I)vpaddq_s32(a, b);
}
#include "products.h"
}  // namespace neon
#undef TARGET
#undef LANES
#undef ROWS
#undef SHIFT
#endif

#define TARGET
#define SHIFT 0
#define LANES 4
#define ROWS 2
namespace portable {
typedef float F __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));
typedef uint32_t U __attribute__((vector_size(16)));
typedef uint16_t H __attribute__((vector_size(8)));
static inline U words(const void* p) {
  H bits;
  memcpy(&bits, p, sizeof bits);
  return __builtin_convertvector(bits, U);
}
static inline F fma(F a, F b, F sum) { return a * b + sum; }
static inline F of_bf16(const void* p) { return (F)(words(p) << 16); }
static inline F of_fp16(const void* p) {
  const U bits = words(p);
  const F size = (F)((bits & 0x7FFF) << 13) * 0x1p112f;  // the exponents' zeros are 112 apart; no weight is infinite
  return (F)((U)size | (bits & 0x8000) << 16);
}
static inline I dot(I sum, int32_t x, I w) {
  const U bits = (U)w;
  for (int j = 0; j < 4; j++) sum += ((I)(bits << (24 - 8 * j)) >> 24) * int32_t(uint32_t(x) >> 8 * j & 255);
  return sum;
}
#include "products.h"
}  // namespace portable

struct Instructions {
  const char* name;
  void (*work)(const Job&, int);
  bool (*here)();
};
bool anywhere() { return true; }
#if defined(__x86_64__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") &&
         __builtin_cpu_supports("fma");
}
bool has_avx2() {
  unsigned a, b, c, d;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid(1, &a, &b, &c, &d) && c & bit_F16C;
}
bool has_avxvnni() {
  unsigned a, b, c, d;
  return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && a & 1 << 4;
}
#elif defined(HAS_DOTPROD)
bool has_dotprod() { return getauxval(AT_HWCAP) & 1 << 20; }  // HWCAP_ASIMDDP
#endif
const Instructions SETS[] = {
#if defined(__x86_64__)
    {"avx512", avx512::work, has_avx512},
    {"avxvnni", avxvnni::work, has_avxvnni},
    {"avx2", avx2::work, has_avx2},
#elif defined(__aarch64__)
#if defined(HAS_DOTPROD)
    {"dotprod", dotprod::work, has_dotprod},
#endif
    {"neon", neon::work, anywhere},
#endif
    {"portable", portable::work, anywhere},
};
constexpr int COUNT = sizeof SETS / sizeof *SETS;

// The workers of the process, which take one job at a time.
struct Pool {
  struct Worker {
    alignas(64) std::atomic<uint32_t> jobs{0};  // that were given to it
    pthread_t thread;
    Pool* pool;
    int number;
  };
  pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;
  Worker workers[MOST_THREADS];
  int count = 0;  // of workers that run: numbers 1 .. count
  Barrier barrier;
  const Job* job = nullptr;  // none: the workers are to end

  static void* live(void* argument) {
    Worker& me = *static_cast<Worker*>(argument);
    for (uint32_t done = 0;; done++) {
      while (me.jobs.load(std::memory_order_acquire) == done) futex(me.jobs, FUTEX_WAIT, done);
      const Job* job = me.pool->job;
      if (!job) return nullptr;
      SETS[job->set].work(*job, me.number);
    }
  }
  void call(Worker& worker) {
    worker.jobs.fetch_add(1, std::memory_order_release);
    futex(worker.jobs, FUTEX_WAKE, 1);
  }
  // Start workers up to `wanted`; fewer where the system refuses.
  void grow(int wanted) {
    sigset_t every, before;
    sigfillset(&every);
    pthread_sigmask(SIG_SETMASK, &every, &before);  // signals are for the threads of the program
    for (; count < wanted; count++) {
      Worker& next = workers[count + 1];
      next.jobs = 0;
      next.pool = this;
      next.number = count + 1;
      if (pthread_create(&next.thread, nullptr, live, &next)) break;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }
  int run(Job& work) {
    pthread_mutex_lock(&turn);
    grow(work.threads - 1);
    if (work.threads > count + 1) work.threads = count + 1;
    const int threads = work.threads;
    work.barrier = &barrier;
    job = &work;
    barrier.slept.store(0, std::memory_order_relaxed);
    const long start = now_ns();
    for (int t = 1; t < threads; t++) call(workers[t]);
    SETS[work.set].work(work, 0);
    work.call->asleep = float(barrier.slept.load(std::memory_order_relaxed)) / (float(threads) * (now_ns() - start));
    pthread_mutex_unlock(&turn);
    return threads;
  }
  void end() {
    pthread_mutex_lock(&turn);
    job = nullptr;
    for (int t = 1; t <= count; t++) call(workers[t]);
    for (int t = 1; t <= count; t++) pthread_join(workers[t].thread, nullptr);
    count = 0;
    pthread_mutex_unlock(&turn);
  }
};

alignas(Pool) char place[sizeof(Pool)];
Pool& pool() { return *reinterpret_cast<Pool*>(place); }
void start_anew() { new (place) Pool; }  // in a child there are no workers, whatever the parent was at
__attribute__((constructor)) void loaded() {
  start_anew();
  pthread_atfork(nullptr, nullptr, start_anew);
}

}  // namespace

#define API extern "C" __attribute__((visibility("default")))

// The name of an instruction set, best first; none behind the last. Whether this processor has it.
API const char* marnet_loop_set(int set) { return set < COUNT ? SETS[set].name : nullptr; }
API int marnet_loop_has(int set) { return SETS[set].here(); }

// Run a loop; returns the number of threads that took part, 0 where there is no memory.
API int marnet_loop_run(const Loop* loop, Call* call, int set, int threads) {
  const int hidden = loop->hidden2.out, state = loop->carry.out, rows = call->images * call->samples;
  const int units = hidden / UNIT, most = units < MOST_THREADS ? units : MOST_THREADS;
  if (threads > most) threads = most;
  const Space space(rows < MOST_ROWS ? rows : MOST_ROWS, hidden > state ? hidden : state, threads);
  if (!space.memory) return 0;
  Job job{loop, call, &space, nullptr, set, threads};
  if (job.threads > 1) return pool().run(job);
  SETS[set].work(job, 0);
  return 1;
}

// Join the workers; the next job starts new ones.
API void marnet_loop_end() { pool().end(); }
// How many workers there are.
API int marnet_loop_workers() { return pool().count; }
