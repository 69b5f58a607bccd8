// Products with a weight matrix, packed into panels of 16 outputs: bfloat16 or int4 weights, bfloat16 rows, sums in fp32.

#include <algorithm>
#include <vector>

#include "amx.h"
#include "int4.h"
#include "int8.h"
#include "vec.h"

using namespace dsla;

namespace {

constexpr int MAX_ROWS = WIDE_REGISTERS ? 8 : 4;  // rows of x a tile holds
constexpr int WIDE = WIDE_REGISTERS ? 3 : 1;      // panels of a wide tile

// A panel of bfloat16 weights: 16 outputs, K inputs by pairs, [K / 2][16][2].
// y[M][16] = x [M, K] w^T
template <int M>
void tile(const Element* x, const uint32_t* panel, int64_t k, vf* y) {
    constexpr int CHAINS = M >= 4 ? 1 : 4;  // sums of each output: enough to hide the latency of one
    vf acc[M][CHAINS] = {};
    for (int64_t pair = 0; pair < k / 2; pair += CHAINS)
        UNROLL
        for (int c = 0; c < CHAINS; c++) {
            fetch(panel + (pair + c) * LANES);
            const vu weights = load<vu>(panel + (pair + c) * LANES);
            UNROLL
            for (int m = 0; m < M; m++)
                acc[m][c] = dot_pair(acc[m][c], x + m * k + 2 * (pair + c), weights);
        }
    UNROLL
    for (int m = 0; m < M; m++) {
        y[m] = acc[m][0];
        for (int c = 1; c < CHAINS; c++) y[m] += acc[m][c];
    }
}

// The same for MAX_ROWS rows and WIDE panels, y[WIDE][MAX_ROWS][16]: a load serves more products.
void wide_tile(const Element* x, const uint32_t* panels, int64_t k, vf (*y)[MAX_ROWS]) {
    vf acc[WIDE][MAX_ROWS] = {};
    for (int64_t pair = 0; pair < k / 2; pair++) {
        vu weights[WIDE];
        UNROLL
        for (int p = 0; p < WIDE; p++) weights[p] = load<vu>(panels + p * k / 2 * LANES + pair * LANES);
        UNROLL
        for (int m = 0; m < MAX_ROWS; m++) {
            UNROLL
            for (int p = 0; p < WIDE; p++) acc[p][m] = dot_pair(acc[p][m], x + m * k + 2 * pair, weights[p]);
        }
    }
    UNROLL
    for (int p = 0; p < WIDE; p++)
        UNROLL
        for (int m = 0; m < MAX_ROWS; m++) y[p][m] = acc[p][m];
}

constexpr decltype(&tile<1>) TILES[] = {tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>, tile<7>, tile<8>};

#if !defined(DSLA_ROUNDS_ROWS)
// y[M][16] = x [M, K] w^T; `totals` [M, K / 32] are the sums of x by group.
template <int M>
void tile_int4(const Element* x, const float* totals, const uint32_t* panel, int64_t k, vf* y) {
    constexpr int CHAINS = M == 1 ? 4 : M == 2 ? 2 : 1;
    UNROLL
    for (int m = 0; m < M; m++) y[m] = vf{};
    for (int64_t g = 0; g < k / GROUP; g++, panel += GROUP_WORDS) {
        vf acc[M][CHAINS] = {};
        for (int c = 0; c < GROUP_WORDS / LANES; c++) fetch(panel + c * LANES);
        for (int c = 0; c < 4; c++) {
            const vu words = load<vu>(panel + c * LANES);
            UNROLL
            for (int i = 0; i < 4; i++) {
                const vu weights = bits_of_pair(words, i);
                UNROLL
                for (int m = 0; m < M; m++)
                    acc[m][i % CHAINS] = dot_pair(acc[m][i % CHAINS], x + m * k + g * GROUP + c * 8 + 2 * i, weights);
            }
        }
        const Grid grid(panel + 4 * LANES);
        UNROLL
        for (int m = 0; m < M; m++) {
            UNROLL
            for (int c = 1; c < CHAINS; c++) acc[m][0] += acc[m][c];
            y[m] += grid.scale * acc[m][0] + grid.offset() * totals[m * (k / GROUP) + g];
        }
    }
}

constexpr decltype(&tile_int4<1>) TILES_INT4[] = {tile_int4<1>, tile_int4<2>, tile_int4<3>, tile_int4<4>,
                                                  tile_int4<5>, tile_int4<6>, tile_int4<7>, tile_int4<8>};

#endif

// Rows x [n, k] as elements; `kept` is theirs, and unused where they are elements already.
const Element* elements(int threads, const uint16_t* x, int64_t n, int64_t k, std::vector<Element>& kept) {
    if constexpr (sizeof(Element) == sizeof(uint16_t)) return reinterpret_cast<const Element*>(x);
    kept.resize(n * k);
#pragma omp parallel for schedule(static) num_threads(threads) if (n > 64)
    for (int64_t i = 0; i < n; i++) put_row(kept.data() + i * k, x + i * k, k);
    return kept.data();
}

void put(const vf* y, int rows, const uint16_t* bias, int64_t first, int64_t n_out, uint16_t* out) {
    const vf add = bias ? widen(bias + first) : vf{};
    for (int m = 0; m < rows; m++) narrow(out + m * n_out + first, y[m] + add);
}

#if !defined(__AVX512BF16__)
// Where products of bfloat16 take several instructions, many rows are worth unpacking the weights once.
constexpr int MANY = 12;
constexpr int FLOAT_ROWS = 6;

constexpr int64_t DEPTH = 256;  // inputs that are taken at once: their weights stay in the first cache

// y[M][16] += x [M, depth] w [depth, 16], rows of x `k` apart
template <int M>
void float_tile(const float* x, int64_t k, const float* w, int64_t depth, vf* y) {
    vf acc[M];
    UNROLL
    for (int m = 0; m < M; m++) acc[m] = y[m];
    for (int64_t i = 0; i < depth; i++) {
        const vf weights = load<vf>(w + i * LANES);
        UNROLL
        for (int m = 0; m < M; m++) acc[m] += x[m * k + i] * weights;
    }
    UNROLL
    for (int m = 0; m < M; m++) y[m] = acc[m];
}

constexpr decltype(&float_tile<1>) FLOAT_TILES[] = {float_tile<1>, float_tile<2>, float_tile<3>,
                                                    float_tile<4>, float_tile<5>, float_tile<6>};

// A panel of bfloat16 weights as floats [K, 16].
void unpack(const uint32_t* panel, int64_t k, float* w) {
    for (int64_t pair = 0; pair < k / 2; pair++) {
        const vu words = load<vu>(panel + pair * LANES);
        store(w + 2 * pair * LANES, as<vf>(words << 16));
        store(w + (2 * pair + 1) * LANES, as<vf>(words & 0xffff0000u));
    }
}

#if !defined(DSLA_ROUNDS_ROWS)

// A panel of int4 weights as floats [K, 16].
void unpack_int4(const uint32_t* panel, int64_t k, float* w) {
    unpack_panel(panel, k, [&](vf even, vf odd) {
        store(w, even);
        store(w + LANES, odd);
        w += 2 * LANES;
    });
}

#endif

// y [n, n_out] = x [n, k] w^T + bias; `unpacks` gives the floats of a panel of `words` words.
void many_rows(int threads, int64_t n, int64_t k, int64_t n_out, const float* x, const uint32_t* w, int64_t words,
               void (*unpacks)(const uint32_t*, int64_t, float*), const uint16_t* bias, uint16_t* y) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> panel(k * LANES);
        std::vector<vf> sums(n);
#pragma omp for schedule(static)
        for (int64_t first = 0; first < n_out; first += LANES) {
            unpacks(w + first / LANES * words, k, panel.data());
            std::fill(sums.begin(), sums.end(), vf{});
            for (int64_t at = 0; at < k; at += DEPTH)
                for (int64_t row = 0; row < n; row += FLOAT_ROWS)
                    FLOAT_TILES[std::min<int64_t>(FLOAT_ROWS, n - row) - 1](x + row * k + at, k, panel.data() + at * LANES,
                                                                            std::min(DEPTH, k - at), sums.data() + row);
            put(sums.data(), int(n), bias, first, n_out, y);
        }
    }
}

