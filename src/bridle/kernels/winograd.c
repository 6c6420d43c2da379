/* Convolutions of 3x3 with stride 1 and a border of 1 by Winograd's minimal filtering F(4x4, 3x3) (arXiv 1509.09308),
   in float32: 36 products in place of 144 for each 4x4 pixels of the output.

   The points of interpolation are 0, +-5/8, +-3/2 and infinity: with the usual 0, +-1, +-2 what is rounded off is more
   than twice as much. What there is of a tile lies in 36 planes, [36, tiles, channels], and of a weight in [36, out,
   in]; the products between the planes are the caller's. Features are [batch, height, width, channels], and weights
   [out, 3, 3, in]. Tiles cover features row by row, sample by sample; those at the right and lower edges reach
   beyond. */

#include "numbers.h"

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#define IN 6  /* pixels a side of what a tile reads */
#define OUT 4 /* pixels a side of what it writes */
#define SIDE 3 /* of a filter */
#define PLANES (IN * IN)
#define ALWAYS inline __attribute__((always_inline)) /* or sizes and transforms would not be constants */
#define P 0.625f
#define Q 1.5f
#define SCALE_P (1.f / (2.f * P * P * (P * P - Q * Q)))
#define SCALE_Q (1.f / (2.f * Q * Q * (Q * Q - P * P)))

typedef float lanes __attribute__((vector_size(4 * LANES)));

/* Of the channels from `at` on, as many as there are lanes, or are left. */
static inline lanes load(const float *at, size rest) {
    lanes found = {0};
    if (rest >= LANES)
        memcpy(&found, at, sizeof found);
    else
        memcpy(&found, at, rest * sizeof(float));
    return found;
}

static inline void store(float *at, lanes given, size rest) {
    if (rest >= LANES)
        memcpy(at, &given, sizeof given);
    else
        memcpy(at, &given, rest * sizeof(float));
}

/* --- each transform along one side; `from` and `to` say how far apart its elements lie */

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

/* The transpose of `output`. */
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

/* The transpose of `filter`. */
static inline void learned(const lanes *u, size from, lanes *g, size to) {
    lanes even_p = SCALE_P * (u[from] + u[2 * from]), odd_p = SCALE_P * P * (u[from] - u[2 * from]);
    lanes even_q = SCALE_Q * (u[3 * from] + u[4 * from]), odd_q = SCALE_Q * Q * (u[3 * from] - u[4 * from]);
    g[0] = u[0] / (P * P * Q * Q) + even_p + even_q;
    g[to] = odd_p + odd_q;
    g[2 * to] = P * P * even_p + Q * Q * even_q + u[5 * from];
}

typedef void Side(const lanes *, size, lanes *, size);

/* Along both sides of a square of `in` by `in`, which becomes one of `out` by `out`. */
static ALWAYS void twice(Side *along, size in, size out, const lanes *x, lanes *y) {
    lanes half[PLANES];
    for (size j = 0; j < in; j++) along(x + j, in, half + j, in);
    for (size i = 0; i < out; i++) along(half + in * i, 1, y + out * i, 1);
}

/* --- of weights */

void winograd_filter(const float *weight, float *planes, size out, size channels, int threads) {
    SHARED(threads)
    for (size d = 0; d < out; d++) {
        for (size c = 0; c < channels; c += LANES) {
            lanes read[SIDE * SIDE], whole[PLANES];
            const float *at = weight + d * SIDE * SIDE * channels + c;
            for (size i = 0; i < SIDE * SIDE; i++) read[i] = load(at + i * channels, channels - c);
            twice(filter, SIDE, IN, read, whole);
            for (size p = 0; p < PLANES; p++) store(planes + (p * out + d) * channels + c, whole[p], channels - c);
        }
    }
}

/* The transpose of `winograd_filter`: from the planes' gradient to the weight's. */
void winograd_learned(const float *planes, float *weight, size out, size channels, int threads) {
    SHARED(threads)
    for (size d = 0; d < out; d++) {
        for (size c = 0; c < channels; c += LANES) {
            lanes read[PLANES], whole[SIDE * SIDE];
            float *at = weight + d * SIDE * SIDE * channels + c;
            for (size p = 0; p < PLANES; p++) read[p] = load(planes + (p * out + d) * channels + c, channels - c);
            twice(learned, IN, SIDE, read, whole);
            for (size i = 0; i < SIDE * SIDE; i++) store(at + i * channels, whole[i], channels - c);
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
static inline void square(const float *x, size sample, size top, size left, size side, size height, size width,
                          size channels, const float **at) {
    for (size i = 0; i < side; i++)
        for (size j = 0; j < side; j++) {
            size row = top + i, column = left + j;
            int inside = row >= 0 && row < height && column >= 0 && column < width;
            at[side * i + j] = inside ? x + ((sample * height + row) * width + column) * channels : NULL;
        }
}

/* Of each of those pixels the channels from `c` on. */
static inline void read_from(const float **at, size count, size c, size channels, lanes *read) {
    for (size i = 0; i < count; i++) read[i] = at[i] ? load(at[i] + c, channels - c) : (lanes){0};
}

/* To planes of the tiles `first` and on, of each a square of so many pixels a side, which begins a border before it. */
static ALWAYS void read_tiles(Side *along, size side, size border, const float *x, float *planes, size height,
                              size width, size channels, size first, size tiles, int threads) {
    SHARED(threads)
    for (size tile = 0; tile < tiles; tile++) {
        Tile at = tile_at(first + tile, height, width);
        const float *pixels[PLANES];
        square(x, at.sample, at.top - border, at.left - border, side, height, width, channels, pixels);
        for (size c = 0; c < channels; c += LANES) {
            lanes read[PLANES], whole[PLANES];
            read_from(pixels, side * side, c, channels, read);
            twice(along, side, IN, read, whole);
            for (size p = 0; p < PLANES; p++) store(planes + (p * tiles + tile) * channels + c, whole[p], channels - c);
        }
    }
}

void winograd_input(const float *x, float *planes, size height, size width, size channels, size first, size tiles,
                    int threads) {
    read_tiles(input, IN, 1, x, planes, height, width, channels, first, tiles, threads);
}

/* The transpose of `winograd_output`: from the output's gradient to the planes'. */
void winograd_told(const float *y, float *planes, size height, size width, size channels, size first, size tiles,
                   int threads) {
    read_tiles(told, OUT, 0, y, planes, height, width, channels, first, tiles, threads);
}

/* From planes to the output. bias: of each channel, or null. */
void winograd_output(const float *planes, const float *bias, float *y, size height, size width, size channels,
                     size first, size tiles, int threads) {
    SHARED(threads)
    for (size tile = 0; tile < tiles; tile++) {
        Tile at = tile_at(first + tile, height, width);
        for (size c = 0; c < channels; c += LANES) {
            lanes read[PLANES], whole[OUT * OUT], shift = {0};
            if (bias) shift = load(bias + c, channels - c);
            for (size p = 0; p < PLANES; p++) read[p] = load(planes + (p * tiles + tile) * channels + c, channels - c);
            twice(output, IN, OUT, read, whole);
            for (size i = 0; i < OUT && at.top + i < height; i++)
                for (size j = 0; j < OUT && at.left + j < width; j++) {
                    size place = (at.sample * height + at.top + i) * width + at.left + j;
                    store(y + place * channels + c, whole[OUT * i + j] + shift, channels - c);
                }
        }
    }
}
