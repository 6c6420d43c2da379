/* What our loops compute with. Features are bfloat16, the upper half of a float, or float32 where FLOAT32 is defined;
   sums are float32 or better in both. */

#include <math.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;
typedef int64_t size;

#define PRAGMA(x) _Pragma(#x)
#define EACH PRAGMA(omp simd)
#define SHARED(threads) PRAGMA(omp parallel for num_threads(threads) schedule(static))

static inline size least(size a, size b) { return a < b ? a : b; }

static inline float widen(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* Rounds to nearest, ties to even; what is no number stays none. */
static inline bf16 narrow(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (bf16)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

/* A feature, and what it is computed with. */
#ifdef FLOAT32
typedef float number;
static inline float up(number x) { return x; }
static inline number down(float value) { return value; }
#else
typedef bf16 number;
static inline float up(number x) { return widen(x); }
static inline number down(float value) { return narrow(value); }
#endif
