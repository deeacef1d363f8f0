/* Statistics of memory: the numbers that the log keeps of a tensor, in one read of it.

   Plain C against the limited API of Python 3.10, so that one build serves every later Python; it
   knows nothing of torch but the names of a few attributes, which `look` asks a tensor for in one
   go. The caller answers for the memory: `__init__.py` says how it does.

   Two ways to the same numbers. With GCC or clang, vectors of 32 bytes, compiled for any machine
   and, on x86, for AVX2 too, which is chosen when the module is loaded. Elsewhere, and for the last
   15 elements, one element at a time. Sums are doubles; counts are exact. */

#define PY_SSIZE_T_CLEAN
#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030A0000
#endif
#include <Python.h>
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

#ifdef _MSC_VER
#define NOINLINE static __declspec(noinline)
#elif defined(__GNUC__)
#define NOINLINE static __attribute__((noinline))
#else
#define NOINLINE static
#endif

typedef enum { F32, F64, F16, BF16, DTYPES } Dtype;

static const int SIZE[DTYPES] = {4, 8, 2, 2};
#define INF64 0x7ff0000000000000ull
/* The bits of infinity: a larger magnitude is a NaN. */
static const uint64_t INFINITE[DTYPES] = {0x7f800000u, INF64, 0x7c00u, 0x7f80u};
static const int BIAS[DTYPES] = {127, 1023, 15, 127};

typedef struct {
    int64_t nan, posinf, neginf, zeros;
    double low, high, sum, squares; /* of the finite elements */
    int64_t first;                  /* the index of the first that is not; -1 if all are */
} Totals;

/* `n` elements in `rows` equal stretches of memory that begin `pitch` elements apart. */
typedef struct {
    const char *at;
    int64_t n, rows, pitch;
    Dtype dtype;
    int lean; /* whether counts and norm are all that is asked for */
    Totals totals;
    double mean, std, norm;
} Job;

typedef void (*Pass)(const char *at, int64_t n, Totals *t);
typedef void (*Moved)(const char *now, const char *then, int64_t n, double *change, double *weight);

/* f32: 16 kB. An int32 counts its lane's share, and a sum of so few squares loses nothing. */
#define BLOCK 4096
/* As many elements as take about 20 us: below, to let another thread run would cost more. */
#define MANY 131072

/* One element at a time. Memory is copied out, so it needs no alignment. */

static uint64_t bits_at(const char *at, int64_t i, Dtype dtype) {
    uint64_t u64;
    uint32_t u32;
    uint16_t u16;
    switch (dtype) {
    case F64: memcpy(&u64, at + 8 * i, 8); return u64;
    case F32: memcpy(&u32, at + 4 * i, 4); return u32;
    default: memcpy(&u16, at + 2 * i, 2); return u16;
    }
}

static uint64_t magnitude_of(uint64_t bits, Dtype dtype) {
    return bits & ((1ull << (8 * SIZE[dtype] - 1)) - 1);
}

/* The value of a finite element. */
static double value_of(uint64_t bits, Dtype dtype) {
    double wide;
    float narrow;
    uint32_t u32 = (uint32_t)bits;
    switch (dtype) {
    case F64: memcpy(&wide, &bits, 8); return wide;
    case F16:
        wide = (double)(bits & 0x3ff);
        wide = bits & 0x7c00 ? ldexp(wide + 1024, (int)(bits >> 10 & 31) - 25) : wide * 0x1p-24;
        return bits & 0x8000 ? -wide : wide;
    case BF16: u32 <<= 16; /* fall through */
    default: memcpy(&narrow, &u32, 4); return narrow;
    }
}

static void pass_singly(const char *at, int64_t start, int64_t n, Dtype dtype, Totals *t) {
    for (int64_t i = start; i < n; i++) {
        uint64_t bits = bits_at(at, i, dtype), magnitude = magnitude_of(bits, dtype);
        if (magnitude >= INFINITE[dtype]) {
            if (t->first < 0) t->first = i;
            if (magnitude > INFINITE[dtype]) t->nan++;
            else if (bits == magnitude) t->posinf++;
            else t->neginf++;
            continue;
        }
        double value = value_of(bits, dtype);
        t->zeros += magnitude == 0;
        t->sum += value;
        t->squares += value * value;
        if (value < t->low) t->low = value;
        if (value > t->high) t->high = value;
    }
}

/* The value of any element. */
static double any_value(const char *at, int64_t i, Dtype dtype) {
    uint64_t bits = bits_at(at, i, dtype), magnitude = magnitude_of(bits, dtype);
    if (magnitude < INFINITE[dtype]) return value_of(bits, dtype);
    if (magnitude > INFINITE[dtype]) return NAN;
    return bits == magnitude ? INFINITY : -INFINITY;
}

/* The sums over the finite elements of (x / scale - shift) and of its square. */
static void shifted(const Job *job, double scale, double shift, double *sum, double *squares) {
    double s = 0, q = 0;
    const int64_t columns = job->n / job->rows;
    for (int64_t row = 0; row < job->rows; row++) {
        const char *at = job->at + row * job->pitch * SIZE[job->dtype];
        for (int64_t i = 0; i < columns; i++) {
            uint64_t bits = bits_at(at, i, job->dtype);
            if (magnitude_of(bits, job->dtype) >= INFINITE[job->dtype]) continue;
            double value = value_of(bits, job->dtype) / scale - shift;
            s += value;
            q += value * value;
        }
    }
    *sum = s;
    *squares = q;
}

/* Vectors. GCC has convertvector since 9; the MSVC compiler has none of this. Tests define
   TENSORTRACE_NO_VECTORS and TENSORTRACE_NO_AVX2, to run what other machines would. */

#if !defined(TENSORTRACE_NO_VECTORS) &&                                                        \
    (defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 9))
#define VECTORS
#define INLINE static inline __attribute__((always_inline))
typedef float vf __attribute__((vector_size(32)));
typedef float vf4 __attribute__((vector_size(16)));
typedef double vd __attribute__((vector_size(32)));
typedef int32_t vi __attribute__((vector_size(32)));
typedef int64_t vl __attribute__((vector_size(32)));
typedef uint16_t vh __attribute__((vector_size(16)));

static int64_t first_bad(const char *at, int64_t start, int64_t n, Dtype dtype) {
    for (int64_t i = 0; i < n; i++)
        if (magnitude_of(bits_at(at, i, dtype), dtype) >= INFINITE[dtype]) return start + i;
    return -1;
}

typedef int (*Look)(const char *at, int64_t n, Totals *t);

/* `n` is a multiple of 16. A block stays in the first cache for a second look; after one with bad
   elements the next is taken to have some too, which spares a storm of NaN the first look. */
static void pass_blocks(Look clean, Look dirty, const char *at, int64_t n, Dtype dtype, Totals *t) {
    int storm = 0;
    for (int64_t i = 0; i < n; i += BLOCK) {
        int64_t k = n - i < BLOCK ? n - i : BLOCK;
        const char *block = at + i * SIZE[dtype];
        if (!storm && clean(block, k, t)) continue;
        storm = dirty(block, k, t);
        if (storm && t->first < 0) t->first = first_bad(block, i, k, dtype);
    }
}

/* In C there is no a < b ? a : b of vectors. */
#define PICK(mask, a, b, V, I) ((V)(((I)(a) & (mask)) | ((I)(b) & ~(mask))))
#define NAME(x) x##_any
#define TARGET
/* By bits: a thread that flushes denormals would find them equal to zero. */
#define IS_ZERO(x, V, I) (((I)(x) << 1) == 0)
#include "_statistics.h"

#if defined(__x86_64__) && !defined(TENSORTRACE_NO_AVX2)
#define HAS_AVX2
#include <cpuid.h>
#define NAME(x) x##_avx2
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define AVX2
/* An instruction less; `measure_job` sees to it that denormals are not flushed. */
#define IS_ZERO(x, V, I) ((I)((x) == (V){0}))
#include "_statistics.h"

