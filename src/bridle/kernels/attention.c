/* Attention in bfloat16 that never keeps its probabilities, by matrix tiles (Intel AMX) or by AVX-512's products in
   bfloat16: forward as FlashAttention-2 (arXiv 2307.08691) does, backward with the probabilities computed again from
   each query's level.

   Scores lie turned: rows are keys, columns are queries. What belongs to a query, its maximum, its sum, its level, is
   then one lane of a vector, and nothing is summed across one. All products are of one kind, `multiply`. */

#include "numbers.h"

#ifdef __AMXBF16__
#define __AMX_BF16__ /* as older clangs call it */
#endif
#if defined(__linux__) && defined(__AMX_BF16__) && !defined(NO_TILES)
#define TILES
#endif
#if defined(__AVX512BF16__) && defined(__AVX512DQ__) && defined(__AVX512BW__) && defined(__AVX512VL__)

#include <immintrin.h>
#ifdef TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#else
#define omp_get_thread_num() 0
#endif

#define WIDE 32     /* both sides of what one `multiply` computes; depths are made up to multiples of it */
#define KEYS 128    /* of a block of scores */
#define QUERIES 128 /* of a block of scores, backward */
#define LOG2E 1.44269504f
#define LEAST (-1e30f) /* a score below all others; the infinite one would make NaN of differences */
#define ALIGNED __attribute__((aligned(64)))
/* Compilers are not told what memory a tile instruction reads, so all that was written is to be there before it. */
#define WRITTEN() __asm__ volatile("" ::: "memory")
#define EACH_HEAD(threads) PRAGMA(omp parallel for num_threads(threads) schedule(dynamic))

static inline size full(size count) { return (count + WIDE - 1) / WIDE * WIDE; }
static inline __mmask16 first_of(size left) { return left < 16 ? (__mmask16)((1u << left) - 1) : 0xffff; }
static inline __m512 all(float value) { return _mm512_set1_ps(value); }
static inline __m512 sixteen(const float *at) { return _mm512_loadu_ps(at); }

/* --- the product: c[32, 32] = a[32, deep] b[deep, 32], on top of c where `add`

   Of b, pairs of rows lie together, element by element. a_row, b_row, c_row: elements between rows, of b between pairs
   of rows. deep: even; what follows, up to a multiple of WIDE, is zeros. rows, columns: what of c is wanted. */

#ifdef TILES

/* Whether the system lets this process use them; asked once, it holds for all threads. */
int attends(void) {
    const long request = 0x1023, tiles = 18; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */
    return syscall(SYS_arch_prctl, request, tiles) == 0;
}

/* Tiles are 8 registers of 16 rows of 64 bytes. How this thread's were used before. */
typedef struct {
    uint8_t config[64] ALIGNED;
} Before;

static inline void take_tiles(Before *before) {
    struct {
        uint8_t palette, start, none[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } ours ALIGNED = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) ours.bytes[tile] = 64, ours.rows[tile] = 16;
    __asm__ volatile("" : : "r"(&ours) : "memory"); /* as WRITTEN, of a variable that nobody else sees */
    _tile_storeconfig(before->config);
    _tile_loadconfig(&ours);
}

static inline void give_tiles(const Before *before) {
    __asm__ volatile("" : : "r"(before) : "memory");
    _tile_loadconfig(before->config);
}

