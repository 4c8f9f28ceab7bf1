// The products of implicit_gemm.cuh in ordinary arithmetic: exact to the rounding of accum_t, for
// every dtype, any number of channels and every GPU. conv_tensor.cu does the same on tensor cores.
//
// In the input gradient, near the border, a tap may come from an output that does not exist. Zeros
// stand for those; but zero times a weight that is infinite or NaN is NaN, at a pixel which never
// saw that weight. So these zeros are written as -0, and the products of a tile with such a weight
// leave them out.

#include "gemm_tile.cuh"
#include "activation.cuh"
#include "implicit_gemm.cuh"

static __device__ bool is_absent(accum_t a) { return a == 0 && copysign((accum_t)1, a) < 0; }

// multiply_add without the products of absent elements of A.
static __device__ void multiply_add_present(accum_t (&sums)[SUMS_M][SUMS_N],
                                            const accum_t (&a)[TILE_K][TILE_M + PAD],
                                            const accum_t (&b)[TILE_K][TILE_N + PAD]) {
#pragma unroll 1
    for (int k = 0; k < TILE_K; ++k)
#pragma unroll
        for (int i = 0; i < SUMS_M; ++i) {
            accum_t factor = a[k][tile_row(i)];
#pragma unroll
            for (int j = 0; j < SUMS_N; ++j)
                if (!is_absent(factor)) sums[i][j] += factor * b[k][tile_column(j)];
        }
}

// sums = this block's tile of the product.
template <bool GRADIENT>
static __device__ void multiply(const Product& p, const Share& own, int splits, Tiles& tiles,
                                accum_t (&sums)[SUMS_M][SUMS_N]) {
    const int length = p.length(), taps_x = p.horizontal.taps;
    const auto [start, end] = stages_of_split(length, own.split, splits);

    // This thread's part of A: VEC neighbouring channels of these rows.
    constexpr int PARTS = TILE_K / VEC, A_LOADS = loads_each<VEC, TILE_M * TILE_K>;
    const int a_term = (int)threadIdx.x % PARTS * VEC, a_row = threadIdx.x / PARTS;
    Corner corner[A_LOADS];
#pragma unroll
    for (int i = 0; i < A_LOADS; ++i)
        corner[i] = p.corner_of(own.first_row + a_row + i * (THREADS / PARTS));
    Term term(start * TILE_K + a_term, taps_x, p.terms);

    // Its part of B: forward, VEC_N neighbouring results of these terms; in the gradient, where
    // the terms lie side by side in w, VEC neighbouring terms of these results.
    constexpr int COLUMNS = GRADIENT ? PARTS : TILE_N / VEC_N, B_VEC = GRADIENT ? VEC : VEC_N;
    constexpr int B_LOADS = loads_each<B_VEC, TILE_N * TILE_K>;
    const int b_column = (int)threadIdx.x % COLUMNS * B_VEC, b_row = threadIdx.x / COLUMNS;

    Chunk<VEC> a_chunk[A_LOADS];
    bool absent[A_LOADS];
    Chunk<B_VEC> b_chunk[B_LOADS];
    int b_stage = start;

    auto fetch = [&] {
#pragma unroll
        for (int i = 0; i < A_LOADS; ++i) {
            index_t place;
            bool seen = p.sees(corner[i], term, own.group, place);
            a_chunk[i] = seen ? chunk_at<VEC>(p.x, place) : zero_chunk<VEC>();
            absent[i] = !seen;
        }
#pragma unroll
        for (int i = 0; i < B_LOADS; ++i) {
            if (GRADIENT) {
                int result = own.first_result + b_row + i * (THREADS / COLUMNS);
                b_chunk[i] = term.ty < p.vertical.taps && result < p.results
                    ? chunk_at<B_VEC>(p.w, p.gradient_weight(term, own.group, result))
                    : zero_chunk<B_VEC>();
            } else {
                int k = b_stage * TILE_K + b_row + i * (THREADS / COLUMNS);
                int result = own.first_result + b_column;
                b_chunk[i] = k < length && result < p.results
                    ? chunk_at<B_VEC>(p.w, p.forward_weight(k, own.group, result))
                    : zero_chunk<B_VEC>();
            }
        }
        term.advance(TILE_K, taps_x, p.terms);
        ++b_stage;
    };
    auto put = [&](int buffer) {  // returns whether a weight is not finite
        const accum_t zero = 0;
        bool odd = false;
#pragma unroll
        for (int i = 0; i < A_LOADS; ++i)
#pragma unroll
            for (int e = 0; e < VEC; ++e) {
                accum_t value = a_chunk[i].at[e];
                if (GRADIENT) value = absent[i] ? -zero : value + zero;  // -0 + 0 is 0
                tiles.a[buffer][a_term + e][a_row + i * (THREADS / PARTS)] = value;
            }
#pragma unroll
        for (int i = 0; i < B_LOADS; ++i)
#pragma unroll
            for (int e = 0; e < B_VEC; ++e) {
                int row = b_row + i * (THREADS / COLUMNS), column = b_column + e;
                accum_t weight = b_chunk[i].at[e];
                odd |= weight - weight != 0;
                if (GRADIENT) tiles.b[buffer][column][row] = weight;
                else tiles.b[buffer][row][column] = weight;
            }
        return odd;
    };

    if (start >= end) return;
    fetch();
    bool odd = put(0);
    if (GRADIENT) odd = __syncthreads_or(odd);
    else __syncthreads();
    for (int stage = start; stage < end; ++stage) {
        int buffer = (stage - start) & 1;
        bool more = stage + 1 < end;
        if (more) fetch();
        if (GRADIENT && odd) multiply_add_present(sums, tiles.a[buffer], tiles.b[buffer]);
        else multiply_add(sums, tiles.a[buffer], tiles.b[buffer]);
        if (more) odd = put(buffer ^ 1);
        if (GRADIENT) odd = __syncthreads_or(odd);
        else __syncthreads();
    }
}