static int has_avx2(void) {
    unsigned a, b, c = 0, d;
    __builtin_cpu_init(); /* looks at what the system saves of the registers, too */
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1); /* F16C */
}
#endif
#endif

/* Written once, when the module is loaded: by whether few numbers are asked for, and dtype. */
static const Pass (*passes)[DTYPES] = NULL;
static const Moved *moves = NULL;
static const char *instructions = "none";

static void choose_passes(void) {
#ifdef VECTORS
    passes = passes_any;
    moves = moves_any;
    instructions = "any";
#endif
#ifdef HAS_AVX2
    if (has_avx2()) {
        passes = passes_avx2;
        moves = moves_avx2;
        instructions = "avx2";
    }
#endif
}

static double finite_or(double value, double other) { return isfinite(value) ? value : other; }

/* How this thread computes: a user may have it flush denormals, which would then count as zeros, or
   trap on a NaN. Ours is the default; what was there is put back. */
#if defined(__x86_64__) || defined(_M_X64)
#define DEFAULT_ARITHMETIC 0x1f80u
static unsigned arithmetic(void) { return _mm_getcsr() & ~0x3fu; } /* six bits are no setting */
static void set_arithmetic(unsigned wanted) { _mm_setcsr(wanted); }
#elif defined(__aarch64__) && (defined(__GNUC__) || defined(__clang__))
#define DEFAULT_ARITHMETIC 0u
static unsigned arithmetic(void) {
    uint64_t found;
    __asm__ volatile("mrs %0, fpcr" : "=r"(found));
    return (unsigned)found;
}
static void set_arithmetic(unsigned wanted) {
    __asm__ volatile("msr fpcr, %0" : : "r"((uint64_t)wanted));
}
#else
#define DEFAULT_ARITHMETIC 0u
static unsigned arithmetic(void) { return DEFAULT_ARITHMETIC; }
static void set_arithmetic(unsigned wanted) { (void)wanted; }
#endif

/* Not inlined: a compiler does not know that the settings matter to the arithmetic. */
NOINLINE void measure_here(Job *job) {
    Totals *t = &job->totals;
    memset(t, 0, sizeof *t);
    t->low = INFINITY, t->high = -INFINITY, t->first = -1;
    const int64_t columns = job->n / job->rows, whole = passes ? columns - columns % 16 : 0;
    for (int64_t row = 0; row < job->rows; row++) {
        const char *at = job->at + row * job->pitch * SIZE[job->dtype];
        int clean = t->first < 0;
        if (whole) passes[job->lean][job->dtype](at, whole, t);
        pass_singly(at, whole, columns, job->dtype, t);
        if (clean && t->first >= 0) t->first += row * columns;
    }
    int64_t count = job->n - t->nan - t->posinf - t->neginf;
    job->mean = job->std = job->norm = 0;
    if (job->lean && job->dtype != F64) {
        job->norm = finite_or(sqrt(t->squares), DBL_MAX);
        return;
    }
    if (count <= 0) {
        t->low = t->high = 0;
        return;
    }
    double largest = -t->low > t->high ? -t->low : t->high, scale = 1;
    /* Doubles whose squares, or whose sum, may be out of range. */
    if (job->dtype == F64 && largest > 0 && !(1e-140 < largest && largest < 1e140)) {
        scale = largest;
        shifted(job, scale, 0, &t->sum, &t->squares);
    }
    double mean = t->sum / count, scatter = t->squares - count * mean * mean;
    if (t->low == t->high) {
        scatter = 0;
    } else if (scatter < 1e-7 * t->squares) { /* of nearly equal elements no digits are left */
        double rest;
        shifted(job, scale, mean, &rest, &scatter);
        scatter -= rest * rest / count;
    }
    /* A thread that writes meanwhile may have shown us a number here and a NaN there; the log holds
       neither NaN nor infinity. Adding zero takes the sign off a zero. */
    t->low = finite_or(t->low, 0) + 0.0;
    t->high = finite_or(t->high, 0) + 0.0;
    job->mean = finite_or(mean * scale, 0) + 0.0;
    job->std = scatter > 0 ? finite_or(sqrt(scatter / count) * scale, 0) : 0;
    job->norm = finite_or(sqrt(t->squares) * scale, DBL_MAX);
}

static void measure_job(Job *job) {
    unsigned was = arithmetic();
    if (was != DEFAULT_ARITHMETIC) set_arithmetic(DEFAULT_ARITHMETIC);
    measure_here(job);
    if (was != DEFAULT_ARITHMETIC) set_arithmetic(was);
}

#define BUCKETS 16
#define LOWEST (-32)
#define WIDTH 4

/* Of f16 with six bits of the fraction: its subnormals too have exponents in these ranges. */
static int fields_of(Dtype dtype) { return dtype == F32 || dtype == BF16 ? 8 : 11; }

/* At most so many elements of a tensor, evenly spaced in runs of `run`: single ones, apart, would
   read all of it. An odd spacing meets other columns in each row of a matrix of even width. */
typedef struct {
    int64_t run, pitch, runs;
} Spacing;

static Spacing spacing_of(int64_t n, int64_t most, int64_t run) {
    int64_t stride = n / most + (n % most > 0);
    if (stride <= 1) return (Spacing){n, n, 1};
    int64_t pitch = run * (stride | 1);
    if (n < pitch) return (Spacing){most < n ? most : n, n, 1};
    return (Spacing){run, pitch, n / pitch};
}

/* How many elements of a sample, fewer than 2^32, have each exponent field; returns how many are 0.
   Four tables in turn: to add to one number again and again would wait for it each time. */
static uint32_t count_fields(const char *from, Spacing s, Dtype dtype, uint32_t *fields) {
    uint32_t tables[4][2048];
    const int width = fields_of(dtype), shift = 8 * SIZE[dtype] - width;
    for (int k = 0; k < 4; k++) memset(tables[k], 0, sizeof(uint32_t) << width);
    uint32_t zero = 0;
#define ADD(k, T, SHIFT)                                                                       \
    {                                                                                          \
        T magnitude = (T)(bits[k] << 1);                                                       \
        zero += magnitude == 0;                                                                \
        tables[k][magnitude >> SHIFT]++;                                                       \
    }
#define FOURS(T, SHIFT)                                                                        \
    for (; i + 4 <= s.run; i += 4) {                                                           \
        T bits[4];                                                                             \
        memcpy(bits, at + i * (int64_t)sizeof(T), sizeof bits);                                \
        ADD(0, T, SHIFT) ADD(1, T, SHIFT) ADD(2, T, SHIFT) ADD(3, T, SHIFT)                    \
    }
    for (int64_t k = 0; k < s.runs; k++) {
        const char *at = from + k * s.pitch * SIZE[dtype];
        int64_t i = 0;
        switch (dtype) {
        case F64: FOURS(uint64_t, 53) break;
        case F32: FOURS(uint32_t, 24) break;
        case F16: FOURS(uint16_t, 5) break;
        default: FOURS(uint16_t, 8) break;
        }
        for (; i < s.run; i++) {
            uint64_t magnitude = magnitude_of(bits_at(at, i, dtype), dtype);
            zero += magnitude == 0;
            tables[0][magnitude >> (shift - 1)]++;
        }
    }
#undef FOURS
#undef ADD
    for (int e = 0; e < 1 << width; e++)
        fields[e] = tables[0][e] + tables[1][e] + tables[2][e] + tables[3][e];
    return zero;
}

static int bucket_of(int exponent) {
    int distance = exponent - LOWEST;
    if (distance < 0) return 0;
    int bucket = 1 + distance / WIDTH;
    return bucket < BUCKETS ? bucket : BUCKETS - 1;
}