/* 16 rows or columns and less spare the rest. */
static inline void multiply(const bf16 *a, size a_row, const bf16 *b, size b_row, size deep, float *c, size c_row,
                            int add, size rows, size columns) {
    float *below = c + 16 * c_row;
    int tall = rows > 16, broad = columns > 16;
    WRITTEN();
    _tile_zero(0);
    if (broad) _tile_zero(1);
    if (tall) _tile_zero(2);
    if (tall && broad) _tile_zero(3);
    if (add) {
        _tile_loadd(0, c, 4 * c_row);
        if (broad) _tile_loadd(1, c + 16, 4 * c_row);
        if (tall) _tile_loadd(2, below, 4 * c_row);
        if (tall && broad) _tile_loadd(3, below + 16, 4 * c_row);
    }
    for (size at = 0; at < deep; at += WIDE, a += WIDE, b += WIDE / 2 * b_row) {
        _tile_loadd(4, a, 2 * a_row);
        _tile_loadd(6, b, 2 * b_row);
        _tile_dpbf16ps(0, 4, 6);
        if (broad) {
            _tile_loadd(7, b + 32, 2 * b_row);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (tall) {
            _tile_loadd(5, a + 16 * a_row, 2 * a_row);
            _tile_dpbf16ps(2, 5, 6);
            if (broad) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, c, 4 * c_row);
    if (broad) _tile_stored(1, c + 16, 4 * c_row);
    if (tall) _tile_stored(2, below, 4 * c_row);
    if (tall && broad) _tile_stored(3, below + 16, 4 * c_row);
}

#else

int attends(void) { return 1; }

typedef char Before;
static inline void take_tiles(Before *before) { (void)before; }
static inline void give_tiles(const Before *before) { (void)before; }

#define TALL 8 /* rows whose sums stay in registers */

/* So many rows, of 16 columns, or 32 where `broad`. */
static inline __attribute__((always_inline)) void multiply_rows(const bf16 *a, size a_row, const bf16 *b, size b_row,
                                                                size deep, float *c, size c_row, int add, int broad) {
    __m512 sums[TALL][2];
    for (int r = 0; r < TALL; r++)
        for (int h = 0; h <= broad; h++)
            sums[r][h] = add ? _mm512_loadu_ps(c + r * c_row + 16 * h) : _mm512_setzero_ps();
    for (size at = 0; at < deep; at += 2, a += 2, b += b_row) {
        __m512bh left = (__m512bh)_mm512_loadu_si512(b), right = left;
        if (broad) right = (__m512bh)_mm512_loadu_si512(b + 32);
        for (int r = 0; r < TALL; r++) {
            int32_t both;
            memcpy(&both, a + r * a_row, 4);
            __m512bh pair = (__m512bh)_mm512_set1_epi32(both);
            sums[r][0] = _mm512_dpbf16_ps(sums[r][0], pair, left);
            if (broad) sums[r][1] = _mm512_dpbf16_ps(sums[r][1], pair, right);
        }
    }
    for (int r = 0; r < TALL; r++)
        for (int h = 0; h <= broad; h++) _mm512_storeu_ps(c + r * c_row + 16 * h, sums[r][h]);
}

/* Spares rows beyond the next multiple of 8, and columns beyond one of 16. */
static inline void multiply(const bf16 *a, size a_row, const bf16 *b, size b_row, size deep, float *c, size c_row,
                            int add, size rows, size columns) {
    for (size r = 0; r < least(rows, WIDE); r += TALL) {
        if (columns > 16)
            multiply_rows(a + r * a_row, a_row, b, b_row, deep, c + r * c_row, c_row, add, 1);
        else
            multiply_rows(a + r * a_row, a_row, b, b_row, deep, c + r * c_row, c_row, add, 0);
    }
}

#endif

/* --- vectors */

/* 2^x to 3e-6 of itself; bfloat16 keeps 4e-3. The polynomial for 2^f on [0, 1) that is nowhere further off. */
static inline __m512 power(__m512 x) {
    __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC), p = all(0.0135341678f);
    p = _mm512_fmadd_ps(p, f, all(0.0520114601f));
    p = _mm512_fmadd_ps(p, f, all(0.241442755f));
    p = _mm512_fmadd_ps(p, f, all(0.693003833f));
    p = _mm512_fmadd_ps(p, f, all(1.0000026f));
    return _mm512_scalef_ps(p, x);
}

/* bfloat16 numbers in the lower halves of words. */
static inline __m512 floats(__m512i words) { return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16)); }

/* Two rows, rounded, one behind the other. */
static inline __m512i rounded(__m512 one, __m512 next) { return (__m512i)_mm512_cvtne2ps_pbh(next, one); }

static inline __m512i behind(__m256i one, __m256i next) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(one), next, 1);
}

static inline __m512i lanes(void) { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }

/* Two rows one behind the other as pairs: as `multiply` wants b. */
static inline __m512i paired(__m512i rows) {
    __m512i even = lanes(), odd = _mm512_add_epi32(even, _mm512_set1_epi32(16));
    return _mm512_permutexvar_epi16(_mm512_or_si512(even, _mm512_slli_epi32(odd, 16)), rows);
}

