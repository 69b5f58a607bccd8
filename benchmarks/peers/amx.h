// For building llama.cpp with GCC on processors with AMX: GCC's own `_tile_loadconfig` says that it reads 8 of the 64 bytes, the
// others are optimised away, and the first tile instruction is illegal.
#pragma once

#include <immintrin.h>

#define _tile_loadconfig(from) __asm__ volatile("ldtilecfg %0" ::"m"(*(const char (*)[64])(from)))
