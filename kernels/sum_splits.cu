// The last step of every sum that is split among blocks: sum[i] = the sum over s of slabs[s][i],
// always in the same order, so that the same input gives the same bits.
extern "C" __global__ void sum_splits(
    const accum_t* __restrict__ slabs, accum_t* __restrict__ sum, long long size, int splits)
{
    GRID_STRIDE_LOOP(i, (index_t)size) {
        accum_t total = slabs[i];
        for (int s = 1; s < splits; ++s) total += slabs[s * (index_t)size + i];
        sum[i] = total;
    }
}
