// The torch side: checks, and the ops' registration.
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <algorithm>

#include "products.h"

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

namespace {

const Tensor* present(const OptionalTensor& t) { return t && t->defined() ? &*t : nullptr; }

Tensor linear(const Tensor& x, const Tensor& codes, const Tensor& scale, const OptionalTensor& zero,
              const OptionalTensor& per_tensor, Spec spec, int64_t num_columns) {
  TORCH_CHECK(codes.dim() == 2, "aqtx: linear takes a matrix");
  check_activations(x, num_columns);
  const Packed w = describe(codes, scale, present(zero), present(per_tensor), spec, num_columns, 0);
  const Tensor dense = x.contiguous();
  const int64_t N = codes.size(0);
  const Rows rows = rows_of(dense, 0, num_columns ? x.numel() / num_columns : 0);
  if (!is_few(rows.type, rows.count)) return many_rows(dense, w, N);
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

// Only experts that have rows are read.
Tensor grouped(const Tensor& x, const Tensor& offsets, at::TensorList parts, at::IntArrayRef specs,
               at::IntArrayRef slots, int64_t num_outputs) {
  const Stack stack = stack_of(parts, specs, slots, num_outputs);
  check_activations(x, x.size(-1));
  const Tensor rows = x.contiguous(), ends = offsets.to(at::kLong).contiguous();
  TORCH_CHECK(x.dim() == 2 && ends.dim() == 1 && size_t(ends.size(0)) <= slots.size(), "aqtx: an expert has no slot");
  Tensor out = at::empty({x.size(0), num_outputs}, x.options());
  for (int64_t expert = 0, start = 0; expert < ends.size(0); expert++) {
    const int64_t end = ends.const_data_ptr<int64_t>()[expert];
    if (end <= start) continue;
    TORCH_CHECK(end <= x.size(0), "aqtx: expert ", expert, " ends at row ", end, " of ", x.size(0));
    const auto [bucket, slot] = stack.find(expert);
    const Rows mine = rows_of(rows, start, end - start);
    if (bucket->is_packed() && is_few(mine.type, mine.count)) {
      few_rows(mine, bucket->matrix(slot, x.size(1)), num_outputs, (char*)out.data_ptr() + start * num_outputs * out.element_size());
    } else if (bucket->is_packed()) {
      const Packed w = bucket->matrix(slot, x.size(1));
      out.narrow(0, start, end - start).copy_(many_rows(rows.narrow(0, start, end - start), w, num_outputs));
    } else {
      const Tensor weight = bucket->codes.select(0, slot).to(x.scalar_type());
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
