// Decodes with a package that `aqtx package DIR model.pt2` wrote: C++ and libtorch alone, no Python.
//
//   run_package model.pt2 NEW_TOKENS ID...      prints the likeliest NEW_TOKENS ids behind the prompt's
//
//
//   T=$(python -c "import torch; print(torch.__path__[0])")      the torch that made the package
//   g++ -O2 -std=c++20 run_package.cpp -o run_package -I$T/include -L$T/lib -Wl,-rpath,$T/lib -ltorch -ltorch_cpu -lc10
#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <filesystem>
#include <iostream>
#include <sstream>
#include <vector>

// "bfloat16 4 slots 64; bfloat16 4 slots 64": the cache's tensors, their sizes behind the batch.
std::vector<at::Tensor> make_cache(const std::string& told, int64_t batch, int64_t slots) {
  std::vector<at::Tensor> cache;
  std::istringstream parts(told);
  for (std::string part; std::getline(parts, part, ';');) {
    std::istringstream words(part);
    std::string type, size;
    words >> type;
    std::vector<int64_t> sizes{batch};
    while (words >> size) sizes.push_back(size == "slots" ? slots : std::stoll(size));
    cache.push_back(at::zeros(sizes, type == "bfloat16" ? at::kBFloat16 : type == "float16" ? at::kHalf : at::kFloat));
  }
  return cache;
}

int main(int count, char** words) {
  if (count < 4) return std::cerr << "usage: run_package model.pt2 NEW_TOKENS ID...\n", 2;
  const std::filesystem::path package = words[1];
  auto kernel = package;
  kernel.replace_extension(".kernel.so");  // the ops that decode packed weights register themselves
  if (std::filesystem::exists(kernel) && !dlopen(std::filesystem::absolute(kernel).c_str(), RTLD_NOW | RTLD_GLOBAL))
    return std::cerr << dlerror() << "\n", 1;
  const c10::InferenceMode no_gradients;
  torch::inductor::AOTIModelPackageLoader model(package.string());

  const int64_t wanted = std::stoll(words[2]);
  std::vector<int64_t> prompt;
  for (int at = 3; at < count; at++) prompt.push_back(std::stoll(words[at]));
  const int64_t length = int64_t(prompt.size());
  at::Tensor ids = at::tensor(prompt, at::kLong).view({1, length}), places = at::arange(length, at::kLong);
  const at::Tensor start = at::zeros({1}, at::kLong);  // the first slot that is no padding
  const auto cache = make_cache(model.get_metadata().at("caches"), 1, length + wanted);
  for (int64_t made = 0; made < wanted; made++) {
    std::vector<at::Tensor> inputs{ids, places, start};  // contiguous: compiled code does not look
    inputs.insert(inputs.end(), cache.begin(), cache.end());
    const at::Tensor logits = model.run(inputs)[0];  // [1, tokens, vocabulary]; the cache was written in place
    ids = logits.select(1, -1).argmax(-1, /*keepdim=*/true);
    places = at::full({1}, length + made, at::kLong);
    std::cout << (made ? " " : "") << ids.item<int64_t>() << std::flush;
  }
  std::cout << "\n";
}
