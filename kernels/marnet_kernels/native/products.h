// One step of the loop for one instruction set. reverse_loop.cpp includes this file once for each, with
//   SET      the namespace          TARGET   the attribute that allows its instructions
//   LANES    floats in a vector     ROWS     rows of activations that share one load of weights
//   SHIFT    what is taken off a byte of an activation when it is stored: 128 where `dot` takes signed ones
// and, inside the namespace, F, I (vectors of float, int32), fma, dot, of_fp16 and of_bf16.
//
// No sum depends on how many rows or threads there are: each has its own accumulator, over the inputs in order.

typedef uint8_t B __attribute__((vector_size(LANES)));
constexpr int VECTORS = UNIT / LANES < 4 ? UNIT / LANES : 4;  // accumulators of a row at a time

template <class V> TARGET static inline V load(const void* from) {
  V v;
  memcpy(&v, from, sizeof v);
  return v;
}
template <class V> TARGET static inline void store(void* to, V v) { memcpy(to, &v, sizeof v); }
TARGET static inline F all(float x) { return x - F{}; }
TARGET static inline F leaky(F x, float slope) { return x > 0 ? x : x * slope; }

template <int KIND> TARGET static inline F weights(const void* from) {
  if constexpr (KIND == FP16) return of_fp16(from);
  else if constexpr (KIND == BF16) return of_bf16(from);
  else return load<F>(from);
}

// y[r][64 outputs of the unit] = weights times the activations of row r, plus bias, for N rows from the first one on.
template <int KIND, int N>
TARGET static void tile(const Layer& l, const Input& in, int first, int unit, float (*y)[UNIT]) {
  constexpr int span = VECTORS * LANES, bytes = KIND == INT8 ? 1 : KIND == FP32 ? 4 : 2, together = KIND == INT8 ? 4 : 1;
  const char* const* x = in.x + first;
  for (int part = 0; part < UNIT; part += span) {
    const char* w = static_cast<const char*>(l.weights) + size_t(unit) * l.in * UNIT * bytes + size_t(part) * together * bytes;
    if constexpr (KIND == INT8) {
      I sum[N][VECTORS] = {};
      for (int k = 0; k < l.in; k += 4, w += 4 * UNIT)
        for (int v = 0; v < VECTORS; v++) {
          const I from = load<I>(w + 4 * LANES * v);
          for (int r = 0; r < N; r++) sum[r][v] = dot(sum[r][v], load<int32_t>(x[r] + k), from);
        }
      for (int r = 0; r < N; r++)
        for (int v = 0; v < VECTORS; v++) {
          const int o = part + LANES * v, at = unit * UNIT + o;
          const I nothing = load<I>(l.sums + at) * (in.zero[first + r] - SHIFT);  // what activations of 0 add up to
          const F whole = __builtin_convertvector(sum[r][v] - nothing, F);
          store(y[first + r] + o, whole * (load<F>(l.scale + at) * in.step[first + r]) + load<F>(l.bias + at));
        }
    } else {
      F sum[N][VECTORS] = {};
      for (int k = 0; k < l.in; k++, w += UNIT * bytes)
        for (int v = 0; v < VECTORS; v++) {
          const F from = weights<KIND>(w + bytes * LANES * v);
          for (int r = 0; r < N; r++) sum[r][v] = fma(from, all(load<float>(x[r] + 4 * k)), sum[r][v]);
        }
      for (int r = 0; r < N; r++)
        for (int v = 0; v < VECTORS; v++) {
          const int o = part + LANES * v;
          store(y[first + r] + o, sum[r][v] + load<F>(l.bias + unit * UNIT + o));
        }
    }
  }
}

template <int KIND>
TARGET static void product(const Layer& l, const Input& in, int unit, float (*y)[UNIT]) {
  int r = 0;
  if constexpr (ROWS >= 4)
    for (; r + 4 <= in.rows; r += 4) tile<KIND, 4>(l, in, r, unit, y);
  for (; r + 2 <= in.rows; r += 2) tile<KIND, 2>(l, in, r, unit, y);
  if (r < in.rows) tile<KIND, 1>(l, in, r, unit, y);
}

TARGET static void product(const Layer& l, const Input& in, int unit, float (*y)[UNIT]) {
  switch (l.kind) {
    case INT8: return product<INT8>(l, in, unit, y);
    case FP16: return product<FP16>(l, in, unit, y);
    case BF16: return product<BF16>(l, in, unit, y);
    default: return product<FP32>(l, in, unit, y);
  }
}

// Put row r of an input on 256 levels between its own least and largest value, 0 among them.
TARGET static void quantise(Input& in, int r, const float* x, int width, char* bytes) {
  F low{}, high{}, odd{};
  for (int o = 0; o < width; o += LANES) {
    const F v = load<F>(x + o);
    low = v < low ? v : low;
    high = v > high ? v : high;
    odd += v - v;  // 0, unless v is infinite or no number
  }
  float least = 0, largest = 0, finite = 0;
  for (int i = 0; i < LANES; i++) {
    least = low[i] < least ? low[i] : least;
    largest = high[i] > largest ? high[i] : largest;
    finite += odd[i];
  }
  const float span = largest - least;
  const bool number = finite == 0 && span - span == 0, some = number && span > LEAST_SPAN;
  const float inverse = some ? 255 / span : 0;
  in.step[r] = some ? span / 255 : number ? 0 : __builtin_nanf("");
  const float half = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer, ties to even
  const int zero = some ? int(-least * inverse + half - half) : 0;
  in.zero[r] = zero;
  in.x[r] = bytes;
  for (int o = 0; o < width; o += LANES) {
    F v = load<F>(x + o) * inverse;
    v = v > float(-zero) ? v : all(float(-zero));  // NaN, too
    v = v < float(255 - zero) ? v : all(float(255 - zero));
    const I level = reinterpret_cast<I>(v + half) - (0x4B400000 - zero);
    store(bytes + o, __builtin_convertvector(level - SHIFT, B));
  }
}

