/* One pass over memory with vectors of 32 bytes, for one instruction set.

   _statistics.c includes this once for each set, with NAME(x) to keep the functions apart, TARGET for
   the attribute that allows the instructions, and AVX2 where they are intrinsics: what GCC makes of
   the portable words takes half as long again. No function takes or returns a vector by value: how
   that is passed depends on the instruction set. */

/* Eight f32 from memory, whatever they are stored as. */
typedef void (*NAME(Load))(const char *at, vf *out);

INLINE TARGET void NAME(load_f32)(const char *at, vf *out) { memcpy(out, at, sizeof *out); }

INLINE TARGET void NAME(load_bf16)(const char *at, vf *out) {
    vh half;
    memcpy(&half, at, sizeof half);
#ifdef AVX2
    *out = (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)half), 16);
#else
    *out = (vf)(__builtin_convertvector(half, vi) << 16);
#endif
}

INLINE TARGET void NAME(load_f16)(const char *at, vf *out) {
    vh half;
    memcpy(&half, at, sizeof half);
#ifdef AVX2
    *out = (vf)_mm256_cvtph_ps((__m128i)half);
#else
    vi bits = __builtin_convertvector(half, vi);
    vi magnitude = (bits & 0x7fff) << 13, exponent = bits & 0x7c00;
    vi tiny = exponent == 0, bad = exponent == 0x7c00;
    vi normal = magnitude + (112 << 23) + (bad & (112 << 23));
    /* Subnormals as (1 + m) - 1, both scaled: no operand that a thread may flush to zero. */
    vf scaled = (vf)(magnitude + (113 << 23)) - 0x1p-14f;
    *out = (vf)((normal & ~tiny) | ((vi)scaled & tiny) | ((bits & 0x8000) << 16));
#endif
}

/* The first four as doubles, and the last four. */
INLINE TARGET void NAME(widen)(const vf *x, vd *out) {
#ifdef AVX2
    *out = (vd)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)*x));
#else
    union { vf whole; vf4 half[2]; } both = {*x};
    *out = __builtin_convertvector(both.half[0], vd);
#endif
}

INLINE TARGET void NAME(widen_rest)(const vf *x, vd *out) {
#ifdef AVX2
    *out = (vd)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)*x, 1));
#else
    union { vf whole; vf4 half[2]; } both = {*x};
    *out = __builtin_convertvector(both.half[1], vd);
#endif
}

INLINE TARGET void NAME(min_max32)(const vf *x, vf *low, vf *high) {
#ifdef AVX2
    *low = (vf)_mm256_min_ps((__m256)*x, (__m256)*low);
    *high = (vf)_mm256_max_ps((__m256)*x, (__m256)*high);
#else
    *low = PICK(*x < *low, *x, *low, vf, vi);
    *high = PICK(*x > *high, *x, *high, vf, vi);
#endif
}

INLINE TARGET void NAME(min_max64)(const vd *x, vd *low, vd *high) {
#ifdef AVX2
    *low = (vd)_mm256_min_pd((__m256d)*x, (__m256d)*low);
    *high = (vd)_mm256_max_pd((__m256d)*x, (__m256d)*high);
#else
    *low = PICK(*x < *low, *x, *low, vd, vl);
    *high = PICK(*x > *high, *x, *high, vd, vl);
#endif
}

