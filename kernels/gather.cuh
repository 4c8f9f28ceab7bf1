// What gather.cu and augment.cu share: how the table is read, and which pixel stands where.

enum { CUT = 256, NO_IMAGE = 257, ENTRIES = 258 };

// A random number from 0 to n - 1.
static __device__ int below(int n, unsigned word) { return (int)__umulhi(word, (unsigned)n); }

// Which of `size` pixels stands at a place less than `size` before or behind them; -1 for none.
static __device__ int pixel_at(int place, int size, int reflect) {
    if (place >= 0 && place < size) return place;
    if (!reflect) return -1;
    return place < 0 ? -place : 2 * (size - 1) - place;
}

// Replaces `word` by the four random words of an image in an epoch.
static __device__ void draw(unsigned* word, long long image, long long epoch, unsigned key0,
                            unsigned key1) {
    word[0] = (unsigned)image;
    word[1] = (unsigned)((unsigned long long)image >> 32);
    word[2] = (unsigned)epoch;
    word[3] = (unsigned)((unsigned long long)epoch >> 32);
    philox4x32(word, key0, key1);
}
