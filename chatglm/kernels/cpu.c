// Products of a few rows with weights as they are stored, and their dequantising, on a CPU.
//
// K columns in, N rows of weights out. A token's time is that of reading the weights: what is done
// with each of them has to be cheap. Where the CPU multiplies bytes (VNNI), packed weights meet x
// as digits of a byte each,
//     x = unit * (d0 + d1 / 254 + d2 / 254^2 + ..),  unit = max|x| / 127,  |d| <= 127,
// whose products are summed exactly. Two digits err by max|x| / 64516 at the most, which is less
// than bf16 loses on the largest x (max|x| / 512); three do for fp16, and four for fp32. Elsewhere,
// and for weights in half precision, x stays in fp32, and the compiler makes of the loop what the
// CPU can.
//
// A byte of int4 holds an even column (high nibble) and an odd one, so x is laid out as all of its
// even columns, then all odd ones.
//
// The threads are those of the OpenMP library in the process, which is torch's.
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#ifdef __F16C__
#include <immintrin.h>
#endif
#if !defined(VNNI) && defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define VNNI 1
#endif
#define INLINE static inline __attribute__((always_inline))

void GOMP_parallel(void (*work)(void *), void *data, unsigned threads, unsigned flags);

enum { INT4 = 4, INT8 = 8, FP16 = 16, BF16 = 17, FP32 = 32 };
enum { BASE = 254, LARGEST = 127, MOST_DIGITS = 4 };
enum { VECTOR = 64, LANES = 64 };
enum { ROWS_AT_ONCE = 32 };  // what a thread takes; a thread that is held up takes fewer
enum { AHEAD = 4096 };  // bytes fetched ahead; without, the cores wait a third of the time

typedef union {
    uint32_t bits;
    float value;
} Word;

INLINE float from_bf16(uint16_t bits) {
    return ((Word){(uint32_t)bits << 16}).value;
}

// For numbers, not infinities or NaN, which no weight is.
INLINE float from_fp16(uint16_t bits) {
    float size = ((Word){(uint32_t)(bits & 0x7fff) << 13}).value * 0x1p112f;
    return bits & 0x8000 ? -size : size;
}

