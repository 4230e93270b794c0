// Coordinate descent on the codes of one row after the other, see gptq_sweeps.py: the same bits as there.
//
// A row and its gradient lie in the cache while it is swept. Sixteen codes are looked at together; few of them change,
// and only a change reaches the gradient, by one row of the Hessian.
#include <cstddef>

#include "lanes.h"

struct Row {
  int64_t columns, padded;
  float *weights, *errors, *gradient, *inverse, *scale, *zero;
};

// What the sixteen columns from `c` on move by; true if any does.
static INLINE bool look(const Row& row, int64_t c, const Round& r, float levels, float* value, float* moved) {
  for (int l = 0; l < kWidth; l++)
    value[l] = (row.weights[c + l] - (row.errors[c + l] - row.gradient[c + l] * row.inverse[c + l])) / row.scale[c + l];
  round_lanes<kWidth>(value, row.zero + c, r, levels);
  uint32_t any = 0;
  for (int l = 0; l < kWidth; l++) {
    moved[l] = row.weights[c + l] - value[l] * row.scale[c + l] - row.errors[c + l];
    any |= as_bits(moved[l]) << 1;  // -0 is no move
  }
  return any != 0;
}

static INLINE void push(float* to, const float* from, float factor, int64_t count) {
  int64_t k = 0;
  for (; k + kWidth <= count; k += kWidth) *(Vector*)(to + k) += factor * *(const Vector*)(from + k);
  for (; k < count; k++) to[k] += factor * from[k];
}

// One sweep; returns what it added to the objective.
static INLINE float sweep(const DescentTask& t, const Row& row, const float* hessian, uint8_t* codes, const Round& r) {
  const float levels = float((1 << t.element.bits) - 1);
  alignas(64) float value[kWidth], moved[kWidth];
  float added = 0;
  for (int64_t c = 0; c < row.padded; c += kWidth) {
    int next = 0;
    while (next < kWidth && look(row, c, r, levels, value, moved)) {
      while (next < kWidth && moved[next] == 0) next++;
      if (next == kWidth) break;
      const int64_t column = c + next;
      const float step = moved[next], *h = hessian + column * row.columns;
      added += step * (2 * row.gradient[column] + step * h[column]);
      row.errors[column] = row.weights[column] - value[next] * row.scale[column];
      codes_of<1>(value + next, row.zero + column, r, t.element, codes + column);
      push(row.gradient, h, step, row.columns);
      next++;
    }
  }
  return added;
}

static INLINE void run_rows(const DescentTask& t, int64_t begin, int64_t end) {
  const Round r = round_of(t.element, t.zero != nullptr);
  const int64_t K = t.num_columns, padded = (K + kWidth - 1) / kWidth * kWidth;
  std::vector<float> space(6 * padded + kWidth);
  float* at = space.data() + (kWidth - (uintptr_t(space.data()) / 4) % kWidth) % kWidth;  // whole cache lines
  const Row row{K, padded, at, at + padded, at + 2 * padded, at + 3 * padded, at + 4 * padded, at + 5 * padded};
  for (int64_t l = K; l < padded; l++) row.scale[l] = 1;  // all else stays 0 there
  for (int64_t i = begin; i < end; i++) {
    const int64_t expert = i / t.num_rows;
    const std::size_t bytes = 4 * K;
    __builtin_memcpy(row.weights, t.weights + i * K, bytes);
    __builtin_memcpy(row.errors, t.errors + i * K, bytes);
    __builtin_memcpy(row.gradient, t.gradient + i * K, bytes);
    __builtin_memcpy(row.inverse, t.inverse + expert * K, bytes);
    for (int64_t k = 0; k < K; k++) {
      row.scale[k] = t.scale[i * t.num_blocks + k / t.block];
      if (t.zero) row.zero[k] = t.zero[i * t.num_blocks + k / t.block];
    }
    float objective = t.objective[i];
    for (int64_t s = 0; s < t.sweeps; s++) {
      const float added = sweep(t, row, t.hessian + expert * K * K, t.codes + i * K, r), before = objective;
      objective += added;
      if (!(-added >= t.least_gain * before)) break;
    }
    t.objective[i] = objective;
    __builtin_memcpy(t.errors + i * K, row.errors, bytes);
  }
}

FOR_EACH_CPU(descend, (const DescentTask& t, int64_t a, int64_t b), (t, a, b), run_rows(t, a, b))

void descend_rows(const DescentTask& task, int64_t begin, int64_t end) { descend(task, begin, end); }
