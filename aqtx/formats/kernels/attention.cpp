// Attention of one query. The slots that the mask allows are read once, in place; the others are not touched, so that
// a token costs what is behind it and not what the cache has room for. All arithmetic is in float32.
#include "attention.h"

#include <bit>
#include <cmath>
#include <limits>

static INLINE float wide(uint16_t bits) { return std::bit_cast<float>(uint32_t(bits) << 16); }
static INLINE float wide(float value) { return value; }

static INLINE void narrow(float value, float* to) { *to = value; }
static INLINE void narrow(float value, uint16_t* to) {  // to the nearest bf16, ties to even
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  *to = value != value ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

constexpr int kSums = 16;

template <class T>
static INLINE float dot(const float* q, const T* k, int64_t size) {
  float sums[kSums] = {}, total = 0;
  int64_t d = 0;
  for (; d + kSums <= size; d += kSums)
    for (int l = 0; l < kSums; l++) sums[l] += q[d + l] * wide(k[d + l]);
  for (; d < size; d++) total += q[d] * wide(k[d]);
  for (int l = 0; l < kSums; l++) total += sums[l];
  return total;
}

template <class T>
static INLINE void head(const AttentionTask& t) {
  const T *query = (const T*)t.query, *keys = (const T*)t.keys, *values = (const T*)t.values;
  float *scores = t.scratch, *q = t.scratch + t.slots, best = -std::numeric_limits<float>::infinity(), total = 0;
  for (int64_t d = 0; d < t.size; d++) q[d] = wide(query[d]) * t.scale;
  for (int64_t c = 0; c < t.slots; c++) {
    if (!t.mask[c]) continue;
    scores[c] = dot(q, keys + c * t.key_stride, t.size);
    best = scores[c] > best || scores[c] != scores[c] ? scores[c] : best;
  }
  for (int64_t d = 0; d < t.size; d++) q[d] = 0;  // now the sum of values
  for (int64_t c = 0; c < t.slots; c++) {
    if (!t.mask[c]) continue;
    const float weight = std::exp(scores[c] - best);
    const T* v = values + c * t.value_stride;
    total += weight;
    for (int64_t d = 0; d < t.size; d++) q[d] += weight * wide(v[d]);
  }
  for (int64_t d = 0; d < t.size; d++) narrow(total == 0 ? 0.0f : q[d] / total, (T*)t.out + d);
}

FOR_EACH_CPU(head_bf16, (const AttentionTask& t), (t), head<uint16_t>(t))
FOR_EACH_CPU(head_float, (const AttentionTask& t), (t), head<float>(t))

void attend(const AttentionTask& task) { task.is_bf16 ? head_bf16(task) : head_float(task); }