INLINE uint16_t to_bf16(float value) {
    uint32_t bits = ((Word){.value = value}).bits;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// For what fp16 can hold.
INLINE uint16_t to_fp16(float value) {
    uint32_t bits = ((Word){.value = value * 0x1p-112f}).bits, size = bits & 0x7fffffff;
    return (size + 0xfff + (size >> 13 & 1)) >> 13 | (bits >> 16 & 0x8000);
}

INLINE float get(const void *numbers, const int type, long i) {
    return type == FP32 ? ((const float *)numbers)[i] : from_bf16(((const uint16_t *)numbers)[i]);
}

INLINE void put(void *out, const int type, long i, float value) {
    if (type == FP32) ((float *)out)[i] = value;
    if (type == BF16) ((uint16_t *)out)[i] = to_bf16(value);
    if (type == FP16) ((uint16_t *)out)[i] = to_fp16(value);
}

INLINE int high(uint8_t pair) { return (int8_t)pair >> 4; }
INLINE int low(uint8_t pair) { return (int8_t)(pair << 4) >> 4; }

INLINE long bytes_of(int kind, long columns) {
    return kind == INT4 ? columns / 2 : kind == INT8 ? columns : 2 * columns;
}

// Into the second cache, which can wait for more of it at a time than the first.
INLINE void ask_for(const uint8_t *bytes) { __builtin_prefetch(bytes, 0, 2); }

// ---- a row of weights times a row of x, in fp32

// LANES numbers at once: from_fp16 is slow over the smallest numbers of fp16.
INLINE void widen_fp16(const uint16_t *halves, float *whole) {
#if defined(__AVX512F__)
    for (int j = 0; j < LANES; j += 16)
        _mm512_storeu_ps(whole + j,
                         _mm512_cvtph_ps(_mm256_loadu_si256((const void *)(halves + j))));
#elif defined(__F16C__)
    for (int j = 0; j < LANES; j += 8)
        _mm256_storeu_ps(whole + j, _mm256_cvtph_ps(_mm_loadu_si128((const void *)(halves + j))));
#else
    for (int j = 0; j < LANES; j++) whole[j] = from_fp16(halves[j]);
#endif
}

INLINE float term(const int kind, const uint8_t *weight, const float *x, long columns, long i) {
    const uint16_t *halves = (const uint16_t *)weight;
    switch (kind) {
    case INT4: return high(weight[i]) * x[i] + low(weight[i]) * x[columns / 2 + i];
    case INT8: return (int8_t)weight[i] * x[i];
    case FP16: return from_fp16(halves[i]) * x[i];
    default: return from_bf16(halves[i]) * x[i];
    }
}

INLINE float sum_in_fp32(const int kind, const uint8_t *weight, const float *x, long columns) {
    float sums[LANES] = {0}, some[LANES], sum = 0;  // of every LANES-th term: vectors hold them
    long terms = kind == INT4 ? columns / 2 : columns, i = 0;
    for (; i + LANES <= terms; i += LANES) {
        const uint8_t *here = weight + i * (kind < FP16 ? 1 : 2);
        ask_for(here + AHEAD);
        if (kind >= FP16) ask_for(here + AHEAD + LANES);
        if (kind == FP16) {
            widen_fp16((const uint16_t *)here, some);
            for (int j = 0; j < LANES; j++) sums[j] += some[j] * x[i + j];
        } else {
            for (int j = 0; j < LANES; j++) sums[j] += term(kind, weight, x, columns, i + j);
        }
    }
    for (; i < terms; i++) sum += term(kind, weight, x, columns, i);
    for (int j = 0; j < LANES; j++) sum += sums[j];
    return sum;
}

// ---- the same in digits

// x (K,) into planes (digits, K). Gives the unit: NaN if x holds NaN or infinity. `sums` are minus
// what the sums of products will have too much, as weights are moved up by `up` there.
INLINE float write_digits(const float *restrict x, int up, const int digits, long columns,
                          int8_t *restrict planes, int32_t *restrict sums) {
    uint32_t most = 0;  // of |x| as bits, which are in the order of the numbers
    for (long i = 0; i < columns; i++) {
        uint32_t size = ((Word){.value = x[i]}).bits & 0x7fffffff;
        most = size > most ? size : most;
    }
    float unit = most < 0x7f800000 ? ((Word){most}).value / LARGEST : NAN;
    float inverse = unit > 0 ? 1 / unit : 0;
    int32_t totals[MOST_DIGITS] = {0};
    for (long i = 0; i < columns; i++) {
        float rest = x[i] * inverse;
        for (int d = 0; d < digits; d++) {
            float digit = rintf(rest);
            planes[d * columns + i] = (int8_t)digit;
            totals[d] += (int32_t)digit;
            rest = (rest - digit) * BASE;
        }
    }
    for (int d = 0; d < digits; d++) sums[d] = -up * totals[d];
    return unit;
}

#if VNNI
INLINE int has_digits(int kind, long columns) {
    return kind <= INT8 && columns % (2 * VECTOR) == 0;
}

// vpdpbusd wants one side unsigned: the weights, moved up by 8 or 128. High nibbles stay where they
// are, and their sums, 16 times too large, are shifted instead.
INLINE float sum_of_digits(const int kind, const uint8_t *weight, const int8_t *planes,
                           const int32_t *begin, long columns, const int digits) {
    const __m512i up = _mm512_set1_epi8(kind == INT4 ? 0x88 : 0x80);
    const __m512i lower = _mm512_set1_epi8(0x0f), upper = _mm512_set1_epi8(0xf0);
    const long apart = kind == INT4 ? columns / 2 : VECTOR, stride = kind == INT4 ? 1 : 2;
    __m512i sums[MOST_DIGITS][2];
    for (int d = 0; d < digits; d++) sums[d][0] = sums[d][1] = _mm512_setzero_si512();
    for (long i = 0; i < columns / 2; i += VECTOR) {
        const uint8_t *here = weight + stride * i;
        __m512i first = _mm512_loadu_si512(here), second = first;
        ask_for(here + AHEAD);
        if (kind == INT4) {
            first = _mm512_ternarylogic_epi32(first, up, upper, 0x28);  // (first ^ up) & upper
            second = _mm512_ternarylogic_epi32(second, up, lower, 0x28);
        } else {
            first = _mm512_xor_si512(first, up);
            second = _mm512_xor_si512(_mm512_loadu_si512(here + VECTOR), up);
            ask_for(here + VECTOR + AHEAD);
        }
        for (int d = 0; d < digits; d++) {
            const int8_t *x = planes + d * columns + stride * i;
            sums[d][0] = _mm512_dpbusd_epi32(sums[d][0], first, _mm512_loadu_si512(x));
            sums[d][1] = _mm512_dpbusd_epi32(sums[d][1], second, _mm512_loadu_si512(x + apart));
        }
    }
    double total = 0;
    for (int d = digits - 1; d >= 0; d--) {
        __m512i first = kind == INT4 ? _mm512_srai_epi32(sums[d][0], 4) : sums[d][0];
        __m512i both = _mm512_add_epi32(first, sums[d][1]);
        total = total / BASE + (begin[d] + _mm512_reduce_add_epi32(both));
    }
    return (float)total;
}
#else
INLINE int has_digits(int kind, long columns) { return (void)kind, (void)columns, 0; }
INLINE float sum_of_digits(const int kind, const uint8_t *weight, const int8_t *planes,
                           const int32_t *begin, long columns, const int digits) {
    (void)kind, (void)weight, (void)planes, (void)begin, (void)columns, (void)digits;
    return NAN;
}
#endif

// ---- all rows

typedef struct {
    int kind, type;  // of the weights; and of bias and out, FP32 or BF16
    int rows, digits;
    long columns, outputs;
    const uint8_t *weight;
    const uint16_t *scale;  // (N,) fp16, or null
    const void *bias;       // (N,), or null
    void *out;              // (rows, N)
    const float *x;         // (rows, K) in the order of the weight's columns
    const int8_t *planes;   // (rows, digits, K) likewise
    const int32_t *begin;   // (rows, digits): where the sums begin
    const float *units;     // (rows,)
    long next;              // the first row of weights that no thread has taken
} Product;

static float product_of_row(const Product *p, const uint8_t *weight, int row) {
    const int8_t *planes = p->planes + row * p->digits * p->columns;
    const int32_t *begin = p->begin + row * p->digits;
    const float *x = p->x + row * p->columns, unit = p->units[row];
    int digits = has_digits(p->kind, p->columns) ? p->digits : 0;
    switch (p->kind * 10 + digits) {  // constants, so that each has a loop of its own
    case 10 * INT4 + 2: return unit * sum_of_digits(INT4, weight, planes, begin, p->columns, 2);
    case 10 * INT4 + 3: return unit * sum_of_digits(INT4, weight, planes, begin, p->columns, 3);
    case 10 * INT4 + 4: return unit * sum_of_digits(INT4, weight, planes, begin, p->columns, 4);
    case 10 * INT8 + 2: return unit * sum_of_digits(INT8, weight, planes, begin, p->columns, 2);
    case 10 * INT8 + 3: return unit * sum_of_digits(INT8, weight, planes, begin, p->columns, 3);
    case 10 * INT8 + 4: return unit * sum_of_digits(INT8, weight, planes, begin, p->columns, 4);
    case 10 * INT4: return sum_in_fp32(INT4, weight, x, p->columns);
    case 10 * INT8: return sum_in_fp32(INT8, weight, x, p->columns);
    case 10 * FP16: return sum_in_fp32(FP16, weight, x, p->columns);
    default: return sum_in_fp32(BF16, weight, x, p->columns);
    }
}

INLINE long take(long *next) { return __atomic_fetch_add(next, ROWS_AT_ONCE, __ATOMIC_RELAXED); }

static void some_products(void *data) {
    Product *p = data;
    for (long first; (first = take(&p->next)) < p->outputs;)
        for (long n = first; n < first + ROWS_AT_ONCE && n < p->outputs; n++)
            for (int row = 0; row < p->rows; row++) {
                const uint8_t *weight = p->weight + n * bytes_of(p->kind, p->columns);
                float scale = p->scale ? from_fp16(p->scale[n]) : 1;
                float bias = p->bias ? get(p->bias, p->type, n) : 0;
                put(p->out, p->type, row * p->outputs + n,
                    scale * product_of_row(p, weight, row) + bias);
            }
}

INLINE void write_by_column(const void *restrict x, const int type, int kind, long columns,
                            float *restrict ordered) {
    for (long i = 0; i < columns / 2 && kind == INT4; i++) {
        ordered[i] = get(x, type, 2 * i);
        ordered[columns / 2 + i] = get(x, type, 2 * i + 1);
    }
    for (long i = 0; i < columns && kind != INT4; i++) ordered[i] = get(x, type, i);
}

// out (rows, N) = x (rows, K) times the weight's transpose, times scale (N,) if there is one, plus
// bias (N,) if there is one; x, bias and out are FP32 or BF16. digits: 2 to 4.
// Gives 0, or 1 if there is no memory.
int multiply(int kind, int type, const void *x, int rows, int digits, long columns, long outputs,
             const void *weight, const void *scale, const void *bias, void *out, int threads) {
    long numbers = rows * columns, up = kind == INT4 ? 8 : 128;
    char *room = malloc(numbers * (sizeof(float) + digits));
    if (!room) return 1;
    float *ordered = (float *)room, units[rows];
    int8_t *planes = (int8_t *)(ordered + numbers);
    int32_t begin[rows * MOST_DIGITS];
    for (int row = 0; row < rows; row++) {
        float *mine = ordered + row * columns;
        int8_t *plane = planes + row * digits * columns;
        int32_t *sums = begin + row * digits;
        if (type == FP32) write_by_column((float *)x + row * columns, FP32, kind, columns, mine);
        if (type == BF16) write_by_column((uint16_t *)x + row * columns, BF16, kind, columns, mine);
        switch (has_digits(kind, columns) ? digits : 0) {
        case 2: units[row] = write_digits(mine, up, 2, columns, plane, sums); break;
        case 3: units[row] = write_digits(mine, up, 3, columns, plane, sums); break;
        case 4: units[row] = write_digits(mine, up, 4, columns, plane, sums); break;
        default: units[row] = 0;
        }
    }
    Product product = {kind,  type, rows, digits,  columns, outputs, weight,
                       scale, bias, out,  ordered, planes,  begin,   units,  0};
    GOMP_parallel(some_products, &product, threads, 0);
    free(room);
    return 0;
}

// ---- dequantising

typedef struct {
    int kind, to;  // of the weights; and FP32, BF16 or FP16
    long columns, outputs;
    const uint8_t *weight;
    const uint16_t *scale;
    char *out;
    long next;
} Matrix;

INLINE void write_row(const uint8_t *restrict weight, float scale, void *restrict out,
                      const int kind, const int to, long columns) {
    for (long i = 0; i < columns && kind == INT8; i++) put(out, to, i, (int8_t)weight[i] * scale);
    for (long i = 0; i < columns / 2 && kind == INT4; i++) {
        put(out, to, 2 * i, high(weight[i]) * scale);
        put(out, to, 2 * i + 1, low(weight[i]) * scale);
    }
}

static void some_rows(void *data) {
    Matrix *m = data;
    for (long first; (first = take(&m->next)) < m->outputs;)
        for (long n = first; n < first + ROWS_AT_ONCE && n < m->outputs; n++) {
            const uint8_t *weight = m->weight + n * bytes_of(m->kind, m->columns);
            float scale = from_fp16(m->scale[n]);
            void *out = m->out + n * m->columns * (m->to == FP32 ? 4 : 2);
            if (m->to == FP32) write_row(weight, scale, out, m->kind, FP32, m->columns);
            if (m->to == BF16) write_row(weight, scale, out, m->kind, BF16, m->columns);
            if (m->to == FP16) write_row(weight, scale, out, m->kind, FP16, m->columns);
        }
}

// out (N, K) = packed weight times scale (N,).
int dequantize(int kind, int to, long columns, long outputs, const void *weight,
               const void *scale, void *out, int threads) {
    Matrix matrix = {kind, to, columns, outputs, weight, scale, out, 0};
    GOMP_parallel(some_rows, &matrix, threads, 0);
    return 0;
}
