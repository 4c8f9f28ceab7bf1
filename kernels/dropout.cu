// Dropout whose mask is drawn anew from a counter wherever it is needed, and never stored.
//
//     y[i] = x[i] * scale   if random word i >= threshold, else 0
//
// Block j of four random words is Philox of the counter (j, stream), so forward and backward draw
// the same mask. The stream, which is another one in each step, is read from memory: a CUDA graph
// replays a launch with the arguments that it was captured with.

#include "philox.cuh"

// One thread draws one block of four words and serves four elements.
extern "C" __global__ void dropout(
    const scalar_t* __restrict__ x, scalar_t* __restrict__ y, long long size,
    unsigned threshold, accum_t scale,
    unsigned key0, unsigned key1, const long long* __restrict__ stream)
{
    const unsigned long long s = (unsigned long long)stream[0];
    const unsigned stream0 = (unsigned)s, stream1 = (unsigned)(s >> 32);
    GRID_STRIDE_LOOP(j, (index_t)((size + 3) / 4)) {
        unsigned word[4] = {(unsigned)j, (unsigned)((unsigned long long)j >> 32), stream0, stream1};
        philox4x32(word, key0, key1);
        for (int v = 0; v < 4 && 4 * j + v < size; ++v)
            y[4 * j + v] = (scalar_t)(word[v] >= threshold ? (accum_t)x[4 * j + v] * scale : 0);
    }
}
