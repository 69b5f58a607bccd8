// Matrix products in the tile registers of Intel's AMX: 16 rows with 16 columns over 32 bfloat16 an instruction, sums in fp32.
#pragma once

#include "vec.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define DSLA_AMX

#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>

namespace dsla {

constexpr int TILE_SIDE = 16;               // rows and columns of a tile
constexpr int AMX_ROWS = 2 * TILE_SIDE;     // rows of a product
constexpr int TILE_INPUTS = 2 * TILE_SIDE;  // bfloat16 of a row of a tile, which are summed over

// Whether the system lets this process use the tile registers, whose state is large and has to be asked for, and the user does:
// DSLA_KERNELS=vectors says no.
inline bool amx_ready() {
    static const bool ready = [] {
        constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
        const char* asked = std::getenv("DSLA_KERNELS");
        return !(asked && std::strcmp(asked, "vectors") == 0) && syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
    }();
    return ready;
}

// While it lives, the tile registers of this thread hold 16 rows of 64 bytes each.
class TileRegisters {
    struct alignas(64) Shape {
        uint8_t palette = 1, first_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };

   public:
    TileRegisters() {
        static const Shape shape;
        if (amx_ready()) _tile_loadconfig(&shape);
    }
    ~TileRegisters() {
        if (amx_ready()) _tile_release();
    }
    TileRegisters(const TileRegisters&) = delete;
};

// The nearest bfloat16, in the upper half of each lane.
inline vu nearest(vf x) { return (vu)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x)) << 16; }

// A factor of a product, in bytes: a tile has 16 rows `row` apart; the next along the sum lies `along`, the one beside it (which
// gives other rows or columns of the result) `beside` further.
struct Factor {
    const void* at;
    int64_t row, along, beside;

    const char* tile(int64_t step, int which) const { return static_cast<const char*>(at) + step * along + which * beside; }
};

// Rows [32, k] of bfloat16, `stride` elements apart.
inline Factor rows_factor(const uint16_t* x, int64_t stride) { return {x, stride * 2, TILE_INPUTS * 2, TILE_SIDE * stride * 2}; }

// Pairs of rows [k / 2, n] of which a pair of columns of tiles is taken: those beside each other lie 16 pairs further.
inline Factor pair_rows_factor(const uint32_t* pairs, int64_t n) { return {pairs, n * 4, TILE_SIDE * n * 4, TILE_SIDE * 4}; }

// Panels of 16 columns [k / 2, 16] of pairs, `beside` words apart.
inline Factor panels_factor(const uint32_t* pairs, int64_t beside) {
    return {pairs, TILE_SIDE * 4, TILE_SIDE * TILE_SIDE * 4, beside * 4};
}

// y [32, 32] = (y if `add`, else 0) + a b over 32 * `steps` bfloat16. Rows of b's tiles hold pairs of inputs of 16 columns; rows of
// y are `stride` apart.
inline void tile_product(Factor a, Factor b, int64_t steps, bool add, float* y, int64_t stride) {
    asm volatile("" ::: "memory");  // tiles are read past the compiler's back
    float* lower = y + TILE_SIDE * stride;
    if (add) {
        _tile_loadd(0, y, stride * 4);
        _tile_loadd(1, y + TILE_SIDE, stride * 4);
        _tile_loadd(2, lower, stride * 4);
        _tile_loadd(3, lower + TILE_SIDE, stride * 4);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t step = 0; step < steps; step++) {
        _tile_loadd(4, a.tile(step, 0), a.row);
        _tile_loadd(6, b.tile(step, 0), b.row);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b.tile(step, 1), b.row);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a.tile(step, 1), a.row);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, y, stride * 4);
    _tile_stored(1, y + TILE_SIDE, stride * 4);
    _tile_stored(2, lower, stride * 4);
    _tile_stored(3, lower + TILE_SIDE, stride * 4);
    asm volatile("" ::: "memory");
}

}  // namespace dsla

#else

namespace dsla {

constexpr bool amx_ready() { return false; }
struct TileRegisters {
    TileRegisters() {}
};

}  // namespace dsla

#endif
