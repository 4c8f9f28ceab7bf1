// Convolution as a matrix product whose left matrix is never stored: an implicit GEMM.
//
//     forward          y[m][o]  = sum over k of X[m][k] W[k][o]     m = (in, oy, ox)  k = (ky, kx, ic)
//     input gradient   dx[m][i] = sum over k of D[m][k] V[k][i]     m = (in, iy, ix)  k = (ky, kx, oc)
//
// X is what im2col would write: X[m][k] = x[in][oy * sh - top + ky * dh][ox * sw - left + kx * dw][ic].
// A block reads the piece that it needs straight from x into shared memory, and fills in zeros where
// the pixel lies in the padding. D holds the outputs that pixel m reached through tap (ky, kx).
// W and V are the filters (kh, kw, c / groups, c_out), read with rows and columns swapped for V.
//
// Which outputs reach a pixel: with stride s, output p covers pixel i by tap t where
// p s - pad + t d = i. Pixels i = phase, phase + s, phase + 2 s, ... have the same taps, and pixel
// number q of such a phase has outputs q + start, q + start + step, ...: once more a convolution,
// of stride 1. So the gradient is s * s small convolutions, one for each phase, which together write
// every pixel once, without a wasted product. Near the border a tap may come from an output that
// does not exist. Zeros stand for those; but zero times a weight that is infinite or NaN is NaN, at a
// pixel which never saw that weight. So the zeros are written as -0, and products of a tile with
// such a weight leave them out.

#include "gemm_tile.cuh"
#include "activation.cuh"

// One axis of a convolution. Its output number p reads, with tap number t, the pixel
// p * stride + start + t * step, and weighs it with tap first + t * every of the filter.
struct Axis {
    int size;                  // pixels that may be read
    int outputs;               // p goes from 0 to outputs - 1
    int stride, start, step;
    int taps, first, every;    // t goes from 0 to taps - 1
    int offset, spacing;       // output p is pixel offset + p * spacing of what is written
};

static __device__ Axis forward_axis(int size, int outputs, int taps, int stride, int pad,
                                    int dilation) {
    return {size, outputs, stride, -pad, dilation, taps, 0, 1, 0, 1};
}

static __device__ int common_divisor(int a, int b) {
    while (b != 0) {
        int rest = a % b;
        a = b;
        b = rest;
    }
    return a;
}

// size: pixels of the image; outputs: of the forward pass, which are read here.
static __device__ Axis gradient_axis(int phase, int size, int outputs, int taps, int stride,
                                     int pad, int dilation) {
    int common = common_divisor(stride, dilation), every = stride / common, first = 0;
    while (first < taps && (phase + pad - first * dilation) % stride != 0) ++first;
    Axis a;
    a.size = outputs;
    a.outputs = phase < size ? (size - 1 - phase) / stride + 1 : 0;
    a.stride = 1;
    a.start = (phase + pad - first * dilation) / stride;
    a.step = -(dilation / common);
    a.taps = first < taps ? (taps - 1 - first) / every + 1 : 0;
    a.first = first;
    a.every = every;
    a.offset = phase;
    a.spacing = stride;
    return a;
}

// Position k = (ty * taps_x + tx) * channels + c in the sum.
struct Term {
    int ty, tx, c;

    __device__ Term(int k, int taps_x, int channels) {
        c = k % channels;
        k /= channels;
        tx = taps_x > 0 ? k % taps_x : 0;
        ty = taps_x > 0 ? k / taps_x : 0;
    }
    __device__ void advance(int taps_x, int channels) {
        c += TILE_K;
        while (c >= channels) {
            c -= channels;
            if (++tx == taps_x) {
                tx = 0;
                ++ty;
            }
        }
    }
};

// The tensors of one product, in the terms of the forward pass or of the gradient.
struct Product {
    const scalar_t *x, *w;
    int images;
    Axis vertical, horizontal;
    int x_channels, terms;       // of x, and how many of them a group reads: c in k = (ky, kx, c)
    int y_channels, results;     // of y, and how many of them a group writes
    int filter_columns, filter_inputs, filter_outputs;  // kw, c / groups, c_out
};

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

