/* The element-wise parts of a decoder, fused: one pass over memory where a chain of tensor operations takes several.
 *
 * Plain C that a compiler vectorizes for the processor it runs on; matrix products are not here (oneDNN and MKL do them).
 * Compiled twice: activations are bfloat16 with -DBFLOAT16, else float32. Everything is computed in float32.
 * No -ffast-math: NaN and infinity must come through, since the trainer looks for them.
 *
 * Shapes: N rows (tokens), D hidden size, F width of the MLP, V vocabulary, Dh head dimension.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef BFLOAT16
typedef uint16_t act;

static inline float load(act x) {
    uint32_t bits = (uint32_t)x << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}

/* To the nearest, ties to even; a NaN stays one. */
static inline act low(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (act)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
#else
typedef float act;
static inline float load(act x) { return x; }
static inline act low(float x) { return x; }
#endif

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t places __attribute__((vector_size(64)));
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (places){__VA_ARGS__})
#endif

#define INLINE static inline __attribute__((always_inline))

/* exp(x) = 2^n exp(r), |r| <= ln(2) / 2, exp(r) by Taylor's series: if `precise` to 2 units in the last place of float32,
 * else to 5e-5. Below -75 it stays at 3e-33, which is nothing beside 1 and makes no denormal numbers, on which arithmetic
 * is slow; above 88 at 1.6e38. NaN gives NaN. */
INLINE float exponential(float x, int precise) {
    x = x > 88.0f ? 88.0f : x;
    x = x < -75.0f ? -75.0f : x;
    float n = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer, kept in the low bits */
    uint32_t bits;
    memcpy(&bits, &n, 4);
    n -= 12582912.0f;
    float r = (x - n * 0.693145752f) - n * 1.42860677e-6f; /* ln(2) in two parts */
    float p = 1.0f / 24.0f;
    if (precise) {
        p = 1.0f / 5040.0f;
        p = p * r + 1.0f / 720.0f;
        p = p * r + 1.0f / 120.0f;
        p = p * r + 1.0f / 24.0f;
    }
    p = p * r + 1.0f / 6.0f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    uint32_t power = (bits + 127u) << 23;
    float scale;
    memcpy(&scale, &power, 4);
    return p * scale;
}

INLINE float exp_(float x) { return exponential(x, 1); }

/* Where the result becomes an activation: half a unit of bfloat16 is 2e-3. */
INLINE float exp_act(float x) { return exponential(x, sizeof(act) == 4); }

/* tanh(x) = (e - 1) / (e + 1) with e = exp(2x), and e - 1 formed without e, so that small x keep their precision. */
INLINE float tanh_(float x) {
    x = x > 10.0f ? 10.0f : x;
    x = x < -10.0f ? -10.0f : x;
    x *= 2.0f;
    float n = x * 1.44269504f + 12582912.0f; /* as in `exponential` */
    uint32_t bits;
    memcpy(&bits, &n, 4);
    n -= 12582912.0f;
    float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
    float p = 1.0f / 5040.0f;
    p = p * r + 1.0f / 720.0f;
    p = p * r + 1.0f / 120.0f;
    p = p * r + 1.0f / 24.0f;
    p = p * r + 1.0f / 6.0f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    uint32_t power = (bits + 127u) << 23;
    float scale;
    memcpy(&scale, &power, 4);
    float less_one = scale * (p * r) + (scale - 1.0f);
    return less_one / (less_one + 2.0f);
}

/* Transposing: 16 x 16 words at a time, by four rounds of a perfect shuffle. Two rows of bfloat16 make a row of words. */
typedef uint32_t words __attribute__((vector_size(64), aligned(4), may_alias));
#define LINES 16
#define ROWS (64 / (int64_t)sizeof(act)) /* that fill a cache line of the result */