/* 0, row, 2 * row, ...: where 16 rows begin. */
static inline __m512i starts(size row) {
    return _mm512_mullo_epi32(lanes(), _mm512_set1_epi32((int)row));
}

/* --- one head's rows in the orders that `multiply` reads, both sides made up to multiples of WIDE by zeros */

/* [count, depth], `row` elements between rows. */
typedef struct {
    const bf16 *at;
    size row, count, depth;
} Rows;

/* lie: elements between samples, heads and rows. */
static inline Rows rows_of(const bf16 *x, const size *lie, size sample, size head, size count, size depth) {
    return (Rows){x + sample * lie[0] + head * lie[1], lie[2], count, depth};
}

/* Elements d and d + 1 of 16 rows from r on. */
static inline __m512i column(Rows x, size r, size d) {
    if (r >= x.count || d >= x.depth) return _mm512_setzero_si512();
    __mmask16 those = first_of(x.count - r);
    return _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), those, starts(x.row), x.at + r * x.row + d, 2);
}

/* Elements d to d + 15 of row r. */
static inline __m256i stretch(Rows x, size r, size d) {
    if (r >= x.count || d >= x.depth) return _mm256_setzero_si256();
    return _mm256_maskz_loadu_epi16(first_of(x.depth - d), x.at + r * x.row + d);
}

/* [count, depth], as it is. */
static void copy(Rows x, bf16 *y) {
    for (size r = 0; r < full(x.count); r++)
        for (size d = 0; d < full(x.depth); d += 16, y += 16) _mm256_storeu_si256((void *)y, stretch(x, r, d));
}

/* [depth, count] */
static void turn(Rows x, bf16 *y) {
    size rows = full(x.count);
    for (size r = 0; r < rows; r += 16)
        for (size d = 0; d < full(x.depth); d += 2) {
            __m512i both = column(x, r, d);
            _mm256_storeu_si256((void *)(y + d * rows + r), _mm512_cvtepi32_epi16(both));
            _mm256_storeu_si256((void *)(y + (d + 1) * rows + r), _mm512_cvtepi32_epi16(_mm512_srli_epi32(both, 16)));
        }
}

/* [count / 2, depth, 2] */
static void pair(Rows x, bf16 *y) {
    size deep = full(x.depth);
    for (size r = 0; r < full(x.count); r += 2)
        for (size d = 0; d < deep; d += 16)
            _mm512_storeu_si512(y + r * deep + 2 * d, paired(behind(stretch(x, r, d), stretch(x, r + 1, d))));
}

/* [depth / 2, count, 2] */
static void turn_pairs(Rows x, bf16 *y) {
    size rows = full(x.count);
    for (size r = 0; r < rows; r += 16)
        for (size d = 0; d < full(x.depth); d += 2) _mm512_storeu_si512(y + d * rows + 2 * r, column(x, r, d));
}

/* The transpose of x [depth, row], each of its first `count` columns times its factor, rounded: y [count, depth]. */
static void turn_back(const float *x, size row, size count, size depth, const float *factors, bf16 *y, size y_row) {
    for (size r = 0; r < count; r += 16) {
        __m512 by = sixteen(factors + r);
        for (size d = 0; d < depth; d += 2) {
            const float *at = x + d * row + r;
            __m512i both = rounded(_mm512_mul_ps(sixteen(at), by), _mm512_mul_ps(sixteen(at + row), by));
            _mm512_mask_i32scatter_epi32(y + r * y_row + d, first_of(count - r), starts(y_row), paired(both), 2);
        }
    }
}

/* --- attention: q, o, g [batch, heads, queries, depth]; k, v [batch, heads, keys, depth]

   lies: for each of the inputs, elements between samples, heads and rows; the elements of a row lie together, an even
   number of them. What is written is [batch, rows, heads, depth]. level: [batch, heads, queries], of each query the
   logarithm to base 2 of the sum of 2^(scores * scale * log2 e). room: `attend_room` bytes for every thread. */