// One block: a tile of one group of one phase, summed over one of the splits of k.
template <bool GRADIENT>
static __device__ void multiply(const Product& p, index_t first_row, int first_result, int group,
                                int split, int splits, Tiles& tiles,
                                accum_t (&sums)[SUMS_M][SUMS_N]) {
    const Axis &v = p.vertical, &h = p.horizontal;
    const index_t rows = (index_t)p.images * v.outputs * h.outputs;
    const int length = v.taps * h.taps * p.terms;
    const int stages = (length + TILE_K - 1) / TILE_K, share = (stages + splits - 1) / splits;
    const int start = split * share, end = min(start + share, stages);

    // This thread's part of A: VEC neighbouring channels of these rows.
    constexpr int PARTS = TILE_K / VEC, A_LOADS = loads_each<VEC, TILE_M * TILE_K>;
    const int a_term = (int)threadIdx.x % PARTS * VEC, a_row = threadIdx.x / PARTS;
    int top[A_LOADS], left[A_LOADS];
    index_t image[A_LOADS];
#pragma unroll
    for (int i = 0; i < A_LOADS; ++i) {
        index_t row = first_row + a_row + i * (THREADS / PARTS);
        index_t line = row / h.outputs;
        left[i] = (int)(row % h.outputs) * h.stride + h.start;
        top[i] = (int)(line % v.outputs) * v.stride + v.start;
        image[i] = row < rows ? line / v.outputs * v.size : -1;
    }
    Term term(start * TILE_K + a_term, h.taps, p.terms);

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
        bool inside = term.ty < v.taps;
#pragma unroll
        for (int i = 0; i < A_LOADS; ++i) {
            int y = top[i] + term.ty * v.step, x = left[i] + term.tx * h.step;
            bool seen = inside && image[i] >= 0 && y >= 0 && y < v.size && x >= 0 && x < h.size;
            index_t pixel = (image[i] + y) * h.size + x;
            a_chunk[i] = seen ? chunk_at<VEC>(p.x, pixel * p.x_channels + group * p.terms + term.c)
                              : zero_chunk<VEC>();
            absent[i] = !seen;
        }
        int tap = (v.first + term.ty * v.every) * p.filter_columns + h.first + term.tx * h.every;
#pragma unroll
        for (int i = 0; i < B_LOADS; ++i) {
            if (GRADIENT) {
                int result = first_result + b_row + i * (THREADS / COLUMNS);
                index_t filter = (index_t)tap * p.filter_inputs + result;
                b_chunk[i] = inside && result < p.results
                    ? chunk_at<B_VEC>(p.w, filter * p.filter_outputs + group * p.terms + term.c)
                    : zero_chunk<B_VEC>();
            } else {
                int k = b_stage * TILE_K + b_row + i * (THREADS / COLUMNS);
                int result = first_result + b_column;
                b_chunk[i] = k < length && result < p.results
                    ? chunk_at<B_VEC>(p.w, (index_t)k * p.filter_outputs + group * p.results + result)
                    : zero_chunk<B_VEC>();
            }
        }
        term.advance(h.taps, p.terms);
        ++b_stage;
    };
    auto put = [&](int buffer) {  // returns whether a weight is not finite
        const accum_t zero = 0;
        bool odd = false;
#pragma unroll
        for (int i = 0; i < A_LOADS; ++i)
#pragma unroll
            for (int e = 0; e < VEC; ++e) {
                accum_t value = GRADIENT ? (absent[i] ? -zero : a_chunk[i].at[e] + zero)  // -0 + 0 is 0
                                         : (accum_t)a_chunk[i].at[e];
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

// What is done to a sum before it is stored.
static __device__ scalar_t finish(accum_t z, const accum_t* bias, int channel,
                                  const scalar_t* residual, index_t place) {
    if (bias) z += bias[channel];
    if (residual) z += (accum_t)residual[place];
    return (scalar_t)activate(z, ACTIVATION);
}

// Blocks: results within a group vary fastest, so that those which read the same pixels run
// together; then splits, groups, phases, and rows.
template <bool GRADIENT>
static __device__ void convolve(Product p, int block, int groups, int splits, index_t first_row,
                                int height, int width, const accum_t* bias,
                                const scalar_t* residual, scalar_t* y, accum_t* partial,
                                Tiles& tiles) {
    const Axis &v = p.vertical, &h = p.horizontal;
    const int columns = (p.results + TILE_N - 1) / TILE_N;
    const int first_result = block % columns * TILE_N;
    const int split = block / columns % splits, group = block / columns / splits % groups;
    const index_t rows = (index_t)p.images * v.outputs * h.outputs;
    if (first_row >= rows) return;

    accum_t sums[SUMS_M][SUMS_N] = {};
    multiply<GRADIENT>(p, first_row, first_result, group, split, splits, tiles, sums);

    const index_t size = (index_t)p.images * height * width * p.y_channels;
#pragma unroll
    for (int i = 0; i < SUMS_M; ++i) {
        index_t row = first_row + tile_row(i);
        if (row >= rows) continue;
        index_t line = row / h.outputs;
        index_t pixel_line = line / v.outputs * height + line % v.outputs * v.spacing + v.offset;
        index_t pixel = pixel_line * width + row % h.outputs * h.spacing + h.offset;
#pragma unroll
        for (int j = 0; j < SUMS_N; j += VEC_N) {
            int result = first_result + tile_column(j);
            if (result >= p.results) continue;
            int channel = group * p.results + result;
            index_t place = pixel * p.y_channels + channel;
            if (partial) {
#pragma unroll
                for (int e = 0; e < VEC_N; ++e) partial[split * size + place + e] = sums[i][j + e];
            } else {
                Chunk<VEC_N> chunk;
#pragma unroll
                for (int e = 0; e < VEC_N; ++e)
                    chunk.at[e] = finish(sums[i][j + e], bias, channel + e, residual, place + e);
                *reinterpret_cast<Chunk<VEC_N>*>(y + place) = chunk;
            }
        }
    }
}

// x (n, h, w, c), filters (kh, kw, c / groups, c_out), bias (c_out), residual and y (n, oh, ow, c_out).
// With a partial (splits, n, oh, ow, c_out) only sums are written, to it; finish_splits does the rest.
extern "C" __global__ void __launch_bounds__(THREADS) conv_forward(
    const scalar_t* __restrict__ x, const scalar_t* __restrict__ filters,
    const accum_t* __restrict__ bias_or_null, const scalar_t* __restrict__ residual_or_null,
    scalar_t* __restrict__ y, accum_t* __restrict__ partial_or_null,
    int n, int h, int w, int c, int oh, int ow, int kh, int kw, int sh, int sw, int top, int left,
    int dh, int dw, int c_out, int groups, int splits)
{
    __shared__ Tiles tiles;
    Product p = {x, filters, n, forward_axis(h, oh, kh, sh, top, dh),
                 forward_axis(w, ow, kw, sw, left, dw), c, c / groups, c_out, c_out / groups,
                 kw, c / groups, c_out};
    int blocks_a_row = (p.results + TILE_N - 1) / TILE_N * splits * groups;
    index_t first_row = (index_t)(blockIdx.x / blocks_a_row) * TILE_M;
    convolve<false>(p, blockIdx.x % blocks_a_row, groups, splits, first_row, oh, ow, bias_or_null,
                    residual_or_null, y, partial_or_null, tiles);
}

// dy (n, oh, ow, c_out), filters as above -> dx (n, h, w, c).
extern "C" __global__ void __launch_bounds__(THREADS) conv_input_gradient(
    const scalar_t* __restrict__ dy, const scalar_t* __restrict__ filters,
    scalar_t* __restrict__ dx, accum_t* __restrict__ partial_or_null,
    int n, int h, int w, int c, int oh, int ow, int kh, int kw, int sh, int sw, int top, int left,
    int dh, int dw, int c_out, int groups, int splits)
{
    __shared__ Tiles tiles;
    int blocks_a_row = (c / groups + TILE_N - 1) / TILE_N * splits * groups;
    int block = blockIdx.x % blocks_a_row, phases_x = min(sw, w), phases = min(sh, h) * phases_x;
    int phase = blockIdx.x / blocks_a_row % phases;
    index_t first_row = (index_t)(blockIdx.x / blocks_a_row / phases) * TILE_M;
    Product p = {dy, filters, n, gradient_axis(phase / phases_x, h, oh, kh, sh, top, dh),
                 gradient_axis(phase % phases_x, w, ow, kw, sw, left, dw), c_out, c_out / groups,
                 c, c / groups, kw, c / groups, c_out};
    convolve<true>(p, block, groups, splits, first_row, h, w, nullptr, nullptr, dx,
                   partial_or_null, tiles);
}

// y = g(the sum of the splits + bias + residual), always in the same order.
extern "C" __global__ void finish_splits(
    const accum_t* __restrict__ partial, const accum_t* __restrict__ bias_or_null,
    const scalar_t* __restrict__ residual_or_null, scalar_t* __restrict__ y, long long size,
    int c_out, int splits)
{
    GRID_STRIDE_LOOP(i, (index_t)size) {
        accum_t z = 0;
        for (int split = 0; split < splits; ++split) z += partial[split * (index_t)size + i];
        y[i] = finish(z, bias_or_null, (int)(i % c_out), residual_or_null, i);
    }
}