static inline void transpose(words *x) {
    words y[16];
    for (int round = 0; round < 2; round++) {
        for (int i = 0; i < 8; i++) {
            y[2 * i] = SHUFFLE(x[i], x[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            y[2 * i + 1] = SHUFFLE(x[i], x[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        }
        for (int i = 0; i < 8; i++) {
            x[2 * i] = SHUFFLE(y[i], y[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            x[2 * i + 1] = SHUFFLE(y[i], y[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        }
    }
}

#define COLUMNS 512 /* of a strip of ROWS rows that is made in the first cache and then transposed */

/* strip [rows, COLUMNS], `width` columns of it -> to [width, ...], `stride` from line to line. */
static inline void put_transposed(const act (*strip)[COLUMNS], int64_t rows, int64_t width, act *to, int64_t stride) {
    int64_t whole = rows == ROWS ? width / LINES * LINES : 0;
    for (int64_t d = 0; d < whole; d += LINES) {
        words x[16];
        for (int i = 0; i < 16; i++) {
#ifdef BFLOAT16
            uint32_t pair[16];
            for (int j = 0; j < 16; j++) pair[j] = (uint32_t)strip[2 * i][d + j] | (uint32_t)strip[2 * i + 1][d + j] << 16;
            memcpy(x + i, pair, 64);
#else
            memcpy(x + i, strip[i] + d, 64);
#endif
        }
        transpose(x);
        for (int i = 0; i < 16; i++) memcpy(to + (d + i) * stride, x + i, 64);
    }
    for (int64_t d = whole; d < width; d++)
        for (int64_t i = 0; i < rows; i++) to[d * stride + i] = strip[i][d];
}

/* out[i] = low(h[i] * rstd[i] * w), rstd[i] = 1 / sqrt(mean(h[i]^2) + eps). h [N, D] float32, out [N, D]. */
void norm_forward(const float *h, const float *w, act *out, float *rstd, int64_t N, int64_t D, float eps, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < N; i++) {
        const float *x = h + i * D;
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t d = 0; d < D; d++) sum += x[d] * x[d];
        float r = 1.0f / sqrtf(sum / D + eps);
        rstd[i] = r;
#pragma omp simd
        for (int64_t d = 0; d < D; d++) out[i * D + d] = low(x[d] * r * w[d]);
    }
}

/* What norm_forward gave, transposed: [D, N]. */
void norm_transposed(const float *h, const float *w, const float *rstd, act *out, int64_t N, int64_t D, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t start = 0; start < N; start += ROWS) {
        int64_t rows = N - start < ROWS ? N - start : ROWS;
        for (int64_t first = 0; first < D; first += COLUMNS) {
            int64_t width = D - first < COLUMNS ? D - first : COLUMNS;
            act strip[ROWS][COLUMNS];
            for (int64_t i = 0; i < rows; i++) {
                const float *x = h + (start + i) * D + first;
                float r = rstd[start + i];
#pragma omp simd
                for (int64_t d = 0; d < width; d++) strip[i][d] = low(x[d] * r * w[first + d]);
            }
            put_transposed(strip, rows, width, out + first * N + start, N);
        }
    }
}

/* out[d] = the sum over the threads' parts [threads, D]. */
static void add_parts(const double *parts, float *out, int64_t D, int threads) {
    for (int64_t d = 0; d < D; d++) {
        double sum = 0.0;
        for (int64_t part = 0; part < threads; part++) sum += parts[part * D + d];
        out[d] = (float)sum;
    }
}

/* d_h = d_residual (none: 0) + the norm's gradient for d_out; d_w [D] is the sum over rows, in float64. `partial`
 * [threads, D] is scratch. */
void norm_backward(const act *d_out, const float *h, const float *w, const float *rstd, const float *d_residual,
                   float *d_h, float *d_w, double *partial, int64_t N, int64_t D, int threads) {
    memset(partial, 0, (size_t)threads * D * sizeof(double));
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t part = 0; part < threads; part++) {
        double *mine = partial + part * D;
        for (int64_t i = N * part / threads; i < N * (part + 1) / threads; i++) {
            const float *x = h + i * D, *along = d_residual ? d_residual + i * D : 0;
            const act *g = d_out + i * D;
            float *to = d_h + i * D;
            float r = rstd[i], dot = 0.0f;
#pragma omp simd reduction(+ : dot)
            for (int64_t d = 0; d < D; d++) dot += load(g[d]) * w[d] * x[d];
            float pull = dot * r * r * r / D;
#pragma omp simd
            for (int64_t d = 0; d < D; d++) {
                float grad = load(g[d]);
                mine[d] += grad * x[d] * r;
                to[d] = (along ? along[d] : 0.0f) + grad * w[d] * r - x[d] * pull;
            }
        }
    }
    add_parts(partial, d_w, D, threads);
}

/* x [N, D] float32 -> low [N, D] and its transpose [D, N]. */
void cast_and_transpose(const float *x, act *straight, act *turned, int64_t N, int64_t D, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t start = 0; start < N; start += ROWS) {
        int64_t rows = N - start < ROWS ? N - start : ROWS;
        for (int64_t first = 0; first < D; first += COLUMNS) {
            int64_t width = D - first < COLUMNS ? D - first : COLUMNS;
            act strip[ROWS][COLUMNS];
            for (int64_t i = 0; i < rows; i++) {
                const float *from = x + (start + i) * D + first;
#pragma omp simd
                for (int64_t d = 0; d < width; d++) strip[i][d] = low(from[d]);
                memcpy(straight + (start + i) * D + first, strip[i], (size_t)width * sizeof(act));
            }
            put_transposed(strip, rows, width, turned + first * N + start, N);
        }
    }
}

/* out[c][r] (+)= x[r][c]: x [R, C] with `stride` from row to row, out [C, R] float32 with `ahead`. */
void widen_transposed(const act *x, float *out, int64_t R, int64_t C, int64_t stride, int64_t ahead, int add, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t c = 0; c < C; c += LINES) {
        int64_t width = C - c < LINES ? C - c : LINES;
        for (int64_t r = 0; r < R; r += LINES) {
            int64_t rows = R - r < LINES ? R - r : LINES;
            float values[LINES][LINES];
            if (rows == LINES && width == LINES) {
                for (int64_t i = 0; i < LINES; i++)
                    for (int64_t j = 0; j < LINES; j++) values[i][j] = load(x[(r + i) * stride + c + j]);
                words turned[16];
                memcpy(turned, values, sizeof values);
                transpose(turned);
                memcpy(values, turned, sizeof values);
            } else {
                for (int64_t i = 0; i < rows; i++)
                    for (int64_t j = 0; j < width; j++) values[j][i] = load(x[(r + i) * stride + c + j]);
            }
            for (int64_t j = 0; j < width; j++) {
                float *to = out + (c + j) * ahead + r;
                for (int64_t i = 0; i < rows; i++) to[i] = add ? to[i] + values[j][i] : values[j][i];
            }
        }
    }
}

/* out = h + delta. */
void add_residual(const float *h, const act *delta, float *out, int64_t count, int threads) {
#pragma omp parallel for simd num_threads(threads) schedule(static)
    for (int64_t i = 0; i < count; i++) out[i] = h[i] + load(delta[i]);
}

/* gate_up [N, 2F], gate first -> silu(gate) * up [N, F]. */
void swiglu_forward(const act *gate_up, act *out, int64_t N, int64_t F, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < N; i++) {
        const act *gate = gate_up + i * 2 * F, *up = gate + F;
        act *to = out + i * F;
#pragma omp simd
        for (int64_t f = 0; f < F; f++) {
            float x = load(gate[f]);
            to[f] = low(x / (1.0f + exp_act(-x)) * load(up[f]));
        }
    }
}

/* In place: gate_up becomes its gradient. `out` gets what the forward pass gave, for the gradient of the next matrix. */
void swiglu_backward(act *gate_up, const act *d_out, act *out, int64_t N, int64_t F, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < N; i++) {
        act *gate = gate_up + i * 2 * F, *up = gate + F, *again = out + i * F;
        const act *grad = d_out + i * F;
#pragma omp simd
        for (int64_t f = 0; f < F; f++) {
            float x = load(gate[f]), u = load(up[f]), g = load(grad[f]);
            float s = 1.0f / (1.0f + exp_act(-x)), silu = x * s;
            again[f] = low(silu * u);
            up[f] = low(g * silu);
            gate[f] = low(g * u * s * (1.0f + x * (1.0f - s)));
        }
    }
}

