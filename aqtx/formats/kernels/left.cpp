// What rounding leaves of weights, row by row: of given codes, or of the nearest values.
#include <algorithm>

#include "lanes.h"

static INLINE void run_left(const LeftTask& t, int64_t begin, int64_t end) {
  const Round r = round_of(t.element, t.zero != nullptr);
  const float levels = float((1 << t.element.bits) - 1);
  const Packed meaning{nullptr, nullptr, (const uint8_t*)t.zero, 1, t.element.bits, t.element.mantissa_bits, t.element.exponent_bias};
  float table[256] = {};
  for (int code = 0; code < 1 << t.element.bits; code++) table[code] = code_value(meaning, code);
  for (int64_t row = begin; row < end; row++)
    for (int64_t b = 0; b < t.num_blocks; b++) {
      const int64_t from = row * t.num_columns + b * t.block, group = row * t.num_blocks + b;
      const int64_t count = std::min(t.block, t.num_columns - b * t.block);
      const float scale = t.scale[group], zero = t.zero ? t.zero[group] : 0;
      const float* __restrict weights = t.weights + from;
      float *__restrict steps = t.steps + from, *__restrict errors = t.errors + from;
      if (t.codes) {
        for (int64_t k = 0; k < count; k++) steps[k] = table[t.codes[from + k]] - zero;
      } else {
        for (int64_t k = 0; k < count; k++) {
          steps[k] = weights[k] / scale;
          round_lanes<1>(steps + k, &zero, r, levels);
        }
      }
      for (int64_t k = 0; k < count; k++) errors[k] = weights[k] - steps[k] * scale;
    }
}

FOR_EACH_CPU(left, (const LeftTask& t, int64_t a, int64_t b), (t, a, b), run_left(t, a, b))

void left_rows(const LeftTask& task, int64_t begin, int64_t end) { left(task, begin, end); }