size attend_room(size queries, size keys, size depth) {
    size l = full(queries), s = full(keys), d = full(depth);
    size forward = 2 * d * (l + 2 * s) + 4 * d * WIDE;
    size backward = 2 * d * (4 * l + 3 * s) + 4 * (d * (l + 2 * KEYS) + 2 * l);
    return forward > backward ? forward : backward;
}

/* Scores [count, WIDE] of the keys from `real` on, which are none: no query sees them. */
static inline void hide(float *scores, size real, size count) {
    for (size i = real * WIDE; i < count * WIDE; i++) scores[i] = LEAST;
}

/* Of 16 queries: the highest score so far, and the sum of the probabilities relative to it. */
typedef struct {
    __m512 most, total;
} Seen;

/* Scores [count, 32 from one to the next] of 16 queries to probabilities relative to the highest so far, pairs of keys
   together. sum: [depth, WIDE], of the values so far; made relative to it as well. */
static inline void chances(const float *s, size count, __m512 by, Seen *seen, float *sum, size depth, bf16 *p) {
    __m512 high = sixteen(s), other = high;
    for (size r = 0; r < count; r += 2) {
        high = _mm512_max_ps(high, sixteen(s + r * WIDE));
        other = _mm512_max_ps(other, sixteen(s + (r + 1) * WIDE));
    }
    __m512 most = _mm512_max_ps(seen->most, _mm512_mul_ps(_mm512_max_ps(high, other), by));
    if (_mm512_cmp_ps_mask(seen->most, most, _CMP_NEQ_UQ)) {
        __m512 shrink = power(_mm512_sub_ps(seen->most, most));
        for (float *at = sum; at < sum + depth * WIDE; at += WIDE)
            _mm512_storeu_ps(at, _mm512_mul_ps(sixteen(at), shrink));
        seen->total = _mm512_mul_ps(seen->total, shrink);
        seen->most = most;
    }
    __m512 even = seen->total, odd = all(0.f);
    for (size r = 0; r < count; r += 2) {
        __m512 one = power(_mm512_fmsub_ps(sixteen(s + r * WIDE), by, most));
        __m512 next = power(_mm512_fmsub_ps(sixteen(s + (r + 1) * WIDE), by, most));
        even = _mm512_add_ps(even, one);
        odd = _mm512_add_ps(odd, next);
        _mm512_storeu_si512(p + r * WIDE, paired(rounded(one, next)));
    }
    seen->total = _mm512_add_ps(even, odd);
}

/* level: null where it is not wanted. */
void attend(const bf16 *q, const bf16 *k, const bf16 *v, const size *lies, bf16 *o, float *level, char *room,
            size batch, size heads, size queries, size keys, size depth, float scale, int threads) {
    size l = full(queries), s = full(keys), d = full(depth), each = attend_room(queries, keys, depth);
    EACH_HEAD(threads)
    for (size unit = 0; unit < batch * heads; unit++) {
        size sample = unit / heads, head = unit % heads;
        bf16 *key = (bf16 *)(room + omp_get_thread_num() * each), *value = key + s * d, *query = value + s * d;
        float *sum = (float *)(query + l * d);
        copy(rows_of(k, lies + 3, sample, head, keys, depth), key);
        turn(rows_of(v, lies + 6, sample, head, keys, depth), value);
        turn_pairs(rows_of(q, lies, sample, head, queries, depth), query);
        __m512 by = all(scale * LOG2E);
        Before before;
        take_tiles(&before);
        for (size first = 0; first < queries; first += WIDE) {
            float scores[KEYS * WIDE] ALIGNED, most[WIDE], total[WIDE];
            bf16 p[KEYS * WIDE] ALIGNED;
            Seen seen[2] = {{all(LEAST), all(0.f)}, {all(LEAST), all(0.f)}};
            memset(sum, 0, sizeof(float) * d * WIDE);
            for (size from = 0; from < s; from += KEYS) {
                size count = least(KEYS, s - from);
                for (size r = 0; r < count; r += WIDE)
                    multiply(key + (from + r) * d, d, query + 2 * first, 2 * l, depth, scores + r * WIDE, WIDE, 0, WIDE,
                             WIDE);
                hide(scores, keys - from, count);
                for (int half = 0; half < 2; half++)
                    chances(scores + 16 * half, count, by, seen + half, sum + 16 * half, d, p + 32 * half);
                for (size r = 0; r < d; r += WIDE)
                    multiply(value + r * s + from, s, p, 2 * WIDE, count, sum + r * WIDE, WIDE, 1, depth - r, WIDE);
            }
            size wanted = least(WIDE, queries - first);
            for (int half = 0; half < 2; half++) {
                _mm512_storeu_ps(most + 16 * half, seen[half].most);
                _mm512_storeu_ps(total + 16 * half, seen[half].total);
            }
            for (size i = 0; i < wanted && level; i++) level[unit * queries + first + i] = most[i] + log2f(total[i]);
            for (size i = 0; i < WIDE; i++) total[i] = 1.f / total[i];
            bf16 *to = o + ((sample * queries + first) * heads + head) * depth;
            turn_back(sum, WIDE, wanted, depth, total, to, heads * depth);
        }
        give_tiles(&before);
    }
}