#define GELU_SCALE 0.797884561f /* sqrt(2 / pi) */
#define GELU_CUBE 0.044715f

/* As swiglu_forward, with gelu(x) = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) of the gate. */
void geglu_forward(const act *gate_up, act *out, int64_t N, int64_t F, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < N; i++) {
        const act *gate = gate_up + i * 2 * F, *up = gate + F;
        act *to = out + i * F;
#pragma omp simd
        for (int64_t f = 0; f < F; f++) {
            float x = load(gate[f]), t = tanh_(GELU_SCALE * (x + GELU_CUBE * x * x * x));
            to[f] = low(0.5f * x * (1.0f + t) * load(up[f]));
        }
    }
}

/* As swiglu_backward. */
void geglu_backward(act *gate_up, const act *d_out, act *out, int64_t N, int64_t F, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < N; i++) {
        act *gate = gate_up + i * 2 * F, *up = gate + F, *again = out + i * F;
        const act *grad = d_out + i * F;
#pragma omp simd
        for (int64_t f = 0; f < F; f++) {
            float x = load(gate[f]), u = load(up[f]), g = load(grad[f]);
            float t = tanh_(GELU_SCALE * (x + GELU_CUBE * x * x * x)), half = 0.5f * (1.0f + t), gelu = x * half;
            again[f] = low(gelu * u);
            up[f] = low(g * gelu);
            gate[f] = low(g * u * (half + 0.5f * x * (1.0f - t * t) * GELU_SCALE * (1.0f + 3.0f * GELU_CUBE * x * x)));
        }
    }
}

