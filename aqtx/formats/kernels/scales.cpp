// The scale of least weighted squared error among candidates, see scale_search.py: the same bits as there.
//
// Squares are summed in 16 lanes, and the lanes in halves, which is an order that plain torch can follow.
#include "lanes.h"

static INLINE float lane_sum(float* sum) {
  for (int half = 8; half > 0; half /= 2)
    for (int l = 0; l < half; l++) sum[l] += sum[l + half];
  return sum[0];
}

static INLINE float as_bf16(float v) {
  const uint32_t bits = as_bits(v);
  return as_float((bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u);
}

static INLINE void round_some(float* v, float zero, const Round& r, float levels) {
  if (r.is_float) {
    for (int l = 0; l < kWidth; l++) {
      const float x = clamp(v[l], r.low, r.high);
      const float power = as_float(as_bits(x) & 0x7f800000);
      const float magic = (power > r.smallest ? power : r.smallest) * r.to_magic;
      v[l] = (x + magic) - magic;
    }
    return;
  }
  constexpr float magic = 12582912.0f;  // 1.5 * 2^23
  const float low = r.has_zero ? -zero : r.low, high = r.has_zero ? levels - zero : r.high;
  for (int l = 0; l < kWidth; l++) v[l] = (clamp(v[l], low, high) + magic) - magic;
}

template <bool kBf16>
static INLINE float error_of(const ScaleTask& t, const float* values, const float* importance, float scale, float zero,
                             const Round& r, float levels) {
  alignas(64) float sum[kWidth] = {}, q[kWidth];
  for (int64_t at = 0; at < t.padded; at += kWidth) {
    for (int l = 0; l < kWidth; l++) q[l] = values[at + l] / scale;
    round_some(q, zero, r, levels);
    for (int l = 0; l < kWidth; l++) {
      const float value = q[l] * scale, off = (kBf16 ? as_bf16(value) : value) - values[at + l];
      sum[l] += (off * off) * importance[at + l];
    }
  }
  return lane_sum(sum);
}

static INLINE void run_scales(const ScaleTask& t, int64_t begin, int64_t end) {
  const Round r = round_of(t.element, t.zero != nullptr);
  const float levels = float((1 << t.element.bits) - 1);
  for (int64_t run = begin; run < end; run++) {
    const float *values = t.values + run * t.padded, *importance = t.importance + run % t.num_weights * t.padded;
    float least = 0;
    int64_t best = 0;
    for (int64_t c = 0; c < t.num_candidates; c++) {
      const float scale = t.scale[c * t.num_runs + run], zero = t.zero ? t.zero[c * t.num_runs + run] : 0;
      const float error = t.to_bf16 ? error_of<true>(t, values, importance, scale, zero, r, levels)
                                    : error_of<false>(t, values, importance, scale, zero, r, levels);
      if (c == 0 || error < least) least = error, best = c;
    }
    t.best[run] = best;
  }
}

FOR_EACH_CPU(search, (const ScaleTask& t, int64_t a, int64_t b), (t, a, b), run_scales(t, a, b))

void best_scales(const ScaleTask& task, int64_t begin, int64_t end) { search(task, begin, end); }
