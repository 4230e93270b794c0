// What the ops are given, checked before any of it is read as raw memory: sizes, dtypes, contiguity, devices.
#pragma once
#include <ATen/core/Tensor.h>

#include "packed.h"

// spec: bits (16: a plain tensor), mantissa_bits, exponent_bias, scale kind, block, has zero, has per-tensor scale
using Spec = at::IntArrayRef;
constexpr int64_t kSpecLength = 7;
constexpr int64_t kPlain = 16;

inline int64_t blocks_of(int64_t columns, int64_t block) { return (columns + block - 1) / block; }

// Bytes of a row's codes; see packing.py.
inline int64_t row_bytes_of(int64_t columns, int64_t bits) {
  const int64_t narrowest = bits == 3 || bits == 5 ? 1 : bits == 6 ? 2 : bits, span = 16 * 8 / narrowest;
  return blocks_of(columns, span) * span * bits / 8;
}

inline void check_plain(const at::Tensor& t, at::ScalarType type, at::IntArrayRef sizes, const char* name) {
  TORCH_CHECK(t.device().is_cpu() && t.scalar_type() == type && t.is_contiguous(), "aqtx: ", name, " must be contiguous ",
              type, " on the CPU, not ", t.scalar_type(), " with strides ", t.strides());
  TORCH_CHECK(t.sizes() == sizes, "aqtx: ", name, " must be ", sizes, ", not ", t.sizes());
}

inline void check_spec(Spec spec) {
  TORCH_CHECK(spec.size() == kSpecLength, "aqtx: a format takes ", kSpecLength, " numbers");
  const int64_t bits = spec[0], kind = spec[3], block = spec[4];
  const bool known = bits == 2 || bits == 3 || bits == 4 || bits == 5 || bits == 6 || bits == 8;
  TORCH_CHECK(known && spec[1] >= 0 && spec[1] < bits && kind >= 0 && kind <= 2 && block > 0, "aqtx: no format ", spec);
}

// Parts of one matrix or of a stack of them; `zero` and `per_tensor` are null where they are not given.
inline void check_packed(const at::Tensor& codes, const at::Tensor& scale, const at::Tensor* zero,
                         const at::Tensor* per_tensor, Spec spec, int64_t num_columns) {
  check_spec(spec);
  const int64_t dims = codes.dim(), block = spec[4];
  TORCH_CHECK((dims == 2 || dims == 3) && num_columns > 0, "aqtx: codes must be [N, bytes] or [E, N, bytes]");
  auto sizes = codes.sizes().vec();
  sizes.back() = row_bytes_of(num_columns, spec[0]);
  check_plain(codes, at::kByte, sizes, "codes");
  const int64_t num_blocks = sizes.back() = blocks_of(num_columns, block);
  TORCH_CHECK(num_blocks == 1 || block == 16 || block == 32 || block == 64 || block == 128, "aqtx: no blocks of ", block);
  check_plain(scale, spec[3] == int64_t(ScaleKind::bf16) ? at::kBFloat16 : at::kByte, sizes, "scales");
  TORCH_CHECK((zero != nullptr) == (spec[5] != 0), "aqtx: zero points are missing, or there should be none");
  if (zero) check_plain(*zero, at::kByte, sizes, "zero points");
  TORCH_CHECK((per_tensor != nullptr) == (spec[6] != 0), "aqtx: scales per matrix are missing, or there should be none");
  if (!per_tensor) return;
  TORCH_CHECK(per_tensor->numel() == (dims == 3 ? codes.size(0) : 1), "aqtx: each matrix has one scale per matrix");
  check_plain(*per_tensor, at::kFloat, per_tensor->sizes(), "scales per matrix");
}

inline void check_activations(const at::Tensor& x, int64_t num_columns) {
  TORCH_CHECK(x.dim() > 0 && x.size(-1) == num_columns, "aqtx: activations of ", num_columns, " columns, not ", x.sizes());
  const auto type = x.scalar_type();
  TORCH_CHECK(x.device().is_cpu() && (type == at::kFloat || type == at::kBFloat16 || type == at::kHalf),
              "aqtx: activations must be float32, bfloat16 or float16 on the CPU");
}

// Of the ops of GPTQ: float32 [E, K, N] or [E, N, K], scales and zero points with blocks in the place of columns.
struct GridTensors {
  const at::Tensor &scale, *zero;
};

