// Register tiles of softmax attention: a few query rows against packed keys and values; bfloat16 in, fp32 sums.
#pragma once

#include "vec.h"

namespace dsla {

constexpr int ROWS = 6;                          // query rows of a tile
constexpr int COLUMNS = WIDE_REGISTERS ? 4 : 1;  // vectors of a row of a tile
constexpr int BLOCK_KEYS = WIDE_REGISTERS ? 256 : 64;  // keys of a block: packed, they stay in the first cache

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

// Scores of ROWS query rows [D] against 64 keys; keys packed [16 keys][D / PAIRED][16] cells.
inline void score_tile(const Element* q, const Cell* k, int dim, float scale, float* scores) {
    const int cells = dim / PAIRED;
    for (int first = 0; first < 4; first += COLUMNS, k += COLUMNS * cells * LANES, scores += COLUMNS * LANES) {
        vf acc[ROWS][COLUMNS] = {};
        for (int d = 0; d < cells; d++) {
            Cells keys[COLUMNS];
            UNROLL
            for (int c = 0; c < COLUMNS; c++) keys[c] = load<Cells>(k + (c * cells + d) * LANES);
            UNROLL
            for (int i = 0; i < ROWS; i++) {
                const Cells query = splat_cell(q + i * dim, d);
                UNROLL
                for (int c = 0; c < COLUMNS; c++) acc[i][c] = add_product(acc[i][c], query, keys[c]);
            }
        }
        UNROLL
        for (int i = 0; i < ROWS; i++)
            UNROLL
            for (int c = 0; c < COLUMNS; c++) store(scores + i * BLOCK_KEYS + c * LANES, acc[i][c] * scale);
    }
}

// y[ROWS][C * 16] = y * keep + weights[ROWS][count] v, values packed [count / PAIRED][D] cells.
template <int C>
inline void value_tile(const Element* weights, const Cell* v, int dim, int count, const float* keep, float* y) {
    vf acc[ROWS][C];
    UNROLL
    for (int i = 0; i < ROWS; i++)
        UNROLL
        for (int c = 0; c < C; c++) acc[i][c] = load<vf>(y + i * dim + c * LANES) * keep[i];
    for (int key = 0; key < count / PAIRED; key++) {
        Cells values[C];
        UNROLL
        for (int c = 0; c < C; c++) values[c] = load<Cells>(v + key * dim + c * LANES);
        UNROLL
        for (int i = 0; i < ROWS; i++) {
            const Cells weight = splat_cell(weights + i * BLOCK_KEYS, key);
            UNROLL
            for (int c = 0; c < C; c++) acc[i][c] = add_product(acc[i][c], weight, values[c]);
        }
    }
    UNROLL
    for (int i = 0; i < ROWS; i++)
        UNROLL
        for (int c = 0; c < C; c++) store(y + i * dim + c * LANES, acc[i][c]);
}

// The same for all columns; dim a multiple of 32.
inline void add_values(const Element* weights, const Cell* v, int dim, int count, const float* keep, float* y) {
    constexpr int LESS = COLUMNS > 2 ? 2 : 1;
    int d = 0;
    for (; d + COLUMNS * LANES <= dim; d += COLUMNS * LANES) value_tile<COLUMNS>(weights, v + d, dim, count, keep, y + d);
    for (; d < dim; d += LESS * LANES) value_tile<LESS>(weights, v + d, dim, count, keep, y + d);
}

// Puts key and value number `index` of a group into their packed forms.
inline void pack_token(const uint16_t* key, const uint16_t* value, int dim, int64_t index, Cell* keys, Cell* values) {
    const int cells = dim / PAIRED;
    Cell* to_k = keys + index / LANES * LANES * cells + index % LANES;
#if defined(__AVX512BF16__)
    for (int d = 0; d < cells; d++) to_k[d * LANES] = load<uint32_t>(key + 2 * d);
    uint16_t* to_v = reinterpret_cast<uint16_t*>(values + index / 2 * dim);
    for (int d = 0; d < dim; d++) to_v[2 * d + index % 2] = value[d];
#else
    for (int d = 0; d < cells; d++) to_k[d * LANES] = widen(key[d]);
    put_row(values + index * dim, value, dim);
#endif
}

}  // namespace dsla
