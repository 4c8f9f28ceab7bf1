// The Gaussian error linear unit, element by element, and its backward pass.
//
//     y  = x P(x)                 P(x) = (1 + erf(x / sqrt(2))) / 2, the normal distribution
//     dx = dy (P(x) + x p(x))     p(x) = exp(-x^2 / 2) / sqrt(2 pi), its density
//
// y does not say which x it came from (the function falls, then rises), so this pass reads x, where
// those of activation.cu read y. P is CUDA's own: 1 + erf would lose the digits of what is left of
// it far to the left. Where |x| > 40 only the limits are left: y = 0 or x, dx = 0 or dy.

constexpr double FAR = 40;

static __device__ accum_t density(accum_t x) {
    accum_t square = x * x, lost = fma(x, x, -square);  // exp would multiply what rounding took
    return (accum_t)0.39894228040143267794 * exp(-square / 2) * (1 - lost / 2);
}

extern "C" __global__ void gelu(
    const scalar_t* __restrict__ x, scalar_t* __restrict__ y, long long size)
{
    GRID_STRIDE_LOOP(i, (index_t)((size + VEC - 1) / VEC)) {
        Scalars s = load(x, i);
        for (int v = 0; v < VEC; ++v) {
            accum_t z = (accum_t)s.at[v];
            z = z < -(accum_t)FAR ? -(accum_t)FAR : z;  // NaN stays NaN
            s.at[v] = (scalar_t)(z * normcdf(z));
        }
        store(y, i, s);
    }
}

extern "C" __global__ void gelu_backward(
    const scalar_t* __restrict__ dy, const scalar_t* __restrict__ x, scalar_t* __restrict__ dx,
    long long size)
{
    GRID_STRIDE_LOOP(i, (index_t)((size + VEC - 1) / VEC)) {
        Scalars g = load(dy, i), s = load(x, i);
        for (int v = 0; v < VEC; ++v) {
            accum_t z = (accum_t)s.at[v];
            z = z < -(accum_t)FAR ? -(accum_t)FAR : z > (accum_t)FAR ? (accum_t)FAR : z;
            g.at[v] = (scalar_t)((accum_t)g.at[v] * (normcdf(z) + z * density(z)));
        }
        store(dx, i, g);
    }
}
