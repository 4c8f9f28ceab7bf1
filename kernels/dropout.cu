// Dropout whose mask is drawn anew from a counter wherever it is needed, and never stored.
//
//     y[i] = x[i] * scale   if random word i >= threshold, else 0
//
// The random words are Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as
// easy as 1, 2, 3", 2011): block j of four words is a pure function of (j, stream, key), so forward
// and backward draw the same mask, and so does gpucnn/rng.py on the CPU.

static __device__ void philox_round(unsigned* word, unsigned key0, unsigned key1) {
    unsigned high0 = __umulhi(0xD2511F53u, word[0]), low0 = 0xD2511F53u * word[0];
    unsigned high1 = __umulhi(0xCD9E8D57u, word[2]), low1 = 0xCD9E8D57u * word[2];
    word[0] = high1 ^ word[1] ^ key0;
    word[1] = low1;
    word[2] = high0 ^ word[3] ^ key1;
    word[3] = low0;
}

// One thread draws one block of four words and serves four elements.
extern "C" __global__ void dropout(
    const scalar_t* __restrict__ x, scalar_t* __restrict__ y, long long size,
    unsigned threshold, accum_t scale,
    unsigned key0, unsigned key1, unsigned stream0, unsigned stream1)
{
    GRID_STRIDE_LOOP(j, (index_t)((size + 3) / 4)) {
        unsigned word[4] = {(unsigned)j, (unsigned)((unsigned long long)j >> 32), stream0, stream1};
        unsigned k0 = key0, k1 = key1;
        for (int round = 0; round < 10; ++round) {
            philox_round(word, k0, k1);
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        for (int v = 0; v < 4 && 4 * j + v < size; ++v)
            y[4 * j + v] = (scalar_t)(word[v] >= threshold ? (accum_t)x[4 * j + v] * scale : 0);
    }
}
