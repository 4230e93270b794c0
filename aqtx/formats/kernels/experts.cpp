// Loops of experts.h, for each kind of processor.
#include "experts.h"

static INLINE void gated(float* gate, const float* up, int64_t count) {
  for (int64_t i = 0; i < count; i++) gate[i] = gate[i] / (1.0f + exp_of(-gate[i])) * up[i];
}

static INLINE void added(float* to, const float* from, float weight, int64_t count) {
  for (int64_t i = 0; i < count; i++) to[i] += weight * from[i];
}

static INLINE float wide(float value) { return value; }
static INLINE float wide(uint16_t bits) { return as_float(uint32_t(bits) << 16); }

constexpr int kSums = 32;

template <class T>
static INLINE void plain(const T* w, const float* x, int64_t M, int64_t K, float* y, int64_t N, int64_t n0, int64_t n1) {
  for (int64_t n = n0; n < n1; n++)
    for (int64_t m = 0; m < M; m++) {
      const T* row = w + n * K;
      const float* values = x + m * K;
      float sums[kSums] = {}, total = 0;
      int64_t k = 0;
      for (; k + kSums <= K; k += kSums)
        for (int l = 0; l < kSums; l++) sums[l] += values[k + l] * wide(row[k + l]);
      for (; k < K; k++) total += values[k] * wide(row[k]);
      for (int l = 0; l < kSums; l++) total += sums[l];
      y[m * N + n] = total;
    }
}

FOR_EACH_CPU(gate_all, (float* gate, const float* up, int64_t count), (gate, up, count), gated(gate, up, count))
FOR_EACH_CPU(add_all, (float* to, const float* from, float weight, int64_t count), (to, from, weight, count),
             added(to, from, weight, count))
FOR_EACH_CPU(plain_float, (const float* w, const float* x, int64_t M, int64_t K, float* y, int64_t N, int64_t a, int64_t b),
             (w, x, M, K, y, N, a, b), plain(w, x, M, K, y, N, a, b))
FOR_EACH_CPU(plain_bf16, (const uint16_t* w, const float* x, int64_t M, int64_t K, float* y, int64_t N, int64_t a, int64_t b),
             (w, x, M, K, y, N, a, b), plain(w, x, M, K, y, N, a, b))

void gate_values(float* gate, const float* up, int64_t count) { gate_all(gate, up, count); }
void add_scaled(float* to, const float* from, float weight, int64_t count) { add_all(to, from, weight, count); }
void plain_rows(const void* w, int dtype, const float* x, int64_t M, int64_t K, float* y, int64_t N, int64_t a, int64_t b) {
  if (dtype == 0) plain_float((const float*)w, x, M, K, y, N, a, b);
  else plain_bf16((const uint16_t*)w, x, M, K, y, N, a, b);
}
