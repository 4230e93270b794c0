// One sweep of coordinate descent within a leaf of a few columns, see gptq_sweeps.py: the same bits as there.
//
// Matrices lie columns first. A tile of 64 rows of one expert is finished while it lies in the cache, 64 lanes a column.
#include "lanes.h"

static INLINE void sweep_tile(const SweepTask& t, int64_t expert, int64_t first, const float* hessian, float* scratch) {
  const int64_t B = t.high - t.low, K = t.num_columns, N = t.num_rows, rows = N - first < kLanes ? N - first : kLanes;
  const Round r = round_of(t.element, t.zero != nullptr);
  const float levels = float((1 << t.element.bits) - 1);
  float *g = scratch, *moved = scratch + B * kLanes;
  alignas(64) float scale[kLanes], zero[kLanes], q[kLanes], weight[kLanes], error[kLanes];
  alignas(64) uint8_t code[kLanes];
  for (int l = 0; l < kLanes; l++) scale[l] = 1, zero[l] = 0, weight[l] = 0, error[l] = 0;
  const int64_t origin = (expert * K + t.low) * N + first;
  if (rows < kLanes) for (int64_t i = 0; i < 2 * B * kLanes; i++) scratch[i] = 0;
  for (int64_t c = 0; c < B; c++) copy(g + c * kLanes, t.gradient + origin + c * N, rows);
  int64_t block = -1;
  for (int64_t c = 0; c < B; c++) {
    if ((t.low + c) / t.block != block) {
      block = (t.low + c) / t.block;
      const int64_t group = (expert * t.num_blocks + block) * N + first;
      copy(scale, t.scale + group, rows);
      if (t.zero) copy(zero, t.zero + group, rows);
    }
    copy(weight, t.weights + origin + c * N, rows);
    copy(error, t.errors + origin + c * N, rows);
    float *mine = g + c * kLanes, *step = moved + c * kLanes;
    receive(mine, moved, hessian + c * B, c);
    const float inverse = t.inverse[expert * K + t.low + c];
    for (int l = 0; l < kLanes; l++) q[l] = (weight[l] - (error[l] - mine[l] * inverse)) / scale[l];
    round_lanes(q, zero, r, levels);
    codes_of(q, zero, r, t.element, code);
    for (int l = 0; l < kLanes; l++) {
      const float now = weight[l] - q[l] * scale[l];
      step[l] = now - error[l];
      error[l] = now;
    }
    copy(t.errors + origin + c * N, error, rows);
    copy(t.moved + origin + c * N, step, rows);
    copy(t.codes + origin + c * N, code, rows);
  }
  for (int64_t c = 0; c < B; c++) {  // and what later columns did to earlier ones
    receive(g + c * kLanes, moved + c * kLanes, hessian + c * B + c, B - c);
    copy(t.gradient + origin + c * N, g + c * kLanes, rows);
  }
}

static INLINE void run_sweep(const SweepTask& t, int64_t begin, int64_t end) {
  const int64_t B = t.high - t.low, K = t.num_columns, tiles = (t.num_rows + kLanes - 1) / kLanes;
  std::vector<float> hessian(B * B), space(2 * B * kLanes + kWidth);
  float* scratch = space.data() + (kWidth - (uintptr_t(space.data()) / 4) % kWidth) % kWidth;  // whole cache lines
  int64_t loaded = -1;
  for (int64_t i = begin; i < end; i++) {
    const int64_t expert = i / tiles;
    if (expert != loaded) {
      loaded = expert;
      const float* from = t.hessian + (expert * K + t.low) * K + t.low;
      for (int64_t c = 0; c < B; c++) __builtin_memcpy(hessian.data() + c * B, from + c * K, 4 * B);
    }
    sweep_tile(t, expert, i % tiles * kLanes, hessian.data(), scratch);
  }
}

FOR_EACH_CPU(sweep, (const SweepTask& t, int64_t a, int64_t b), (t, a, b), run_sweep(t, a, b))

void sweep_columns(const SweepTask& task, int64_t begin, int64_t end) { sweep(task, begin, end); }
