// A region of code compiled for an instruction set beyond the baseline, whatever the flags of the build say.
// Standard headers must be included before the region: their inline functions are shared by the whole program.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

// BERT_FAST_SCALAR_ONLY builds without instruction sets, for ThreadSanitizer: quick to compile.
#if defined(__x86_64__) && !defined(BERT_FAST_SCALAR_ONLY)
#define BERT_FAST_X86 1
#include <immintrin.h>
#else
#define BERT_FAST_X86 0
#endif

#define BERT_FAST_PRAGMA(text) _Pragma(#text)

#if defined(__clang__)
#define BERT_FAST_TARGET_BEGIN(isa) \
  BERT_FAST_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define BERT_FAST_TARGET_END _Pragma("clang attribute pop")
#else
// GCC 12's own AVX-512 header sets off both warnings.
#define BERT_FAST_TARGET_BEGIN(isa)                                                            \
  _Pragma("GCC push_options") BERT_FAST_PRAGMA(GCC target(isa)) _Pragma("GCC diagnostic push") \
      _Pragma("GCC diagnostic ignored \"-Wmaybe-uninitialized\"")                              \
          _Pragma("GCC diagnostic ignored \"-Wuninitialized\"")
#define BERT_FAST_TARGET_END _Pragma("GCC diagnostic pop") _Pragma("GCC pop_options")
#endif

#define BERT_FAST_INLINE inline __attribute__((always_inline))
