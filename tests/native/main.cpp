// The C++ part without torch, tested under sanitizers: `make check-native`. Names of tests as arguments choose some.
#include <algorithm>

#include "check.h"

int main(int count, char** names) {
  const std::vector<std::pair<std::string, void (*)()>> tests{
      {"linear", bert_fast::test_linear},       {"rows", bert_fast::test_rows},
      {"attention", bert_fast::test_attention}, {"encoder", bert_fast::test_encoder},
      {"threads", bert_fast::test_threads},     {"memory", bert_fast::test_memory},
      {"offsets", bert_fast::test_offsets},     {"attention_training", bert_fast::test_attention_training},
      {"dense", bert_fast::test_dense},         {"training_rows", bert_fast::test_training_rows},
  };
  const std::vector<std::string> chosen(names + 1, names + count);
  for (const auto& [name, test] : tests)
    if (chosen.empty() || std::find(chosen.begin(), chosen.end(), name) != chosen.end()) test();
}
