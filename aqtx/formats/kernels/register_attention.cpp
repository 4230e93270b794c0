// The torch side of attention: few queries by our own loops, many by torch's.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <torch/library.h>

#include <vector>

#include "attention.h"

using at::Tensor;

namespace {

constexpr int64_t kFewQueries = 4;

bool is_known(const Tensor& q, const Tensor& k, const Tensor& v) {
  const auto type = q.scalar_type();
  return (type == at::kBFloat16 || type == at::kFloat) && k.scalar_type() == type && v.scalar_type() == type &&
         q.size(-1) == v.size(-1);
}

// q [B, Q, S, D], k and v [B, G, C, D], mask [B or 1, 1, S, C] of booleans -> [B, Q, S, D], heads next to each other.
Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& mask, double scale) {
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4 && mask.dim() == 4, "aqtx: attention takes four dimensions");
  const int64_t B = q.size(0), Q = q.size(1), S = q.size(2), D = q.size(3), G = k.size(1), C = k.size(2);
  TORCH_CHECK(k.size(0) == B && v.size(0) == B && v.size(1) == G && v.size(2) == C && k.size(3) == D && G && Q % G == 0,
              "aqtx: keys and values do not fit the queries");
  TORCH_CHECK(mask.scalar_type() == at::kBool && (mask.size(0) == B || mask.size(0) == 1) && mask.size(1) == 1 &&
                  mask.size(2) == S && mask.size(3) == C, "aqtx: a mask [B, 1, S, C] of booleans");
  if (S > kFewQueries || !is_known(q, k, v)) {
    const Tensor out = at::scaled_dot_product_attention(q, k, v, mask, 0.0, false, scale, Q != G);
    return out.transpose(1, 2).contiguous().transpose(1, 2);
  }
  const Tensor out = at::empty({B, S, Q, D}, q.options()), queries = q.contiguous(), allowed = mask.contiguous();
  const Tensor keys = k.stride(3) == 1 ? k : k.contiguous(), values = v.stride(3) == 1 ? v : v.contiguous();
  const int64_t bytes = q.element_size();
  at::parallel_for(0, B * Q, 4, [&](int64_t from, int64_t to) {
    std::vector<float> scratch(C + D);
    for (int64_t at = from; at < to; at++)
      for (int64_t s = 0; s < S; s++) {
        const int64_t b = at / Q, h = at % Q, g = h / (Q / G);
        attend({(const char*)queries.const_data_ptr() + ((at * S + s) * D) * bytes,
                (const char*)keys.const_data_ptr() + (b * keys.stride(0) + g * keys.stride(1)) * bytes,
                (const char*)values.const_data_ptr() + (b * values.stride(0) + g * values.stride(1)) * bytes,
                allowed.const_data_ptr<bool>() + ((mask.size(0) == 1 ? 0 : b) * S + s) * C,
                (char*)out.data_ptr() + ((b * S + s) * Q + h) * D * bytes, scratch.data(), C, D, keys.stride(2),
                values.stride(2), float(scale), bytes == 2});
      }
  });
  return out.transpose(1, 2);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(aqtx_cpu, m) {
  m.def("attention(Tensor q, Tensor k, Tensor v, Tensor mask, float scale) -> Tensor");
}
TORCH_LIBRARY_IMPL(aqtx_cpu, CPU, m) { m.impl("attention", attention); }