static int exponent_of(int field, Dtype dtype) {
    if (dtype != F16) return (field ? field : 1) - BIAS[dtype];
    if (field >= 64) return (field >> 6) - BIAS[F16];
    int exponent = -21; /* below 2^-20, all in one range */
    for (; field; field >>= 1) exponent++;
    return exponent;
}

/* The first field of each range, and of what is not finite: a range is a run of fields. */
static int first_field[DTYPES][BUCKETS + 1];

static void part_fields(Dtype dtype) {
    const int shift = 8 * SIZE[dtype] - 1 - fields_of(dtype);
    const int last = (int)(INFINITE[dtype] >> shift);
    int bucket = 0;
    for (int field = 0; field < last; field++)
        while (bucket < bucket_of(exponent_of(field, dtype))) first_field[dtype][++bucket] = field;
    while (bucket < BUCKETS) first_field[dtype][++bucket] = last;
}

static void histogram(const Job *job, Spacing spacing, int64_t *buckets) {
    uint32_t fields[2048];
    uint32_t zeros = count_fields(job->at, spacing, job->dtype, fields);
    fields[0] -= zeros;
    const int *first = first_field[job->dtype];
    for (int i = 0; i < BUCKETS; i++)
        for (int field = first[i]; field < first[i + 1]; field++) buckets[i] += fields[field];
}

/* Python. */

static int parse_memory(PyObject *address, PyObject *count, PyObject *dtype, Job *job) {
    job->at = (const char *)PyLong_AsVoidPtr(address);
    if (!job->at && PyErr_Occurred()) return 0;
    long long n = PyLong_AsLongLong(count);
    if (n == -1 && PyErr_Occurred()) return 0;
    long code = PyLong_AsLong(dtype);
    if (code == -1 && PyErr_Occurred()) return 0;
    if (code < 0 || code >= DTYPES) {
        PyErr_SetString(PyExc_ValueError, "no such dtype");
        return 0;
    }
    /* The address of no memory is what torch gives for a storage that is not there. */
    if (n < 0 || n > INT64_MAX / 16 || (n > 0 && !job->at)) {
        PyErr_SetString(PyExc_ValueError, "no memory there");
        return 0;
    }
    job->n = job->pitch = n;
    job->rows = 1;
    job->dtype = (Dtype)code;
    job->lean = 0;
    return 1;
}

static int parse_spacing(PyObject *most, PyObject *run, const Job *job, Spacing *spacing) {
    long long m = PyLong_AsLongLong(most), r = PyLong_AsLongLong(run);
    if (PyErr_Occurred()) return 0;
    if (m < 1 || m > INT32_MAX || r < 1 || r > INT32_MAX || job->n < 1) {
        PyErr_SetString(PyExc_ValueError, "nothing to sample");
        return 0;
    }
    *spacing = spacing_of(job->n, m, r);
    return 1;
}

static int parse_sample(PyObject *const *args, Py_ssize_t nargs, Job *job, Spacing *spacing) {
    if (nargs != 5) {
        PyErr_SetString(PyExc_TypeError, "it takes (address, count, dtype, most, run)");
        return 0;
    }
    return parse_memory(args[0], args[1], args[2], job) &&
           parse_spacing(args[3], args[4], job, spacing);
}

static PyObject *as_tuple(PyObject *const *items, Py_ssize_t n) {
    PyObject *tuple = PyTuple_New(n);
    int failed = tuple == NULL;
    for (Py_ssize_t i = 0; i < n; i++) {
        failed |= items[i] == NULL;
        if (failed) Py_XDECREF(items[i]);
        else PyTuple_SetItem(tuple, i, items[i]); /* takes the reference */
    }
    if (!failed) {
        /* Of numbers, texts and tuples of them: the garbage collector need not look at it once. */
        if (n) PyObject_GC_UnTrack(tuple);
        return tuple;
    }
    Py_XDECREF(tuple);
    return NULL;
}

#define HEAD 9
#define ROW 12

static void put_row(const Job *job, PyObject *exponents, PyObject **items) {
    const Totals *t = &job->totals;
    int some = t->nan + t->posinf + t->neginf < job->n;
    const int64_t counts[4] = {t->nan, t->posinf, t->neginf, t->zeros};
    for (int i = 0; i < 4; i++) items[i] = PyLong_FromLongLong(counts[i]);
    const double numbers[5] = {t->low, t->high, job->mean, job->std, job->norm};
    for (int i = 0; i < 5; i++) {
        int known = some && (!job->lean || i == 4);
        if (!known) Py_INCREF(Py_None);
        items[4 + i] = known ? PyFloat_FromDouble(numbers[i]) : Py_None;
    }
    Py_INCREF(Py_None);
    items[9] = Py_None;
    if (t->first < 0) Py_INCREF(Py_None);
    items[10] = t->first < 0 ? Py_None : PyLong_FromLongLong(t->first);
    items[11] = exponents;
}

static PyObject *row_of(const Job *job, PyObject *exponents) {
    PyObject *items[ROW];
    put_row(job, exponents, items);
    return as_tuple(items, ROW);
}

static PyObject *none(void) {
    Py_INCREF(Py_None);
    return Py_None;
}

static PyObject *owned(PyObject *borrowed) {
    Py_XINCREF(borrowed);
    return borrowed;
}

static void measure_and_release(Job *job) {
    if (job->n < MANY) {
        measure_job(job);
    } else {
        Py_BEGIN_ALLOW_THREADS
        measure_job(job);
        Py_END_ALLOW_THREADS
    }
}

static PyObject *measure_as(PyObject *const *args, Py_ssize_t nargs, int lean) {
    Job job;
    if (nargs != 3) {
        PyErr_SetString(PyExc_TypeError, "it takes (address, count, dtype)");
        return NULL;
    }
    if (!parse_memory(args[0], args[1], args[2], &job)) return NULL;
    job.lean = lean;
    measure_and_release(&job);
    return row_of(&job, none());
}

static PyObject *measure(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    (void)module;
    return measure_as(args, nargs, 0);
}

static PyObject *measure_lean(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    (void)module;
    return measure_as(args, nargs, 1);
}

static PyObject *measure_rows(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    (void)module;
    Job job;
    if (nargs != 6) {
        PyErr_SetString(PyExc_TypeError, "it takes (address, columns, dtype, rows, pitch, lean)");
        return NULL;
    }
    if (!parse_memory(args[0], args[1], args[2], &job)) return NULL;
    long long rows = PyLong_AsLongLong(args[3]), pitch = PyLong_AsLongLong(args[4]);
    int lean = PyObject_IsTrue(args[5]);
    if (PyErr_Occurred()) return NULL;
    if (job.n < 1 || rows < 1 || pitch < job.n || rows > INT64_MAX / 16 / pitch) {
        PyErr_SetString(PyExc_ValueError, "no such rows");
        return NULL;
    }
    job.n *= rows;
    job.rows = rows;
    job.pitch = pitch;
    job.lean = lean;
    measure_and_release(&job);
    return row_of(&job, none());
}

static PyObject *exponents_of(const Job *job, Spacing spacing) {
    int64_t buckets[BUCKETS] = {0};
    histogram(job, spacing, buckets);
    PyObject *items[BUCKETS];
    for (int i = 0; i < BUCKETS; i++) items[i] = PyLong_FromLongLong(buckets[i]);
    return as_tuple(items, BUCKETS);
}

static PyObject *measure_closely(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    (void)module;
    Job job;
    Spacing spacing;
    if (!parse_sample(args, nargs, &job, &spacing)) return NULL;
    measure_and_release(&job);
    PyObject *exponents = exponents_of(&job, spacing);
    return exponents ? row_of(&job, exponents) : NULL;
}

/* Adds the squares of a piece of a sample. One element at a time where f32 cannot hold a square, and
   for bad elements. */