/* Where a row sits in the padded, head-major layout of attention (attention.py says how it is laid out). */
typedef struct {
    int32_t first;  /* row of its document's first row, for one head: all earlier documents' widths */
    int32_t width;  /* of its document, padded */
    int32_t block;  /* rows of a block of queries; the width where there is one */
    int32_t row;    /* within its document */
    int32_t last;   /* whether no row of its document comes after it */
} seat;

/* Row of the first head: documents first, then groups of `share` heads, then blocks, then heads of a group, then rows. */
static inline int64_t row_of(const seat *s, int32_t row, int64_t heads, int64_t share) {
    int32_t block = row / s->block;
    return (int64_t)s->first * heads + block * share * s->block + (row - block * s->block);
}

/* How far head h lies behind it. */
static inline int64_t head_after(const seat *s, int32_t share, int32_t h) {
    int32_t group = h / share;
    return (int64_t)group * share * s->width + (int64_t)(h - group * share) * s->block;
}

/* One head from row to seat, and its gradient back. Inlined with constants for Dh, w and angles: loops without ends. */
INLINE void seat_head(const act *from, act *to, const float *w, const float *cosine, const float *sine, int64_t Dh, float eps) {
    int64_t half = Dh / 2;
    float r = 1.0f;
    if (!cosine) {
        memcpy(to, from, Dh * sizeof(act));
        return;
    }
    if (w) {
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t d = 0; d < Dh; d++) sum += load(from[d]) * load(from[d]);
        r = 1.0f / sqrtf(sum / Dh + eps);
    }
#pragma omp simd
    for (int64_t d = 0; d < half; d++) {
        float a = load(from[d]), b = load(from[half + d]);
        if (w) a *= r * w[d], b *= r * w[half + d];
        to[d] = low(a * cosine[d] - b * sine[d]);
        to[half + d] = low(b * cosine[d] + a * sine[d]);
    }
}

INLINE void unseat_head(const act *g, const act *from, act *to, const float *w, double *d_w, const float *cosine,
                        const float *sine, int64_t Dh, float eps) {
    int64_t half = Dh / 2;
    float back[1024];
    if (!cosine) {
        memcpy(to, g, Dh * sizeof(act));
        return;
    }
#pragma omp simd
    for (int64_t d = 0; d < half; d++) {
        float a = load(g[d]), b = load(g[half + d]);
        back[d] = a * cosine[d] + b * sine[d];
        back[half + d] = b * cosine[d] - a * sine[d];
    }
    if (w) {
        float sum = 0.0f, dot = 0.0f;
#pragma omp simd reduction(+ : sum, dot)
        for (int64_t d = 0; d < Dh; d++) {
            float v = load(from[d]);
            sum += v * v;
            dot += back[d] * w[d] * v;
        }
        float r = 1.0f / sqrtf(sum / Dh + eps), pull = dot * r * r * r / Dh;
#pragma omp simd
        for (int64_t d = 0; d < Dh; d++) {
            float v = load(from[d]);
            d_w[d] += back[d] * v * r;
            back[d] = back[d] * w[d] * r - v * pull;
        }
    }
#pragma omp simd
    for (int64_t d = 0; d < Dh; d++) to[d] = low(back[d]);
}

/* CALL(Dh, w, cosine) with what is known at compile time where it is usual. */
#define SPECIALISED(CALL)                                                    \
    if (!angles) CALL(Dh, NULL, NULL);                                       \
    else if (Dh == 64 && w) CALL(64, w, cosine);                             \
    else if (Dh == 64) CALL(64, NULL, cosine);                               \
    else if (Dh == 32 && w) CALL(32, w, cosine);                             \
    else if (Dh == 128 && w) CALL(128, w, cosine);                           \
    else CALL(Dh, w, cosine)

