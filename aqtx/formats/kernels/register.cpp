// The torch side: checks, scratch memory, threads, and the ops' registration.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include "packed.h"

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

namespace {

// spec: bits (16: a plain tensor), mantissa_bits, exponent_bias, scale kind, block, has zero, has per-tensor scale
using Spec = at::IntArrayRef;
constexpr int64_t kSpecLength = 7;

Packed describe(const Tensor& codes, const Tensor& scale, const Tensor* zero, const Tensor* per_tensor, Spec spec,
                int64_t num_columns, int64_t expert) {
  const int64_t rows = codes.size(-2), blocks = scale.size(-1), row_bytes = codes.size(-1);
  TORCH_CHECK(codes.is_contiguous() && scale.is_contiguous(), "aqtx: packed weights must be contiguous");
  Packed w{};
  w.codes = codes.const_data_ptr<uint8_t>() + expert * rows * row_bytes;
  w.scale = (const uint8_t*)scale.const_data_ptr() + expert * rows * blocks * scale.element_size();
  w.zero = zero ? zero->const_data_ptr<uint8_t>() + expert * rows * blocks : nullptr;
  w.per_tensor = per_tensor ? per_tensor->const_data_ptr<float>()[expert] : 1.0f;
  w.bits = int(spec[0]), w.mantissa_bits = int(spec[1]), w.exponent_bias = int(spec[2]);
  w.scale_kind = ScaleKind(spec[3]);
  w.num_columns = num_columns, w.block = spec[4], w.num_blocks = blocks, w.row_bytes = row_bytes;
  return w;
}

const Tensor* present(const OptionalTensor& t) { return t && t->defined() && t->numel() ? &*t : nullptr; }

// Activations in decoder order, zero-padded; see packed.h.
struct Prepared {
  Tensor values, sums;
  Activations view;
};

Prepared prepare(const Tensor& x, const Packed& w) {
  Prepared p;
  const int64_t M = x.size(0), K = w.num_columns, columns = supers(K) * kSuper;
  const bool fast = has_avx512_bf16() && x.scalar_type() == at::kBFloat16;
  const Tensor floats = fast && !w.zero ? Tensor() : x.to(at::kFloat);
  const float* from = floats.defined() ? floats.const_data_ptr<float>() : nullptr;
  p.values = at::empty({M, columns}, x.options().dtype(fast ? at::kBFloat16 : at::kFloat));
  auto fill = [&](auto* to, const auto* source) {
    for (int64_t m = 0; m < M; m++)
      for (int64_t s = 0; s < columns; s += kSuper)
        for (int64_t part = 0; part < 4; part++) {
          const int64_t k = s + 16 * (part == 1 ? 2 : part == 2 ? 1 : part);
          auto* out = to + m * columns + s + 16 * part;
          for (int64_t j = 0; j < 16; j++) out[j] = k + j < K ? source[m * K + k + j] : 0;
        }
  };
  p.view = {nullptr, nullptr, nullptr, M, columns};
  if (fast) {
    fill((uint16_t*)p.values.data_ptr(), (const uint16_t*)x.const_data_ptr());
    p.view.bf16 = (const uint16_t*)p.values.const_data_ptr();
  } else {
    fill(p.values.data_ptr<float>(), from);
    p.view.f32 = p.values.const_data_ptr<float>();
  }
  if (w.zero) {
    p.sums = at::empty({M, w.num_blocks}, floats.options());
    float* sums = p.sums.data_ptr<float>();
    for (int64_t m = 0; m < M; m++)
      for (int64_t b = 0; b < w.num_blocks; b++) {
        float sum = 0;
        for (int64_t k = b * w.block; k < std::min((b + 1) * w.block, K); k++) sum += from[m * K + k];
        sums[m * w.num_blocks + b] = sum;
      }
    p.view.block_sums = sums;
  }
  return p;
}

int64_t grain(const Packed& w) { return std::max<int64_t>(16, (1 << 18) / std::max<int64_t>(w.num_columns, 1)); }

// y [M, N] = x [M, K] w^T for few rows.
Tensor few_rows(const Tensor& x, const Packed& w, int64_t N) {
  const Prepared p = prepare(x, w);
  Tensor y = at::empty({x.size(0), N}, x.options().dtype(at::kFloat));
  float* to = y.data_ptr<float>();
  at::parallel_for(0, N, grain(w), [&](int64_t a, int64_t b) { linear_rows(w, p.view, to, N, a, b); });
  return x.scalar_type() == at::kFloat ? y : y.to(x.scalar_type());
}

Tensor dequantized(const Packed& w, int64_t N, const at::TensorOptions& options) {
  const bool fast = has_avx512_bf16() && options.dtype() == at::kBFloat16;
  Tensor out = at::empty({N, w.num_columns}, options.dtype(fast ? at::kBFloat16 : at::kFloat));
  at::parallel_for(0, N, grain(w), [&](int64_t a, int64_t b) {
    if (fast) dequantize_rows(w, (uint16_t*)out.data_ptr() + a * w.num_columns, a, b);
    else dequantize_rows(w, out.data_ptr<float>() + a * w.num_columns, a, b);
  });
  return out.to(options.dtype().toScalarType());
}

// Few rows: one fused pass over the packed weight. Many: dequantize and multiply.
constexpr int64_t kFewRows = 32, kFewPortable = 8;

Tensor product(const Tensor& x, const Packed& w, int64_t N) {
  const bool fast = has_avx512_bf16() && x.scalar_type() == at::kBFloat16;
  if (x.size(0) <= (fast ? kFewRows : kFewPortable)) return few_rows(x, w, N);
  return at::linear(x, dequantized(w, N, x.options()));
}

Tensor linear(const Tensor& x, const Tensor& codes, const Tensor& scale, const OptionalTensor& zero,
              const OptionalTensor& per_tensor, Spec spec, int64_t num_columns) {
  TORCH_CHECK(codes.dim() == 2 && x.size(-1) == num_columns && spec.size() == kSpecLength, "aqtx: shapes do not match");
  const Packed w = describe(codes, scale, present(zero), present(per_tensor), spec, num_columns, 0);
  const Tensor rows = x.reshape({-1, num_columns}).contiguous();
  auto shape = x.sizes().vec();
  shape.back() = codes.size(0);
  return product(rows, w, codes.size(0)).view(shape);
}

Tensor dequantize(const Tensor& codes, const Tensor& scale, const OptionalTensor& zero, const OptionalTensor& per_tensor,
                  Spec spec, int64_t num_columns, at::ScalarType dtype) {
  TORCH_CHECK(codes.dim() == 2, "aqtx: dequantize takes a matrix");
  const Packed w = describe(codes, scale, present(zero), present(per_tensor), spec, num_columns, 0);
  return dequantized(w, codes.size(0), codes.options().dtype(dtype));
}

struct Bucket {
  Tensor codes, scale, zero, per_tensor;
  Spec spec;
};

// One bucket per format. `parts` lists its tensors: codes (or the plain weight), scale, and what its spec says it has.
std::vector<Bucket> buckets_of(at::TensorList parts, at::IntArrayRef specs) {
  std::vector<Bucket> found;
  size_t next = 0;
  for (size_t at = 0; at < specs.size(); at += kSpecLength) {
    Bucket b;
    b.spec = specs.slice(at, kSpecLength);
    b.codes = parts[next++];
    if (b.spec[0] != 16) b.scale = parts[next++];
    if (b.spec[5]) b.zero = parts[next++];
    if (b.spec[6]) b.per_tensor = parts[next++];
    found.push_back(b);
  }
  return found;
}

// Only experts that have rows are read.
Tensor grouped(const Tensor& x, const Tensor& offsets, at::TensorList parts, at::IntArrayRef specs,
               at::IntArrayRef slots, int64_t num_outputs) {
  const std::vector<Bucket> buckets = buckets_of(parts, specs);
  const Tensor rows = x.contiguous(), ends = offsets.to(at::kLong).contiguous();
  Tensor out = at::empty({x.size(0), num_outputs}, x.options());
  for (int64_t expert = 0, start = 0; expert < ends.size(0); expert++) {
    const int64_t end = ends.const_data_ptr<int64_t>()[expert];
    if (end <= start) continue;
    int64_t slot = slots[expert];
    const Bucket* b = buckets.data();
    while (slot >= b->codes.size(0)) slot -= (b++)->codes.size(0);
    const Tensor mine = rows.narrow(0, start, end - start);
    Tensor target = out.narrow(0, start, end - start);
    if (b->spec[0] == 16) {
      at::mm_out(target, mine, b->codes.select(0, slot).to(x.scalar_type()).t());
    } else {
      const Tensor* zero = b->zero.defined() ? &b->zero : nullptr;
      const Tensor* per_tensor = b->per_tensor.defined() ? &b->per_tensor : nullptr;
      const Packed w = describe(b->codes, b->scale, zero, per_tensor, b->spec, x.size(1), slot);
      target.copy_(product(mine, w, num_outputs));
    }
    start = end;
  }
  return out;
}

std::tuple<Tensor, Tensor> quantize_mx(const Tensor& weight, Spec spec, double largest, int64_t rule, int64_t row_bytes) {
  const Tensor rows = weight.contiguous();
  const int64_t K = rows.size(-1), N = K ? rows.numel() / K : 0;
  auto shape = rows.sizes().vec();
  const auto options = rows.options().dtype(at::kByte);
  shape.back() = row_bytes;
  Tensor codes = at::empty(shape, options);
  shape.back() = (K + 31) / 32;
  Tensor scale = at::empty(shape, options);
  const auto type = rows.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf, "aqtx: float weights only");
  const MxTask task{rows.const_data_ptr(), type == at::kFloat ? 0 : type == at::kBFloat16 ? 1 : 2,
                    codes.data_ptr<uint8_t>(), scale.data_ptr<uint8_t>(), K, row_bytes,
                    int(spec[0]), int(spec[1]), int(spec[2]), float(largest), int(rule)};
  at::parallel_for(0, N, std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(K, 1)),
                   [&](int64_t a, int64_t b) { quantize_mx_rows(task, a, b); });
  return {codes, scale};
}

bool fast() { return has_avx512_bf16(); }

}  // namespace

TORCH_LIBRARY(aqtx_cpu, m) {
  m.def("linear(Tensor x, Tensor codes, Tensor scale, Tensor? zero, Tensor? per_tensor, int[] spec, int num_columns) -> Tensor");
  m.def("dequantize(Tensor codes, Tensor scale, Tensor? zero, Tensor? per_tensor, int[] spec, int num_columns, ScalarType dtype) -> Tensor");
  m.def("grouped(Tensor x, Tensor offsets, Tensor[] parts, int[] specs, int[] slots, int num_outputs) -> Tensor");
  m.def("quantize_mx(Tensor weight, int[] spec, float largest, int rule, int row_bytes) -> (Tensor, Tensor)");
  m.def("fast() -> bool", fast);
}
TORCH_LIBRARY_IMPL(aqtx_cpu, CPU, m) {
  m.impl("linear", linear);
  m.impl("dequantize", dequantize);
  m.impl("grouped", grouped);
  m.impl("quantize_mx", quantize_mx);
}
