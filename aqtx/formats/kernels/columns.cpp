// GPTQ within a leaf of a few columns: each column is rounded and its error made good by the leaf's later ones.
//
// Matrices lie columns first. A tile of 64 rows of one expert is finished while it lies in the cache, 64 lanes a
// column. The arithmetic is that of gptq_columns.py and elements.py, addition for addition and without
// contraction, so that both give the same bits.
#include "lanes.h"

static INLINE void tile(const ColumnsTask& t, int64_t expert, int64_t first, const float* ratios, float* scratch) {
  const int64_t B = t.high - t.low, K = t.num_columns, N = t.num_rows, rows = N - first < kLanes ? N - first : kLanes;
  const Round r = round_of(t.element, t.zero != nullptr);
  const float levels = float((1 << t.element.bits) - 1);
  float *v = scratch, *e = scratch + B * kLanes;
  alignas(64) float scale[kLanes], zero[kLanes], sum[kLanes], q[kLanes];
  alignas(64) uint8_t code[kLanes];
  for (int l = 0; l < kLanes; l++) scale[l] = 1, zero[l] = 0, sum[l] = 0;
  const int64_t origin = (expert * K + t.low) * N + first;
  if (rows < kLanes) for (int64_t i = 0; i < 2 * B * kLanes; i++) scratch[i] = 0;
  for (int64_t c = 0; c < B; c++) {
    copy(v + c * kLanes, t.values + origin + c * N, rows);
    copy(e + c * kLanes, t.weights + origin + c * N, rows);
  }
  int64_t block = -1;
  for (int64_t c = 0; c < B; c++) {
    const int64_t next = t.blocks ? t.blocks[expert * K + t.low + c] : (t.low + c) / t.block;
    if (next != block) {
      block = next;
      const int64_t group = (expert * t.num_blocks + block) * N + first;
      copy(scale, t.scale + group, rows);
      if (t.zero) copy(zero, t.zero + group, rows);
    }
    float *mine = v + c * kLanes, *error = e + c * kLanes;  // `error` holds the weights until they are rounded
    receive(mine, e, ratios + c * B, c);
    for (int l = 0; l < kLanes; l++) q[l] = mine[l] / scale[l];
    round_lanes(q, zero, r, levels);
    codes_of(q, zero, r, t.element, code);
    const float penalty = t.penalties[expert * K + t.low + c];
    for (int l = 0; l < kLanes; l++) {
      const float rounded = q[l] * scale[l], step = mine[l] - rounded;
      error[l] -= rounded;
      sum[l] += penalty * (step * step);
    }
    copy(t.errors + origin + c * N, error, rows);
    copy(t.codes + origin + c * N, code, rows);
  }
  for (int64_t l = 0; l < rows; l++) t.bounds[expert * N + first + l] += sum[l];
}

static INLINE void run_tiles(const ColumnsTask& t, int64_t begin, int64_t end) {
  const int64_t B = t.high - t.low, K = t.num_columns, tiles = (t.num_rows + kLanes - 1) / kLanes;
  std::vector<float> ratios(B * B), space(2 * B * kLanes + kWidth);
  float* scratch = space.data() + (kWidth - (uintptr_t(space.data()) / 4) % kWidth) % kWidth;  // whole cache lines
  int64_t loaded = -1;
  for (int64_t i = begin; i < end; i++) {
    const int64_t expert = i / tiles;
    if (expert != loaded) {  // transposed: what a column receives lies together
      loaded = expert;
      const float* from = t.ratios + (expert * K + t.low) * K + t.low;
      for (int64_t row = 0; row < B; row++)
        for (int64_t c = 0; c < B; c++)
          ratios[c * B + row] = from[row * K + c];
    }
    tile(t, expert, i % tiles * kLanes, ratios.data(), scratch);
  }
}

FOR_EACH_CPU(run, (const ColumnsTask& t, int64_t a, int64_t b), (t, a, b), run_tiles(t, a, b))

int64_t column_tiles(int64_t num_rows) { return (num_rows + kLanes - 1) / kLanes; }
void round_columns(const ColumnsTask& task, int64_t begin, int64_t end) { run(task, begin, end); }