/* x [N, ...] -> out [heads * rows, Dh], rows as seats say, padding zero. With `w` [Dh] each head is normalized; with
 * `angles` (cos and sin, [positions, Dh]: cos first half, sin second) turned by the angle of its position. `w` is not used
 * without `angles`. */
void pad_heads(const act *x, int64_t stride, act *out, const seat *seats, const int32_t *positions, const float *w,
                const float *angles, int64_t N, int64_t heads, int64_t share, int64_t Dh, float eps, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < N; i++) {
        const seat *s = seats + i;
        const float *cosine = angles ? angles + (int64_t)positions[i] * Dh : NULL;
        act *first = out + row_of(s, s->row, heads, share) * Dh;
        for (int64_t h = 0; h < heads; h++) {
            const act *from = x + i * stride + h * Dh;
            act *to = first + head_after(s, share, h) * Dh;
#define SEAT(DIM, NORM, COSINE) seat_head(from, to, NORM, COSINE, COSINE + DIM / 2, DIM, eps)
            SPECIALISED(SEAT);
            if (s->last)
                for (int32_t row = s->row + 1; row < s->width; row++)
                    memset(out + (row_of(s, row, heads, share) + head_after(s, share, h)) * Dh, 0, Dh * sizeof(act));
        }
    }
}

/* The gradient of pad_heads: d_out in the padded layout -> d_x [N, ...] with `stride`; d_w [Dh] where normalized, summed
 * in float64. `x` is the forward pass's input, `partial` [threads, Dh] scratch. Without `angles` it brings rows back. */
void unpad_heads(const act *d_out, const act *x, int64_t x_stride, act *d_x, int64_t stride, const seat *seats,
                  const int32_t *positions, const float *w, const float *angles, float *d_w, double *partial, int64_t N,
                  int64_t heads, int64_t share, int64_t Dh, float eps, int threads) {
    if (w) memset(partial, 0, (size_t)threads * Dh * sizeof(double));
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t part = 0; part < threads; part++) {
        double *mine = w ? partial + part * Dh : NULL;
        for (int64_t i = N * part / threads; i < N * (part + 1) / threads; i++) {
            const seat *s = seats + i;
            const float *cosine = angles ? angles + (int64_t)positions[i] * Dh : NULL;
            const act *first = d_out + row_of(s, s->row, heads, share) * Dh;
            for (int64_t h = 0; h < heads; h++) {
                const act *g = first + head_after(s, share, h) * Dh, *from = w ? x + i * x_stride + h * Dh : NULL;
                act *to = d_x + i * stride + h * Dh;
#define UNSEAT(DIM, NORM, COSINE) unseat_head(g, from, to, NORM, mine, COSINE, COSINE + DIM / 2, DIM, eps)
                SPECIALISED(UNSEAT);
            }
        }
    }
    if (w) add_parts(partial, d_w, Dh, threads);
}

#define VECTOR 16 /* a row is worked on so many columns at a time, those beyond its end masked: no slow loop at its end */
#define KEPT 4096 /* exponentials of so many columns are kept; the rest of a longer row is computed once more */

INLINE float largest(const float *x) {
    float out = x[0];
    for (int k = 1; k < VECTOR; k++) out = x[k] > out ? x[k] : out;
    return out;
}

INLINE float total(const float *x) {
    float out = 0.0f;
    for (int k = 0; k < VECTOR; k++) out += x[k];
    return out;
}

INLINE int32_t within(int32_t limit, int64_t C) { return limit < 0 ? 0 : limit > C ? (int32_t)C : limit; }

/* In place: a row of scores, times scale, becomes its soft-max over the columns that its query may see, zero after them;
 * log_z gets the logarithm of the sum. scores [documents, copies, R, C]; limits [documents, R] says before which columns,
 * and is kept within 0 and C; starts [documents, R], if not null, from which on, kept within 0 and the limit.
 * C is a multiple of VECTOR. */