INLINE TARGET double NAME(total)(const vd *a, const vd *b, const vd *c, const vd *d) {
    vd sum = (*a + *b) + (*c + *d);
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

INLINE TARGET int64_t NAME(count32)(const vi *lanes) {
    int64_t count = 0;
    for (int k = 0; k < 8; k++) count -= (*lanes)[k]; /* a true lane is -1 */
    return count;
}

INLINE TARGET int64_t NAME(count64)(const vl *lanes) {
    return -((*lanes)[0] + (*lanes)[1] + (*lanes)[2] + (*lanes)[3]);
}

INLINE TARGET void NAME(bounds32)(Totals *t, const vf *low, const vf *high) {
    for (int k = 0; k < 8; k++) {
        if ((*low)[k] < t->low) t->low = (*low)[k];
        if ((*high)[k] > t->high) t->high = (*high)[k];
    }
}

INLINE TARGET void NAME(bounds64)(Totals *t, const vd *low, const vd *high) {
    for (int k = 0; k < 4; k++) {
        if ((*low)[k] < t->low) t->low = (*low)[k];
        if ((*high)[k] > t->high) t->high = (*high)[k];
    }
}

/* A block with nothing but finite elements; 0, and nothing counted, if the squares say otherwise.
   Each square of an f32 fits a double, so their sum is finite if and only if every element is. */
INLINE TARGET int NAME(clean32)(const char *at, int64_t n, int item, NAME(Load) load, Totals *t) {
    /* In this order all of it fits into sixteen registers. */
    vd s0 = {0}, s1 = s0, q0 = s0, q1 = s0, q2 = s0, q3 = s0, a0, b0;
    vf a, b, low = (vf){0} + INFINITY, high = -low;
    vi zeros = {0};
    for (const char *end = at + n * item; at != end; at += 16 * item) {
        load(at, &a);
        load(at + 8 * item, &b);
        zeros += IS_ZERO(a, vf, vi) + IS_ZERO(b, vf, vi);
        NAME(min_max32)(&a, &low, &high);
        NAME(min_max32)(&b, &low, &high);
        NAME(widen)(&a, &a0);
        NAME(widen)(&b, &b0);
        s0 += a0 + b0;
        q0 += a0 * a0, q1 += b0 * b0;
        NAME(widen_rest)(&a, &a0);
        NAME(widen_rest)(&b, &b0);
        s1 += a0 + b0;
        q2 += a0 * a0, q3 += b0 * b0;
    }
    double squares = NAME(total)(&q0, &q1, &q2, &q3);
    if (!(squares < INFINITY)) return 0;
    t->sum += NAME(total)(&s0, &s1, &(vd){0}, &(vd){0});
    t->squares += squares;
    t->zeros += NAME(count32)(&zeros);
    NAME(bounds32)(t, &low, &high);
    return 1;
}

/* What a thin step asks for, zeros and squares, as fast as memory is read. Eight squares are added
   as f32, then to the doubles: that costs the norm at most 3e-7 of it (half of eight roundings).
   Where squares leave the range of f32, doubles have to say. */
INLINE TARGET int NAME(lean32)(const char *at, int64_t n, int item, NAME(Load) load, Totals *t) {
    vd q0 = {0}, q1 = q0, wide;
    vi zeros = {0};
    for (const char *end = at + n * item; at != end;) {
        vf a, b, p = {0}, q = p;
        for (const char *stop = end - at < 128 * item ? end : at + 128 * item; at != stop;
             at += 16 * item) {
            load(at, &a);
            load(at + 8 * item, &b);
            zeros += IS_ZERO(a, vf, vi) + IS_ZERO(b, vf, vi);
            p += a * a, q += b * b;
        }
        NAME(widen)(&p, &wide), q0 += wide;
        NAME(widen_rest)(&p, &wide), q1 += wide;
        NAME(widen)(&q, &wide), q0 += wide;
        NAME(widen_rest)(&q, &wide), q1 += wide;
    }
    double squares = NAME(total)(&q0, &q1, &(vd){0}, &(vd){0});
    int64_t zero = NAME(count32)(&zeros);
    if (!(squares < INFINITY) || (squares < 1e-24 * n && zero < n)) return 0;
    t->squares += squares;
    t->zeros += zero;
    return 1;
}

/* Adds the squares of the differences and of what was before, of a multiple of 16 elements, a run of
   a sample: few enough to be added as f32. */
INLINE TARGET void NAME(moved32)(const char *now, const char *then, int64_t n, int item,
                                 NAME(Load) load, double *change, double *weight) {
    vd d0, d1;
    vf a, b, p = {0}, q = p;
    for (const char *end = now + n * item; now != end; now += 8 * item, then += 8 * item) {
        load(now, &a);
        load(then, &b);
        a -= b;
        p += a * a, q += b * b;
    }
    NAME(widen)(&p, &d0), NAME(widen_rest)(&p, &d1);
    *change += NAME(total)(&d0, &d1, &(vd){0}, &(vd){0});
    NAME(widen)(&q, &d0), NAME(widen_rest)(&q, &d1);
    *weight += NAME(total)(&d0, &d1, &(vd){0}, &(vd){0});
}

/* A block with any elements; returns whether there are bad ones among them. */
INLINE TARGET int NAME(dirty32)(const char *at, int64_t n, int item, NAME(Load) load, Totals *t) {
    vd s0 = {0}, s1 = s0, q0 = s0, q1 = s0, a0, a1;
    vf a, low = (vf){0} + INFINITY, high = -low;
    vi zeros = {0}, nans = {0}, posinfs = {0}, bads = {0};
    for (const char *end = at + n * item; at != end; at += 8 * item) {
        load(at, &a);
        vi bits = (vi)a, magnitude = bits & 0x7fffffff, bad = magnitude > 0x7f7fffff;
        nans += magnitude > 0x7f800000;
        posinfs += bits == 0x7f800000;
        zeros += magnitude == 0;
        bads += bad;
        vi kept = bits & ~bad;
        a = (vf)kept;
        NAME(widen)(&a, &a0);
        NAME(widen_rest)(&a, &a1);
        s0 += a0, s1 += a1;
        q0 += a0 * a0, q1 += a1 * a1;
        /* A bad one is as high as can be for the minimum, and as low for the maximum. */
        vf above = (vf)(kept | (bad & 0x7f800000)), below = (vf)(kept | (bad & (int32_t)0xff800000));
        vf none = high;
        NAME(min_max32)(&above, &low, &none);
        none = low;
        NAME(min_max32)(&below, &none, &high);
    }
    int64_t nan = NAME(count32)(&nans), posinf = NAME(count32)(&posinfs);
    int64_t all = NAME(count32)(&bads);
    t->nan += nan;
    t->posinf += posinf;
    t->neginf += all - nan - posinf;
    t->zeros += NAME(count32)(&zeros);
    t->sum += NAME(total)(&s0, &s1, &(vd){0}, &(vd){0});
    t->squares += NAME(total)(&q0, &q1, &(vd){0}, &(vd){0});
    NAME(bounds32)(t, &low, &high);
    return all > 0;
}

/* The same for doubles, of which a finite one may have an infinite square: then the squares are
   taken again at the end, scaled. */
INLINE TARGET int NAME(clean64)(const char *at, int64_t n, Totals *t) {
    vd s0 = {0}, s1 = s0, q0 = s0, q1 = s0, q2 = s0, q3 = s0, a, b, c, d;
    vd low = (vd){0} + INFINITY, high = -low;
    vl zeros = {0};
    for (const char *end = at + n * 8; at != end; at += 16 * 8) {
        memcpy(&a, at, 32);
        memcpy(&b, at + 32, 32);
        memcpy(&c, at + 64, 32);
        memcpy(&d, at + 96, 32);
        s0 += a + b, s1 += c + d;
        q0 += a * a, q1 += b * b, q2 += c * c, q3 += d * d;
        zeros += (IS_ZERO(a, vd, vl) + IS_ZERO(b, vd, vl)) + (IS_ZERO(c, vd, vl) + IS_ZERO(d, vd, vl));
        NAME(min_max64)(&a, &low, &high);
        NAME(min_max64)(&b, &low, &high);
        NAME(min_max64)(&c, &low, &high);
        NAME(min_max64)(&d, &low, &high);
    }
    double squares = NAME(total)(&q0, &q1, &q2, &q3);
    if (!(squares < INFINITY)) return 0;
    t->sum += NAME(total)(&s0, &s1, &(vd){0}, &(vd){0});
    t->squares += squares;
    t->zeros += NAME(count64)(&zeros);
    NAME(bounds64)(t, &low, &high);
    return 1;
}

INLINE TARGET int NAME(dirty64)(const char *at, int64_t n, Totals *t) {
    const vl infinite = (vl){0} + (int64_t)INF64;
    vd s = {0}, q = {0}, low = (vd){0} + INFINITY, high = -low;
    vl zeros = {0}, nans = {0}, posinfs = {0}, bads = {0};
    for (const char *end = at + n * 8; at != end; at += 4 * 8) {
        vl bits;
        memcpy(&bits, at, sizeof bits);
        vl magnitude = bits & INT64_MAX, bad = magnitude >= infinite;
        nans += magnitude > infinite;
        posinfs += bits == infinite;
        zeros += magnitude == 0;
        bads += bad;
        vl kept = bits & ~bad;
        s += (vd)kept;
        q += (vd)kept * (vd)kept;
        vd above = (vd)(kept | (bad & infinite)), below = (vd)(kept | (bad & (infinite | INT64_MIN)));
        vd none = high;
        NAME(min_max64)(&above, &low, &none);
        none = low;
        NAME(min_max64)(&below, &none, &high);
    }
    int64_t nan = NAME(count64)(&nans), posinf = NAME(count64)(&posinfs);
    int64_t all = NAME(count64)(&bads);
    t->nan += nan;
    t->posinf += posinf;
    t->neginf += all - nan - posinf;
    t->zeros += NAME(count64)(&zeros);
    t->sum += NAME(total)(&s, &(vd){0}, &(vd){0}, &(vd){0});
    t->squares += NAME(total)(&q, &(vd){0}, &(vd){0}, &(vd){0});
    NAME(bounds64)(t, &low, &high);
    return all > 0;
}

/* A function each: constants of one loop would take registers from the other. */
#define PASS(clean, dirty, dtype, suffix)                                                      \
    TARGET NOINLINE int NAME(clean_##suffix)(const char *at, int64_t n, Totals *t) {           \
        return clean;                                                                          \
    }                                                                                          \
    TARGET NOINLINE int NAME(dirty_##suffix)(const char *at, int64_t n, Totals *t) {           \
        return dirty;                                                                          \
    }                                                                                          \
    static void NAME(pass_##suffix)(const char *at, int64_t n, Totals *t) {                    \
        pass_blocks(NAME(clean_##suffix), NAME(dirty_##suffix), at, n, dtype, t);              \
    }

PASS(NAME(clean32)(at, n, 4, NAME(load_f32), t), NAME(dirty32)(at, n, 4, NAME(load_f32), t), F32, f32)
PASS(NAME(clean32)(at, n, 2, NAME(load_f16), t), NAME(dirty32)(at, n, 2, NAME(load_f16), t), F16, f16)
PASS(NAME(clean32)(at, n, 2, NAME(load_bf16), t), NAME(dirty32)(at, n, 2, NAME(load_bf16), t), BF16, bf16)
PASS(NAME(clean64)(at, n, t), NAME(dirty64)(at, n, t), F64, f64)

#define LEAN(item, dtype, suffix)                                                              \
    TARGET NOINLINE int NAME(lean_##suffix)(const char *at, int64_t n, Totals *t) {            \
        return NAME(lean32)(at, n, item, NAME(load_##suffix), t);                              \
    }                                                                                          \
    static void NAME(lean_pass_##suffix)(const char *at, int64_t n, Totals *t) {               \
        pass_blocks(NAME(lean_##suffix), NAME(dirty_##suffix), at, n, dtype, t);               \
    }

LEAN(4, F32, f32)
LEAN(2, F16, f16)
LEAN(2, BF16, bf16)

static const Pass NAME(passes)[2][DTYPES] = {
    {NAME(pass_f32), NAME(pass_f64), NAME(pass_f16), NAME(pass_bf16)},
    {NAME(lean_pass_f32), NAME(pass_f64), NAME(lean_pass_f16), NAME(lean_pass_bf16)}};

#define MOVED(item, suffix)                                                                    \
    TARGET static void NAME(moved_##suffix)(const char *now, const char *then, int64_t n,      \
                                            double *change, double *weight) {                  \
        NAME(moved32)(now, then, n, item, NAME(load_##suffix), change, weight);                \
    }

MOVED(4, f32)
MOVED(2, f16)
MOVED(2, bf16)

static const Moved NAME(moves)[DTYPES] = {
    NAME(moved_f32), NULL, NAME(moved_f16), NAME(moved_bf16)};

#undef MOVED
#undef PASS
#undef LEAN
#undef NAME
#undef TARGET
#undef AVX2
#undef IS_ZERO