// The mean of each column of a tile of outputs, and the sum of squared differences from it, written
// to moments (row tiles, 2, channels) as batchnorm.cu merges them. rows: how many the tile has.
static __device__ void write_moments(const Product& p, const Share& own, int rows,
                                     const accum_t (&outputs)[SUMS_M][SUMS_N], Tiles& tiles,
                                     accum_t* moments) {
    static_assert(THREADS_M * TILE_N * sizeof(accum_t) <= sizeof(Tiles),
                  "one value a thread and column");
    accum_t (*shared)[TILE_N] = reinterpret_cast<accum_t(*)[TILE_N]>(&tiles);
    accum_t mean[SUMS_N] = {}, m2[SUMS_N] = {};
    for (int pass = 0; pass < 2; ++pass) {
        __syncthreads();
#pragma unroll
        for (int j = 0; j < SUMS_N; ++j) {
            accum_t sum = 0;
#pragma unroll
            for (int i = 0; i < SUMS_M; ++i) {
                accum_t d = outputs[i][j] - mean[j];
                if (tile_row(i) < rows) sum += pass == 0 ? d : d * d;
            }
            shared[threadIdx.x / THREADS_N][tile_column(j)] = sum;
        }
        __syncthreads();
#pragma unroll
        for (int j = 0; j < SUMS_N; ++j) {
            accum_t sum = 0;
            for (int t = 0; t < THREADS_M; ++t) sum += shared[t][tile_column(j)];
            if (pass == 0) mean[j] = sum / rows;
            else m2[j] = sum;
        }
    }
    moments += own.first_row / TILE_M * 2 * p.y_channels + own.group * p.results;
    if (threadIdx.x < THREADS_N)
#pragma unroll
        for (int j = 0; j < SUMS_N; ++j) {
            int result = own.first_result + tile_column(j);
            if (result >= p.results) continue;
            moments[result] = mean[j];
            moments[p.y_channels + result] = m2[j];
        }
}

