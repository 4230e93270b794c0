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

struct ColumnsTensors {
  const at::Tensor &values, &weights, &errors, &nearest, &codes, &ratios, &scale, &penalties, &shares, &bounds;
  const at::Tensor *zero, *blocks;
};

inline void check_columns(const ColumnsTensors& t, Spec spec, int64_t low, int64_t high) {
  check_spec(spec);
  TORCH_CHECK(t.values.dim() == 3 && t.scale.dim() == 3, "aqtx: float32 [E, K, N] only");
  const int64_t E = t.values.size(0), K = t.values.size(1), N = t.values.size(2), G = t.scale.size(1);
  for (const at::Tensor* x : {&t.values, &t.weights, &t.errors, &t.nearest}) check_plain(*x, at::kFloat, {E, K, N}, "columns");
  check_plain(t.codes, at::kByte, {E, K, N}, "codes");
  check_plain(t.scale, at::kFloat, {E, G, N}, "scales");
  if (t.zero) check_plain(*t.zero, at::kFloat, {E, G, N}, "zero points");
  check_plain(t.penalties, at::kFloat, {E, K}, "penalties");
  check_plain(t.shares, at::kFloat, {E}, "shares");
  check_plain(t.bounds, at::kFloat, {E, N}, "bounds");
  TORCH_CHECK(t.ratios.scalar_type() == at::kFloat && t.ratios.sizes() == at::IntArrayRef({E, K, K}), "aqtx: float32 [E, K, K] only");
  TORCH_CHECK(0 <= low && low <= high && high <= K, "aqtx: no columns from ", low, " to ", high);
  TORCH_CHECK(blocks_of(K, spec[4]) == G, "aqtx: ", G, " scales for ", K, " columns in blocks of ", spec[4]);
  if (!t.blocks) return;
  check_plain(*t.blocks, at::kLong, {E, K}, "block numbers");
  const int64_t* number = t.blocks->const_data_ptr<int64_t>();
  for (int64_t i = 0; i < E * K; i++) TORCH_CHECK(number[i] >= 0 && number[i] < G, "aqtx: no block ", number[i]);
}
