// Panels of int4 weights: 16 outputs, K inputs in groups of 32.
//
// Of each group, first 4 x 16 words: word o of quarter c holds of output o the 8 weights of inputs 8 c ... 8 c + 7, input
// 8 c + 2 i + j in bits 4 i + 16 j and up; then 16 scales and 16 least values in bfloat16. A weight is least + scale * bits.
#pragma once

#include "vec.h"

namespace dsla {

constexpr int GROUP = 32;
constexpr int GROUP_WORDS = 5 * LANES;

// Scales and least values of a group; `parameters` is what follows its words.
struct Grid {
    vf scale, least;

    explicit Grid(const uint32_t* parameters) {
        const uint16_t* halves = reinterpret_cast<const uint16_t*>(parameters);
        scale = widen(halves);
        least = widen(halves + LANES);
    }

    // What is added to scale * (bits + 128).
    vf offset() const { return least - 128.0f * scale; }
};

// bits + 128 of inputs 2 i and 2 i + 1 of a quarter's words, as pairs of bfloat16, which hold them exactly: one "or" makes them.
inline vu bits_of_pair(vu words, int i) { return (words >> (4 * i) & 0x000f000fu) | 0x43004300u; }

// Calls `put(even, odd)` with the weights of each two inputs of a panel, in order.
template <typename Put>
void unpack_panel(const uint32_t* panel, int64_t k, Put put) {
    for (int64_t g = 0; g < k / GROUP; g++, panel += GROUP_WORDS) {
        const Grid grid(panel + 4 * LANES);
        const vf offset = grid.offset();
        for (int c = 0; c < 4; c++)
            for (int i = 0; i < 4; i++) {
                const vu bits = bits_of_pair(load<vu>(panel + c * LANES), i);
                put(offset + grid.scale * as<vf>(bits << 16), offset + grid.scale * as<vf>(bits & 0xffff0000u));
            }
    }
}

// Fetches weights that are read soon, those a few KiB further: the processor's own prefetching ends with each page.
inline void fetch(const uint32_t* weights) {
    constexpr int64_t AHEAD = 1024;
    __builtin_prefetch(weights + AHEAD, 0, 3);
}

}  // namespace dsla
