/* AdamW (arXiv 1711.05101) whose moments are kept in 8 bits, in blocks of 256 numbers (arXiv 2110.02861), in one pass.

   Codes are those of bitsandbytes' dynamic type. A block's numbers are shares of its largest. A share is a decade and a
   place in it: the decades from 1e-6 to 1 are cut into 1, 2, 4, ... 64 equal parts, or into 2, 4, ... 128 where no sign
   is kept, and a code stands for the middle of a part. Counted through, part number n begins a decade where n is a power
   of two, so n + 1/2 is its decade and place as a float's exponent and mantissa are. Beside the parts there are 0 and 1. */

#include "numbers.h"

#define BLOCK 256
#define DECADES 7
#define SMALLEST 1e-37f /* of what can be divided by; a block of less becomes zeros */
#define ZERO 127 /* its code where there are signs */

/* 10^(decade - 6), the decade being that of part `n` where `n` begins with 1, or with 2 where the parts are `fine`.
   Beyond the last decade, what makes that code's number 1. */
static inline float decade(int n, int fine) {
    int at = fine ? n / 2 : n;
    float found = 1e-6f;
    found = at >= 2 ? 1e-5f : found;
    found = at >= 4 ? 1e-4f : found;
    found = at >= 8 ? 1e-3f : found;
    found = at >= 16 ? 1e-2f : found;
    found = at >= 32 ? 1e-1f : found;
    found = at >= 64 ? 1.f : found;
    return at >= 128 ? 1.f / (0.9f * (1.f + (fine ? 1.f / 512.f : 1.f / 256.f)) - 0.8f) : found;
}

/* Part n's number: the middle between 0.1 and 1 of its decade that its place says. */
static inline float middle(int n, int fine) {
    float count = (float)n + 0.5f, place;
    uint32_t bits;
    memcpy(&bits, &count, 4);
    bits = (bits & 0x007fffff) | 0x3f800000; /* in [1, 2) */
    memcpy(&place, &bits, 4);
    return decade(n, fine) * (0.9f * place - 0.8f);
}

/* The part nearest to a share in [0, 1]; 0 for none of them. */
static inline int nearest(float share, int fine) {
    /* Between two decades the border is half way from the last middle of one to the first of the next. */
    float parts = fine ? 2.f : 1.f, inverse = 1e6f, border = 1e-6f * (0.1f + 0.45f / parts) / 2.f;
    int some = share >= border;
    for (int i = 1; i < DECADES; i++) {
        static const float tens[DECADES] = {1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f, 1e-1f, 1.f};
        static const float inverses[DECADES] = {1e6f, 1e5f, 1e4f, 1e3f, 1e2f, 1e1f, 1.f};
        float last = tens[i - 1] * (1.f - 0.45f / (float)((fine ? 2 : 1) << (i - 1)));
        float first = tens[i] * (0.1f + 0.45f / (float)((fine ? 2 : 1) << i));
        int beyond = share >= 0.5f * (last + first);
        parts = beyond ? (float)((fine ? 2 : 1) << i) : parts;
        inverse = beyond ? inverses[i] : inverse;
    }
    float place = (share * inverse + 0.8f) * (1.f / 0.9f);
    place = place < 1.f ? 1.f : place;
    int n = (int)(place * parts), most = (int)(2.f * parts) - 1;
    n = n > most ? most : n;
    return some ? n : 0;
}

static inline float signed_share(int code) {
    int n = code - ZERO, without = n < 0 ? -n : n;
    float found = without ? middle(without, 0) : 0.f;
    return n < 0 ? -found : found;
}

static inline int signed_code(float share) {
    float without = fabsf(share);
    int n = nearest(without, 0);
    n = share >= 0.5f * (1.f + 1.f - 0.45f / 64.f) ? 128 : n; /* of the two ends 1 alone has a code */
    return share < 0.f ? ZERO - n : ZERO + n;
}

static inline float plain_share(int code) { return code ? middle(code + 1, 1) : 0.f; }

/* What is not zero does not become it, or steps would be divided by it. */
static inline int plain_code(float share) {
    int n = nearest(share, 1);
    n = share >= 0.5f * (1.f + 1.f - 0.45f / 128.f) ? 256 : n;
    n = n ? n - 1 : 0;
    return n + ((share > 0.f) & (n == 0));
}

/* As `adamw` of native.c. first, second: codes of the moments, and of each block of them the largest. */
void adamw_8bit(float *weight, const void *gradient, uint8_t *first, uint8_t *second, float *largest_first,
                float *largest_second, bf16 *cast, size count, int half, float scale, float lr, float beta1,
                float beta2, float eps, float decay, float corrected, float root, int threads) {
    float keep = 1.f - lr * decay, rate = lr * corrected;
    SHARED(threads)
    for (size block = 0; block < count; block += BLOCK) {
        size n = least(BLOCK, count - block);
        float m[BLOCK], s[BLOCK], most_first = 0.f, most_second = 0.f;
        float *w = weight + block, was_first = largest_first[block / BLOCK], was_second = largest_second[block / BLOCK];
        uint8_t *codes_first = first + block, *codes_second = second + block;
        if (half) {
            EACH for (size i = 0; i < n; i++) m[i] = widen(((const bf16 *)gradient)[block + i]) * scale;
        } else {
            EACH for (size i = 0; i < n; i++) m[i] = ((const float *)gradient)[block + i] * scale;
        }
        _Pragma("omp simd reduction(max : most_first, most_second)")
        for (size i = 0; i < n; i++) {
            float v = m[i], before = signed_share(codes_first[i]) * was_first;
            m[i] = before + (v - before) * (1.f - beta1);
            s[i] = plain_share(codes_second[i]) * was_second * beta2 + v * v * (1.f - beta2);
            w[i] = w[i] * keep - rate * m[i] / (sqrtf(s[i]) * root + eps);
            most_first = fabsf(m[i]) > most_first ? fabsf(m[i]) : most_first;
            most_second = s[i] > most_second ? s[i] : most_second;
        }
        float share_first = most_first > SMALLEST ? 1.f / most_first : 0.f;
        float share_second = most_second > SMALLEST ? 1.f / most_second : 0.f;
        EACH for (size i = 0; i < n; i++) codes_first[i] = (uint8_t)signed_code(m[i] * share_first);
        EACH for (size i = 0; i < n; i++) codes_second[i] = (uint8_t)plain_code(s[i] * share_second);
        largest_first[block / BLOCK] = most_first;
        largest_second[block / BLOCK] = most_second;
        if (cast) {
            EACH for (size i = 0; i < n; i++) cast[block + i] = narrow(w[i]);
        }
    }
}
