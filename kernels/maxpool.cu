// Max pooling of an NHWC tensor, and its backward pass.
//
//     x, dx    (n, h, w, c)
//     y, dy    (n, oh, ow, c)
//     mask     (n, oh, ow, c), the place ky * kw + kx of the maximum inside its window
//
// Padding counts as minus infinity. The first maximum in row-major order wins a tie, and a NaN
// beats every number. The caller refuses windows that lie wholly in the padding.
//
// With relu, y = max(0, the maximum): the same as pooling after a ReLU, which need not be computed
// for all of x then. The mask holds (mask_t)-1, which is no place, where the maximum is not above
// 0, so that one gather is the backward pass of both, and needs neither x nor y.

// One thread finds the maxima of VEC channels.
extern "C" __global__ void max_pool(
    const scalar_t* __restrict__ x, scalar_t* __restrict__ y, mask_t* __restrict__ mask_or_null,
    int n, int h, int w, int c, int oh, int ow,
    int kh, int kw, int sh, int sw, int top, int left, int dh, int dw, int relu)
{
    const int cv = c / VEC;
    GRID_STRIDE_LOOP(i, (index_t)n * oh * ow * cv) {
        Place p = place_of(i, oh, ow, cv);
        Sums best = {};
        Masks place = {};
        bool none_yet = true;
        for (int ky = 0; ky < kh; ++ky) {
            int iy = p.y * sh - top + ky * dh;
            if (iy < 0 || iy >= h) continue;
            for (int kx = 0; kx < kw; ++kx) {
                int ix = p.x * sw - left + kx * dw;
                if (ix < 0 || ix >= w) continue;
                Scalars s = load(x, offset_of(p.n, iy, ix, p.c, h, w, cv));
                for (int v = 0; v < VEC; ++v) {
                    accum_t value = s.at[v];
                    bool first_nan = value != value && best.at[v] == best.at[v];
                    if (none_yet || value > best.at[v] || first_nan) {
                        best.at[v] = value;
                        place.at[v] = (mask_t)(ky * kw + kx);
                    }
                }
                none_yet = false;
            }
        }
        if (relu)
            for (int v = 0; v < VEC; ++v)
                if (best.at[v] <= 0) {
                    best.at[v] = 0;
                    place.at[v] = (mask_t)-1;
                }
        store(y, i, best);
        if (mask_or_null) store_masks(mask_or_null, i, place);
    }
}

// dx = the sum of dy over the windows whose maximum this pixel was. One thread gathers VEC
// channels of one pixel.
extern "C" __global__ void max_pool_backward(
    const scalar_t* __restrict__ dy, const mask_t* __restrict__ mask, scalar_t* __restrict__ dx,
    int n, int h, int w, int c, int oh, int ow,
    int kh, int kw, int sh, int sw, int top, int left, int dh, int dw)
{
    const int cv = c / VEC;
    GRID_STRIDE_LOOP(i, (index_t)n * h * w * cv) {
        Place p = place_of(i, h, w, cv);
        Sums sum = {};
        for_each_output(p.y, p.x, oh, ow, kh, kw, sh, sw, top, left, dh, dw,
                        [&](int oy, int ox, int ky, int kx) {
            index_t o = offset_of(p.n, oy, ox, p.c, oh, ow, cv);
            Masks place = load_masks(mask, o);
            Scalars g = load(dy, o);
            for (int v = 0; v < VEC; ++v)
                if (place.at[v] == ky * kw + kx) sum.at[v] += (accum_t)g.at[v];
        });
        store(dx, i, sum);
    }
}