static void move_piece(const char *now, const char *then, int64_t n, Dtype dtype, double *change,
                       double *weight) {
    const double least = 1e-24 * (double)n;
    double c = 0, w = 0;
    int64_t k = 0;
    if (moves && moves[dtype] && n % 16 == 0) {
        moves[dtype](now, then, n, &c, &w);
        int still = c == 0 && memcmp(now, then, (size_t)(n * SIZE[dtype])) == 0;
        if ((still || (c > least && c < INFINITY)) && w > least && w < INFINITY) k = n;
        else c = w = 0;
    }
    for (; k < n; k++) {
        double x = any_value(now, k, dtype), y = any_value(then, k, dtype);
        c += (x - y) * (x - y);
        w += y * y;
    }
    *change += c;
    *weight += w;
}

#define PIECE 128

/* Not inlined: a compiler does not know that the settings of arithmetic matter to it. */
NOINLINE void move(const Job *job, const Spacing *s, const char *before, double *change,
                   double *weight) {
    int64_t item = SIZE[job->dtype];
    for (int64_t i = 0; i < s->runs; i++) {
        const char *now = job->at + i * s->pitch * item, *then = before + i * s->run * item;
        for (int64_t k = 0; k < s->run; k += PIECE) {
            int64_t n = s->run - k < PIECE ? s->run - k : PIECE;
            move_piece(now + k * item, then + k * item, n, job->dtype, change, weight);
        }
    }
}

/* A look at an ordinary tensor: all that a record says of it, asked for and measured in one call. It
   asks what `compiled.place` and `tensors._head` ask, in the same order; between a program's own
   ops their dozen Python functions are cold each time, and cost twice this. */

enum { DTYPE, SHAPE, REQUIRES_GRAD, IS_LEAF, GRAD_FN, VERSION, IS_CONTIGUOUS,
       STORAGE_OFFSET, UNTYPED_STORAGE, NBYTES, DATA_PTR, IS_VIEW, NAME, IS_CPU, IS_NEG, STRIDE,
       NEXT_ID, ID, NAMES };
static const char *const ATTRIBUTES[NAMES] = {
    "dtype", "shape", "requires_grad", "is_leaf", "grad_fn", "_version",
    "is_contiguous", "storage_offset", "untyped_storage", "nbytes", "data_ptr", "_is_view", "name",
    "is_cpu", "is_neg", "stride", "next_id", "id"};

static struct {
    PyObject *names[NAMES], *tensor, *parameter, *dtypes, *cpu, *shapes;
    int64_t small, least;
    Spacing sample; /* most elements as `runs`, and `run` */
} torch;

static PyObject *prepare(PyObject *module, PyObject *args) {
    (void)module;
    PyObject *tensor, *parameter, *dtypes;
    long long small, least, most, run;
    if (!PyArg_ParseTuple(args, "OOO!LLLL", &tensor, &parameter, &PyDict_Type, &dtypes, &small, &least,
                          &most, &run))
        return NULL;
    if (most < 1 || most > INT32_MAX || run < 1 || run > INT32_MAX || least < 1) {
        PyErr_SetString(PyExc_ValueError, "nothing to sample");
        return NULL;
    }
    Py_INCREF(tensor), Py_INCREF(parameter), Py_INCREF(dtypes);
    Py_XDECREF(torch.tensor), Py_XDECREF(torch.parameter), Py_XDECREF(torch.dtypes);
    torch.tensor = tensor, torch.parameter = parameter, torch.dtypes = dtypes;
    torch.small = small, torch.least = least;
    torch.sample = (Spacing){run, 0, most};
    return none();
}

/* A number that an attribute, or a method without arguments, gives; -1 with an error set. */
static long long number_of(PyObject *value) {
    long long number = value ? PyLong_AsLongLong(value) : -1;
    Py_XDECREF(value);
    return number;
}

static PyObject *ask(PyObject *object, int name) {
    return PyObject_CallMethodObjArgs(object, torch.names[name], NULL);
}

static int is_true(PyObject *value) {
    int truth = value ? PyObject_IsTrue(value) : -1;
    Py_XDECREF(value);
    return truth;
}

/* Whether the memory of a tensor, if it gives an address, is what it means. To ask for its dispatch
   keys, as Python does, takes as long as all that follows: they come as an object of pybind11's. Of
   what is wrapped around other memory (functorch, functional, nested, sparse, opaque) and of a zero
   tensor torch gives no address, or raises; a quantized one has another dtype. */
static int is_dense(PyObject *tensor) {
    return is_true(PyObject_GetAttr(tensor, torch.names[IS_CPU])) == 1 &&
           is_true(ask(tensor, IS_NEG)) == 0;
}

/* The product of a shape; -1 where it is no tuple of numbers. */
static int64_t elements_of(PyObject *shape) {
    int64_t n = 1;
    for (Py_ssize_t i = 0; i < PyTuple_Size(shape); i++) {
        long long length = PyLong_AsLongLong(PyTuple_GetItem(shape, i));
        if (length < 0 || (length && n > INT64_MAX / 16 / length)) return -1;
        n *= length;
    }
    return n;
}

/* Where the elements lie; 0 for none, and for those that the storage is too small for. */
static int locate(PyObject *tensor, Job *job) {
    long long offset = number_of(ask(tensor, STORAGE_OFFSET));
    PyObject *storage = ask(tensor, UNTYPED_STORAGE);
    long long nbytes = storage ? number_of(ask(storage, NBYTES)) : -1;
    Py_XDECREF(storage);
    if (PyErr_Occurred() || offset < 0 || offset > INT64_MAX / 16) return 0;
    const int64_t extent = (job->rows - 1) * job->pitch + job->n / job->rows;
    if ((offset + extent) > nbytes / SIZE[job->dtype]) return 0;
    PyObject *address = ask(tensor, DATA_PTR);
    job->at = address ? (const char *)PyLong_AsVoidPtr(address) : NULL;
    Py_XDECREF(address);
    return job->at != NULL;
}

/* The name of the node that made a tensor, as `tensors.grad_fn_name` finds it; NULL for an error. */
static PyObject *node_name(PyObject *tensor) {
    int view = is_true(ask(tensor, IS_VIEW));
    if (view < 0) return NULL;
    if (view && number_of(PyObject_GetAttr(tensor, torch.names[VERSION])) != 0) {
        PyErr_Clear(); /* inference tensors count no versions */
        return none();
    }
    PyObject *node = PyObject_GetAttr(tensor, torch.names[GRAD_FN]);
    if (!node || node == Py_None) return node;
    PyObject *name = ask(node, NAME);
    Py_DECREF(node);
    return name;
}

#define MOST_SHAPES 1024
#define MOST_DIMS 16
#define MOST_SEEN 8
/* As in __init__.py: of shorter rows only so many elements are read. */
#define LEAST_COLUMNS 16
#define MOST_SINGLY 4096

/* A plain tuple of a shape, the same one each time: few shapes make all tensors of a step, and each
   object that is kept is one more for the garbage collector to look at. */
static PyObject *shape_of(PyObject *shape) {
    PyObject *known = PyDict_GetItemWithError(torch.shapes, shape); /* borrowed */
    if (known) {
        Py_INCREF(known);
        return known;
    }
    if (PyErr_Occurred()) return NULL;
    PyObject *made = PyTuple_GetSlice(shape, 0, PyTuple_Size(shape));
    if (PyDict_Size(torch.shapes) >= MOST_SHAPES) PyDict_Clear(torch.shapes);
    if (made && PyDict_SetItem(torch.shapes, made, made) == 0) {
        PyObject_GC_UnTrack(made);
        return made;
    }
    Py_XDECREF(made);
    return NULL;
}

/* As `compiled.place` and `compiled.rows_place`: whether the elements of a tensor with strides lie in
   one stretch of memory, or in rows of equal length at equal distances. */
