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

// y[r][64 outputs of the unit] = weights times the activations x[r], plus bias. Of fine ones, x[2 r] are the low bytes and
// x[2 r + 1] the high ones, of N / 2 rows.
template <int KIND, int N>
TARGET static void tile(const Layer& l, const char* const* x, int unit, float (*y)[UNIT]) {
  constexpr bool bytes_in = KIND == INT8 || KIND == FINE;
  constexpr int span = VECTORS * LANES, bytes = bytes_in ? 1 : KIND == FP32 ? 4 : 2, together = bytes_in ? 4 : 1;
  for (int part = 0; part < UNIT; part += span) {
    const char* w = static_cast<const char*>(l.weights) + size_t(unit) * l.in * UNIT * bytes + size_t(part) * together * bytes;
    if constexpr (bytes_in) {
      I sum[N][VECTORS] = {};
      for (int k = 0; k < l.in; k += 4, w += 4 * UNIT)
        for (int v = 0; v < VECTORS; v++) {
          const I from = load<I>(w + 4 * LANES * v);
          for (int r = 0; r < N; r++) sum[r][v] = dot(sum[r][v], load<int32_t>(x[r] + k), from);
        }
      for (int r = 0; r < N; r += KIND == FINE ? 2 : 1)
        for (int v = 0; v < VECTORS; v++) {
          const int o = part + LANES * v, at = unit * UNIT + o;
          const I nothing = load<I>(l.sums + at) * (l.zero - SHIFT);  // what levels of 0 would add up to
          const F bias = load<F>(l.bias + at), scale = load<F>(l.scale + at);
          F whole = __builtin_convertvector(sum[r][v] - nothing, F);
          if constexpr (KIND == FINE) {
            whole = __builtin_convertvector(sum[r + 1][v] - nothing, F) * 256.0f + whole;
            store(y[r / 2] + o, whole * (scale * (1 / FINER)) + bias);
          } else {
            store(y[r] + o, whole * scale + bias);
          }
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
          store(y[r] + o, sum[r][v] + load<F>(l.bias + unit * UNIT + o));
        }
    }
  }
}

template <int KIND>
TARGET static void product(const Layer& l, const char* const* x, int rows, int unit, float (*y)[UNIT]) {
  int r = 0;
  if constexpr (ROWS >= 4)
    for (; r + 4 <= rows; r += 4) tile<KIND, 4>(l, x + r, unit, y + r);
  for (; r + 2 <= rows; r += 2) tile<KIND, 2>(l, x + r, unit, y + r);
  if (r < rows) tile<KIND, 1>(l, x + r, unit, y + r);
}

TARGET static void fine_product(const Layer& l, const char* const* x, int rows, int unit, float (*y)[UNIT], size_t apart) {
  const char* bytes[2 * MOST_ROWS];
  for (int r = 0; r < rows; r++) {
    bytes[2 * r] = x[r];
    bytes[2 * r + 1] = x[r] + apart;
  }
  int r = 0;
  if constexpr (ROWS >= 4)
    for (; r + 2 <= rows; r += 2) tile<FINE, 4>(l, bytes + 2 * r, unit, y + r);
  for (; r < rows; r++) tile<FINE, 2>(l, bytes + 2 * r, unit, y + r);
}

// `fine`: how far the high bytes of an int8 layer's input are from the low ones; 0 where there are none.
TARGET static void product(const Layer& l, const char* const* x, int rows, int unit, float (*y)[UNIT], size_t fine) {
  switch (l.kind) {
    case INT8: return fine ? fine_product(l, x, rows, unit, y, fine) : product<INT8>(l, x, rows, unit, y);
    case FP16: return product<FP16>(l, x, rows, unit, y);
    case BF16: return product<BF16>(l, x, rows, unit, y);
    default: return product<FP32>(l, x, rows, unit, y);
  }
}

