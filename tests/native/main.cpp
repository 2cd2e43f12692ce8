// The C++ part without torch, tested under sanitizers: `make check-native`. Names of tests as arguments choose some,
// and 0/2 every second one, so that two processes share them.
#include <algorithm>
#include <cstdio>

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
  size_t part = 0, parts = 1;
  const bool shares = count == 2 && std::sscanf(names[1], "%zu/%zu", &part, &parts) == 2 && parts > 0;
  for (size_t i = 0; i < tests.size(); ++i) {
    const bool named = chosen.empty() || std::find(chosen.begin(), chosen.end(), tests[i].first) != chosen.end();
    if (shares ? i % parts == part : named) tests[i].second();
  }
}