static int lay_out(PyObject *strides, PyObject *shape, Job *job) {
    int64_t stride[MOST_DIMS], length[MOST_DIMS], columns = 1, rows = 1, pitch = 0;
    const Py_ssize_t dims = PyTuple_Check(strides) ? PyTuple_Size(strides) : -1;
    int n = 0;
    if (dims < 0 || dims > MOST_DIMS || dims != PyTuple_Size(shape)) return 0;
    for (Py_ssize_t i = 0; i < dims; i++) {
        const int64_t l = PyLong_AsLongLong(PyTuple_GetItem(shape, i));
        const int64_t s = PyLong_AsLongLong(PyTuple_GetItem(strides, i));
        if (s < 0 || s > INT64_MAX / 16 / job->n) return 0;
        if (l == 1) continue;
        int k = n++; /* into its place among those before it */
        for (; k > 0 && (stride[k - 1] > s || (stride[k - 1] == s && length[k - 1] > l)); k--)
            stride[k] = stride[k - 1], length[k] = length[k - 1];
        stride[k] = s, length[k] = l;
    }
    for (int i = 0; i < n; i++) {
        if (!pitch && stride[i] == columns) columns *= length[i];
        else if (!pitch && stride[i] > columns) pitch = stride[i], rows = length[i];
        else if (pitch && stride[i] == pitch * rows) rows *= length[i];
        else return 0;
    }
    if (!pitch) return 1;
    job->rows = rows, job->pitch = pitch;
    return columns >= LEAST_COLUMNS || job->n <= MOST_SINGLY;
}

/* The strides of a tensor that is not contiguous, and NULL of one that is; 0 where it is not laid out
   as above. */
static int lies(PyObject *tensor, PyObject *shape, Job *job, PyObject **strides) {
    int contiguous = is_true(ask(tensor, IS_CONTIGUOUS));
    if (contiguous) return contiguous == 1;
    *strides = ask(tensor, STRIDE);
    if (!*strides || !lay_out(*strides, shape, job)) return 0;
    PyObject_GC_UnTrack(*strides); /* numbers, and nobody else has it yet */
    return 1;
}

/* What needs no grad is a leaf, and no node made it. */
static void put_head(PyObject *tensor, PyObject *number, PyObject *shape, PyObject *strides,
                     PyObject *dtype, int64_t n, PyObject **items) {
    PyObject *needs_grad = PyObject_GetAttr(tensor, torch.names[REQUIRES_GRAD]);
    PyObject *node = needs_grad == Py_True ? node_name(tensor) : none();
    PyObject *is_leaf = needs_grad == Py_False ? owned(Py_True)
                                               : PyObject_GetAttr(tensor, torch.names[IS_LEAF]);
    Py_INCREF(number), Py_INCREF(dtype), Py_INCREF(torch.cpu);
    PyObject *head[HEAD] = {
        number, shape_of(shape), strides ? strides : none(), dtype, torch.cpu, needs_grad, is_leaf,
        node, PyLong_FromLongLong(n)};
    Py_XINCREF(strides);
    memcpy(items, head, sizeof head);
}

static int is_exact(PyObject *tensor) {
    PyObject *kind = (PyObject *)Py_TYPE(tensor);
    return kind == torch.tensor || kind == torch.parameter;
}

/* The code and the name of the dtype of an ordinary tensor, borrowed, its shape, which is the caller's,
   and how many elements that has; NULL, and no shape, of any other. */
static PyObject *begin(PyObject *tensor, PyObject **shape, Job *job) {
    if (!is_exact(tensor) || !is_dense(tensor)) return NULL;
    PyObject *dtype = PyObject_GetAttr(tensor, torch.names[DTYPE]);
    PyObject *known = dtype ? PyDict_GetItemWithError(torch.dtypes, dtype) : NULL;
    Py_XDECREF(dtype);
    if (!known || !(*shape = PyObject_GetAttr(tensor, torch.names[SHAPE]))) return NULL;
    *job = (Job){.rows = 1, .dtype = (Dtype)PyLong_AsLong(PyTuple_GetItem(known, 0))};
    job->n = job->pitch = PyTuple_Check(*shape) ? elements_of(*shape) : -1;
    return known;
}

/* Where all elements of an ordinary tensor lie, in one stretch; 0 of any other. */
static int locate_all(PyObject *tensor, Job *job) {
    PyObject *shape = NULL, *strides = NULL;
    if (!begin(tensor, &shape, job)) return 0;
    int found = job->n > 0 && lies(tensor, shape, job, &strides) && job->rows == 1 &&
                !PyErr_Occurred() && locate(tensor, job);
    Py_DECREF(shape), Py_XDECREF(strides);
    return found;
}

/* What is no ordinary tensor is none for `sample` and `moved`, whatever it raised on the way. */
static int find_sample(PyObject *const *args, Job *job, Spacing *spacing) {
    if (torch.tensor && locate_all(args[0], job)) return parse_spacing(args[1], args[2], job, spacing);
    PyErr_Clear();
    return 0;
}

static PyObject *sample(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    (void)module;
    Job job;
    Spacing s;
    if (nargs != 3) {
        PyErr_SetString(PyExc_TypeError, "sample(tensor, most, run)");
        return NULL;
    }
    if (!find_sample(args, &job, &s)) return PyErr_Occurred() ? NULL : none();
    int64_t item = SIZE[job.dtype];
    PyObject *values = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(s.runs * s.run * item));
    if (!values) return NULL;
    char *to = PyBytes_AsString(values);
    for (int64_t i = 0; i < s.runs; i++)
        memcpy(to + i * s.run * item, job.at + i * s.pitch * item, (size_t)(s.run * item));
    PyObject *taken[4] = {values, PyLong_FromLongLong(s.runs * s.run), PyLong_FromLongLong(job.n),
                          PyLong_FromLong(job.dtype)};
    return as_tuple(taken, 4);
}

static PyObject *moved(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    (void)module;
    Job job;
    Spacing s;
    if (nargs != 4 || !PyTuple_Check(args[3]) || PyTuple_Size(args[3]) != 4 ||
        !PyBytes_Check(PyTuple_GetItem(args[3], 0))) {
        PyErr_SetString(PyExc_TypeError, "moved(tensor, most, run, taken)");
        return NULL;
    }
    PyObject *values = PyTuple_GetItem(args[3], 0);
    const long long n = PyLong_AsLongLong(PyTuple_GetItem(args[3], 2));
    const long dtype = PyLong_AsLong(PyTuple_GetItem(args[3], 3));
    if (PyErr_Occurred()) return NULL;
    if (!find_sample(args, &job, &s)) return PyErr_Occurred() ? NULL : none();
    if (job.n != n || (long)job.dtype != dtype) return none();
    int64_t item = SIZE[job.dtype];
    if (PyBytes_Size(values) != s.runs * s.run * item) {
        PyErr_SetString(PyExc_ValueError, "a sample of something else");
        return NULL;
    }
    const char *before = PyBytes_AsString(values);
    double change = 0, weight = 0;
    unsigned was = arithmetic();
    if (was != DEFAULT_ARITHMETIC) set_arithmetic(DEFAULT_ARITHMETIC);
    move(&job, &s, before, &change, &weight);
    if (was != DEFAULT_ARITHMETIC) set_arithmetic(was);
    PyObject *norms[2] = {PyFloat_FromDouble(sqrt(change)), PyFloat_FromDouble(sqrt(weight))};
    return as_tuple(norms, 2);
}

/* The head of an ordinary tensor that nobody measures. */
static PyObject *head_of(PyObject *tensor, PyObject *number) {
    PyObject *shape = NULL, *items[HEAD], *head = NULL;
    Job job;
    PyObject *known = begin(tensor, &shape, &job);
    if (!known) return NULL;
    if (job.n >= 0 && is_true(ask(tensor, IS_CONTIGUOUS)) == 1) {
        put_head(tensor, number, shape, NULL, PyTuple_GetItem(known, 1), job.n, items);
        head = as_tuple(items, HEAD);
    }
    Py_DECREF(shape);
    return head;
}

