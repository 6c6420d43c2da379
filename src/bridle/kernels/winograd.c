/* Convolutions of 3x3 with stride 1 and a border of 1 by Winograd's minimal filtering (arXiv 1509.09308): in bfloat16
   F(2x2, 3x3), 16 products in place of 36 for each 2x2 pixels of the output, and where FLOAT32 is defined F(4x4, 3x3), 36
   in place of 144 for each 4x4.

   The points of interpolation are 0, +-1 and infinity for the smaller, and 0, +-5/8, +-3/2 and infinity for the larger:
   with the usual 0, +-1, +-2 what is rounded off is more than twice as much. What there is of a tile lies in planes,
   [planes, tiles, channels], and of a weight in [planes, out, in]; the products between the planes are the caller's.
   Features are [batch, height, width, channels], and weights [out, 3, 3, in]. Tiles cover features row by row, sample by
   sample; those at the right and lower edges reach beyond. */

#include "numbers.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#ifdef FLOAT32
#define OUT 4 /* pixels a side of what a tile writes */
#else
#define OUT 2
#endif
#define SIDE 3 /* of a filter */
#define IN (OUT + SIDE - 1) /* pixels a side of what a tile reads */
#define PLANES (IN * IN)
#define ALWAYS inline __attribute__((always_inline)) /* or sizes and transforms would not be constants */

typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));
typedef number numbers __attribute__((vector_size(sizeof(number) * LANES)));

#ifdef FLOAT32
static inline lanes up_all(numbers x) { return x; }
static inline numbers down_all(lanes x) { return x; }
#else
static inline lanes up_all(numbers x) { return (lanes)(__builtin_convertvector(x, bits) << 16); }

/* As `narrow`; by the processor's own instruction what is smaller than normal numbers becomes zero. */
static inline numbers down_all(lanes x) {
#ifdef __AVX512BF16__
    return (numbers)_mm512_cvtneps_pbh((__m512)x);
#else
    bits given = (bits)x, none = (bits)((given & 0x7fffffff) > 0x7f800000);
    bits rounded = (given + 0x7fff + ((given >> 16) & 1)) >> 16;
    return __builtin_convertvector((none & 0x7fc0) | (~none & rounded), numbers);
#endif
}
#endif

/* Of the channels from `at` on, as many as there are lanes, or are left: perhaps none. */
static inline lanes load(const number *at, size rest) {
    numbers found = {0};
    if (rest >= LANES)
        memcpy(&found, at, sizeof found);
    else if (rest > 0)
        memcpy(&found, at, rest * sizeof(number));
    return up_all(found);
}

static inline void store(number *at, lanes given, size rest) {
    numbers rounded = down_all(given);
    if (rest >= LANES)
        memcpy(at, &rounded, sizeof rounded);
    else if (rest > 0)
        memcpy(at, &rounded, rest * sizeof(number));
}

/* --- each transform along one side; `from` and `to` say how far apart its elements lie. `told` is the transpose of
   `output`, and `learned` of `filter` */

#ifdef FLOAT32
#define P 0.625f
#define Q 1.5f
#define SCALE_P (1.f / (2.f * P * P * (P * P - Q * Q)))
#define SCALE_Q (1.f / (2.f * Q * Q * (Q * Q - P * P)))

static inline void input(const lanes *x, size from, lanes *v, size to) {
    lanes x1 = x[from], x2 = x[2 * from], x3 = x[3 * from], x4 = x[4 * from];
    lanes even_p = x4 - Q * Q * x2, odd_p = P * (x3 - Q * Q * x1);
    lanes even_q = x4 - P * P * x2, odd_q = Q * (x3 - P * P * x1);
    v[0] = P * P * Q * Q * x[0] - (P * P + Q * Q) * x2 + x4;
    v[to] = even_p + odd_p;
    v[2 * to] = even_p - odd_p;
    v[3 * to] = even_q + odd_q;
    v[4 * to] = even_q - odd_q;
    v[5 * to] = P * P * Q * Q * x1 - (P * P + Q * Q) * x3 + x[5 * from];
}

static inline void output(const lanes *m, size from, lanes *y, size to) {
    lanes even_p = m[from] + m[2 * from], odd_p = P * (m[from] - m[2 * from]);
    lanes even_q = m[3 * from] + m[4 * from], odd_q = Q * (m[3 * from] - m[4 * from]);
    y[0] = m[0] + even_p + even_q;
    y[to] = odd_p + odd_q;
    y[2 * to] = P * P * even_p + Q * Q * even_q;
    y[3 * to] = P * P * odd_p + Q * Q * odd_q + m[5 * from];
}

