// The last step of every sum that is split among blocks: sum[i] = the sum over s of slabs[s][i],
// always in the same order, so that the same input gives the same bits.
//
// There may be hundreds of slabs of few numbers, so what counts is that AT_ONCE reads are under way
// at a time. Past the last slab it is read again, and left out.
constexpr int AT_ONCE = 16;

extern "C" __global__ void sum_splits(
    const accum_t* __restrict__ slabs, accum_t* __restrict__ sum, long long size, int splits)
{
    GRID_STRIDE_LOOP(i, (index_t)size) {
        accum_t total = slabs[i];
        for (int first = 1; first < splits; first += AT_ONCE) {
            accum_t next[AT_ONCE];
#pragma unroll
            for (int k = 0; k < AT_ONCE; ++k)
                next[k] = slabs[(first + k < splits ? first + k : splits - 1) * (index_t)size + i];
#pragma unroll
            for (int k = 0; k < AT_ONCE; ++k)
                if (first + k < splits) total += next[k];
        }
        sum[i] = total;
    }
}