static PyObject *head(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    (void)module;
    if (!torch.tensor || nargs != 2) {
        PyErr_SetString(PyExc_TypeError, "head(tensor, number)");
        return NULL;
    }
    PyObject *found = head_of(args[0], args[1]);
    if (found) return found;
    PyErr_Clear(); /* as in `look` */
    return none();
}

static void put_measured(Job *job, int closely, PyObject **items) {
    measure_and_release(job);
    if (job->lean && job->totals.first >= 0) {
        job->lean = 0;
        measure_and_release(job);
    }
    put_row(job, closely ? exponents_of(job, spacing_of(job->n, torch.sample.runs, torch.sample.run))
                         : none(), items);
}

/* What was measured a moment ago, with the fields of its `Tensor`: the same memory is not read
   again. */
typedef struct {
    Job jobs[MOST_SEEN];
    PyObject *fields[MOST_SEEN]; /* its own */
    int count;
} Seen;

static PyObject *seen_before(const Seen *seen, const Job *job) {
    for (int i = 0; i < seen->count; i++) {
        const Job *other = &seen->jobs[i];
        if (other->at == job->at && other->n == job->n && other->rows == job->rows &&
            other->pitch == job->pitch && other->dtype == job->dtype)
            return seen->fields[i];
    }
    return NULL;
}

/* Head and row of an ordinary tensor; 0, and none of them, of any other. Of one that is not
   contiguous nothing but finite elements: where the first bad one is, somebody else has to say. */
static int describe(PyObject *tensor, PyObject *number, long mode, const Seen *seen, Job *job,
                    PyObject **items) {
    PyObject *shape = NULL, *strides = NULL, *known = begin(tensor, &shape, job);
    int found = 0;
    if (!known) return 0;
    memset(items, 0, (HEAD + ROW) * sizeof *items);
    if (job->n > 0 && lies(tensor, shape, job, &strides)) {
        put_head(tensor, number, shape, strides, PyTuple_GetItem(known, 1), job->n, items);
        /* The address last, right before it is read. */
        found = !PyErr_Occurred() && locate(tensor, job);
    }
    PyObject *before = found && seen ? seen_before(seen, job) : NULL;
    if (before) {
        for (int i = HEAD; i < HEAD + ROW; i++) items[i] = owned(PyTuple_GetItem(before, i));
    } else if (found) {
        job->lean = mode == 2 && job->n > torch.small;
        put_measured(job, mode == 1 && job->n >= torch.least && job->rows == 1, items + HEAD);
        found = !strides || job->totals.first < 0;
    }
    Py_DECREF(shape), Py_XDECREF(strides);
    for (int i = 0; i < HEAD + ROW && !found; i++) Py_XDECREF(items[i]);
    return found;
}

static PyObject *look_at(PyObject *tensor, PyObject *number, long mode) {
    PyObject *items[HEAD + ROW];
    Job job;
    if (!describe(tensor, number, mode, NULL, &job, items)) return NULL;
    PyObject *found[2] = {as_tuple(items, HEAD), as_tuple(items + HEAD, ROW)};
    return as_tuple(found, 2);
}

static PyObject *look(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    (void)module;
    long mode = nargs == 3 ? PyLong_AsLong(args[2]) : -1;
    if (!torch.tensor || mode < 0 || mode > 2) {
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, "look(tensor, number, mode)");
        return NULL;
    }
    PyObject *found = look_at(args[0], args[1], mode);
    if (found) return found;
    PyErr_Clear(); /* whoever asks one thing at a time meets it again, and knows what to do */
    return none();
}

/* The finished `Tensor` of an ordinary gradient; NULL of one that has a graph of its own. */
static PyObject *record_of(PyObject *make, PyObject *tensor, PyObject *number, long mode, Seen *seen,
                           int *bad) {
    PyObject *items[HEAD + ROW];
    Job job;
    if (!describe(tensor, number, mode, seen, &job, items)) return NULL;
    const int has_bad = items[HEAD + 10] != Py_None, needs_grad = items[5] != Py_False;
    PyObject *fields = as_tuple(items, HEAD + ROW);
    PyObject *made = fields && !needs_grad ? PyObject_Call(make, fields, NULL) : NULL;
    *bad |= has_bad;
    if (made && seen->count < MOST_SEEN && !has_bad) {
        seen->jobs[seen->count] = job;
        seen->fields[seen->count++] = fields;
    } else {
        Py_XDECREF(fields);
    }
    return made;
}

/* Takes a number from the table for each that is a tensor. For all of them before any is measured,
   since that lets other threads run. */
static int reserve(PyObject *table, PyObject *const *grads, Py_ssize_t n, long long *first) {
    long long count = 0;
    for (Py_ssize_t i = 0; i < n; i++)
        count += PyObject_TypeCheck(grads[i], (PyTypeObject *)torch.tensor) != 0;
    *first = number_of(PyObject_GetAttr(table, torch.names[NEXT_ID]));
    PyObject *next = *first < 0 ? NULL : PyLong_FromLongLong(*first + count);
    int failed = !next || PyObject_SetAttr(table, torch.names[NEXT_ID], next) < 0;
    Py_XDECREF(next);
    return !failed;
}

#define GIVEN 64

static PyObject *look_all(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    (void)module;
    long mode = nargs == 5 && PyTuple_Check(args[2]) && PyTuple_Check(args[3])
                    ? PyLong_AsLong(args[4]) : -1;
    if (!torch.tensor || mode < 0 || mode > 2) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_TypeError, "look_all(make, table, arrived, made, mode)");
        return NULL;
    }
    PyObject *grads[GIVEN], *found[GIVEN];
    const Py_ssize_t arrived = PyTuple_Size(args[2]), n = arrived + PyTuple_Size(args[3]);
    long long number;
    if (n > GIVEN) return none();
    for (Py_ssize_t i = 0; i < n; i++)
        grads[i] = i < arrived ? PyTuple_GetItem(args[2], i) : PyTuple_GetItem(args[3], i - arrived);
    if (!reserve(args[1], grads, n, &number)) return NULL;
    Seen seen = {.count = 0};
    int bad = 0, rest = 0;
    for (Py_ssize_t i = 0; i < n; i++) {
        found[i] = NULL;
        if (!PyObject_TypeCheck(grads[i], (PyTypeObject *)torch.tensor)) {
            found[i] = none();
            continue;
        }
        PyObject *id = PyLong_FromLongLong(number++);
        if (id) found[i] = record_of(args[0], grads[i], id, mode, &seen, &bad);
        if (id && !found[i]) {
            PyErr_Clear(); /* as in `look` */
            rest = 1;
            found[i] = owned(id);
        }
        Py_XDECREF(id);
    }
    while (seen.count) Py_DECREF(seen.fields[--seen.count]);
    PyObject *all[3] = {as_tuple(found, n), PyBool_FromLong(bad), PyBool_FromLong(rest)};
    return as_tuple(all, 3);
}

/* A list or dict of drafts or records, of which there are thousands a step: the garbage collector need
   not look at it, nor count it among what may be garbage. Nothing in it can lead back to it. */
static PyObject *untracked(PyObject *module, PyObject *plain) {
    (void)module;
    if (!PyList_CheckExact(plain) && !PyDict_CheckExact(plain)) {
        PyErr_SetString(PyExc_TypeError, "untracked() takes a list or a dict");
        return NULL;
    }
    PyObject_GC_UnTrack(plain);
    return owned(plain);
}

static PyObject *as_list(PyObject *const *items, Py_ssize_t n) {
    PyObject *list = PyList_New(n);
    int failed = list == NULL;
    for (Py_ssize_t i = 0; i < n; i++) {
        failed |= items[i] == NULL;
        if (failed) Py_XDECREF(items[i]);
        else PyList_SetItem(list, i, items[i]); /* takes the reference */
    }
    if (!failed) {
        PyObject_GC_UnTrack(list);
        return list;
    }
    Py_XDECREF(list);
    return NULL;
}

