// Softmax attention of a few query rows at once with packed keys and values; bfloat16 in, fp32 sums.
#pragma once

#include <algorithm>
#include <cmath>

#include "amx.h"
#include "vec.h"

namespace dsla {

constexpr int COLUMNS = WIDE_REGISTERS ? 4 : 1;  // vectors of a row of a tile
constexpr int BLOCK_KEYS = WIDE_REGISTERS ? 256 : 64;  // keys of a block: packed, they stay in a near cache

// What keys and values are packed into: pairs of bfloat16 where the processor multiplies those, else floats. A head of D dims
// has D / PAIRED cells.
#if defined(__AVX512BF16__)
constexpr int PAIRED = 2;
typedef uint32_t Cell;
typedef vu Cells;
inline Cells splat_cell(const Element* row, int i) { return splat(reinterpret_cast<const uint32_t*>(row)[i]); }
inline vf add_product(vf sum, Cells a, Cells b) { return dot_pairs(sum, a, b); }
// Values of PAIRED rows from place `at` on, as GATHERED vectors of cells.
constexpr int GATHERED = 2;
inline void gather(const uint16_t* const* rows, int64_t at, Cells* cells) {
    interleave(load<vh>(rows[0] + at), load<vh>(rows[1] + at), cells);
}
#else
constexpr int PAIRED = 1;
typedef float Cell;
typedef vf Cells;
inline Cells splat_cell(const Element* row, int i) { return splat(row[i]); }
inline vf add_product(vf sum, Cells a, Cells b) { return sum + a * b; }
constexpr int GATHERED = 1;
inline void gather(const uint16_t* const* rows, int64_t at, Cells* cells) { *cells = widen(*rows + at); }
#endif

// Both products of attention, by vector registers. Keys of a block are packed [16 keys][D / PAIRED][16] cells, and values
// [count / PAIRED][D]; rows of scores and of weights are BLOCK_KEYS apart.
struct ByVectors {
    static constexpr int ROWS = 6;  // query rows of a tile

    // scores [ROWS, count] = q [ROWS, D] keys; count a multiple of 64.
    static void scores(const Element* q, const Cell* keys, int dim, int count, float* scores) {
        const int cells = dim / PAIRED;
        for (int first = 0; first < count; first += COLUMNS * LANES, keys += COLUMNS * cells * LANES) {
            vf acc[ROWS][COLUMNS] = {};
            for (int d = 0; d < cells; d++) {
                Cells key[COLUMNS];
                UNROLL
                for (int c = 0; c < COLUMNS; c++) key[c] = load<Cells>(keys + (c * cells + d) * LANES);
                UNROLL
                for (int i = 0; i < ROWS; i++) {
                    const Cells query = splat_cell(q + i * dim, d);
                    UNROLL
                    for (int c = 0; c < COLUMNS; c++) acc[i][c] = add_product(acc[i][c], query, key[c]);
                }
            }
            UNROLL
            for (int i = 0; i < ROWS; i++)
                UNROLL
                for (int c = 0; c < COLUMNS; c++) store(scores + i * BLOCK_KEYS + first + c * LANES, acc[i][c]);
        }
    }

    // y [ROWS, D] += weights [ROWS, count] values; dim a multiple of 32.
    static void add_values(const Element* weights, const Cell* values, int dim, int count, float* y) {
        constexpr int LESS = COLUMNS > 2 ? 2 : 1;
        int d = 0;
        for (; d + COLUMNS * LANES <= dim; d += COLUMNS * LANES) add_columns<COLUMNS>(weights, values + d, dim, count, y + d);
        for (; d < dim; d += LESS * LANES) add_columns<LESS>(weights, values + d, dim, count, y + d);
    }

   private:
    template <int C>
    static void add_columns(const Element* weights, const Cell* values, int dim, int count, float* y) {
        vf acc[ROWS][C];
        UNROLL
        for (int i = 0; i < ROWS; i++)
            UNROLL
            for (int c = 0; c < C; c++) acc[i][c] = load<vf>(y + i * dim + c * LANES);
        for (int key = 0; key < count / PAIRED; key++) {
            Cells value[C];
            UNROLL
            for (int c = 0; c < C; c++) value[c] = load<Cells>(values + key * dim + c * LANES);
            UNROLL
            for (int i = 0; i < ROWS; i++) {
                const Cells weight = splat_cell(weights + i * BLOCK_KEYS, key);
                UNROLL
                for (int c = 0; c < C; c++) acc[i][c] = add_product(acc[i][c], weight, value[c]);
            }
        }
        UNROLL
        for (int i = 0; i < ROWS; i++)
            UNROLL
            for (int c = 0; c < C; c++) store(y + i * dim + c * LANES, acc[i][c]);
    }
};

#if defined(DSLA_AMX)

// The same in tile registers, which a thread needs `TileRegisters` for.
struct ByTiles {
    static constexpr int ROWS = AMX_ROWS;

