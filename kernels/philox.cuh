// Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3",
// 2011): four random words as a pure function of a counter of four words and a key of two. Nothing
// is stored, any thread can draw any word again, and gpucnn/rng.py draws the same on the CPU.

// Replaces the counter in `word` by the random words.
static __device__ void philox4x32(unsigned* word, unsigned key0, unsigned key1) {
    for (int round = 0; round < 10; ++round) {
        unsigned high0 = __umulhi(0xD2511F53u, word[0]), low0 = 0xD2511F53u * word[0];
        unsigned high1 = __umulhi(0xCD9E8D57u, word[2]), low1 = 0xCD9E8D57u * word[2];
        word[0] = high1 ^ word[1] ^ key0;
        word[1] = low1;
        word[2] = high0 ^ word[3] ^ key1;
        word[3] = low0;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
}
