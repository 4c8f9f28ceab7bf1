// The weight gradient of a convolution, as a matrix product that sums over all pixels:
//
//     dw[k][o] = sum over m of X[m][k] dz[m][o]      m = (in, oy, ox)   k = (ky, kx, ic)
//
// X is what im2col would write (see conv_gemm.cu); it is read straight from x. The result is small
// and the sum is long, so the sum is split among blocks: each writes a slab of its own, and
// sum_splits.cu adds the slabs, always in the same order. dw lies as the filters do,
// (kh, kw, c / groups, c_out).

#include "gemm_tile.cuh"
#include "implicit_gemm.cuh"

// x (n, h, w, c), dz (n, oh, ow, c_out) -> slabs (splits, kh, kw, c / groups, c_out).
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) conv_weight_gradient(
    const scalar_t* __restrict__ x, const scalar_t* __restrict__ dz, accum_t* __restrict__ slabs,
    int n, int h, int w, int c, int oh, int ow, int kh, int kw, int sh, int sw, int top, int left,
    int dh, int dw, int c_out, int groups, int splits)
{
    __shared__ Tiles tiles;
    const int inputs = c / groups, outputs = c_out / groups, terms = kh * kw * inputs;
    const WeightShare own = weight_share_of_block(outputs, terms, groups);
    const index_t pixels = (index_t)n * oh * ow;
    const auto [start, end] = stages_of_split(pixels, own.split, splits);

    // This thread's part of A: VEC neighbouring channels under one tap, of these pixels.
    constexpr int A_COLUMNS = TILE_M / VEC, A_LOADS = loads_each<VEC, TILE_M * TILE_K>;
    const int a_column = (int)threadIdx.x % A_COLUMNS * VEC, a_row = threadIdx.x / A_COLUMNS;
    const int term = own.first_term + a_column, channel = own.group * inputs + term % inputs;
    const int from_y = term / inputs / kw * dh - top, from_x = term / inputs % kw * dw - left;
    Pixel pixel[A_LOADS];
#pragma unroll
    for (int i = 0; i < A_LOADS; ++i)
        pixel[i].set(start * TILE_K + a_row + i * (THREADS / A_COLUMNS), oh, ow);

    // Its part of B: VEC_N neighbouring outputs of these pixels.
    constexpr int B_COLUMNS = TILE_N / VEC_N, B_LOADS = loads_each<VEC_N, TILE_N * TILE_K>;
    const int b_column = (int)threadIdx.x % B_COLUMNS * VEC_N, b_row = threadIdx.x / B_COLUMNS;
    const int output = own.first_output + b_column;
    index_t b_pixel = start * TILE_K + b_row;
    static_assert(THREADS % A_COLUMNS == 0 && THREADS % B_COLUMNS == 0, "whole rows are read");

    Chunk<VEC> a_chunk[A_LOADS];
    Chunk<VEC_N> b_chunk[B_LOADS];
    auto fetch = [&] {
#pragma unroll
        for (int i = 0; i < A_LOADS; ++i) {
            int iy = pixel[i].y * sh + from_y, ix = pixel[i].x * sw + from_x;
            bool seen = pixel[i].image < n && term < terms && iy >= 0 && iy < h && ix >= 0
                        && ix < w;
            index_t place = ((pixel[i].image * h + iy) * w + ix) * c + channel;
            a_chunk[i] = seen ? chunk_at<VEC>(x, place) : zero_chunk<VEC>();
            pixel[i].advance(TILE_K, oh, ow);
        }
#pragma unroll
        for (int i = 0; i < B_LOADS; ++i) {
            index_t m = b_pixel + i * (THREADS / B_COLUMNS);
            bool seen = m < pixels && output < outputs;
            b_chunk[i] = seen ? chunk_at<VEC_N>(dz, m * c_out + own.group * outputs + output)
                              : zero_chunk<VEC_N>();
        }
        b_pixel += TILE_K;
    };
    auto put = [&](int buffer) {
#pragma unroll
        for (int i = 0; i < A_LOADS; ++i)
#pragma unroll
            for (int e = 0; e < VEC; ++e)
                tiles.a[buffer][a_row + i * (THREADS / A_COLUMNS)][a_column + e] = a_chunk[i].at[e];
#pragma unroll
        for (int i = 0; i < B_LOADS; ++i)
#pragma unroll
            for (int e = 0; e < VEC_N; ++e)
                tiles.b[buffer][b_row + i * (THREADS / B_COLUMNS)][b_column + e] = b_chunk[i].at[e];
    };

    accum_t sums[SUMS_M][SUMS_N] = {};
    if (start < end) {
        fetch();
        put(0);
        __syncthreads();
        for (index_t stage = start; stage < end; ++stage) {
            int buffer = (int)(stage - start) & 1;
            bool more = stage + 1 < end;
            if (more) fetch();
            multiply_add(sums, tiles.a[buffer], tiles.b[buffer]);
            if (more) put(buffer ^ 1);
            __syncthreads();
        }
    }
#pragma unroll
    for (int i = 0; i < SUMS_M; ++i)
#pragma unroll
        for (int j = 0; j < SUMS_N; ++j) {
            int k = own.first_term + tile_row(i), o = own.first_output + tile_column(j);
            if (k < terms && o < outputs)
                slabs[((index_t)own.split * terms + k) * c_out + own.group * outputs + o] =
                    sums[i][j];
        }
}