#endif

#if defined(DSLA_ROUNDS_ROWS)

constexpr decltype(&tile_int8<1>) TILES_INT8[] = {tile_int8<1>, tile_int8<2>, tile_int8<3>, tile_int8<4>,
#if defined(DSLA_VNNI)
                                                  tile_int8<5>, tile_int8<6>, tile_int8<7>, tile_int8<8>
#endif
};
static_assert(sizeof TILES_INT8 / sizeof TILES_INT8[0] == INT8_ROWS);

// y [n, n_out] = x [n, k] w^T + bias, int4 weights and rows rounded to one int8 an input, or two.
void linear_int8(int threads, int64_t n, int64_t k, int64_t n_out, const uint16_t* x, const uint32_t* w, const uint16_t* bias,
                 uint16_t* y) {
    const int64_t groups = k / GROUP;
    const int64_t bytes = k * INT8_PARTS;  // of a row
    std::vector<int8_t> rounded(n * bytes);
    std::vector<float> scales(n * groups), totals(n * groups);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n * groups; i++) quantize(x + i * GROUP, &rounded[i * GROUP * INT8_PARTS], &scales[i], &totals[i]);
#pragma omp for schedule(static)
        for (int64_t first = 0; first < n_out; first += LANES)
            for (int64_t row = 0; row < n; row += INT8_ROWS) {
                const int rows = int(std::min<int64_t>(INT8_ROWS, n - row));
                float out[INT8_ROWS * LANES];
                TILES_INT8[rows - 1](&rounded[row * bytes], &scales[row * groups], &totals[row * groups],
                                     w + first / LANES * groups * GROUP_WORDS, k, out);
                for (int m = 0; m < rows; m++)
                    narrow(y + (row + m) * n_out + first, load<vf>(out + m * LANES) + (bias ? widen(bias + first) : vf{}));
            }
    }
}

