// `experts`: what the chosen experts of a layer make of hidden states, in one op. Only experts that tokens chose are
// read. Between their matrices numbers stay float32 where few rows meet them, and a token's sum is rounded once.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <list>
#include <map>

#include "experts.h"
#include "products.h"

using at::Tensor;

namespace {

// A matrix of one expert.
struct Matrix {
  const Bucket* bucket;
  Packed packed;
  Tensor plain;  // where it is not packed
};

Matrix matrix_of(const Stack& stack, int64_t expert, int64_t num_columns) {
  const auto [bucket, slot] = stack.find(expert);
  if (bucket->is_packed()) return {bucket, bucket->matrix(slot, num_columns), {}};
  const Tensor plain = bucket->codes.select(0, slot);
  TORCH_CHECK(plain.size(-1) == num_columns && plain.device().is_cpu(), "aqtx: plain experts of ", plain.size(-1), " columns");
  const bool is_read = plain.scalar_type() == at::kFloat || plain.scalar_type() == at::kBFloat16;
  return {bucket, {}, (is_read ? plain : plain.to(at::kFloat)).contiguous()};
}

// Few rows of activations, made ready once for each format that they meet.
struct Source {
  Rows rows;
  at::ScalarType model;
  int64_t num_columns;
  std::vector<float> floats;
  std::map<std::vector<int64_t>, Inputs> ready;

