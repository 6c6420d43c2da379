/* What a training step does between its matrix products, on a CPU, where PyTorch takes longer.

   Features are rows: [rows, channels], channels next to each other; what they are, numbers.h says. Every function
   computes in float32. Loops are plain: the compiler makes vectors of them. `threads` is PyTorch's number of threads,
   whose OpenMP library this is linked to. */

#include "numbers.h"

#define BLOCK 512     /* elements that stay in the fastest cache between two loops */
#define CHANNELS 4096 /* the most that a function sums at once; of a normalisation, two groups have no more */
#define PARALLEL 8192 /* elements below which threads cost more than they give */

static inline int few(int threads, size elements) { return elements < PARALLEL ? 1 : threads; }

/* e^x to 4e-6 of itself, 3e-7 where x is small, as far as a float has room: 2^n times a polynomial on [-1/2, 1/2]. */
static inline float exponential(float x) {
    float scaled = x * 1.44269504f;
    scaled = scaled > 126.f ? 126.f : scaled;
    scaled = scaled < -126.f ? -126.f : scaled;
    float whole = floorf(scaled + 0.5f), f = (scaled - whole) * 0.693147181f;
    float high = 0.166666667f + f * (0.0416666667f + f * (0.00833333333f + f * 0.00138888889f));
    float p = 1.f + f * (1.f + f * (0.5f + f * high));
    int32_t bits = ((int32_t)whole + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return p * power;
}

/* Abramowitz and Stegun 7.1.26, to 1.5e-7. */
static inline float error_function(float x, float gauss) {
    float a = fabsf(x), t = 1.f / (1.f + 0.3275911f * a);
    float p = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    return copysignf(1.f - p * gauss, x);
}

/* --- the gated activation of a transformer block */

/* [rows, 2 * width] to [rows, width]: the first half times the GELU of the second. Rounded wherever PyTorch's own
   steps would: with one rounding alone, a control's first losses were up to 1% away from the plain path's. */
void geglu(const number *x, number *y, size rows, size width, int threads) {
    SHARED(few(threads, rows * width))
    for (size row = 0; row < rows; row++) {
        const number *value = x + 2 * row * width, *gate = value + width;
        number *out = y + row * width;
        EACH for (size i = 0; i < width; i++) {
            float v = up(gate[i]), gauss = exponential(-0.5f * v * v);
            float open = up(down(v * 0.5f * (1.f + error_function(v * 0.707106781f, gauss))));
            out[i] = down(up(value[i]) * open);
        }
    }
}

void geglu_backward(const number *g, const number *x, number *dx, size rows, size width, int threads) {
    SHARED(few(threads, rows * width))
    for (size row = 0; row < rows; row++) {
        const number *value = x + 2 * row * width, *gate = value + width, *given = g + row * width;
        number *to_value = dx + 2 * row * width, *to_gate = to_value + width;
        EACH for (size i = 0; i < width; i++) {
            float v = up(gate[i]), gauss = exponential(-0.5f * v * v), pull = up(given[i]);
            float below = 0.5f * (1.f + error_function(v * 0.707106781f, gauss));
            to_value[i] = down(pull * up(down(v * below)));
            to_gate[i] = down(up(down(pull * up(value[i]))) * (below + v * gauss * 0.398942280f));
        }
    }
}

/* --- attention, a block of its probabilities at a time: [rows, width] */

/* In place of scores: e^(scale * score - rest), which are probabilities where the log of their sum is `rest`. */
void chances(number *scores, size rows, size width, float scale, float rest, int threads) {
    SHARED(few(threads, rows * width))
    for (size row = 0; row < rows; row++) {
        number *at = scores + row * width;
        EACH for (size i = 0; i < width; i++) at[i] = down(exponential(up(at[i]) * scale - rest));
    }
}

/* In place of the probabilities' gradient: that of the scores. drift: of each row, the sum of the probabilities times
   their gradient. */
void chances_backward(const number *chance, number *gradient, const float *drift, size rows, size width, float scale,
                      int threads) {
    SHARED(few(threads, rows * width))
    for (size row = 0; row < rows; row++) {
        const number *p = chance + row * width;
        number *at = gradient + row * width;
        EACH for (size i = 0; i < width; i++) at[i] = down(up(p[i]) * (up(at[i]) - drift[row]) * scale);
    }
}

/* --- group normalisation: x [batch, pixels, channels]; a unit of work is some groups of one sample */

/* Some groups of one sample: numbers of groups, in all samples, and of channels; and where the first element lies. */
typedef struct {
    size group, groups, channel, channels, start;
} Part;

static inline Part part_of(size unit, size parts, size pixels, size channels, size groups) {
    size sample = unit / parts, part = unit % parts, wide = channels / groups;
    size first = part * groups / parts, last = (part + 1) * groups / parts;
    return (Part){sample * groups + first, last - first, first * wide, (last - first) * wide,
                  sample * pixels * channels + first * wide};
}

/* Into how many parts a sample's groups are shared out: for every thread one, and none too wide. */
static inline size parts_of(size batch, size channels, size groups, int threads) {
    size parts = batch >= threads ? 1 : least(groups, threads);
    while (parts < groups && (groups / parts + 1) * (channels / groups) > CHANNELS) parts++;
    return parts;
}

/* backward, sums and along: [batch, channels], of the gradient, and of it times the normalised input. */

#ifndef FLOAT32 /* one pass about a pixel: bfloat16's 8 bits are lost long before what is left of a float's 24 cancels */

void group_norm(const number *x, const float *weight, const float *bias, number *y, float *mean, float *inverse,
               size batch, size pixels, size channels, size groups, float eps, int threads) {
    size parts = parts_of(batch, channels, groups, threads), wide = channels / groups;
    SHARED(few(threads, batch * pixels * channels))
    for (size unit = 0; unit < batch * parts; unit++) {
        Part part = part_of(unit, parts, pixels, channels, groups);
        size from = part.channel, count = part.channels;
        const number *in = x + part.start;
        number *out = y + part.start;
        double sum[CHANNELS] = {0}, square[CHANNELS] = {0};
        float about[CHANNELS], slope[CHANNELS], level[CHANNELS];
        EACH for (size c = 0; c < count; c++) about[c] = up(in[pixels / 2 * channels + c]); /* corners see the padding */
        for (size block = 0; block < pixels; block += BLOCK) {
            float some[CHANNELS], squares[CHANNELS];
            memset(some, 0, count * sizeof(float)), memset(squares, 0, count * sizeof(float));
            for (size p = block; p < least(block + BLOCK, pixels); p++) {
                const number *row = in + p * channels;
                EACH for (size c = 0; c < count; c++) {
                    float v = up(row[c]) - about[c];
                    some[c] += v;
                    squares[c] += v * v;
                }
            }
            EACH for (size c = 0; c < count; c++) sum[c] += some[c], square[c] += squares[c];
        }
        for (size group = 0; group < part.groups; group++) {
            double s = 0, q = 0, elements = (double)(pixels * wide);
            for (size c = group * wide; c < (group + 1) * wide; c++) s += sum[c] + (double)pixels * about[c];
            double m = s / elements;
            for (size c = group * wide; c < (group + 1) * wide; c++) {
                double d = about[c] - m;
                q += square[c] + d * (2.0 * sum[c] + d * pixels);
            }
            float r = (float)(1.0 / sqrt((q < 0 ? 0 : q / elements) + eps));
            mean[part.group + group] = (float)m;
            inverse[part.group + group] = r;
            for (size c = group * wide; c < (group + 1) * wide; c++) {
                slope[c] = r * weight[from + c];
                level[c] = bias[from + c] - (float)m * slope[c];
            }
        }
        for (size p = 0; p < pixels; p++) {
            const number *row = in + p * channels;
            number *to = out + p * channels;
            EACH for (size c = 0; c < count; c++) to[c] = down(up(row[c]) * slope[c] + level[c]);
        }
    }
}

void group_norm_backward(const number *g, const number *x, const float *weight, const float *mean, const float *inverse,
                        number *dx, float *sums, float *along, size batch, size pixels, size channels, size groups,
                        int threads) {
    size parts = parts_of(batch, channels, groups, threads), wide = channels / groups;
    SHARED(few(threads, batch * pixels * channels))
    for (size unit = 0; unit < batch * parts; unit++) {
        Part part = part_of(unit, parts, pixels, channels, groups);
        size from = part.channel, count = part.channels, start = part.start, sample = unit / parts;
        float sum[CHANNELS] = {0}, product[CHANNELS] = {0}, pull[CHANNELS], slope[CHANNELS], level[CHANNELS];
        for (size p = 0; p < pixels; p++) {
            const number *given = g + start + p * channels, *row = x + start + p * channels;
            EACH for (size c = 0; c < count; c++) {
                float v = up(given[c]);
                sum[c] += v;
                product[c] += v * up(row[c]);
            }
        }
        for (size group = 0; group < part.groups; group++) {
            float m = mean[part.group + group], r = inverse[part.group + group];
            double s = 0, q = 0;
            for (size c = group * wide; c < (group + 1) * wide; c++) {
                float with = (product[c] - m * sum[c]) * r;
                sums[sample * channels + from + c] = sum[c];
                along[sample * channels + from + c] = with;
                s += sum[c] * weight[from + c], q += with * weight[from + c];
            }
            double elements = (double)(pixels * wide);
            float tilt = (float)(-(double)r * r * q / elements), flat = (float)(-r * s / elements) - tilt * m;
            for (size c = group * wide; c < (group + 1) * wide; c++)
                pull[c] = r * weight[from + c], slope[c] = tilt, level[c] = flat;
        }
        for (size p = 0; p < pixels; p++) {
            const number *given = g + start + p * channels, *row = x + start + p * channels;
            number *to = dx + start + p * channels;
            EACH for (size c = 0; c < count; c++)
                to[c] = down(up(given[c]) * pull[c] + up(row[c]) * slope[c] + level[c]);
        }
    }
}

#else /* about the mean, and a float's sums over no more than a block */

/* Of each channel, over the pixels of a part: the sum of the features, or of their squares about `about`. */
static inline void sum_part(const number *x, Part part, size pixels, size channels, const float *about, double *sums) {
    size count = part.channels;
    memset(sums, 0, count * sizeof(double));
    for (size block = 0; block < pixels; block += BLOCK) {
        float some[CHANNELS];
        memset(some, 0, count * sizeof(float));
        for (size p = block; p < least(block + BLOCK, pixels); p++) {
            const number *row = x + part.start + p * channels;
            if (about) {
                EACH for (size c = 0; c < count; c++) {
                    float v = up(row[c]) - about[c];
                    some[c] += v * v;
                }
            } else {
                EACH for (size c = 0; c < count; c++) some[c] += up(row[c]);
            }
        }
        EACH for (size c = 0; c < count; c++) sums[c] += some[c];
    }
}

void group_norm(const number *x, const float *weight, const float *bias, number *y, float *mean, float *inverse,
               size batch, size pixels, size channels, size groups, float eps, int threads) {
    size parts = parts_of(batch, channels, groups, threads), wide = channels / groups;
    SHARED(few(threads, batch * pixels * channels))
    for (size unit = 0; unit < batch * parts; unit++) {
        Part part = part_of(unit, parts, pixels, channels, groups);
        size from = part.channel, count = part.channels;
        double sums[CHANNELS], elements = (double)(pixels * wide);
        float about[CHANNELS], slope[CHANNELS], level[CHANNELS];
        sum_part(x, part, pixels, channels, NULL, sums);
        for (size group = 0; group < part.groups; group++) {
            double sum = 0;
            for (size c = group * wide; c < (group + 1) * wide; c++) sum += sums[c];
            mean[part.group + group] = (float)(sum / elements);
            for (size c = group * wide; c < (group + 1) * wide; c++) about[c] = mean[part.group + group];
        }
        sum_part(x, part, pixels, channels, about, sums);
        for (size group = 0; group < part.groups; group++) {
            double sum = 0;
            for (size c = group * wide; c < (group + 1) * wide; c++) sum += sums[c];
            float r = inverse[part.group + group] = (float)(1.0 / sqrt(sum / elements + eps));
            for (size c = group * wide; c < (group + 1) * wide; c++)
                slope[c] = r * weight[from + c], level[c] = bias[from + c];
        }
        for (size p = 0; p < pixels; p++) {
            const number *row = x + part.start + p * channels;
            number *to = y + part.start + p * channels;
            EACH for (size c = 0; c < count; c++) to[c] = down((up(row[c]) - about[c]) * slope[c] + level[c]);
        }
    }
}

void group_norm_backward(const number *g, const number *x, const float *weight, const float *mean, const float *inverse,
                        number *dx, float *sums, float *along, size batch, size pixels, size channels, size groups,
                        int threads) {
    size parts = parts_of(batch, channels, groups, threads), wide = channels / groups;
    SHARED(few(threads, batch * pixels * channels))
    for (size unit = 0; unit < batch * parts; unit++) {
        Part part = part_of(unit, parts, pixels, channels, groups);
        size from = part.channel, count = part.channels, start = part.start, sample = unit / parts;
        double sum[CHANNELS], product[CHANNELS];
        float about[CHANNELS], pull[CHANNELS], slope[CHANNELS], level[CHANNELS];
        memset(sum, 0, count * sizeof(double)), memset(product, 0, count * sizeof(double));
        for (size c = 0; c < count; c++) about[c] = mean[part.group + c / wide];
        for (size block = 0; block < pixels; block += BLOCK) {
            float some[CHANNELS], products[CHANNELS];
            memset(some, 0, count * sizeof(float)), memset(products, 0, count * sizeof(float));
            for (size p = block; p < least(block + BLOCK, pixels); p++) {
                const number *given = g + start + p * channels, *row = x + start + p * channels;
                EACH for (size c = 0; c < count; c++) {
                    float v = up(given[c]);
                    some[c] += v;
                    products[c] += v * (up(row[c]) - about[c]);
                }
            }
            EACH for (size c = 0; c < count; c++) sum[c] += some[c], product[c] += products[c];
        }
        for (size group = 0; group < part.groups; group++) {
            float r = inverse[part.group + group];
            double s = 0, q = 0, elements = (double)(pixels * wide);
            for (size c = group * wide; c < (group + 1) * wide; c++) {
                double with = product[c] * r;
                sums[sample * channels + from + c] = (float)sum[c];
                along[sample * channels + from + c] = (float)with;
                s += sum[c] * weight[from + c], q += with * weight[from + c];
            }
            for (size c = group * wide; c < (group + 1) * wide; c++) {
                pull[c] = r * weight[from + c];
                slope[c] = (float)(-(double)r * r * q / elements);
                level[c] = (float)(-r * s / elements);
            }
        }
        for (size p = 0; p < pixels; p++) {
            const number *given = g + start + p * channels, *row = x + start + p * channels;
            number *to = dx + start + p * channels;
            EACH for (size c = 0; c < count; c++)
                to[c] = down(up(given[c]) * pull[c] + (up(row[c]) - about[c]) * slope[c] + level[c]);
        }
    }
}

#endif

/* --- convolutions as products */

/* Every pixel's neighbourhood as a row, zero beyond the edges: [batch, height, width, channels] to
   [batch * down * across, kernel^2 * channels]. */
void gather(const number *x, number *y, size batch, size height, size width, size channels, size kernel, size stride,
            size padding, size high, size across, int threads) {
    size bytes = channels * sizeof(number);
    SHARED(few(threads, batch * high * across * kernel * kernel * channels))
    for (size line = 0; line < batch * high; line++) {
        size sample = line / high, top = line % high * stride - padding;
        for (size column = 0; column < across; column++) {
            size left = column * stride - padding;
            size from = left < 0 ? -left : 0, to = least(kernel, width - left);
            for (size k = 0; k < kernel; k++) {
                number *out = y + ((line * across + column) * kernel + k) * kernel * channels;
                if (top + k < 0 || top + k >= height) {
                    memset(out, 0, kernel * bytes);
                    continue;
                }
                if (from > 0) memset(out, 0, from * bytes);
                const number *in = x + ((sample * height + top + k) * width + left + from) * channels;
                memcpy(out + from * channels, in, (to - from) * bytes);
                if (to < kernel) memset(out + to * channels, 0, (kernel - to) * bytes);
            }
        }
    }
}

/* The transpose of `gather`: what every pixel is told, added up. Of `channels` the first `wanted` are. */
void scatter(const number *said, number *dx, size batch, size height, size width, size channels, size wanted,
             size kernel, size stride, size padding, size high, size across, int threads) {
    SHARED(few(threads, batch * height * width * channels))
    for (size line = 0; line < batch * height; line++) {
        size sample = line / height, row = line % height + padding;
        for (size column = padding; column < width + padding; column++) {
            number *out = dx + (line * width + column - padding) * wanted;
            for (size first = 0; first < wanted; first += CHANNELS) {
                size count = least(CHANNELS, wanted - first);
                float sum[CHANNELS];
                memset(sum, 0, count * sizeof(float));
                for (size k = 0; k < kernel; k++) {
                    size r = (row - k) / stride;
                    if (row < k || (row - k) % stride || r >= high) continue;
                    for (size l = 0; l < kernel; l++) {
                        size c = (column - l) / stride;
                        if (column < l || (column - l) % stride || c >= across) continue;
                        size from = (((sample * high + r) * across + c) * kernel + k) * kernel + l;
                        const number *in = said + from * channels + first;
                        EACH for (size i = 0; i < count; i++) sum[i] += up(in[i]);
                    }
                }
                EACH for (size i = 0; i < count; i++) out[first + i] = down(sum[i]);
            }
        }
    }
}

/* [rows, channels] to [channels], float32. */
void sum_rows(const number *x, float *sums, size rows, size channels) {
    for (size first = 0; first < channels; first += CHANNELS) {
        size count = least(CHANNELS, channels - first);
        double total[CHANNELS] = {0};
        for (size block = 0; block < rows; block += BLOCK) {
            float sum[CHANNELS];
            memset(sum, 0, count * sizeof(float));
            for (size row = block; row < least(block + BLOCK, rows); row++) {
                const number *in = x + row * channels + first;
                EACH for (size c = 0; c < count; c++) sum[c] += up(in[c]);
            }
            EACH for (size c = 0; c < count; c++) total[c] += sum[c];
        }
        EACH for (size c = 0; c < count; c++) sums[first + c] = (float)total[c];
    }
}

/* Of float32 numbers, or bfloat16 ones where `half`. */
double square_sum(const void *x, size count, int half, int threads) {
    double total = 0;
    PRAGMA(omp parallel for num_threads(few(threads, count)) schedule(static) reduction(+ : total))
    for (size block = 0; block < count; block += BLOCK) {
        size end = least(block + BLOCK, count);
        float sum = 0;
        if (half) {
            for (size i = block; i < end; i++) sum += widen(((const bf16 *)x)[i]) * widen(((const bf16 *)x)[i]);
        } else {
            for (size i = block; i < end; i++) sum += ((const float *)x)[i] * ((const float *)x)[i];
        }
        total += sum;
    }
    return total;
}

/* --- AdamW (arXiv 1711.05101), in one pass over all that it keeps */

/* gradient: float32, or bfloat16 where `half`; it is multiplied by `scale`. cast: what the new weight is written to as
   well, or null. corrected, root: 1 / (1 - beta^t) of the first moment, and the square root of the second's. */
void adamw(float *weight, const void *gradient, float *first, float *second, bf16 *cast, size count, int half,
           float scale, float lr, float beta1, float beta2, float eps, float decay, float corrected, float root,
           int threads) {
    float keep = 1.f - lr * decay, rate = lr * corrected;
    SHARED(few(threads, count))
    for (size block = 0; block < count; block += BLOCK) {
        size end = least(block + BLOCK, count);
        float g[BLOCK];
        if (half) {
            EACH for (size i = block; i < end; i++) g[i - block] = widen(((const bf16 *)gradient)[i]) * scale;
        } else {
            EACH for (size i = block; i < end; i++) g[i - block] = ((const float *)gradient)[i] * scale;
        }
        EACH for (size i = block; i < end; i++) {
            float v = g[i - block];
            float m = first[i] + (v - first[i]) * (1.f - beta1), s = second[i] * beta2 + v * v * (1.f - beta2);
            first[i] = m;
            second[i] = s;
            weight[i] = weight[i] * keep - rate * m / (sqrtf(s) * root + eps);
        }
        if (cast) {
            EACH for (size i = block; i < end; i++) cast[i] = narrow(weight[i]);
        }
    }
}
