// The products of implicit_gemm.cuh on tensor cores; tensor_tile.cuh says how, or where the
// launcher defines WGMMA as 1, wgmma_tile.cuh.
//
//     A    TILE_M rows of TILE_K terms                terms are neighbours in memory
//     B    forward: TILE_K rows of TILE_N results     results are neighbours, as in the filters
//          gradient: TILE_N rows of TILE_K terms      terms are neighbours, as in the filters

#if WGMMA
#include "wgmma_tile.cuh"
#else
#include "tensor_tile.cuh"
#endif
#include "activation.cuh"
#include "implicit_gemm.cuh"
#include "moments.cuh"

constexpr int A_BYTES = term_bytes<TILE_M>, B_BYTES = column_bytes<TILE_N>;
static_assert(B_BYTES >= term_bytes<TILE_N>, "either layout of B fits");

template <bool GRADIENT>
static __device__ void multiply(const Product& p, const Share& own, int splits, unsigned memory,
                                float (&sums)[FRAGMENTS_M][FRAGMENTS_N][4]) {
    const int length = p.length(), taps_x = p.horizontal.taps;
    const auto [start, end] = stages_of_split(length, own.split, splits);

    // This thread copies one piece of k of each of these rows of A ...
    constexpr int ROWS = THREADS / PIECES, A_COPIES = TILE_M / ROWS;
    const int piece = threadIdx.x % PIECES, a_row = threadIdx.x / PIECES;
    Corner corner[A_COPIES];
#pragma unroll
    for (int i = 0; i < A_COPIES; ++i) corner[i] = p.corner_of(own.first_row + a_row + i * ROWS);
    Term term(start * TILE_K + piece * PIECE, taps_x, p.terms);

    // ... and of B: forward one piece of the results of these terms, else these terms of results.
    constexpr int COLUMNS = TILE_N / PIECE, K_ROWS = THREADS / COLUMNS;
    constexpr int B_COPIES = GRADIENT ? TILE_N / ROWS : TILE_K / K_ROWS;
    const int b_piece = threadIdx.x % COLUMNS, b_row = threadIdx.x / COLUMNS;
    static_assert(TILE_M % ROWS == 0 && TILE_N % ROWS == 0 && TILE_K % K_ROWS == 0, "whole rows");

    int fetched = start;
    auto fetch = [&](unsigned stage) {
#pragma unroll
        for (int i = 0; i < A_COPIES; ++i) {
            index_t place;
            bool seen = p.sees(corner[i], term, own.group, place);
            start_copy(stage + term_offset(a_row + i * ROWS, piece), p.x + (seen ? place : 0),
                       seen);
        }
        const unsigned b = stage + A_BYTES;
#pragma unroll
        for (int i = 0; i < B_COPIES; ++i) {
            if (GRADIENT) {
                int result = own.first_result + a_row + i * ROWS;
                bool seen = term.ty < p.vertical.taps && result < p.results;
                index_t place = p.gradient_weight(term, own.group, result);
                start_copy(b + term_offset(a_row + i * ROWS, piece), p.w + (seen ? place : 0),
                           seen);
            } else {
                int row = b_row + i * K_ROWS, k = fetched * TILE_K + row;
                int result = own.first_result + b_piece * PIECE;
                bool seen = k < length && result < p.results;
                index_t place = p.forward_weight(k, own.group, result);
                start_copy(b + column_offset<TILE_N>(row, b_piece), p.w + (seen ? place : 0), seen);
            }
        }
        term.advance(TILE_K, taps_x, p.terms);
        ++fetched;
    };

    run_stages<A_BYTES + B_BYTES>(memory, start, end, fetch, [&](unsigned tile) {
        multiply_tile<false, !GRADIENT>(sums, tile, tile + A_BYTES);
    }, sums);
}

// The moments of a warp's columns: lane l has columns l, l + 32, ...
struct Moments {
    static constexpr int EACH = (WARP_N + 31) / 32;
    float count, mean[EACH], m2[EACH];

    // Adds `rows` rows of outputs that lie in shared memory.
    __device__ void add(const float* outputs, int pitch, int rows) {
        if (rows <= 0) return;
        const float share = rows / (count + rows);
#pragma unroll
        for (int j = 0; j < EACH; ++j) {
            int column = threadIdx.x % 32 + j * 32;
            if (column >= WARP_N) continue;
            float sum = 0, squares = 0;
            for (int r = 0; r < rows; ++r) sum += outputs[r * pitch + column];
            const float own = sum / rows;
            for (int r = 0; r < rows; ++r) {
                float d = outputs[r * pitch + column] - own;
                squares += d * d;
            }
            merge_moments(mean[j], m2[j], count, share, own, squares);
        }
        count += rows;
    }
};

// Merges those of the warps that have the same columns, and writes them as conv_gemm.cu does.
static __device__ void write_moments(const Product& p, const Share& own, const Moments& mine,
                                     float* shared, float* moments) {
    constexpr int WARPS = THREADS / 32;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    __syncthreads();
    if (lane == 0) shared[warp] = mine.count;
#pragma unroll
    for (int j = 0; j < Moments::EACH; ++j) {
        if (lane + j * 32 >= WARP_N) continue;
        shared[WARPS + warp * WARP_N + lane + j * 32] = mine.mean[j];
        shared[WARPS * (1 + WARP_N) + warp * WARP_N + lane + j * 32] = mine.m2[j];
    }
    __syncthreads();
    moments += own.first_row / TILE_M * 2 * p.y_channels + own.group * p.results;
    for (int column = threadIdx.x; column < TILE_N; column += THREADS) {
        float count = 0, mean = 0, m2 = 0;
        const int first = column / WARP_N * COLUMN_WARPS;
        for (int w = first; w < first + COLUMN_WARPS; ++w) {
            const float more = shared[w];
            if (more == 0) continue;
            const int at = WARPS + w * WARP_N + column % WARP_N;
            merge_moments(mean, m2, count, more / (count + more), shared[at],
                          shared[at + WARPS * WARP_N]);
            count += more;
        }
        const int result = own.first_result + column;
        if (result >= p.results) continue;
        moments[result] = mean;
        moments[p.y_channels + result] = m2;
    }
}