/* A block of scores and of the probabilities' gradients, both [keys, queries]. */
typedef struct {
    bf16 p[KEYS * QUERIES] ALIGNED, ds[KEYS * QUERIES] ALIGNED; /* probabilities, scores' gradients without the scale */
    bf16 pairs[KEYS * QUERIES] ALIGNED;                         /* the latter, pairs of keys together */
} Block;

/* Rows that lie one behind the other, to places a row of the block apart. */
static inline void put_rows(bf16 *to, __m512i rows) {
    _mm256_storeu_si256((void *)to, _mm512_castsi512_si256(rows));
    _mm256_storeu_si256((void *)(to + QUERIES), _mm512_extracti64x4_epi64(rows, 1));
}

/* 32 keys and as many queries of it: from scores s and gradients g of the probabilities, [WIDE, WIDE]. */
static inline void differentiate(const float *s, const float *g, const float *level, const float *drift, __m512 by,
                                 Block *block, size r, size c) {
    for (int half = 0; half < 2; half++, s += 16, g += 16, c += 16) {
        __m512 base = sixteen(level + 16 * half), mean = sixteen(drift + 16 * half);
        for (size from = 0, to = r * QUERIES; from < WIDE * WIDE; from += 2 * WIDE, to += 2 * QUERIES) {
            __m512 one = power(_mm512_fmsub_ps(sixteen(s + from), by, base));
            __m512 next = power(_mm512_fmsub_ps(sixteen(s + from + WIDE), by, base));
            __m512 slope = _mm512_mul_ps(one, _mm512_sub_ps(sixteen(g + from), mean));
            __m512i slopes = rounded(slope, _mm512_mul_ps(next, _mm512_sub_ps(sixteen(g + from + WIDE), mean)));
            put_rows(block->p + to + c, rounded(one, next));
            put_rows(block->ds + to + c, slopes);
            _mm512_storeu_si512(block->pairs + to + 2 * c, paired(slopes));
        }
    }
}

/* drift: of each query, its output times the output's gradient, which is the probabilities' gradient on average. */
static void drifts(Rows o, Rows g, float *drift) {
    for (size i = 0; i < full(o.count); i++) {
        __m512 sum = all(0.f);
        for (size d = 0; d < o.depth; d += 16) {
            __m512i seen = _mm512_cvtepu16_epi32(stretch(o, i, d)), pull = _mm512_cvtepu16_epi32(stretch(g, i, d));
            sum = _mm512_fmadd_ps(floats(seen), floats(pull), sum);
        }
        drift[i] = _mm512_reduce_add_ps(sum);
    }
}

/* x [count, depth made up] times a factor, rounded: y [count, depth]. */
static void put(const float *x, size count, size depth, float factor, bf16 *y, size y_row) {
    for (size r = 0; r < count; r++)
        for (size d = 0; d < depth; d++) y[r * y_row + d] = down(x[r * full(depth) + d] * factor);
}