template <bool GRADIENT>
static __device__ void convolve(const Product& p, const Share& own, int splits,
                                const accum_t* bias, const scalar_t* residual, scalar_t* y,
                                accum_t* partial, accum_t* moments, Tiles& tiles) {
    const index_t rows = p.rows();
    if (own.first_row >= rows) return;
    accum_t sums[SUMS_M][SUMS_N] = {};
    multiply<GRADIENT>(p, own, splits, tiles, sums);

    if (partial) partial += own.split * ((index_t)p.images * p.y_height * p.y_width * p.y_channels);
#pragma unroll
    for (int i = 0; i < SUMS_M; ++i) {
        index_t row = own.first_row + tile_row(i);
        if (row >= rows) continue;
        index_t pixel = GRADIENT ? p.gradient_pixel(row) : row;
#pragma unroll
        for (int j = 0; j < SUMS_N; j += VEC_N) {
            int result = own.first_result + tile_column(j);
            if (result >= p.results) continue;
            int channel = own.group * p.results + result;
            index_t place = pixel * p.y_channels + channel;
            if (partial) {
#pragma unroll
                for (int e = 0; e < VEC_N; ++e) partial[place + e] = sums[i][j + e];
            } else {
                Chunk<VEC_N> chunk;
#pragma unroll
                for (int e = 0; e < VEC_N; ++e) {
                    chunk.at[e] = finish(sums[i][j + e], bias, channel + e, residual, place + e);
                    if (MOMENTS) sums[i][j + e] = chunk.at[e];
                }
                *reinterpret_cast<Chunk<VEC_N>*>(y + place) = chunk;
            }
        }
    }
    if (MOMENTS && !GRADIENT)
        write_moments(p, own, (int)min((index_t)TILE_M, rows - own.first_row), sums, tiles,
                      moments);
}

// x (n, h, w, c)   filters (kh, kw, c / groups, c_out)   bias (c_out)
// residual, y (n, oh, ow, c_out)
//
// With a partial (splits, n, oh, ow, c_out) only sums are written, to it; finish_splits.cu goes on.
// moments (row tiles, 2, c_out): of the outputs, for the batch norm after it; not with a partial.
// They take registers, so it is a variant of its own that writes them: MOMENTS is 1 then.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) conv_forward(
    const scalar_t* __restrict__ x, const scalar_t* __restrict__ filters,
    const accum_t* __restrict__ bias_or_null, const scalar_t* __restrict__ residual_or_null,
    scalar_t* __restrict__ y, accum_t* __restrict__ partial_or_null,
    accum_t* __restrict__ moments_or_null,
    int n, int h, int w, int c, int oh, int ow, int kh, int kw, int sh, int sw, int top, int left,
    int dh, int dw, int c_out, int groups, int splits)
{
    __shared__ Tiles tiles;
    Product p = forward_product(x, filters, n, h, w, c, oh, ow, kh, kw, sh, sw, top, left, dh, dw,
                                c_out, groups);
    convolve<false>(p, share_of_block(p.results, splits, groups, 1), splits, bias_or_null,
                    residual_or_null, y, partial_or_null, moments_or_null, tiles);
}

// dy (n, oh, ow, c_out), filters as above -> dx (n, h, w, c), or partial (splits, n, h, w, c).
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) conv_input_gradient(
    const scalar_t* __restrict__ dy, const scalar_t* __restrict__ filters,
    scalar_t* __restrict__ dx, accum_t* __restrict__ partial_or_null,
    int n, int h, int w, int c, int oh, int ow, int kh, int kw, int sh, int sw, int top, int left,
    int dh, int dw, int c_out, int groups, int splits)
{
    __shared__ Tiles tiles;
    Share own = share_of_block(c / groups, splits, groups, gradient_phases(h, w, sh, sw));
    Product p = gradient_product(dy, filters, own.phase, n, h, w, c, oh, ow, kh, kw, sh, sw, top,
                                 left, dh, dw, c_out, groups);
    convolve<true>(p, own, splits, nullptr, nullptr, dx, partial_or_null, nullptr, tiles);
}
