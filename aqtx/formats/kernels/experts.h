// The experts that tokens chose, from hidden states to their weighted sum. No torch in here but for threads.
#pragma once
#include <cmath>

#include "packed.h"

// e^x to 2 units in the last place, in a form that compilers vectorise; for x beyond -87 and 88.5 that of these, NaN stays.
INLINE float exp_of(float x) {
  const float clamped = x < -87.0f ? -87.0f : x > 88.5f ? 88.5f : x;
  const float shifted = clamped * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: whole numbers in the low bits
  const float whole = shifted - 12582912.0f, rest = (clamped - whole * 0.693359375f) + whole * 2.12194440e-4f;
  float y = 1.9875691500e-4f;
  y = y * rest + 1.3981999507e-3f;
  y = y * rest + 8.3334519073e-3f;
  y = y * rest + 4.1665795894e-2f;
  y = y * rest + 1.6666665459e-1f;
  y = y * rest + 5.0000001201e-1f;
  y = y * rest * rest + rest + 1.0f;
  return as_float(as_bits(y) + (as_bits(shifted) << 23));
}

// gate[i] = silu(gate[i]) * up[i].
void gate_values(float* gate, const float* up, int64_t count);
// to[i] += weight * from[i].
void add_scaled(float* to, const float* from, float weight, int64_t count);
// y[m, n0..n1) of [M, N] = x [M, K] w[n0..n1)^T for a plain matrix; dtype 0 float32, 1 bf16.
void plain_rows(const void* w, int dtype, const float* x, int64_t num_rows, int64_t num_columns, float* y, int64_t N,
                int64_t n0, int64_t n1);