inline void check_grid(const GridTensors& grid, at::IntArrayRef sizes, Spec spec) {
  check_spec(spec);
  TORCH_CHECK((grid.zero != nullptr) == (spec[5] != 0), "aqtx: zero points are missing, or there should be none");
  check_plain(grid.scale, at::kFloat, sizes, "scales");
  if (grid.zero) check_plain(*grid.zero, at::kFloat, sizes, "zero points");
}

struct ColumnsTensors {
  const at::Tensor &values, &weights, &errors, &codes, &ratios, &penalties, &bounds;
  const at::Tensor* blocks;
};

inline void check_columns(const ColumnsTensors& t, const GridTensors& grid, Spec spec, int64_t low, int64_t high) {
  TORCH_CHECK(t.values.dim() == 3, "aqtx: float32 [E, K, N] only");
  const int64_t E = t.values.size(0), K = t.values.size(1), N = t.values.size(2);
  check_spec(spec);
  const int64_t G = blocks_of(K, spec[4]);
  check_grid(grid, {E, G, N}, spec);
  for (const at::Tensor* x : {&t.values, &t.weights, &t.errors}) check_plain(*x, at::kFloat, {E, K, N}, "columns");
  check_plain(t.codes, at::kByte, {E, K, N}, "codes");
  check_plain(t.penalties, at::kFloat, {E, K}, "penalties");
  check_plain(t.bounds, at::kFloat, {E, N}, "bounds");
  check_plain(t.ratios, at::kFloat, {E, K, K}, "ratios");
  TORCH_CHECK(0 <= low && low <= high && high <= K, "aqtx: no columns from ", low, " to ", high);
  if (!t.blocks) return;
  check_plain(*t.blocks, at::kLong, {E, K}, "block numbers");
  const int64_t* number = t.blocks->const_data_ptr<int64_t>();
  for (int64_t i = 0; i < E * K; i++) TORCH_CHECK(number[i] >= 0 && number[i] < G, "aqtx: no block ", number[i]);
}

struct DescentTensors {
  const at::Tensor &gradient, &weights, &errors, &codes, &hessian, &inverse, &objective;
};

inline void check_descent(const DescentTensors& t, const GridTensors& grid, Spec spec) {
  TORCH_CHECK(t.weights.dim() == 3, "aqtx: float32 [E, N, K] only");
  const int64_t E = t.weights.size(0), N = t.weights.size(1), K = t.weights.size(2);
  check_spec(spec);
  check_grid(grid, {E, N, blocks_of(K, spec[4])}, spec);
  for (const at::Tensor* x : {&t.gradient, &t.weights, &t.errors}) check_plain(*x, at::kFloat, {E, N, K}, "rows");
  check_plain(t.codes, at::kByte, {E, N, K}, "codes");
  check_plain(t.hessian, at::kFloat, {E, K, K}, "Hessians");
  check_plain(t.inverse, at::kFloat, {E, K}, "the diagonal's inverse");
  check_plain(t.objective, at::kFloat, {E, N}, "objectives");
}

inline void check_left(const at::Tensor& weights, const at::Tensor* codes, const GridTensors& grid, Spec spec) {
  TORCH_CHECK(weights.dim() == 3, "aqtx: float32 [E, N, K] only");
  const int64_t E = weights.size(0), N = weights.size(1), K = weights.size(2);
  check_spec(spec);
  check_grid(grid, {E, N, blocks_of(K, spec[4])}, spec);
  check_plain(weights, at::kFloat, {E, N, K}, "rows");
  if (codes) check_plain(*codes, at::kByte, {E, N, K}, "codes");
}

inline void check_runs(const at::Tensor& values, const at::Tensor& importance, const GridTensors& grid, Spec spec) {
  TORCH_CHECK(values.dim() == 2 && importance.dim() == 2 && grid.scale.dim() == 2, "aqtx: float32 matrices only");
  const int64_t R = values.size(0), B = values.size(1), C = grid.scale.size(0);
  TORCH_CHECK(B % 16 == 0, "aqtx: runs in multiples of 16, not of ", B);
  TORCH_CHECK(C > 0 && (R == 0 || importance.size(0) > 0), "aqtx: no candidates, or no importance");
  check_grid(grid, {C, R}, spec);
  check_plain(values, at::kFloat, {R, B}, "runs");
  check_plain(importance, at::kFloat, {importance.size(0), B}, "importance");
}