static inline void told(const lanes *y, size from, lanes *m, size to) {
    lanes y0 = y[0], y2 = y[2 * from], y1 = y[from], y3 = y[3 * from];
    lanes even_p = y0 + P * P * y2, odd_p = P * (y1 + P * P * y3);
    lanes even_q = y0 + Q * Q * y2, odd_q = Q * (y1 + Q * Q * y3);
    m[0] = y0;
    m[to] = even_p + odd_p;
    m[2 * to] = even_p - odd_p;
    m[3 * to] = even_q + odd_q;
    m[4 * to] = even_q - odd_q;
    m[5 * to] = y3;
}

static inline void filter(const lanes *g, size from, lanes *u, size to) {
    lanes g0 = g[0], g1 = g[from], g2 = g[2 * from];
    lanes even_p = SCALE_P * (g0 + P * P * g2), odd_p = SCALE_P * P * g1;
    lanes even_q = SCALE_Q * (g0 + Q * Q * g2), odd_q = SCALE_Q * Q * g1;
    u[0] = g0 / (P * P * Q * Q);
    u[to] = even_p + odd_p;
    u[2 * to] = even_p - odd_p;
    u[3 * to] = even_q + odd_q;
    u[4 * to] = even_q - odd_q;
    u[5 * to] = g2;
}

static inline void learned(const lanes *u, size from, lanes *g, size to) {
    lanes even_p = SCALE_P * (u[from] + u[2 * from]), odd_p = SCALE_P * P * (u[from] - u[2 * from]);
    lanes even_q = SCALE_Q * (u[3 * from] + u[4 * from]), odd_q = SCALE_Q * Q * (u[3 * from] - u[4 * from]);
    g[0] = u[0] / (P * P * Q * Q) + even_p + even_q;
    g[to] = odd_p + odd_q;
    g[2 * to] = P * P * even_p + Q * Q * even_q + u[5 * from];
}
#else
static inline void input(const lanes *x, size from, lanes *v, size to) {
    v[0] = x[0] - x[2 * from];
    v[to] = x[from] + x[2 * from];
    v[2 * to] = x[2 * from] - x[from];
    v[3 * to] = x[3 * from] - x[from];
}

static inline void output(const lanes *m, size from, lanes *y, size to) {
    y[0] = m[0] + m[from] + m[2 * from];
    y[to] = m[from] - m[2 * from] + m[3 * from];
}

static inline void told(const lanes *y, size from, lanes *m, size to) {
    m[0] = y[0];
    m[to] = y[0] + y[from];
    m[2 * to] = y[0] - y[from];
    m[3 * to] = y[from];
}

static inline void filter(const lanes *g, size from, lanes *u, size to) {
    lanes even = 0.5f * (g[0] + g[2 * from]), odd = 0.5f * g[from];
    u[0] = g[0];
    u[to] = even + odd;
    u[2 * to] = even - odd;
    u[3 * to] = g[2 * from];
}

static inline void learned(const lanes *u, size from, lanes *g, size to) {
    lanes even = 0.5f * (u[from] + u[2 * from]), odd = 0.5f * (u[from] - u[2 * from]);
    g[0] = u[0] + even;
    g[to] = odd;
    g[2 * to] = even + u[3 * from];
}
#endif

typedef void Side(const lanes *, size, lanes *, size);

/* Along both sides of a square of `in` by `in`, which becomes one of `out` by `out`. */
static ALWAYS void twice(Side *along, size in, size out, const lanes *x, lanes *y) {
    lanes half[PLANES];
    for (size j = 0; j < in; j++) along(x + j, in, half + j, in);
    for (size i = 0; i < out; i++) along(half + in * i, 1, y + out * i, 1);
}

/* --- of weights. Where sizes are powers of two all planes lie in one place of the processor's caches, which forget one
   for another: what a line of them holds is read and written at once */

#define LINE (64 / (size)sizeof(number) / LANES) /* vectors in it */

void winograd_filter(const number *weight, number *planes, size out, size channels, int threads) {
    SHARED(threads)
    for (size d = 0; d < out; d++) {
        for (size c = 0; c < channels; c += LINE * LANES) {
            lanes whole[LINE][PLANES];
            for (size k = 0; k < LINE; k++) {
                lanes read[SIDE * SIDE];
                const number *at = weight + d * SIDE * SIDE * channels + c + k * LANES;
                for (size i = 0; i < SIDE * SIDE; i++) read[i] = load(at + i * channels, channels - c - k * LANES);
                twice(filter, SIDE, IN, read, whole[k]);
            }
            for (size p = 0; p < PLANES; p++)
                for (size k = 0; k < LINE; k++)
                    store(planes + (p * out + d) * channels + c + k * LANES, whole[k][p], channels - c - k * LANES);
        }
    }
}