void softmax_forward(act *scores, float *log_z, const int32_t *limits, const int32_t *starts, int64_t documents,
                     int64_t copies, int64_t R, int64_t C, float scale, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static, 8)
    for (int64_t i = 0; i < documents * copies * R; i++) {
        int64_t at = i / (copies * R) * R + i % R;
        int32_t end = within(limits[at], C), begin = starts ? within(starts[at], end) : 0;
        int32_t filled = end > begin ? (end + VECTOR - 1) / VECTOR * VECTOR : 0;
        act *row = scores + i * C;
        log_z[i] = 0.0f;
        if (end > begin) {
            float tops[VECTOR], sums[VECTOR], kept[KEPT];
            for (int k = 0; k < VECTOR; k++) tops[k] = -INFINITY, sums[k] = 0.0f;
            for (int32_t j = 0; j < filled; j += VECTOR)
#pragma omp simd
                for (int k = 0; k < VECTOR; k++) {
                    float s = j + k >= begin && j + k < end ? load(row[j + k]) : -INFINITY;
                    tops[k] = s > tops[k] ? s : tops[k];
                }
            float shift = largest(tops) * scale;
            for (int32_t j = 0; j < filled; j += VECTOR)
#pragma omp simd
                for (int k = 0; k < VECTOR; k++) {
                    float e = exp_act(load(row[j + k]) * scale - shift);
                    e = j + k >= begin && j + k < end ? e : 0.0f;
                    sums[k] += e;
                    if (j < KEPT) kept[j + k] = e;
                }
            float sum = total(sums), inverse = 1.0f / sum;
            for (int32_t j = 0; j < filled; j += VECTOR)
#pragma omp simd
                for (int k = 0; k < VECTOR; k++) {
                    float e = j < KEPT                         ? kept[j + k]
                              : j + k >= begin && j + k < end ? exp_act(load(row[j + k]) * scale - shift)
                                                              : 0.0f;
                    row[j + k] = low(e * inverse);
                }
            log_z[i] = shift + logf(sum);
        }
        if (filled < C) memset(row + filled, 0, (size_t)(C - filled) * sizeof(act));
    }
}

/* In place: scores become probabilities again, their gradient d_p the gradient of the unscaled scores. */
void softmax_backward(act *scores, act *d_p, const float *log_z, const int32_t *limits, const int32_t *starts,
                      int64_t documents, int64_t copies, int64_t R, int64_t C, float scale, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static, 8)
    for (int64_t i = 0; i < documents * copies * R; i++) {
        int64_t at = i / (copies * R) * R + i % R;
        int32_t end = within(limits[at], C), begin = starts ? within(starts[at], end) : 0;
        int32_t filled = end > begin ? (end + VECTOR - 1) / VECTOR * VECTOR : 0;
        act *row = scores + i * C, *grad = d_p + i * C;
        float z = log_z[i], sums[VECTOR];
        for (int k = 0; k < VECTOR; k++) sums[k] = 0.0f;
        for (int32_t j = 0; j < filled; j += VECTOR)
#pragma omp simd
            for (int k = 0; k < VECTOR; k++) {
                float p = exp_act(load(row[j + k]) * scale - z);
                p = j + k >= begin && j + k < end ? p : 0.0f;
                sums[k] += p * load(grad[j + k]);
                row[j + k] = low(p);
            }
        float delta = total(sums);
        for (int32_t j = 0; j < filled; j += VECTOR)
#pragma omp simd
            for (int k = 0; k < VECTOR; k++)
                grad[j + k] = low(load(row[j + k]) * (load(grad[j + k]) - delta) * scale);
        if (filled < C) {
            memset(row + filled, 0, (size_t)(C - filled) * sizeof(act));
            memset(grad + filled, 0, (size_t)(C - filled) * sizeof(act));
        }
    }
}

#define SUMMED 512 /* exponentials added up in float32 before they are added to a float64 sum */

/* In place: logits [N, V] become weight * (softmax(logits) - one_hot(label)), the gradient of the sum of
 * weight * nll; nll [N] gets the negative log-likelihoods, unweighted. `weights` may be null: all 1. `statistics`
 * [N, 2], if not null, gets a row's largest logit, and the logarithm of Z relative to it. */
