// Activations element by element, and their backward pass with the gradient of a bias.
//
//     a  = g(z + other)
//     dz = da g'(z), in terms of a = g(z)
//     db[o] = the sum of dz[.][o], in the same pass over memory
//
// The launcher defines ACTIVATION, which says what g is.

#include "activation.cuh"
#include "reduce.cuh"

extern "C" __global__ void activate_sum(
    const scalar_t* __restrict__ z, const scalar_t* __restrict__ other_or_null,
    scalar_t* __restrict__ a, long long size, accum_t slope)
{
    GRID_STRIDE_LOOP(i, (index_t)((size + VEC - 1) / VEC)) {
        Scalars sum = load(z, i), other = other_or_null ? load(other_or_null, i) : zeros();
        for (int v = 0; v < VEC; ++v) {
            accum_t term = sum.at[v];
            if (other_or_null) term += (accum_t)other.at[v];
            sum.at[v] = (scalar_t)activate(term, ACTIVATION, slope);
        }
        store(a, i, sum);
    }
}

extern "C" __global__ void activation_backward(
    const scalar_t* __restrict__ da, const scalar_t* __restrict__ a, scalar_t* __restrict__ dz,
    long long size, accum_t slope)
{
    GRID_STRIDE_LOOP(i, (index_t)((size + VEC - 1) / VEC)) {
        Scalars g = load(da, i), out = load(a, i);
        for (int v = 0; v < VEC; ++v)
            g.at[v] = (scalar_t)deactivate((accum_t)g.at[v], (accum_t)out.at[v], ACTIVATION, slope);
        store(dz, i, g);
    }
}

// da, a, dz (rows, c) -> slabs (blocks, c), each block's part of db; sum_splits.cu adds them.
//
// A block owns a band of rows. Its threads stand side by side over the columns, VEC channels each,
// and where c is small in several rows at once, whose sums are added at the end.
constexpr int THREADS = 256, BLOCKS = 2;  // at a time on a multiprocessor: the launch has no more

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) activation_backward_bias(
    const scalar_t* __restrict__ da, const scalar_t* __restrict__ a,
    scalar_t* __restrict__ dz_or_null, accum_t* __restrict__ slabs, long long rows, int c)
{
    __shared__ accum_t shared[THREADS / 2 * VEC];
    const int cv = c / VEC, across = cv < THREADS ? cv : THREADS, lanes = THREADS / across;
    const int lane = threadIdx.x / across, first = threadIdx.x % across;
    const index_t band = (rows + gridDim.x - 1) / gridDim.x, start = blockIdx.x * band;
    const index_t end = start + band < rows ? start + band : (index_t)rows;
    for (int column = 0; column < cv; column += across) {
        const int here = column + first;
        Sums sum = {};
        if (lane < lanes && here < cv)
            for (index_t row = start + lane; row < end; row += lanes) {
                Scalars g = load(da, row * cv + here), out = load(a, row * cv + here);
                for (int v = 0; v < VEC; ++v) {
                    accum_t dz = deactivate((accum_t)g.at[v], (accum_t)out.at[v], ACTIVATION);
                    g.at[v] = (scalar_t)dz;
                    sum.at[v] += dz;
                }
                if (dz_or_null) store(dz_or_null, row * cv + here, g);
            }
        add_lanes<THREADS>(sum.at, shared, lane, lanes, across);
        if (lane == 0 && here < cv)
            for (int v = 0; v < VEC; ++v)
                slabs[((index_t)blockIdx.x * cv + here) * VEC + v] = sum.at[v];
    }
}
