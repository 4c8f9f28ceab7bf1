// Unfold the windows of a convolution into the rows of a matrix, and fold them back.
//
//     x    (n, h, w, c)
//     cols (n * oh * ow, kh * kw * c)
//     cols[(in, oy, ox)][(ky, kx, ic)] =
//         x[in][oy * sh - top + ky * dh][ox * sw - left + kx * dw][ic], or 0 in the padding
//
// With the columns at hand a convolution is one matrix product, cols @ w.reshape(kh * kw * c, -1).

// One thread copies VEC channels of cols. Neighbouring threads hold neighbouring channels, then
// neighbouring taps, which lie side by side in both tensors: reads and writes coalesce.
extern "C" __global__ void im2col(
    const scalar_t* __restrict__ x, scalar_t* __restrict__ cols,
    int n, int h, int w, int c, int oh, int ow,
    int kh, int kw, int sh, int sw, int top, int left, int dh, int dw)
{
    const int cv = c / VEC;
    GRID_STRIDE_LOOP(i, (index_t)n * oh * ow * kh * kw * cv) {
        index_t r = i;
        int ic = r % cv;  r /= cv;
        int kx = r % kw;  r /= kw;
        int ky = r % kh;  r /= kh;
        int ox = r % ow;  r /= ow;
        int oy = r % oh;  r /= oh;
        int iy = oy * sh - top + ky * dh;
        int ix = ox * sw - left + kx * dw;
        bool inside = iy >= 0 && iy < h && ix >= 0 && ix < w;
        store(cols, i, inside ? load(x, offset_of(r, iy, ix, ic, h, w, cv)) : zeros());
    }
}

// The adjoint of im2col: x[...] = the sum of all entries of cols that im2col copied from there.
// One thread gathers the sum of VEC elements of x.
extern "C" __global__ void col2im(
    const scalar_t* __restrict__ cols, scalar_t* __restrict__ x,
    int n, int h, int w, int c, int oh, int ow,
    int kh, int kw, int sh, int sw, int top, int left, int dh, int dw)
{
    const int cv = c / VEC;
    GRID_STRIDE_LOOP(i, (index_t)n * h * w * cv) {
        Place p = place_of(i, h, w, cv);
        Sums sum = {};
        for_each_output(p.y, p.x, oh, ow, kh, kw, sh, sw, top, left, dh, dw,
                        [&](int oy, int ox, int ky, int kx) {
            index_t row = offset_of(p.n, oy, ox, 0, oh, ow, 1);
            Scalars term = load(cols, offset_of(row, ky, kx, p.c, kh, kw, cv));
            for (int v = 0; v < VEC; ++v) sum.at[v] += (accum_t)term.at[v];
        });
        store(x, i, sum);
    }
}