template <bool GRADIENT>
static __device__ void convolve(const Product& p, const Share& own, int splits, const float* bias,
                                const scalar_t* residual, scalar_t* y, float* partial,
                                float* moments) {
    extern __shared__ __align__(128) unsigned char raw[];
    unsigned char* memory = raw + (-(int)shared_address(raw) & (ALIGNMENT - 1));
    const index_t rows = p.rows();
    if (own.first_row >= rows) return;
    float sums[FRAGMENTS_M][FRAGMENTS_N][4] = {};
    multiply<GRADIENT>(p, own, splits, shared_address(memory), sums);

    // A lane has two neighbouring sums of a row, but should write 16 bytes. So each warp lays 16
    // rows of its sums into shared memory and reads them back in pieces.
    constexpr int PITCH = WARP_N + 8, ROW_PIECES = WARP_N / PIECE;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float* corner = reinterpret_cast<float*>(memory) + warp * 16 * PITCH;
    Moments of_warp = {};
    if (partial) partial += own.split * ((index_t)p.images * p.y_height * p.y_width * p.y_channels);
#pragma unroll
    for (int i = 0; i < FRAGMENTS_M; ++i) {
#pragma unroll
        for (int j = 0; j < FRAGMENTS_N; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                corner[(lane / 4 + e / 2 * 8) * PITCH + j * 8 + lane % 4 * 2 + e % 2] =
                    sums[i][j][e];
        __syncwarp();
        for (int u = lane; u < 16 * ROW_PIECES; u += 32) {
            index_t row = own.first_row + fragment_row(i) + u / ROW_PIECES;
            int column = u % ROW_PIECES * PIECE;
            int result = own.first_result + first_column() + column;
            if (row >= rows || result >= p.results) continue;
            float* sum = corner + u / ROW_PIECES * PITCH + column;
            int channel = own.group * p.results + result;
            index_t pixel = GRADIENT ? p.gradient_pixel(row) : row;
            index_t place = pixel * p.y_channels + channel;
            if (partial) {
#pragma unroll
                for (int e = 0; e < PIECE; ++e) partial[place + e] = sum[e];
            } else {
                struct alignas(16) Piece { scalar_t at[PIECE]; } out;
#pragma unroll
                for (int e = 0; e < PIECE; ++e) {
                    out.at[e] = finish(sum[e], bias, channel + e, residual, place + e);
                    if (MOMENTS && !GRADIENT) sum[e] = out.at[e];
                }
                *reinterpret_cast<Piece*>(y + place) = out;
            }
        }
        __syncwarp();
        if (MOMENTS && !GRADIENT) {
            index_t left = rows - own.first_row - fragment_row(i);
            of_warp.add(corner, PITCH, left < 16 ? (int)left : 16);
            __syncwarp();
        }
    }
    if (MOMENTS && !GRADIENT)
        write_moments(p, own, of_warp, reinterpret_cast<float*>(memory), moments);
}

// As conv_forward in conv_gemm.cu.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_EACH) conv_tensor_forward(
    const scalar_t* __restrict__ x, const scalar_t* __restrict__ filters,
    const accum_t* __restrict__ bias_or_null, const scalar_t* __restrict__ residual_or_null,
    scalar_t* __restrict__ y, accum_t* __restrict__ partial_or_null,
    accum_t* __restrict__ moments_or_null,
    int n, int h, int w, int c, int oh, int ow, int kh, int kw, int sh, int sw, int top, int left,
    int dh, int dw, int c_out, int groups, int splits)
{
    Product p = forward_product(x, filters, n, h, w, c, oh, ow, kh, kw, sh, sw, top, left, dh, dw,
                                c_out, groups);
    convolve<false>(p, share_of_block(p.results, splits, groups, 1), splits, bias_or_null,
                    residual_or_null, y, partial_or_null, moments_or_null);
}

// As conv_input_gradient in conv_gemm.cu, except that a weight which is not finite makes NaN also
// at those pixels near the border whose tap it is, but whose output does not exist.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_EACH) conv_tensor_input_gradient(
    const scalar_t* __restrict__ dy, const scalar_t* __restrict__ filters,
    scalar_t* __restrict__ dx, accum_t* __restrict__ partial_or_null,
    int n, int h, int w, int c, int oh, int ow, int kh, int kw, int sh, int sw, int top, int left,
    int dh, int dw, int c_out, int groups, int splits)
{
    Share own = share_of_block(c / groups, splits, groups, gradient_phases(h, w, sh, sw));
    Product p = gradient_product(dy, filters, own.phase, n, h, w, c, oh, ow, kh, kw, sh, sw, top,
                                 left, dh, dw, c_out, groups);
    convolve<true>(p, own, splits, nullptr, nullptr, dx, partial_or_null, nullptr);
}
