// The last step of a convolution whose sum over k was split among blocks:
//
//     y = g(the sum over s of partial[s] + bias + residual)
//
// always in the same order, so that the same input gives the same bits.

#include "activation.cuh"

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