/* The transpose of `winograd_filter`: from the planes' gradient to the weight's. */
void winograd_learned(const number *planes, number *weight, size out, size channels, int threads) {
    SHARED(threads)
    for (size d = 0; d < out; d++) {
        for (size c = 0; c < channels; c += LINE * LANES) {
            lanes read[LINE][PLANES];
            for (size p = 0; p < PLANES; p++)
                for (size k = 0; k < LINE; k++)
                    read[k][p] = load(planes + (p * out + d) * channels + c + k * LANES, channels - c - k * LANES);
            for (size k = 0; k < LINE; k++) {
                lanes whole[SIDE * SIDE];
                number *at = weight + d * SIDE * SIDE * channels + c + k * LANES;
                twice(learned, IN, SIDE, read[k], whole);
                for (size i = 0; i < SIDE * SIDE; i++) store(at + i * channels, whole[i], channels - c - k * LANES);
            }
        }
    }
}

/* --- of tiles */

/* Where the output of a tile begins, in the features as a whole. */
typedef struct {
    size sample, top, left;
} Tile;

static inline Tile tile_at(size tile, size height, size width) {
    size across = (width + OUT - 1) / OUT, high = (height + OUT - 1) / OUT;
    return (Tile){tile / (across * high), tile / across % high * OUT, tile % across * OUT};
}

/* Where the pixels of a square lie whose first is (top, left); null beyond the edges, where they are zero. */
static inline void square(const number *x, size sample, size top, size left, size side, size height, size width,
                          size channels, const number **at) {
    for (size i = 0; i < side; i++)
        for (size j = 0; j < side; j++) {
            size row = top + i, column = left + j;
            int inside = row >= 0 && row < height && column >= 0 && column < width;
            at[side * i + j] = inside ? x + ((sample * height + row) * width + column) * channels : NULL;
        }
}

/* Of each of those pixels the channels from `c` on. */
static inline void read_from(const number **at, size count, size c, size channels, lanes *read) {
    for (size i = 0; i < count; i++) read[i] = at[i] ? load(at[i] + c, channels - c) : (lanes){0};
}

/* To planes of so many rows: first of the tiles `first` and on, each a square of so many pixels a side, which begins a
   border before it; zeros after them. */
static ALWAYS void read_tiles(Side *along, size side, size border, const number *x, number *planes, size height,
                              size width, size channels, size first, size tiles, size rows, int threads) {
    SHARED(threads)
    for (size row = 0; row < rows; row++) {
        Tile at = tile_at(first + row, height, width);
        const number *pixels[PLANES] = {NULL};
        if (row < tiles)
            square(x, at.sample, at.top - border, at.left - border, side, height, width, channels, pixels);
        for (size c = 0; c < channels; c += LANES) {
            lanes read[PLANES], whole[PLANES];
            read_from(pixels, side * side, c, channels, read);
            twice(along, side, IN, read, whole);
            for (size p = 0; p < PLANES; p++) store(planes + (p * rows + row) * channels + c, whole[p], channels - c);
        }
    }
}

void winograd_input(const number *x, number *planes, size height, size width, size channels, size first, size tiles,
                    size rows, int threads) {
    read_tiles(input, IN, 1, x, planes, height, width, channels, first, tiles, rows, threads);
}

/* The transpose of `winograd_output`: from the output's gradient to the planes'. */
void winograd_told(const number *y, number *planes, size height, size width, size channels, size first, size tiles,
                   size rows, int threads) {
    read_tiles(told, OUT, 0, y, planes, height, width, channels, first, tiles, rows, threads);
}

/* From planes to the output. bias: of each channel, or null. */
void winograd_output(const number *planes, const number *bias, number *y, size height, size width, size channels,
                     size first, size tiles, size rows, int threads) {
    SHARED(threads)
    for (size tile = 0; tile < tiles; tile++) {
        Tile at = tile_at(first + tile, height, width);
        for (size c = 0; c < channels; c += LANES) {
            lanes read[PLANES], whole[OUT * OUT], shift = {0};
            if (bias) shift = load(bias + c, channels - c);
            for (size p = 0; p < PLANES; p++) read[p] = load(planes + (p * rows + tile) * channels + c, channels - c);
            twice(output, IN, OUT, read, whole);
            for (size i = 0; i < OUT && at.top + i < height; i++)
                for (size j = 0; j < OUT && at.left + j < width; j++) {
                    size place = (at.sample * height + at.top + i) * width + at.left + j;
                    store(y + place * channels + c, whole[OUT * i + j] + shift, channels - c);
                }
        }
    }
}