/* Inputs, outputs and tensors of a record: (name, id) of those that came and went, and all of them.
   None where there are others than finished ones among them. */
static PyObject *name_all(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    (void)module;
    if (nargs != 4 || !PyTuple_Check(args[1]) || !PyTuple_Check(args[2]) || !PyTuple_Check(args[3]) ||
        PyTuple_Size(args[1]) + PyTuple_Size(args[2]) != PyTuple_Size(args[3])) {
        PyErr_SetString(PyExc_TypeError, "name_all(kind, came, went, grads)");
        return NULL;
    }
    const Py_ssize_t came = PyTuple_Size(args[1]), n = PyTuple_Size(args[3]);
    PyObject *named[2][GIVEN], *found[GIVEN];
    Py_ssize_t count[2] = {0, 0}, total = 0;
    if (n > GIVEN) return none();
    for (Py_ssize_t i = 0; i < n; i++) {
        PyObject *grad = PyTuple_GetItem(args[3], i);
        if (grad != Py_None && (PyObject *)Py_TYPE(grad) != args[0]) return none();
    }
    for (Py_ssize_t i = 0; i < n; i++) {
        PyObject *grad = PyTuple_GetItem(args[3], i);
        if (grad == Py_None) continue;
        const int which = i >= came;
        PyObject *name = which ? PyTuple_GetItem(args[2], i - came) : PyTuple_GetItem(args[1], i);
        PyObject *pair[2] = {owned(name), PyObject_GetAttr(grad, torch.names[ID])};
        named[which][count[which]++] = as_tuple(pair, 2);
        found[total++] = owned(grad);
    }
    PyObject *lists[3] = {as_list(named[0], count[0]), as_list(named[1], count[1]),
                          as_list(found, total)};
    return as_tuple(lists, 3);
}

/* Whether a tensor has this dtype (or this shape). */
static int has(PyObject *tensor, int name, PyObject *wanted) {
    PyObject *found = PyObject_GetAttr(tensor, torch.names[name]);
    int same = found ? PyObject_RichCompareBool(found, wanted, Py_EQ) : -1;
    Py_XDECREF(found);
    return same == 1;
}

/* 1 or 0; -1 where an address would have to be asked of somebody who knows better. */
static int quiet_at(PyObject *tensor, PyObject *shape, PyObject *dtype) {
    PyObject *kind = (PyObject *)Py_TYPE(tensor);
    if (kind != torch.tensor && kind != torch.parameter) return -1;
    /* As `is_dense`; a sign that is still to be changed, and a conjugate, is as finite as its memory. */
    if (is_true(PyObject_GetAttr(tensor, torch.names[IS_CPU])) != 1) return -1;
    PyObject *known = PyDict_GetItemWithError(torch.dtypes, dtype); /* borrowed */
    if (!known || !PyTuple_Check(shape)) return -1;
    if (!has(tensor, DTYPE, dtype) || !has(tensor, SHAPE, shape)) return 0;
    if (is_true(PyObject_GetAttr(tensor, torch.names[REQUIRES_GRAD])) != 0) return 0;
    Job job = {.rows = 1, .lean = 1, .dtype = (Dtype)PyLong_AsLong(PyTuple_GetItem(known, 0))};
    job.n = job.pitch = elements_of(shape);
    if (job.n <= 0 || is_true(ask(tensor, IS_CONTIGUOUS)) != 1 || !locate(tensor, &job)) return -1;
    measure_and_release(&job);
    return job.totals.first < 0;
}

static PyObject *is_quiet(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    (void)module;
    if (!torch.tensor || nargs != 3) {
        PyErr_SetString(PyExc_TypeError, "is_quiet(tensor, shape, dtype)");
        return NULL;
    }
    int quiet = quiet_at(args[0], args[1], args[2]);
    PyErr_Clear(); /* as in `look` */
    return quiet < 0 ? none() : PyBool_FromLong(quiet);
}

/* Units of a rectified layer, for `stats/units.py`. */

#define MOST_UNITS 4096 /* as in stats/units.py */
#define TOGETHER 64     /* a few vectors: of most units the first of them is enough */

/* Whether an element is above 0, or a NaN, by its bits: a thread that flushes denormals would find
   them equal to 0. */
#define IS_ALIVE(T, bits, SIGN, INF)                                                           \
    (((bits) != 0 && (bits) < (T)(SIGN)) || (bits) > (T)((SIGN) | (INF)))

/* Loops without a branch, which compilers turn into vectors. */
#define ALIVE(NAME, T, SIGN, INF)                                                              \
    static int NAME##_any(const char *at, int64_t n) {                                         \
        int alive = 0;                                                                         \
        for (int64_t i = 0; i < n; i++) {                                                      \
            T bits;                                                                            \
            memcpy(&bits, at + i * (int64_t)sizeof bits, sizeof bits);                         \
            alive |= IS_ALIVE(T, bits, SIGN, INF);                                             \
        }                                                                                      \
        return alive;                                                                          \
    }                                                                                          \
    static void NAME##_each(const char *at, int64_t n, uint8_t *alive) {                       \
        for (int64_t i = 0; i < n; i++) {                                                      \
            T bits;                                                                            \
            memcpy(&bits, at + i * (int64_t)sizeof bits, sizeof bits);                         \
            alive[i] |= IS_ALIVE(T, bits, SIGN, INF);                                          \
        }                                                                                      \
    }
ALIVE(f64, uint64_t, 1ull << 63, INF64)
ALIVE(f32, uint32_t, 1u << 31, 0x7f800000u)
ALIVE(f16, uint16_t, 0x8000u, 0x7c00u)
ALIVE(bf16, uint16_t, 0x8000u, 0x7f80u)

static int (*const any_alive[DTYPES])(const char *, int64_t) = {f32_any, f64_any, f16_any, bf16_any};
static void (*const each_alive[DTYPES])(const char *, int64_t, uint8_t *) = {
    f32_each, f64_each, f16_each, bf16_each};

/* Unit u has the `apart` elements from u * apart on, and as many again after all the others. Says of
   each whether one of them is above 0: of most it is one of the first, so little of a layer is read.
*/
static void find_alive(const Job *job, int64_t units, int64_t apart, uint8_t *alive) {
    int32_t open[MOST_UNITS];
    const int64_t item = SIZE[job->dtype], pitch = units * apart * item;
    const char *end = job->at + job->n * item;
    int64_t left = units;
    for (int32_t u = 0; u < units; u++) open[u] = u, alive[u] = 0;
    for (const char *at = job->at; at < end && left; at += pitch) {
        int64_t still = 0;
        if (apart == 1 && left * 8 > units) {
            each_alive[job->dtype](at, units, alive);
        } else {
            for (int64_t k = 0; k < left; k++) {
                const char *from = at + open[k] * apart * item;
                for (int64_t i = 0; i < apart && !alive[open[k]]; i += TOGETHER) {
                    const int64_t n = apart - i < TOGETHER ? apart - i : TOGETHER;
                    alive[open[k]] = (uint8_t)any_alive[job->dtype](from + i * item, n);
                }
            }
        }
        for (int64_t k = 0; k < left; k++) {
            const int32_t u = open[k];
            open[still] = u;
            still += !alive[u];
        }
        left = still;
    }
}