/* dk, dv: both null where they are not wanted. */
void attend_backward(const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *o, const bf16 *g, const size *lies,
                     const float *level, bf16 *dq, bf16 *dk, bf16 *dv, char *room, size batch, size heads,
                     size queries, size keys, size depth, float scale, int threads) {
    size l = full(queries), s = full(keys), d = full(depth), each = attend_room(queries, keys, depth);
    EACH_HEAD(threads)
    for (size unit = 0; unit < batch * heads; unit++) {
        size sample = unit / heads, head = unit % heads, step = heads * depth;
        Rows query = rows_of(q, lies, sample, head, queries, depth);
        Rows key = rows_of(k, lies + 3, sample, head, keys, depth);
        Rows value = rows_of(v, lies + 6, sample, head, keys, depth);
        Rows seen = rows_of(o, lies + 9, sample, head, queries, depth);
        Rows pull = rows_of(g, lies + 12, sample, head, queries, depth);
        bf16 *key_rows = (bf16 *)(room + omp_get_thread_num() * each), *keys_turned = key_rows + s * d;
        bf16 *value_rows = keys_turned + s * d, *query_columns = value_rows + s * d;
        bf16 *query_pairs = query_columns + l * d, *pull_columns = query_pairs + l * d;
        bf16 *pull_pairs = pull_columns + l * d;
        float *for_query = (float *)(pull_pairs + l * d), *for_key = for_query + l * d, *for_value = for_key + KEYS * d;
        float *levels = for_value + KEYS * d, *drift = levels + l;
        copy(key, key_rows);
        turn(key, keys_turned);
        copy(value, value_rows);
        turn_pairs(query, query_columns);
        pair(query, query_pairs);
        turn_pairs(pull, pull_columns);
        pair(pull, pull_pairs);
        drifts(seen, pull, drift);
        memset(levels, 0, sizeof(float) * l); /* beyond the last query; what is pulled there is zero */
        memcpy(levels, level + unit * queries, sizeof(float) * queries);
        memset(for_query, 0, sizeof(float) * l * d);
        __m512 by = all(scale * LOG2E);
        Before before;
        take_tiles(&before);
        for (size from = 0; from < s; from += KEYS) {
            size count = least(KEYS, s - from);
            memset(for_key, 0, sizeof(float) * count * d);
            memset(for_value, 0, sizeof(float) * count * d);
            for (size first = 0; first < l; first += QUERIES) {
                size wide = least(QUERIES, l - first);
                Block block;
                for (size r = 0; r < count; r += WIDE)
                    for (size c = 0; c < wide; c += WIDE) {
                        float scores[WIDE * WIDE] ALIGNED, gradient[WIDE * WIDE] ALIGNED;
                        size row = (from + r) * d, at = first + c;
                        const bf16 *asked = query_columns + 2 * at, *pulled = pull_columns + 2 * at;
                        multiply(key_rows + row, d, asked, 2 * l, depth, scores, WIDE, 0, WIDE, WIDE);
                        multiply(value_rows + row, d, pulled, 2 * l, depth, gradient, WIDE, 0, WIDE, WIDE);
                        hide(scores, keys - from - r, WIDE);
                        differentiate(scores, gradient, levels + at, drift + at, by, &block, r, c);
                    }
                for (size c = 0; c < d; c += WIDE) {
                    const bf16 *asked = query_pairs + first * d + 2 * c, *pulled = pull_pairs + first * d + 2 * c;
                    for (size r = 0; r < count && dk; r += WIDE) {
                        size row = r * QUERIES, to = r * d + c, left = depth - c;
                        multiply(block.ds + row, QUERIES, asked, 2 * d, wide, for_key + to, d, 1, WIDE, left);
                        multiply(block.p + row, QUERIES, pulled, 2 * d, wide, for_value + to, d, 1, WIDE, left);
                    }
                    for (size i = 0; i < wide; i += WIDE)
                        multiply(keys_turned + c * s + from, s, block.pairs + 2 * i, 2 * QUERIES, count,
                                 for_query + c * l + first + i, l, 1, depth - c, WIDE);
                }
            }
            size to = ((sample * keys + from) * heads + head) * depth, real = least(count, keys - from);
            if (dk) put(for_key, real, depth, scale, dk + to, step), put(for_value, real, depth, 1.f, dv + to, step);
        }
        give_tiles(&before);
        for (size i = 0; i < l; i++) levels[i] = scale; /* they have served */
        turn_back(for_query, l, queries, depth, levels, dq + (sample * queries * heads + head) * depth, step);
    }
}

#else

int attends(void) { return 0; }

#endif