// Activations o .. o + LANES as the layer reads them: float, or on the 256 levels of its range, or on 257 times as fine ones.
TARGET static inline void emit(const Layer& reader, char* row, int o, F x, size_t fine) {
  if (reader.kind != INT8) return store(row + 4 * o, x);
  const int zero = fine ? reader.zero * int(FINER) : reader.zero, levels = fine ? 65536 : 256;
  const float least = float(-zero), largest = float(levels - 1 - zero);
  const float half = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer, ties to even
  F v = x * (fine ? reader.inverse * FINER : reader.inverse);
  v = v > least ? v : all(least);  // NaN, too
  v = v < largest ? v : all(largest);
  const I level = reinterpret_cast<I>(v + half) - (0x4B400000 - zero);
  if (fine) store(row + fine + o, __builtin_convertvector((level >> 8) - SHIFT, B));
  store(row + o, __builtin_convertvector(level - SHIFT, B));
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
    const char *x[MOST_ROWS], *act[4][MOST_ROWS], *h3[MOST_ROWS];
    for (int r = 0; r < rows; r++) {
      x[r] = reinterpret_cast<const char*>(c.x + size_t((first + r) / c.samples) * n.condition.in);
      for (int a = 0; a < 4; a++) act[a][r] = s.act(a, r);
      h3[r] = reinterpret_cast<const char*>(s.h3(r));
    }
    for (int unit = hidden.first; unit < hidden.last; unit++) {
      product(n.condition, x, rows, unit, y, 0);
      for (int r = 0; r < rows; r++) memcpy(s.q(r) + unit * UNIT, y[r], sizeof y[r]);
    }
    for (int r = 0; r < rows; r++) {
      memset(s.p(r) + state.first * UNIT, 0, state.bytes());
      memset(s.gained(r) + state.first * UNIT, 0, state.bytes());
    }
    for (int i = 0; i < c.steps; i++) {
      const size_t fine = i >= c.steps - n.fine ? s.width : 0;
      if (n.feature) {
        for (int r = 0; r < rows; r++)
          for (int o = state.first * UNIT; o < state.last * UNIT; o += LANES) emit(n.input, s.act(0, r), o, load<F>(s.p(r) + o), fine);
        meet(job);
      }
      for (int unit = hidden.first; unit < hidden.last; unit++) {
        if (n.feature) product(n.input, act[0], rows, unit, y, fine);
        for (int r = 0; r < rows; r++) {
          const int row = first + r, noise = c.noises == 1 ? row % c.samples : row;
          const float* bias = c.bias + (size_t(i) * c.noises * c.samples + noise) * n.hidden2.in;
          const float* into = n.feature ? y[r] - unit * UNIT : s.p(r);
          for (int o = unit * UNIT; o < (unit + 1) * UNIT; o += LANES)
            emit(n.hidden2, s.act(1, r), o, leaky(load<F>(into + o) + load<F>(s.q(r) + o) + load<F>(bias + o), n.slope), fine);
        }
      }
      meet(job);
      for (int unit = hidden.first; unit < hidden.last; unit++) {
        product(n.hidden2, act[1], rows, unit, y, fine);
        for (int r = 0; r < rows; r++)
          for (int o = 0; o < UNIT; o += LANES) emit(n.hidden3, s.act(2, r), unit * UNIT + o, leaky(load<F>(y[r] + o), n.slope), fine);
      }
      meet(job);
      const bool last = i == c.steps - 1;
      for (int unit = hidden.first; unit < hidden.last; unit++) {
        product(n.hidden3, act[2], rows, unit, y, fine);
        for (int r = 0; r < rows; r++)
          for (int o = 0; o < UNIT; o += LANES) {
            const F h = leaky(load<F>(y[r] + o), n.slope);
            if (last) store(s.h3(r) + unit * UNIT + o, h);
            else emit(n.carry, s.act(3, r), unit * UNIT + o, h, fine);
          }
      }
      meet(job);
      if (last) break;
      const float A = c.coefficients[3 * i], G = c.coefficients[3 * i + 1], P = c.coefficients[3 * i + 2];
      for (int unit = state.first; unit < state.last; unit++) {
        product(n.carry, act[3], rows, unit, y, fine);
        for (int r = 0; r < rows; r++)
          for (int o = 0; o < UNIT; o += LANES) {
            float *p = s.p(r) + unit * UNIT + o, *gained = s.gained(r) + unit * UNIT + o;
            const F g = load<F>(y[r] + o);
            store(p, load<F>(p) * A + g * G + load<F>(gained) * P);
            store(gained, g);
          }
      }
    }
    for (int unit = output.first; unit < output.last; unit++) {
      product(n.output, h3, rows, unit, y, 0);
      for (int r = 0; r < rows; r++) memcpy(c.out + size_t(first + r) * n.output.out + unit * UNIT, y[r], sizeof y[r]);
    }
  }
  meet(job);
}