#endif

#if defined(DSLA_AMX)

constexpr int64_t FEW = 8, FEW_INT4 = 16;  // rows that are not worth a tile

// y [n, n_out] = x [n, k] w^T + bias; `tiles(first, count, unpacked)` gives those of `count` <= 2 panels from `first` on.
template <typename Tiles>
void linear_amx(int threads, int64_t n, int64_t k, int64_t n_out, const uint16_t* x, const uint16_t* bias, uint16_t* y,
                Tiles tiles) {
    const int64_t panels = n_out / LANES, whole = n / AMX_ROWS * AMX_ROWS;
    Array<uint16_t> rest(whole < n ? AMX_ROWS * k : 0);
    std::copy(x + whole * k, x + n * k, rest.begin());
#pragma omp parallel num_threads(threads)
    {
        const TileRegisters registers;
        Array<uint32_t> unpacked;
#pragma omp for schedule(static)
        for (int64_t first = 0; first < panels; first += 2) {
            const int count = int(std::min<int64_t>(2, panels - first));
            const Factor w = tiles(first, count, unpacked);
            for (int64_t row = 0; row < n; row += AMX_ROWS) {
                alignas(64) float out[AMX_ROWS * 2 * LANES];
                const Factor rows = rows_factor(row < whole ? x + row * k : rest.data(), k);
                tile_product(rows, w, k / TILE_INPUTS, false, out, 2 * LANES);
                for (int64_t m = 0; m < std::min<int64_t>(AMX_ROWS, n - row); m++)
                    for (int p = 0; p < count; p++) {
                        const vf* from = reinterpret_cast<const vf*>(out) + 2 * m + p;
                        put(from, 1, bias, (first + p) * LANES, n_out, y + (row + m) * n_out);
                    }
            }
        }
    }
}

// A panel of int4 weights as one of bfloat16, [k / 2, 16] pairs: rounded as they are where all weights are bfloat16.
void unpack_tiles(const uint32_t* panel, int64_t k, uint32_t* pairs) {
    unpack_panel(panel, k, [&](vf even, vf odd) {
        store(pairs, nearest(even) >> 16 | nearest(odd));
        pairs += LANES;
    });
}

#endif

}  // namespace

