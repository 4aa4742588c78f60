// Opens a translation unit that is compiled for more than the baseline instruction set.
#pragma once

#define COMMFUSE_STRING_(x) #x
#define COMMFUSE_STRING(x) COMMFUSE_STRING_(x)

#if defined(__clang__)
#define COMMFUSE_TARGET_BEGIN(features) \
  _Pragma(COMMFUSE_STRING_(             \
      clang attribute push(__attribute__((target(features))), apply_to = function)))
#define COMMFUSE_TARGET_END _Pragma("clang attribute pop")
#else
#define COMMFUSE_TARGET_BEGIN(features) \
  _Pragma("GCC push_options") _Pragma(COMMFUSE_STRING_(GCC target(features)))
#define COMMFUSE_TARGET_END _Pragma("GCC pop_options")
#endif

// Compilers that know the tile instructions; the others leave the amx variant out.
#if defined(__x86_64__) && \
    (defined(__clang__) ? __clang_major__ >= 12 : defined(__GNUC__) && __GNUC__ >= 11)
#define COMMFUSE_WITH_AMX
#endif
