// Attention of one query over the slots of a cache that it may see. No torch in here.
#pragma once
#include <cstdint>

#include "packed.h"

struct AttentionTask {
  const void *query, *keys, *values;  // [D], [C, D], [C, D]; bf16 or float32
  const bool* mask;                   // [C], true where the query may look
  void* out;                          // [D]
  float* scratch;                     // C + D floats
  int64_t slots, size, key_stride, value_stride;
  float scale;
  bool is_bf16;
};

// One head of one query: softmax(scale q k) v over the slots that the mask allows; zeros where it allows none.
void attend(const AttentionTask& task);
