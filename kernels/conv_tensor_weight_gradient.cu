// The weight gradient of conv_weight_gradient.cu on tensor cores; tensor_tile.cuh says how, or
// where the launcher defines WGMMA as 1, wgmma_tile.cuh.
//
//     A    TILE_K rows, one a pixel, of TILE_M terms (ky, kx, ic)    terms are neighbours in memory
//     B    TILE_K rows, one a pixel, of TILE_N outputs               outputs are neighbours

#if WGMMA
#include "wgmma_tile.cuh"
#else
#include "tensor_tile.cuh"
#endif
#include "implicit_gemm.cuh"

constexpr int A_BYTES = column_bytes<TILE_M>, B_BYTES = column_bytes<TILE_N>;

// x (n, h, w, c), dz (n, oh, ow, c_out) -> slabs (splits, kh, kw, c / groups, c_out).
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_EACH) conv_tensor_weight_gradient(
    const scalar_t* __restrict__ x, const scalar_t* __restrict__ dz, accum_t* __restrict__ slabs,
    int n, int h, int w, int c, int oh, int ow, int kh, int kw, int sh, int sw, int top, int left,
    int dh, int dw, int c_out, int groups, int splits)
{
    extern __shared__ __align__(128) unsigned char raw[];
    unsigned char* memory = raw + (-(int)shared_address(raw) & (ALIGNMENT - 1));
    const int inputs = c / groups, outputs = c_out / groups, terms = kh * kw * inputs;
    const WeightShare own = weight_share_of_block(outputs, terms, groups);
    const index_t pixels = (index_t)n * oh * ow;
    const auto [start, end] = stages_of_split(pixels, own.split, splits);

    // This thread copies one piece of the channels under one tap of each of these pixels of A ...
    constexpr int A_COLUMNS = TILE_M / PIECE, A_ROWS = THREADS / A_COLUMNS;
    constexpr int A_COPIES = TILE_K / A_ROWS;
    const int a_piece = threadIdx.x % A_COLUMNS, a_row = threadIdx.x / A_COLUMNS;
    const int term = own.first_term + a_piece * PIECE, channel = own.group * inputs + term % inputs;
    const int from_y = term / inputs / kw * dh - top, from_x = term / inputs % kw * dw - left;
    Pixel pixel[A_COPIES], step;
    step.set(TILE_K, oh, ow);
#pragma unroll
    for (int i = 0; i < A_COPIES; ++i) pixel[i].set(start * TILE_K + a_row + i * A_ROWS, oh, ow);

    // ... and one piece of the outputs of each of these pixels of B.
    constexpr int B_COLUMNS = TILE_N / PIECE, B_ROWS = THREADS / B_COLUMNS;
    constexpr int B_COPIES = TILE_K / B_ROWS;
    const int b_piece = threadIdx.x % B_COLUMNS, b_row = threadIdx.x / B_COLUMNS;
    const int output = own.first_output + b_piece * PIECE;
    index_t b_pixel = start * TILE_K + b_row;
    static_assert(TILE_K % A_ROWS == 0 && TILE_K % B_ROWS == 0, "whole rows are copied");

    auto fetch = [&](unsigned a) {
#pragma unroll
        for (int i = 0; i < A_COPIES; ++i) {
            int iy = pixel[i].y * sh + from_y, ix = pixel[i].x * sw + from_x;
            bool seen = pixel[i].image < n && term < terms && iy >= 0 && iy < h && ix >= 0
                        && ix < w;
            index_t place = ((pixel[i].image * h + iy) * w + ix) * c + channel;
            start_copy(a + column_offset<TILE_M>(a_row + i * A_ROWS, a_piece),
                       x + (seen ? place : 0), seen);
            if (TILE_K >= 32) pixel[i].advance(step, oh, ow);
            else pixel[i].advance(TILE_K, oh, ow);
        }
#pragma unroll
        for (int i = 0; i < B_COPIES; ++i) {
            index_t m = b_pixel + i * B_ROWS;
            bool seen = m < pixels && output < outputs;
            index_t place = m * c_out + own.group * outputs + output;
            start_copy(a + A_BYTES + column_offset<TILE_N>(b_row + i * B_ROWS, b_piece),
                       dz + (seen ? place : 0), seen);
        }
        b_pixel += TILE_K;
    };

    const int lane = threadIdx.x % 32;
    float sums[FRAGMENTS_M][FRAGMENTS_N][4] = {};
    run_stages<A_BYTES + B_BYTES>(shared_address(memory), start, end, fetch, [&](unsigned tile) {
        multiply_tile<true, true>(sums, tile, tile + A_BYTES);
    }, sums);
#pragma unroll
    for (int i = 0; i < FRAGMENTS_M; ++i)
#pragma unroll
        for (int j = 0; j < FRAGMENTS_N; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                int k = own.first_term + fragment_row(i) + lane / 4 + e / 2 * 8;
                int o = own.first_output + first_column() + j * 8 + lane % 4 * 2 + e % 2;
                if (k < terms && o < outputs)
                    slabs[((index_t)own.split * terms + k) * c_out + own.group * outputs + o] =
                        sums[i][j][e];
            }
}
