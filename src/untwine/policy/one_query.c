/* Attention of single queries over rows of keys and values, float32. Called by one_query.py, which
   says what the arguments are. A token's keys are read once for all queries of their head. */

#include <math.h>
#include <stdint.h>

#define LANES 8
#define BLOCK 64 /* tokens whose keys or values stay in the nearest cache */

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t whole __attribute__((vector_size(4 * LANES)));

static inline lanes at(const float *x) { return *(const lanes *)x; }
static inline void put(float *x, lanes value) { *(lanes *)x = value; }

static inline float total(lanes x) {
    float low = (x[0] + x[4]) + (x[1] + x[5]), high = (x[2] + x[6]) + (x[3] + x[7]);
    return low + high;
}

/* e^x for x <= 0, to 2 units of the last place; 0 below -87. */
static inline lanes exponential(lanes x) {
    const lanes zero = {0};
    whole tiny = x < zero - 87.0f;
    x = (lanes)((whole)x & ~tiny);
    whole power = __builtin_convertvector(x * 1.44269504f - 0.5f, whole); /* to nearest: x <= 0 */
    lanes n = __builtin_convertvector(power, lanes);
    lanes r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    lanes p = zero + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    lanes found = p * (lanes)((power + 127) << 23);
    return (lanes)((whole)found & ~tiny);
}

/* scores_GL become exp(scores - largest); the sum of each row goes to sums_G. */
static void weigh(float *scores, float *sums, int64_t queries, int64_t length, int64_t stride) {
    for (int64_t g = 0; g < queries; g++) {
        float *s = scores + g * stride, most = s[0];
        for (int64_t t = 1; t < length; t++) most = s[t] > most ? s[t] : most;
        for (int64_t t = length; t < stride; t++) s[t] = -INFINITY; /* e^that is 0 */
        lanes sum = {0};
        for (int64_t t = 0; t < stride; t += LANES) {
            lanes weight = exponential(at(s + t) - most);
            put(s + t, weight);
            sum += weight;
        }
        sums[g] = total(sum);
    }
}

static inline __attribute__((always_inline)) void head(
    const float *q, const float *k, const float *v, float *out, float *scratch, int64_t queries,
    int64_t length, int64_t size, float scale) {
    int64_t stride = (length + LANES - 1) / LANES * LANES;
    float *sums = scratch, *scores = scratch + queries;
    for (int64_t begin = 0; begin < length; begin += BLOCK) {
        int64_t end = begin + BLOCK < length ? begin + BLOCK : length;
        for (int64_t g = 0; g < queries; g++) {
            const float *query = q + g * size;
            for (int64_t t = begin; t < end; t++) {
                const float *key = k + t * size;
                lanes sum = at(query) * at(key);
                for (int64_t d = LANES; d < size; d += LANES) sum += at(query + d) * at(key + d);
                scores[g * stride + t] = total(sum) * scale;
            }
        }
    }
    weigh(scores, sums, queries, length, stride);
    for (int64_t d = 0; d < queries * size; d++) out[d] = 0.0f;
    for (int64_t begin = 0; begin < length; begin += BLOCK) {
        int64_t end = begin + BLOCK < length ? begin + BLOCK : length;
        for (int64_t g = 0; g < queries; g++) {
            const float *weights = scores + g * stride;
            for (int64_t d = 0; d < size; d += 4 * LANES) { /* size: a multiple of 4 * LANES */
                float *sum = out + g * size + d;
                lanes s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0};
                for (int64_t t = begin; t < end; t++) {
                    const float *value = v + t * size + d;
                    s0 += weights[t] * at(value);
                    s1 += weights[t] * at(value + LANES);
                    s2 += weights[t] * at(value + 2 * LANES);
                    s3 += weights[t] * at(value + 3 * LANES);
                }
                put(sum, at(sum) + s0);
                put(sum + LANES, at(sum + LANES) + s1);
                put(sum + 2 * LANES, at(sum + 2 * LANES) + s2);
                put(sum + 3 * LANES, at(sum + 3 * LANES) + s3);
            }
        }
    }
    for (int64_t g = 0; g < queries; g++)
        for (int64_t d = 0; d < size; d++) out[g * size + d] /= sums[g];
}

void one_query(
    const float *q, const float *keys, const float *values, float *out, float *scratch,
    const int64_t *rows, const int64_t *lengths, int64_t first, int64_t last, int64_t heads,
    int64_t queries, int64_t size, int64_t capacity, float scale) {
    for (int64_t b = first; b < last; b++)
        for (int64_t h = 0; h < heads; h++) {
            int64_t here = (rows[b] * heads + h) * capacity * size;
            int64_t asked = (b * heads + h) * queries * size;
            const float *k = keys + here, *v = values + here;
            if (size == 32) head(q + asked, k, v, out + asked, scratch, queries, lengths[b], 32, scale);
            else if (size == 64) head(q + asked, k, v, out + asked, scratch, queries, lengths[b], 64, scale);
            else if (size == 128) head(q + asked, k, v, out + asked, scratch, queries, lengths[b], 128, scale);
            else head(q + asked, k, v, out + asked, scratch, queries, lengths[b], size, scale);
        }
}