// Rows of activations as a layer reads them: floats as they are, or on levels, in the thread's own bytes.
TARGET static Input input(const Layer& l, const Space& s, Part part, int rows, int thread) {
  Input in;
  in.rows = rows;
  for (int r = 0; r < rows; r++)
    if (l.kind == INT8) quantise(in, r, s.row(part, r), l.in, s.bytes(thread, r));
    else in.x[r] = reinterpret_cast<const char*>(s.row(part, r));
  return in;
}

TARGET static void work(const Job& job, int thread) {
  const Loop& n = *job.loop;
  const Call& c = *job.call;
  const Space& s = *job.space;
  const Span hidden(n.hidden2.out, thread, job.threads), state(n.carry.out, thread, job.threads),
      output(n.output.out, thread, job.threads);
  const int all_rows = c.images * c.samples;
  alignas(64) float y[MOST_ROWS][UNIT];
  for (int first = 0; first < all_rows; first += MOST_ROWS) {
    const int rows = all_rows - first < MOST_ROWS ? all_rows - first : MOST_ROWS;
    Input given;
    given.rows = rows;
    for (int r = 0; r < rows; r++)
      given.x[r] = reinterpret_cast<const char*>(c.x + size_t((first + r) / c.samples) * n.condition.in);
    for (int unit = hidden.first; unit < hidden.last; unit++) {
      product(n.condition, given, unit, y);
      for (int r = 0; r < rows; r++) memcpy(s.row(CONDITION, r) + unit * UNIT, y[r], sizeof y[r]);
    }
    for (int r = 0; r < rows; r++) {
      memset(s.row(STATE, r) + state.first * UNIT, 0, state.bytes());
      memset(s.row(GAINED, r) + state.first * UNIT, 0, state.bytes());
    }
    if (n.feature) meet(job);  // the whole state is read
    for (int i = 0; i < c.steps; i++) {
      const Input from = n.feature ? input(n.input, s, STATE, rows, thread) : Input{};
      for (int unit = hidden.first; unit < hidden.last; unit++) {
        if (n.feature) product(n.input, from, unit, y);
        for (int r = 0; r < rows; r++) {
          const int row = first + r, noise = c.noises == 1 ? row % c.samples : row;
          const float* bias = c.bias + (size_t(i) * c.noises * c.samples + noise) * n.hidden2.in;
          const float* into = n.feature ? y[r] - unit * UNIT : s.row(STATE, r);
          for (int o = unit * UNIT; o < (unit + 1) * UNIT; o += LANES)
            store(s.row(H1, r) + o, leaky(load<F>(into + o) + load<F>(s.row(CONDITION, r) + o) + load<F>(bias + o), n.slope));
        }
      }
      meet(job);
      const Input h1 = input(n.hidden2, s, H1, rows, thread);
      for (int unit = hidden.first; unit < hidden.last; unit++) {
        product(n.hidden2, h1, unit, y);
        for (int r = 0; r < rows; r++)
          for (int o = 0; o < UNIT; o += LANES) store(s.row(H2, r) + unit * UNIT + o, leaky(load<F>(y[r] + o), n.slope));
      }
      meet(job);
      const Input h2 = input(n.hidden3, s, H2, rows, thread);
      for (int unit = hidden.first; unit < hidden.last; unit++) {
        product(n.hidden3, h2, unit, y);
        for (int r = 0; r < rows; r++)
          for (int o = 0; o < UNIT; o += LANES) store(s.row(H3, r) + unit * UNIT + o, leaky(load<F>(y[r] + o), n.slope));
      }
      meet(job);
      if (i == c.steps - 1) break;
      const float A = c.coefficients[3 * i], G = c.coefficients[3 * i + 1], P = c.coefficients[3 * i + 2];
      const Input h3 = input(n.carry, s, H3, rows, thread);
      for (int unit = state.first; unit < state.last; unit++) {
        product(n.carry, h3, unit, y);
        for (int r = 0; r < rows; r++)
          for (int o = 0; o < UNIT; o += LANES) {
            float *p = s.row(STATE, r) + unit * UNIT + o, *gained = s.row(GAINED, r) + unit * UNIT + o;
            const F g = load<F>(y[r] + o);
            store(p, load<F>(p) * A + g * G + load<F>(gained) * P);
            store(gained, g);
          }
      }
      if (n.feature) meet(job);
    }
    const Input h3 = input(n.output, s, H3, rows, thread);
    for (int unit = output.first; unit < output.last; unit++) {
      product(n.output, h3, unit, y);
      for (int r = 0; r < rows; r++) memcpy(c.out + size_t(first + r) * n.output.out + unit * UNIT, y[r], sizeof y[r]);
    }
  }
  meet(job);
}