static PyObject *count_dead(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    (void)module;
    Job job, kept;
    if (!torch.tensor || nargs != 5) {
        PyErr_SetString(PyExc_TypeError, "count_dead(tensor, last, apart, step, start)");
        return NULL;
    }
    const long long apart = PyLong_AsLongLong(args[2]);
    const double step = PyFloat_AsDouble(args[3]), start = PyFloat_AsDouble(args[4]);
    if (PyErr_Occurred()) return NULL;
    if (!locate_all(args[1], &kept) || kept.dtype != F32 || kept.n > MOST_UNITS || apart < 1 ||
        !locate_all(args[0], &job) || job.n / kept.n < apart || job.n % (kept.n * apart)) {
        PyErr_Clear(); /* as in `look` */
        return none();
    }
    uint8_t alive[MOST_UNITS];
    if (job.n < MANY) {
        find_alive(&job, kept.n, apart, alive);
    } else {
        Py_BEGIN_ALLOW_THREADS
        find_alive(&job, kept.n, apart, alive);
        Py_END_ALLOW_THREADS
    }
    float *last = (float *)kept.at;
    long dead = 0;
    double latest = -1;
    for (int64_t u = 0; u < kept.n; u++) {
        if (alive[u]) last[u] = (float)step;
        if (last[u] >= start) continue;
        dead++;
        if (last[u] > latest) latest = last[u];
    }
    PyObject *found[2] = {PyLong_FromLong(dead), PyFloat_FromDouble(latest + 1)};
    return as_tuple(found, 2);
}

/* How far rows differ, for `stats/rows.py`. */

typedef struct {
    int64_t rows, columns, row_pitch, column_pitch;
} Sample;

/* Their distance from their mean, and their norm, by way of their distance from the first: equal rows
   are at none. Not inlined, as above. */
NOINLINE double spread_of(const Job *job, Sample s) {
    double apart = 0, whole = 0;
    for (int64_t column = 0; column < s.columns; column++) {
        const double first = any_value(job->at, column * s.column_pitch, job->dtype);
        double sum = 0, squares = 0;
        for (int64_t row = 0; row < s.rows; row++) {
            const int64_t i = row * s.row_pitch + column * s.column_pitch;
            const double x = any_value(job->at, i, job->dtype), d = x - first;
            sum += d, squares += d * d;
            whole += x * x;
        }
        apart += squares - sum * sum / (double)s.rows;
    }
    return sqrt(apart < 0 ? 0 : apart) / sqrt(whole);
}

static int64_t every(int64_t n, int64_t most) { return n / most + (n % most > 0); }

static PyObject *spread(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    (void)module;
    Job job;
    if (!torch.tensor || nargs != 4) {
        PyErr_SetString(PyExc_TypeError, "spread(tensor, rows, most_rows, most_columns)");
        return NULL;
    }
    const long long rows = PyLong_AsLongLong(args[1]), most_rows = PyLong_AsLongLong(args[2]);
    const long long most_columns = PyLong_AsLongLong(args[3]);
    if (PyErr_Occurred()) return NULL;
    /* Whether it is contiguous first: the address right before it is read. */
    if (most_rows < 1 || most_columns < 1 || rows < 1 || !is_exact(args[0]) ||
        is_true(ask(args[0], IS_CONTIGUOUS)) != 1 || !locate_all(args[0], &job) || job.n % rows) {
        PyErr_Clear();
        return none();
    }
    const int64_t columns = job.n / rows;
    Sample s = {.row_pitch = every(rows, most_rows), .column_pitch = every(columns, most_columns)};
    s.rows = every(rows, s.row_pitch), s.columns = every(columns, s.column_pitch);
    s.row_pitch *= columns;
    unsigned was = arithmetic();
    if (was != DEFAULT_ARITHMETIC) set_arithmetic(DEFAULT_ARITHMETIC);
    const double found = spread_of(&job, s);
    if (was != DEFAULT_ARITHMETIC) set_arithmetic(was);
    return PyFloat_FromDouble(found);
}

static int start(PyObject *module) {
    for (int i = 0; i < NAMES; i++)
        if (!torch.names[i] && !(torch.names[i] = PyUnicode_InternFromString(ATTRIBUTES[i]))) return -1;
    if (!torch.cpu && !(torch.cpu = PyUnicode_InternFromString("cpu"))) return -1;
    if (!torch.shapes && !(torch.shapes = PyDict_New())) return -1;

    choose_passes();
    for (int dtype = 0; dtype < DTYPES; dtype++) part_fields((Dtype)dtype);
    return PyModule_AddStringConstant(module, "INSTRUCTIONS", instructions);
}

PyDoc_STRVAR(measure_doc, "The fields of a Stats, of the elements at an address.");
PyDoc_STRVAR(measure_lean_doc, "The same but min, max, mean and std, with a norm to six digits.");
PyDoc_STRVAR(measure_rows_doc, "The same as one of those two, of rows with gaps between them.");
PyDoc_STRVAR(measure_closely_doc, "All fields of a Stats, with the exponents of a sample in runs.");
PyDoc_STRVAR(sample_doc, "A copy of at most so many elements of an ordinary dense CPU tensor, in runs: the "
                         "values, how many, of how many, and the code of the dtype; else None.");
PyDoc_STRVAR(moved_doc, "Norms of how far the elements of a sample have moved, and of the sample; None where "
                        "the tensor has another length or dtype by now.");

PyDoc_STRVAR(prepare_doc, "Tell `look` what an ordinary tensor is, and how much of it to read.");
PyDoc_STRVAR(look_doc, "Head and fields of a Stats of an ordinary dense CPU tensor, else None.");
PyDoc_STRVAR(head_doc, "Only the head.");
PyDoc_STRVAR(untracked_doc, "A list or dict that the garbage collector looks at no longer.");
PyDoc_STRVAR(name_all_doc, "What look_all has found as the inputs, outputs and tensors of a Call.");
PyDoc_STRVAR(look_all_doc, "A finished Tensor of each gradient that a node was given, and of each it made.");
PyDoc_STRVAR(is_quiet_doc, "Whether an ordinary contiguous CPU tensor has this shape and dtype, requires "
                           "no grad and is finite throughout; None of any other.");
PyDoc_STRVAR(count_dead_doc, "Note in `last` the units that are above 0 in this step; how many were last "
                             "before `start`, and the step after the latest of those. None as in `look`.");
PyDoc_STRVAR(spread_doc, "How far a sample of the rows of a contiguous tensor are from their mean, as a share "
                         "of their norm. None as in `look`.");

static PyMethodDef methods[] = {
    {"prepare", prepare, METH_VARARGS, prepare_doc},
    {"look", (PyCFunction)(void (*)(void))look, METH_FASTCALL, look_doc},
    {"head", (PyCFunction)(void (*)(void))head, METH_FASTCALL, head_doc},
    {"untracked", untracked, METH_O, untracked_doc},
    {"name_all", (PyCFunction)(void (*)(void))name_all, METH_FASTCALL, name_all_doc},
    {"look_all", (PyCFunction)(void (*)(void))look_all, METH_FASTCALL, look_all_doc},
    {"is_quiet", (PyCFunction)(void (*)(void))is_quiet, METH_FASTCALL, is_quiet_doc},
    {"measure", (PyCFunction)(void (*)(void))measure, METH_FASTCALL, measure_doc},
    {"measure_lean", (PyCFunction)(void (*)(void))measure_lean, METH_FASTCALL, measure_lean_doc},
    {"measure_rows", (PyCFunction)(void (*)(void))measure_rows, METH_FASTCALL, measure_rows_doc},
    {"measure_closely", (PyCFunction)(void (*)(void))measure_closely, METH_FASTCALL,
     measure_closely_doc},
    {"sample", (PyCFunction)(void (*)(void))sample, METH_FASTCALL, sample_doc},
    {"moved", (PyCFunction)(void (*)(void))moved, METH_FASTCALL, moved_doc},
    {"count_dead", (PyCFunction)(void (*)(void))count_dead, METH_FASTCALL, count_dead_doc},
    {"spread", (PyCFunction)(void (*)(void))spread, METH_FASTCALL, spread_doc},
    {NULL, NULL, 0, NULL}};

static PyModuleDef_Slot slots[] = {{Py_mod_exec, (void *)start}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_statistics", "Statistics of memory in one read of it.", 0,
    methods, slots, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__statistics(void) { return PyModuleDef_Init(&definition); }
