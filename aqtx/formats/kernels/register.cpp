// The torch side: checks, scratch memory, threads, and the ops' registration.
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>
#include <numeric>

#include "checks.h"
#include "rounded.h"

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

namespace {

Packed describe(const Tensor& codes, const Tensor& scale, const Tensor* zero, const Tensor* per_tensor, Spec spec,
                int64_t num_columns, int64_t expert) {
  check_packed(codes, scale, zero, per_tensor, spec, num_columns);
  TORCH_CHECK(0 <= expert && expert < (codes.dim() == 3 ? codes.size(0) : 1), "aqtx: no expert ", expert);
  const int64_t rows = codes.size(-2), blocks = scale.size(-1), row_bytes = codes.size(-1);
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

const Tensor* present(const OptionalTensor& t) { return t && t->defined() ? &*t : nullptr; }

// Contiguous activations [count, K] of any float type.
struct Rows {
  const char* data;
  at::ScalarType type;
  int64_t count;
};

Rows rows_of(const Tensor& x, int64_t start, int64_t count) {
  return {(const char*)x.const_data_ptr() + start * x.size(-1) * x.element_size(), x.scalar_type(), count};
}

std::vector<float> as_floats(const Rows& x, int64_t columns) {
  std::vector<float> values(x.count * columns);
  auto copy = [&](auto* from) { std::copy(from, from + values.size(), values.begin()); };
  if (x.type == at::kFloat) copy((const float*)x.data);
  else if (x.type == at::kBFloat16) copy((const at::BFloat16*)x.data);
  else if (x.type == at::kHalf) copy((const at::Half*)x.data);
  else TORCH_CHECK(false, "aqtx: activations must be float32, bfloat16 or float16");
  return values;
}

// Activations in decoder order, zero-padded; see packed.h.
struct Prepared {
  Tensor values;
  std::vector<float> sums;
  Activations view;
};

bool is_fast(at::ScalarType type) { return cpu() == Cpu::avx512_bf16 && type == at::kBFloat16; }

Prepared prepare(const Rows& x, const Packed& w) {
  Prepared p;
  const bool fast = is_fast(x.type);
  const int64_t M = x.count, K = w.num_columns, columns = ordered_columns(w, fast);
  const std::vector<float> floats = fast && !w.zero ? std::vector<float>() : as_floats(x, K);
  p.values = at::detail::empty_cpu({M, columns}, fast ? at::kBFloat16 : at::kFloat);
  p.view = {nullptr, nullptr, nullptr, M, columns};
  if (fast) {
    order_activations((const uint16_t*)x.data, M, w, (uint16_t*)p.values.data_ptr());
    p.view.bf16 = (const uint16_t*)p.values.const_data_ptr();
  } else {
    order_activations(floats.data(), M, w, p.values.data_ptr<float>());
    p.view.f32 = p.values.const_data_ptr<float>();
  }
  if (w.zero) {
    p.sums.resize(M * w.num_blocks);
    for (int64_t m = 0; m < M; m++)
      for (int64_t b = 0; b < w.num_blocks; b++) {
        const float* from = floats.data() + m * K + b * w.block;
        p.sums[m * w.num_blocks + b] = std::accumulate(from, from + std::min(w.block, K - b * w.block), 0.0f);
      }
    p.view.block_sums = p.sums.data();
  }
  return p;
}

int64_t grain(const Packed& w) { return std::max<int64_t>(16, (1 << 18) / std::max<int64_t>(w.num_columns, 1)); }

// y [M, N] = x [M, K] w^T for few rows, in x's type.
void few_rows(const Rows& x, const Packed& w, int64_t N, void* y) {
  Rounded whole;
  const bool is_rounded = !is_fast(x.type) && x.type != at::kFloat && can_round(w) &&
                          round_activations(as_floats(x, w.num_columns).data(), x.count, w, 16, whole);
  const Prepared p = is_rounded ? Prepared{} : prepare(x, w);
  const std::unique_ptr<float[]> scratch(x.type == at::kFloat ? nullptr : new float[x.count * N]);
  float* sums = scratch ? scratch.get() : (float*)y;
  at::parallel_for(0, N, grain(w), [&](int64_t a, int64_t b) {
    if (is_rounded) rounded_rows(w, whole, sums, N, a, b);
    else linear_rows(w, p.view, sums, N, a, b);
    for (int64_t m = 0; m < x.count; m++) {
      const float* from = sums + m * N;
      if (x.type == at::kBFloat16) round_to_bf16(from + a, b - a, (uint16_t*)y + m * N + a);
      else if (x.type == at::kHalf) std::copy(from + a, from + b, (at::Half*)y + m * N + a);
    }
  });
}

// Rows start..start + out.size(0) of a weight into `out`, bf16 or float32; none of it beyond `largest`.
void dequantize_into(const Tensor& out, const Packed& w, int64_t start, float largest) {
  at::parallel_for(0, out.size(0), grain(w), [&](int64_t a, int64_t b) {
    if (out.scalar_type() == at::kFloat)
      dequantize_rows(w, out.data_ptr<float>() + a * w.num_columns, start + a, start + b, largest);
    else dequantize_rows(w, (uint16_t*)out.data_ptr() + a * w.num_columns, start + a, start + b);
  });
}

float largest_of(at::ScalarType type) { return type == at::kHalf ? 65504.0f : type == at::kBFloat16 ? kLargestBf16 : kLargestFloat; }

Tensor dequantized(const Packed& w, int64_t N, const at::TensorOptions& options) {
  const at::ScalarType type = options.dtype().toScalarType();
  const Tensor out = at::empty({N, w.num_columns}, options.dtype(is_fast(type) ? type : at::kFloat));
  dequantize_into(out, w, 0, largest_of(type));
  return out.to(type);
}

// Few rows: one fused pass over the packed weight. Many: dequantize and multiply, in panels that stay in the
// cache and are small enough for the allocator to keep: fresh pages for a whole weight cost a third of the product.
constexpr int64_t kFewRows = 32, kFewPortable = 8, kPanel = 1 << 19;

bool is_few(const Rows& x) { return x.count <= (is_fast(x.type) ? kFewRows : kFewPortable); }

// What is multiplied after dequantizing: 16 bits where the processor has products of them, else float32, which is faster.
at::ScalarType dense_type(at::ScalarType type) { return is_fast(type) ? type : at::kFloat; }

Tensor many_rows(const Tensor& x, const Packed& w, int64_t N) {
  const int64_t step = std::max<int64_t>(64, kPanel / std::max<int64_t>(w.num_columns, 1));
  const Tensor rows = x.to(dense_type(x.scalar_type()));
  if (N <= step) return at::linear(rows, dequantized(w, N, rows.options())).to(x.scalar_type());
  auto shape = x.sizes().vec();
  shape.back() = N;
  const Tensor y = at::detail::empty_cpu(shape, x.scalar_type()), space = at::empty({step, w.num_columns}, rows.options());
  for (int64_t n = 0; n < N; n += step) {
    const Tensor panel = space.narrow(0, 0, std::min(step, N - n));
    dequantize_into(panel, w, n, largest_of(rows.scalar_type()));
    y.narrow(-1, n, panel.size(0)).copy_(at::linear(rows, panel));
  }
  return y;
}

Tensor linear(const Tensor& x, const Tensor& codes, const Tensor& scale, const OptionalTensor& zero,
              const OptionalTensor& per_tensor, Spec spec, int64_t num_columns) {
  TORCH_CHECK(codes.dim() == 2, "aqtx: linear takes a matrix");
  check_activations(x, num_columns);
  const Packed w = describe(codes, scale, present(zero), present(per_tensor), spec, num_columns, 0);
  const Tensor dense = x.contiguous();
  const int64_t N = codes.size(0);
  const Rows rows = rows_of(dense, 0, num_columns ? x.numel() / num_columns : 0);
  if (!is_few(rows)) return many_rows(dense, w, N);
  auto shape = x.sizes().vec();
  shape.back() = N;
  Tensor y = at::detail::empty_cpu(shape, x.scalar_type());
  few_rows(rows, w, N, y.data_ptr());
  return y;
}

Tensor dequantize(const Tensor& codes, const Tensor& scale, const OptionalTensor& zero, const OptionalTensor& per_tensor,
                  Spec spec, int64_t num_columns, at::ScalarType dtype) {
  TORCH_CHECK(codes.dim() == 2 && at::isFloatingType(dtype), "aqtx: dequantize takes a matrix and a float dtype");
  const Packed w = describe(codes, scale, present(zero), present(per_tensor), spec, num_columns, 0);
  return dequantized(w, codes.size(0), codes.options().dtype(dtype));
}

struct Bucket {
  Tensor codes, scale, zero, per_tensor;
  Spec spec;
};

// One bucket per format. `parts` lists its tensors: codes (or the plain weight), scale, and what its spec says it has.
std::vector<Bucket> buckets_of(at::TensorList parts, at::IntArrayRef specs, int64_t num_outputs) {
  std::vector<Bucket> found;
  size_t next = 0, wanted = 0;
  TORCH_CHECK(specs.size() % kSpecLength == 0, "aqtx: a format takes ", kSpecLength, " numbers");
  for (size_t at = 0; at < specs.size(); at += kSpecLength)
    wanted += 1 + (specs[at] != kPlain) + (specs[at + 5] != 0) + (specs[at + 6] != 0);
  TORCH_CHECK(parts.size() == wanted, "aqtx: the formats have ", wanted, " parts, not ", parts.size());
  for (size_t at = 0; at < specs.size(); at += kSpecLength) {
    Bucket b;
    b.spec = specs.slice(at, kSpecLength);
    b.codes = parts[next++];
    if (b.spec[0] != kPlain) b.scale = parts[next++];
    if (b.spec[5]) b.zero = parts[next++];
    if (b.spec[6]) b.per_tensor = parts[next++];
    TORCH_CHECK(b.codes.dim() == 3 && b.codes.size(1) == num_outputs, "aqtx: experts must be [E, ", num_outputs, ", ..]");
    found.push_back(b);
  }
  return found;
}

// Only experts that have rows are read.
Tensor grouped(const Tensor& x, const Tensor& offsets, at::TensorList parts, at::IntArrayRef specs,
               at::IntArrayRef slots, int64_t num_outputs) {
  const std::vector<Bucket> buckets = buckets_of(parts, specs, num_outputs);
  check_activations(x, x.size(-1));
  const Tensor rows = x.contiguous(), ends = offsets.to(at::kLong).contiguous();
  TORCH_CHECK(x.dim() == 2 && ends.dim() == 1 && size_t(ends.size(0)) <= slots.size(), "aqtx: an expert has no slot");
  Tensor out = at::empty({x.size(0), num_outputs}, x.options());
  for (int64_t expert = 0, start = 0; expert < ends.size(0); expert++) {
    const int64_t end = ends.const_data_ptr<int64_t>()[expert];
    if (end <= start) continue;
    TORCH_CHECK(end <= x.size(0) && slots[expert] >= 0, "aqtx: expert ", expert, " ends at row ", end, " of ", x.size(0));
    int64_t slot = slots[expert];
    const Bucket *b = buckets.data(), *last = b + buckets.size();
    while (b < last && slot >= b->codes.size(0)) slot -= (b++)->codes.size(0);
    TORCH_CHECK(b < last, "aqtx: expert ", expert, " has slot ", slots[expert], ", beyond the stack");
    const bool packed = b->spec[0] != kPlain;
    Packed w{};
    if (packed) {
      const Tensor* zero = b->zero.defined() ? &b->zero : nullptr;
      const Tensor* per_tensor = b->per_tensor.defined() ? &b->per_tensor : nullptr;
      w = describe(b->codes, b->scale, zero, per_tensor, b->spec, x.size(1), slot);
    }
    const Rows mine = rows_of(rows, start, end - start);
    if (packed && is_few(mine)) {
      few_rows(mine, w, num_outputs, (char*)out.data_ptr() + start * num_outputs * out.element_size());
    } else if (packed) {
      out.narrow(0, start, end - start).copy_(many_rows(rows.narrow(0, start, end - start), w, num_outputs));
    } else {
      const Tensor weight = b->codes.select(0, slot).to(x.scalar_type());
      Tensor target = out.narrow(0, start, end - start);
      at::mm_out(target, rows.narrow(0, start, end - start), weight.t());
    }
    start = end;
  }
  return out;
}

std::tuple<Tensor, Tensor> quantize_mx(const Tensor& weight, Spec spec, double largest, int64_t rule, int64_t row_bytes) {
  TORCH_CHECK(weight.dim() > 0 && weight.device().is_cpu(), "aqtx: a weight on the CPU");
  check_spec(spec);
  const Tensor rows = weight.contiguous();
  const int64_t K = rows.size(-1), N = K ? rows.numel() / K : 0;
  auto shape = rows.sizes().vec();
  TORCH_CHECK(spec[1] > 0 && spec[3] == 0 && row_bytes == row_bytes_of(K, spec[0]), "aqtx: no MX format, or no row of it");
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

int64_t level() { return int64_t(cpu()); }

}  // namespace

TORCH_LIBRARY(aqtx_cpu, m) {
  m.def("linear(Tensor x, Tensor codes, Tensor scale, Tensor? zero, Tensor? per_tensor, int[] spec, int num_columns) -> Tensor");
  m.def("dequantize(Tensor codes, Tensor scale, Tensor? zero, Tensor? per_tensor, int[] spec, int num_columns, ScalarType dtype) -> Tensor");
  m.def("grouped(Tensor x, Tensor offsets, Tensor[] parts, int[] specs, int[] slots, int num_outputs) -> Tensor");
  m.def("quantize_mx(Tensor weight, int[] spec, float largest, int rule, int row_bytes) -> (Tensor, Tensor)");
  m.def("cpu() -> int", level);  // as in packed.h: 0 baseline, 1 avx2, 2 avx512, 3 avx512_bf16
}
TORCH_LIBRARY_IMPL(aqtx_cpu, CPU, m) {
  m.impl("linear", linear);
  m.impl("dequantize", dequantize);
  m.impl("grouped", grouped);
  m.impl("quantize_mx", quantize_mx);
}
