// Convolutions in which an output depends on few inputs, without a matrix product: those of a first
// layer, with one to four input channels, and depthwise ones, where output channel o reads input
// channel o alone. They are bound by memory: what counts is that every access is wide and that
// neighbouring threads read and write side by side.
//
//     x (n, h, w, c)   filters (kh, kw, inputs, c_out)   y (n, oh, ow, c_out)
//
// The launcher defines DEPTHWISE as 1 (inputs = 1, c = c_out) or 0 (inputs = c). A thread handles
// VEC channels of the output.

#include "activation.cuh"
#include "reduce.cuh"

// What VEC output channels, number o of such groups, read at a pixel: each its own channel where
// the convolution is depthwise, all of them input number i otherwise. 0 in the padding, which is
// multiplied like any other value: a weight that is not finite shows there as everywhere. `pixel` is
// 0 then, and read: reads behind branches would wait for one another.
static __device__ Sums inputs_of(const scalar_t* x, bool inside, index_t pixel, int c, int o,
                                 int i) {
    Sums read;
    if (DEPTHWISE) {
        Scalars s = load(x, pixel * (c / VEC) + o);
        for (int v = 0; v < VEC; ++v) read.at[v] = (accum_t)s.at[v];
    } else
        for (int v = 0; v < VEC; ++v) read.at[v] = (accum_t)x[pixel * c + i];
    for (int v = 0; v < VEC; ++v) read.at[v] = inside ? read.at[v] : 0;
    return read;
}

// One thread computes VEC channels of one pixel.
extern "C" __global__ void conv_direct(
    const scalar_t* __restrict__ x, const scalar_t* __restrict__ filters,
    const accum_t* __restrict__ bias_or_null, const scalar_t* __restrict__ residual_or_null,
    scalar_t* __restrict__ y,
    int n, int h, int w, int c, int oh, int ow, int kh, int kw, int sh, int sw, int top, int left,
    int dh, int dw, int c_out)
{
    const int cv = c_out / VEC, inputs = DEPTHWISE ? 1 : c;
    GRID_STRIDE_LOOP(i, (index_t)n * oh * ow * cv) {
        Place p = place_of(i, oh, ow, cv);
        Sums sum = {};
        for (int ky = 0; ky < kh; ++ky) {
            int iy = p.y * sh - top + ky * dh;
            for (int kx = 0; kx < kw; ++kx) {
                int ix = p.x * sw - left + kx * dw;
                bool inside = iy >= 0 && iy < h && ix >= 0 && ix < w;
                index_t pixel = inside ? offset_of(p.n, iy, ix, 0, h, w, 1) : 0;
                for (int ic = 0; ic < inputs; ++ic) {
                    Sums read = inputs_of(x, inside, pixel, c, p.c, ic);
                    Scalars weights = load(filters, offset_of(ky, kx, ic, p.c, kw, inputs, cv));
                    for (int v = 0; v < VEC; ++v)
                        sum.at[v] += read.at[v] * (accum_t)weights.at[v];
                }
            }
        }
        Scalars out;
        for (int v = 0; v < VEC; ++v)
            out.at[v] = finish(sum.at[v], bias_or_null, p.c * VEC + v, residual_or_null,
                               i * VEC + v);
        store(y, i, out);
    }
}

// The input gradient of a depthwise convolution. One thread gathers VEC channels of one pixel from
// the outputs that the pixel reached.
extern "C" __global__ void conv_depthwise_input_gradient(
    const scalar_t* __restrict__ dy, const scalar_t* __restrict__ filters,
    scalar_t* __restrict__ dx,
    int n, int h, int w, int c, int oh, int ow, int kh, int kw, int sh, int sw, int top, int left,
    int dh, int dw)
{
    const int cv = c / VEC;
    GRID_STRIDE_LOOP(i, (index_t)n * h * w * cv) {
        Place p = place_of(i, h, w, cv);
        Sums sum = {};
        for_each_output(p.y, p.x, oh, ow, kh, kw, sh, sw, top, left, dh, dw,
                        [&](int oy, int ox, int ky, int kx) {
            Scalars g = load(dy, offset_of(p.n, oy, ox, p.c, oh, ow, cv));
            Scalars weights = load(filters, offset_of(0, ky, kx, p.c, kh, kw, cv));
            for (int v = 0; v < VEC; ++v) sum.at[v] += (accum_t)g.at[v] * (accum_t)weights.at[v];
        });
        store(dx, i, sum);
    }
}

// The weight gradient: slabs[block][term][o] = the sum of x dz over a band of pixels, where a term
// is a tap and an input, (ky * kw + kx) * inputs + ic. A thread keeps TERMS terms of VEC channels
// in registers and walks over pixels; where c_out is small, several lanes of a block share its
// band. sum_splits.cu adds the slabs.
//
// BLOCKS: on a multiprocessor at a time, as many as are launched; left to itself the compiler takes
// more registers than that, or fewer and local memory.
constexpr int THREADS = 256, BLOCKS = 2;

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) conv_direct_weight_gradient(
    const scalar_t* __restrict__ x, const scalar_t* __restrict__ dz, accum_t* __restrict__ slabs,
    int n, int h, int w, int c, int oh, int ow, int kh, int kw, int sh, int sw, int top, int left,
    int dh, int dw, int c_out)
{
    __shared__ accum_t shared[THREADS / 2 * VEC];
    const int cv = c_out / VEC, inputs = DEPTHWISE ? 1 : c, terms = kh * kw * inputs;
    const int across = cv < THREADS ? cv : THREADS, lanes = THREADS / across;
    const int lane = threadIdx.x / across, o = blockIdx.y * across + threadIdx.x % across;
    const int first_term = blockIdx.z * TERMS;
    const bool working = lane < lanes && o < cv;
    const index_t pixels = (index_t)n * oh * ow, band = (pixels + gridDim.x - 1) / gridDim.x;
    const index_t start = blockIdx.x * band, end = start + band < pixels ? start + band : pixels;

    int from_y[TERMS], from_x[TERMS], input[TERMS];
#pragma unroll
    for (int t = 0; t < TERMS; ++t) {
        int term = first_term + t, tap = term / inputs;
        input[t] = term % inputs;
        from_y[t] = term < terms ? tap / kw * dh - top : -2147483647 - 1;  // outside of all
        from_x[t] = tap % kw * dw - left;
    }
    accum_t sums[TERMS][VEC] = {};
    if (working)
        for (index_t m = start + lane; m < end; m += lanes) {
            Place p = place_of(m, oh, ow, 1);
            Scalars g = load(dz, m * cv + o);
#pragma unroll
            for (int t = 0; t < TERMS; ++t) {
                int iy = p.y * sh + from_y[t], ix = p.x * sw + from_x[t];
                bool inside = iy >= 0 && iy < h && ix >= 0 && ix < w;
                index_t pixel = inside ? offset_of(p.n, iy, ix, 0, h, w, 1) : 0;
                Sums read = inputs_of(x, inside, pixel, c, o, input[t]);
                for (int v = 0; v < VEC; ++v) sums[t][v] += read.at[v] * (accum_t)g.at[v];
            }
        }
#pragma unroll
    for (int t = 0; t < TERMS; ++t) {
        add_lanes<THREADS>(sums[t], shared, lane, lanes, across);
        if (working && lane == 0 && first_term + t < terms)
            for (int v = 0; v < VEC; ++v)
                slabs[(((index_t)blockIdx.x * terms + first_term + t) * cv + o) * VEC + v] =
                    sums[t][v];
    }
}