  const Inputs* for_matrix(const Matrix& w) {
    if (!w.bucket->is_packed()) {
      if (floats.empty()) floats = as_floats(rows, num_columns);
      return nullptr;
    }
    const auto [found, is_new] = ready.try_emplace(w.bucket->spec.vec());
    if (is_new) found->second = inputs_of(rows, w.packed, model);
    return &found->second;
  }
  void multiply(const Matrix& w, const Inputs* in, float* y, int64_t N, int64_t a, int64_t b) const {
    if (in) return product_rows(w.packed, *in, y, N, a, b);
    const bool is_bf16 = w.plain.scalar_type() == at::kBFloat16;
    plain_rows(w.plain.const_data_ptr(), is_bf16, floats.data(), rows.count, num_columns, y, N, a, b);
  }
};

// An expert, the tokens that chose it, and the weight of each.
struct Hit {
  Matrix gate, up, down;
  std::vector<int64_t> tokens;
  std::vector<float> weights;
  Tensor states;  // their hidden states [M, H]
  Source *in, middle;
  const Inputs *for_gate, *for_up, *for_down;
  std::vector<float> inner, upper, out;  // [M, I], [M, I], [M, H]
  int64_t count() const { return int64_t(tokens.size()); }
};

struct Layer {
  Tensor x;  // [T, H]
  Stack gate, up, down;
  int64_t H, I;
};

constexpr int64_t kWork = 1 << 18;  // weights that are worth a thread

// `work(hit, a, b)` for rows a..b of each hit's matrices of N rows and K weights each.
template <class F> void for_rows(std::vector<Hit*>& hits, int64_t N, int64_t K, F work) {
  at::parallel_for(0, int64_t(hits.size()) * N, std::max<int64_t>(16, kWork / K), [&](int64_t from, int64_t to) {
    for (int64_t at = from; at < to;) {
      const int64_t hit = at / N, end = std::min(to, (hit + 1) * N);
      work(*hits[hit], at - hit * N, end - hit * N);
      at = end;
    }
  });
}

// Experts with few tokens each, all in two passes.
void run_few(std::vector<Hit*>& hits, const Layer& layer) {
  const int64_t H = layer.H, I = layer.I;
  const at::ScalarType model = layer.x.scalar_type();
  std::list<Source> sources;  // a single token's is the same for all its experts
  for (Hit* hit : hits) {
    if (sources.empty() || layer.x.size(0) != 1)
      sources.push_back({rows_of(hit->states, 0, hit->count()), model, H, {}, {}});
    hit->in = &sources.back();
    hit->for_gate = hit->in->for_matrix(hit->gate), hit->for_up = hit->in->for_matrix(hit->up);
    hit->inner.resize(hit->count() * I), hit->upper.resize(hit->count() * I), hit->out.resize(hit->count() * H);
  }
  for_rows(hits, I, 2 * H, [&](Hit& hit, int64_t a, int64_t b) {
    hit.in->multiply(hit.gate, hit.for_gate, hit.inner.data(), I, a, b);
    hit.in->multiply(hit.up, hit.for_up, hit.upper.data(), I, a, b);
    for (int64_t m = 0; m < hit.count(); m++)
      gate_values(hit.inner.data() + m * I + a, hit.upper.data() + m * I + a, b - a);
  });
  for (Hit* hit : hits) {
    hit->middle = {{(const char*)hit->inner.data(), at::kFloat, hit->count()}, model, I, {}, {}};
    hit->for_down = hit->middle.for_matrix(hit->down);
  }
  for_rows(hits, H, I, [&](Hit& hit, int64_t a, int64_t b) {
    hit.middle.multiply(hit.down, hit.for_down, hit.out.data(), H, a, b);
  });
}

Tensor multiplied(const Matrix& w, const Tensor& x, int64_t N) {
  return w.bucket->is_packed() ? many_rows(x, w.packed, N) : at::linear(x, w.plain.to(x.scalar_type()));
}

// One expert with many tokens.
void run_many(Hit& hit, const Layer& layer) {
  const Tensor x = hit.states.to(dense_type(layer.x.scalar_type()));
  const Tensor gate = multiplied(hit.gate, x, layer.I).to(at::kFloat), up = multiplied(hit.up, x, layer.I).to(at::kFloat);
  at::parallel_for(0, hit.count(), std::max<int64_t>(1, (1 << 14) / layer.I), [&](int64_t a, int64_t b) {
    gate_values(gate.data_ptr<float>() + a * layer.I, up.const_data_ptr<float>() + a * layer.I, (b - a) * layer.I);
  });
  const Tensor out = multiplied(hit.down, gate.to(x.scalar_type()), layer.H).to(at::kFloat).contiguous();
  hit.out.assign(out.const_data_ptr<float>(), out.const_data_ptr<float>() + out.numel());
}

// x [T, H], weights and chosen experts [T, k] -> [T, H]. `parts`, `specs` and `slots` are those of gate, up and down one
// behind the other, `buckets` says how many formats each of them has; experts have `inner` rows of gate and of up.
Tensor experts(const Tensor& x, const Tensor& weights, const Tensor& chosen, at::TensorList parts, at::IntArrayRef specs,
               at::IntArrayRef slots, at::IntArrayRef buckets, int64_t inner) {
  TORCH_CHECK(x.dim() == 2 && weights.dim() == 2 && chosen.sizes() == weights.sizes() && chosen.size(0) == x.size(0),
              "aqtx: experts take x [T, H], weights and chosen experts [T, k]");
  TORCH_CHECK(buckets.size() == 3 && slots.size() % 3 == 0, "aqtx: experts have three stacks");
  check_activations(x, x.size(1));
  const int64_t T = x.size(0), H = x.size(1), k = weights.size(1), E = int64_t(slots.size()) / 3;
  const Tensor rows = x.contiguous(), scale = weights.to(at::kFloat).contiguous(), ids = chosen.to(at::kLong).contiguous();
  Stack stacks[3];
  int64_t spec = 0, part = 0;
  for (int i = 0; i < 3; i++) {
    const auto mine = specs.slice(spec * kSpecLength, buckets[i] * kSpecLength);
    const int64_t count = num_parts(mine);
    stacks[i] = stack_of(parts.slice(part, count), mine, slots.slice(i * E, E), i == 2 ? H : inner);
    spec += buckets[i], part += count;
  }
  const Layer layer{rows, stacks[0], stacks[1], stacks[2], H, inner};
  std::vector<Hit> hits;
  std::vector<int64_t> place(E, -1);
  for (int64_t at = 0; at < T * k; at++) {
    const int64_t expert = ids.const_data_ptr<int64_t>()[at];
    TORCH_CHECK(0 <= expert && expert < E, "aqtx: no expert ", expert);
    if (place[expert] < 0) {
      place[expert] = int64_t(hits.size());
      hits.emplace_back();
      Hit& hit = hits.back();
      hit.gate = matrix_of(layer.gate, expert, H), hit.up = matrix_of(layer.up, expert, H);
      hit.down = matrix_of(layer.down, expert, inner);
    }
    hits[place[expert]].tokens.push_back(at / k);
    hits[place[expert]].weights.push_back(scale.const_data_ptr<float>()[at]);
  }
  std::vector<Hit*> few;
  Tensor sums = at::zeros({T, H}, x.options().dtype(at::kFloat));
  auto add = [&](Hit& hit) {
    for (int64_t m = 0; m < hit.count(); m++)
      add_scaled(sums.data_ptr<float>() + hit.tokens[m] * H, hit.out.data() + m * H, hit.weights[m], H);
    hit.out.clear();
  };
  for (Hit& hit : hits) {
    hit.states = T == 1 ? rows : at::index_select(rows, 0, at::tensor(hit.tokens));
    if (is_few(x.scalar_type(), hit.count())) few.push_back(&hit);
    else run_many(hit, layer), add(hit), hit.states = Tensor();
  }
  if (!few.empty()) run_few(few, layer);
  for (Hit* hit : few) add(*hit);
  return sums.to(x.scalar_type());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(aqtx_cpu, m) {
  m.def("experts(Tensor x, Tensor weights, Tensor chosen, Tensor[] parts, int[] specs, int[] slots, int[] buckets, "
        "int inner) -> Tensor");
}
TORCH_LIBRARY_IMPL(aqtx_cpu, CPU, m) { m.impl("experts", experts); }