    static void scores(const Element* q, const Cell* keys, int dim, int count, float* scores) {
        const int64_t size = int64_t(dim) / PAIRED * LANES;  // of 16 keys
        for (int first = 0; first < count; first += 2 * LANES)
            tile_product(rows_factor(q, dim), panels_factor(keys + first / LANES * size, size), dim / TILE_INPUTS, false,
                         scores + first, BLOCK_KEYS);
    }

    static void add_values(const Element* weights, const Cell* values, int dim, int count, float* y) {
        for (int d = 0; d < dim; d += 2 * LANES)
            tile_product(rows_factor(weights, BLOCK_KEYS), pair_rows_factor(values + d, dim), count / TILE_INPUTS, true, y + d,
                         dim);
    }
};

#endif

// Calls `work` with the faster of both.
template <typename Work>
void by_fastest(Work work) {
#if defined(DSLA_AMX)
    if (amx_ready()) return work(ByTiles{});
#endif
    work(ByVectors{});
}

#if defined(DSLA_AMX)
constexpr int MOST_ROWS = ByTiles::ROWS;
#else
constexpr int MOST_ROWS = ByVectors::ROWS;
#endif

// Rows that hold `rows` of them in whole tiles, by either.
constexpr int padded_rows(int rows) {
    const int by_vectors = (rows + ByVectors::ROWS - 1) / ByVectors::ROWS * ByVectors::ROWS;
    return std::max(by_vectors, (rows + MOST_ROWS - 1) / MOST_ROWS * MOST_ROWS);
}

// Attention of one tile of query rows over packed keys and values.
struct SoftmaxRows {
    alignas(64) float scores[MOST_ROWS * BLOCK_KEYS];
    alignas(64) Element weights[MOST_ROWS * BLOCK_KEYS];

    // Adds a block of `count` keys, a multiple of 64, to a tile of which `rows` are wanted: y [ROWS, D] is the sum of values by
    // weights, the total of which is total[ROWS], relative to e^top[ROWS]. `hide(i, scores)` puts -infinity to what row i does not
    // see.
    template <typename By, typename Hide>
    void add(const Element* q, int rows, const Cell* keys, const Cell* values, int dim, int count, float scale, float* y,
             float* top, float* total, Hide hide) {
        By::scores(q, keys, dim, count, scores);
        for (int i = 0; i < std::min(rows, By::ROWS); i++) {
            float* row = scores + i * BLOCK_KEYS;
            hide(i, row);
            vf most = load<vf>(row);
            for (int c = LANES; c < count; c += LANES) most = maximum(most, load<vf>(row + c));
            const float highest = std::max(top[i], maximum(most) * scale);
            const float binary = scale * LOG2_E, above = highest * LOG2_E;
            vf sums = {};
            for (int c = 0; c < count; c += LANES) {
                const vf exps = power_of_two(load<vf>(row + c) * binary - above);
                sums += exps;
                put_elements(weights + i * BLOCK_KEYS + c, exps);
            }
            if (top[i] != highest) {
                const float keep = std::exp(top[i] - highest);
                for (int d = 0; d < dim; d += LANES) store(y + i * dim + d, load<vf>(y + i * dim + d) * keep);
                total[i] *= keep;
                top[i] = highest;
            }
            total[i] += sum(sums);
        }
        By::add_values(weights, values, dim, count, y);
    }
};

// Packs keys and values of LANES tokens, numbers `first` on of a group.
inline void pack_tokens(const uint16_t* const* keys, const uint16_t* const* values, int dim, int64_t first, Cell* to_keys,
                        Cell* to_values) {
    const int cells = dim / PAIRED;
    Cell* to_k = to_keys + first * cells;
    Cell* to_v = to_values + first / PAIRED * dim;
#if defined(__AVX512BF16__)
    for (int d = 0; d < cells; d += LANES) {
        vu rows[LANES];
        UNROLL
        for (int i = 0; i < LANES; i++) rows[i] = load<vu>(keys[i] + 2 * d);
        transpose(rows);
        UNROLL
        for (int i = 0; i < LANES; i++) store(to_k + (d + i) * LANES, rows[i]);
    }
    for (int i = 0; i < LANES; i += 2)
        for (int d = 0; d < dim; d += 2 * LANES) {
            Cells pairs[GATHERED];
            gather(values + i, d, pairs);
            for (int c = 0; c < GATHERED; c++) store(to_v + i / 2 * dim + d + c * LANES, pairs[c]);
        }
#else
    for (int i = 0; i < LANES; i++) {
        for (int d = 0; d < cells; d++) to_k[d * LANES + i] = widen(keys[i][d]);
        put_row(to_v + i * dim, values[i], dim);
    }
#endif
}

}  // namespace dsla