void cross_entropy(act *logits, const int64_t *labels, const float *weights, float *nll, float *statistics, int64_t N,
                   int64_t V, int64_t stride, int with_gradient, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static, 4)
    for (int64_t i = 0; i < N; i++) {
        act *row = logits + i * stride;
        float top = -INFINITY;
        double sum = 0.0;
#pragma omp simd reduction(max : top)
        for (int64_t v = 0; v < V; v++) {
            float s = load(row[v]);
            top = s > top ? s : top;
        }
        for (int64_t start = 0; start < V; start += SUMMED) { /* else small terms are lost beside a large sum */
            int64_t end = V - start < SUMMED ? V : start + SUMMED;
            float part = 0.0f;
#pragma omp simd reduction(+ : part)
            for (int64_t v = start; v < end; v++) part += exp_(load(row[v]) - top);
            sum += part;
        }
        /* Both relative to the largest logit: the sum of both would be rounded to its own size. */
        float log_sum = (float)log(sum), at_label = load(row[labels[i]]) - top;
        nll[i] = log_sum - at_label;
        if (statistics) statistics[2 * i] = top, statistics[2 * i + 1] = log_sum;
        if (!with_gradient) continue;
        float factor = weights ? weights[i] : 1.0f;
#pragma omp simd
        for (int64_t v = 0; v < V; v++) row[v] = low(factor * exp_act(load(row[v]) - top - log_sum));
        row[labels[i]] = low(factor * (exp_(at_label - log_sum) - 1.0f));
    }
}

/* In place: logits [N, V] become on_softmax * softmax(logits) - at_label * one_hot(label), with a factor a row each.
 * `statistics` are those of cross_entropy. */
void cross_entropy_gradient(act *logits, const int64_t *labels, const float *statistics, const float *on_softmax,
                            const float *at_label, int64_t N, int64_t V, int64_t stride, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static, 4)
    for (int64_t i = 0; i < N; i++) {
        act *row = logits + i * stride;
        float top = statistics[2 * i], log_sum = statistics[2 * i + 1], factor = on_softmax[i];
        float of_label = load(row[labels[i]]) - top;
#pragma omp simd
        for (int64_t v = 0; v < V; v++) row[v] = low(factor * exp_act(load(row[v]) - top - log_sum));
        row[labels[i]] = low(factor * exp_(of_label - log_sum) - at_label[i]);
    }
}

/* In place: logits [N, V] become cap * tanh(logits / cap). */
void soft_cap(act *logits, int64_t N, int64_t V, int64_t stride, float cap, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < N; i++) {
        act *row = logits + i * stride;
#pragma omp simd
        for (int64_t v = 0; v < V; v++) row[v] = low(cap * tanh_(load(row[v]) / cap));
    }
}

/* In place: the gradient of capped logits becomes that of the `uncapped` [N, V], with a stride of their own. */
void soft_cap_gradient(act *gradient, const act *uncapped, int64_t N, int64_t V, int64_t stride, int64_t apart, float cap,
                       int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < N; i++) {
        act *row = gradient + i * stride;
        const act *from = uncapped + i * apart;
#pragma omp simd
        for (int64_t v = 0; v < V; v++) {
            float t = tanh_(load(from[v]) / cap);
            row[v] = low(load(row[v]) * (1.0f - t * t));
        }
    }
}

#define BLOCK 65536

/* partial[b] = the sum of the squares of x's block b of BLOCK numbers, in float64: the same for any number of threads. */
void sum_of_squares(const float *x, double *partial, int64_t count, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t start = 0; start < count; start += BLOCK) {
        int64_t end = count - start < BLOCK ? count : start + BLOCK;
        double sum = 0.0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = start; i < end; i++) sum += (double)x[i] * x[i];
        partial[start / BLOCK] = sum;
    }
}

/* out[targets[u]] += the sum of the rows order[starts[u]] to order[starts[u + 1] - 1] of x [.., D], formed in float64.
 * Targets are distinct; starts [U + 1]. */
void add_rows(const float *x, const int64_t *order, const int64_t *starts, const int64_t *targets, float *out, int64_t U,
              int64_t D, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 8)
    for (int64_t u = 0; u < U; u++) {
        float *to = out + targets[u] * D;
        for (int64_t first = 0; first < D; first += SUMMED) {
            int64_t width = D - first < SUMMED ? D - first : SUMMED;
            double sums[SUMMED] = {0};
            for (int64_t i = starts[u]; i < starts[u + 1]; i++) {
                const float *from = x + order[i] * D + first;
#pragma omp simd
                for (int64_t d = 0; d < width; d++) sums[d] += from[d];
            }
#pragma omp simd
            for (int64_t d = 0; d < width; d++) to[first + d] += (float)sums[d];
        }
    }
}
