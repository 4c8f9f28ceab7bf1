// Average pooling of an NHWC tensor, and its backward pass. Padding is not counted: a window at
// the border is the average of the pixels that it sees.
//
//     x, dx (n, h, w, c)    y, dy (n, oh, ow, c)

// How many pixels of an image of `size` pixels a window of `taps` sees from `start` on.
static __device__ int pixels_seen(int start, int taps, int size) {
    int end = start + taps < size ? start + taps : size;
    return end - (start > 0 ? start : 0);
}

// One thread averages VEC channels. Each row of the window is summed on its own: one long sum over
// a large window would lose more digits.
extern "C" __global__ void avg_pool(
    const scalar_t* __restrict__ x, scalar_t* __restrict__ y,
    int n, int h, int w, int c, int oh, int ow,
    int kh, int kw, int sh, int sw, int top, int left)
{
    const int cv = c / VEC;
    GRID_STRIDE_LOOP(i, (index_t)n * oh * ow * cv) {
        Place p = place_of(i, oh, ow, cv);
        int y0 = p.y * sh - top, x0 = p.x * sw - left;
        Sums sum = {};
        for (int iy = y0 > 0 ? y0 : 0; iy < y0 + kh && iy < h; ++iy) {
            Sums row = {};
            for (int ix = x0 > 0 ? x0 : 0; ix < x0 + kw && ix < w; ++ix) {
                Scalars s = load(x, offset_of(p.n, iy, ix, p.c, h, w, cv));
                for (int v = 0; v < VEC; ++v) row.at[v] += (accum_t)s.at[v];
            }
            for (int v = 0; v < VEC; ++v) sum.at[v] += row.at[v];
        }
        accum_t seen = (accum_t)pixels_seen(y0, kh, h) * pixels_seen(x0, kw, w);
        for (int v = 0; v < VEC; ++v) sum.at[v] /= seen;
        store(y, i, sum);
    }
}

// dx = the sum of dy / (pixels in the window) over the windows that see this pixel. One thread
// gathers VEC channels of one pixel.
extern "C" __global__ void avg_pool_backward(
    const scalar_t* __restrict__ dy, scalar_t* __restrict__ dx,
    int n, int h, int w, int c, int oh, int ow,
    int kh, int kw, int sh, int sw, int top, int left)
{
    const int cv = c / VEC;
    GRID_STRIDE_LOOP(i, (index_t)n * h * w * cv) {
        Place p = place_of(i, h, w, cv);
        Sums sum = {};
        for_each_output(p.y, p.x, oh, ow, kh, kw, sh, sw, top, left, 1, 1,
                        [&](int oy, int ox, int, int) {
            accum_t seen = (accum_t)pixels_seen(oy * sh - top, kh, h)
                           * pixels_seen(ox * sw - left, kw, w);
            Scalars g = load(dy, offset_of(p.n, oy, ox, p.c, oh, ow, cv));
            for (int v = 0; v < VEC; ++v) sum.at[v] += (accum_t)g.at[v] / seen;
        });
        store(dx, i, sum);
    }
}