extern "C" {

// y [n, n_out] = x [n, k] w [n_out, k]^T + bias (or null); w in panels, k a multiple of 32, n_out of 16.
void dsla_linear(int threads, int64_t n, int64_t k, int64_t n_out, const uint16_t* x, const uint32_t* w, const uint16_t* bias,
                 uint16_t* y) {
    std::vector<Element> kept;
    const Element* rows_of_x = elements(threads, x, n, k, kept);
#if !defined(__AVX512BF16__)
    if (n >= MANY) return many_rows(threads, n, k, n_out, rows_of_x, w, k / 2 * LANES, unpack, bias, y);
#endif
#if defined(DSLA_AMX)
    if (n >= FEW && amx_ready())
        return linear_amx(threads, n, k, n_out, x, bias, y, [=](int64_t first, int count, Array<uint32_t>&) {
            return panels_factor(w + first * k / 2 * LANES, (count - 1) * k / 2 * LANES);
        });
#endif
    const int64_t panels = n_out / LANES;
    // Panels stay in the first cache while all rows pass by them.
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t begin = 0; begin < panels; begin += WIDE) {
        const int64_t end = std::min(begin + WIDE, panels);
        for (int64_t row = 0; row < n; row += MAX_ROWS) {
            const int rows = int(std::min<int64_t>(MAX_ROWS, n - row));
            vf out[WIDE][MAX_ROWS];
            if (rows == MAX_ROWS && end - begin == WIDE)
                wide_tile(rows_of_x + row * k, w + begin * k / 2 * LANES, k, out);
            else
                for (int64_t p = begin; p < end; p++) TILES[rows - 1](rows_of_x + row * k, w + p * k / 2 * LANES, k, out[p - begin]);
            for (int64_t p = begin; p < end; p++) put(out[p - begin], rows, bias, p * LANES, n_out, y + row * n_out);
        }
    }
}

// How many int8 an input is rounded to before few rows are multiplied with int4 weights; 0 = it is not.
int dsla_int8_parts() {
#if defined(DSLA_ROUNDS_ROWS)
    return INT8_PARTS;
#else
    return 0;
#endif
}

// Whether many rows are multiplied in tile registers.
int dsla_tiles() { return amx_ready(); }

// The same with int4 weights, packed as above.
void dsla_linear_int4(int threads, int64_t n, int64_t k, int64_t n_out, const uint16_t* x, const uint32_t* w,
                      const uint16_t* bias, uint16_t* y) {
#if defined(DSLA_AMX)
    if (n >= FEW_INT4 && amx_ready())
        return linear_amx(threads, n, k, n_out, x, bias, y, [=](int64_t first, int count, Array<uint32_t>& unpacked) {
            const int64_t words = k / 2 * LANES, packed = k / GROUP * GROUP_WORDS;
            unpacked.resize(2 * words);
            for (int p = 0; p < count; p++) unpack_tiles(w + (first + p) * packed, k, &unpacked[p * words]);
            return panels_factor(unpacked.data(), (count - 1) * words);
        });
#endif
#if defined(DSLA_ROUNDS_ROWS)
    linear_int8(threads, n, k, n_out, x, w, bias, y);
#else
    const int64_t groups = k / GROUP;
    std::vector<Element> kept;
    const Element* rows_of_x = elements(threads, x, n, k, kept);
    if (n >= MANY) return many_rows(threads, n, k, n_out, rows_of_x, w, groups * GROUP_WORDS, unpack_int4, bias, y);
    std::vector<float> totals(n * groups);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n * groups; i++)
            totals[i] = sum(widen(x + i * GROUP) + widen(x + i * GROUP + LANES));
#pragma omp for schedule(static)
        for (int64_t first = 0; first < n_out; first += LANES)
            for (int64_t row = 0; row < n; row += MAX_ROWS) {
                const int rows = int(std::min<int64_t>(MAX_ROWS, n - row));
                vf out[MAX_ROWS];
                TILES_INT4[rows - 1](rows_of_x + row * k, totals.data() + row * groups, w + first / LANES * groups * GROUP_WORDS, k, out);
                put(out, rows, bias, first, n_out, y + row * n_out);
            }
    }
#endif
}

}  // extern "C"
