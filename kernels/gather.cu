// One batch of a data set that lies on the device, augmented and normalised, in one launch.
//
//     images  (total, h, w, c)    labels  (total,)    order  (total,), the epoch's permutation
//     x       (n, h, w, c)        y       (n,)        cursor (2,): the place in order, the epoch
//     table   (c, ENTRIES), what to write for each byte of a channel, for CUT and for NO_IMAGE
//
// Where the data set is streamed, images, labels and order hold `total` of its `streamed` images,
// and order says which: image i of the batch is images[cursor[0] + i].
//
// Image i of the batch is images[order[cursor[0] + i]]. It is padded by `crop` pixels, a window of
// h x w is taken from it, mirrored or not, and a square of `cutout` pixels a side is cut out of
// that. What is drawn is a function of (key, number of the image, epoch) alone, so it does not
// depend on the batch. The cursor is read from memory, so that a CUDA graph can replay the launch.
//
// There are only 256 values of a byte: the host computes what becomes of each, so that no
// arithmetic is left here that might round otherwise than on the CPU.

#include "philox.cuh"
#include "gather.cuh"

// One thread writes VEC neighbours of an image row, whatever the number of channels: w * c is a
// multiple of 16 bytes for most images, c alone for hardly any.
extern "C" __global__ void gather_batch(
    const scalar_t* __restrict__ table, scalar_t* __restrict__ x, long long* __restrict__ y,
    const unsigned char* __restrict__ images, const long long* __restrict__ labels,
    const long long* __restrict__ order, const long long* __restrict__ cursor,
    long long total, long long streamed, int n, int h, int w, int c,
    int crop, int reflect, int flip, int cutout, unsigned key0, unsigned key1)
{
    const int groups = w * c / VEC;
    GRID_STRIDE_LOOP(i, (index_t)n * h * groups) {
        Place p = place_of(i, h, groups, 1);
        long long place = cursor[0] + p.n, epoch = cursor[1];
        long long image = place >= 0 && place < total ? order[place] : -1;
        bool exists = image >= 0 && image < (streamed ? streamed : total);
        long long lies = streamed ? place : image;
        if (p.y == 0 && p.x == 0) y[p.n] = exists ? labels[lies] : -1;

        unsigned word[4];
        draw(word, image, epoch, key0, key1);
        int row = pixel_at(p.y + below(2 * crop + 1, word[0]) - crop, h, reflect);
        int left = below(2 * crop + 1, word[1]) - crop;
        bool mirrored = flip && (word[0] & 1);  // the row is chosen by the highest bits
        int cut_top = below(h, word[2]) - cutout / 2, cut_left = below(w, word[3]) - cutout / 2;
        bool cut_row = p.y >= cut_top && p.y < cut_top + cutout;

        int at = p.x * VEC / c, channel = p.x * VEC % c;
        Scalars s;
        for (int v = 0; v < VEC; ++v) {
            int column = pixel_at((mirrored ? w - 1 - at : at) + left, w, reflect);
            int entry = 0;
            if (!exists) entry = NO_IMAGE;
            else if (cut_row && at >= cut_left && at < cut_left + cutout) entry = CUT;
            else if (row >= 0 && column >= 0)
                entry = images[offset_of((index_t)lies, row, column, channel, h, w, c)];
            s.at[v] = table[channel * ENTRIES + entry];
            if (++channel == c) { channel = 0; ++at; }
        }
        store(x, i, s);
    }
}
