// One batch as gather.cu gathers it, of images that are also rotated, coloured and mixed.
//
//     x, y, images, labels, order, cursor, table and streamed as in gather.cu
//     choices  (3, CHOICES): cosine and sine of an angle, times ONE; the share of mixup, times 256
//     targets  (n, classes): in the place of y where images are mixed
//
// An image goes through these, in order, of which each takes and gives bytes, rounded:
//     crop and flip   as in gather.cu
//     rotation        by one of CHOICES angles around the middle, bilinear
//     colour          brightness, contrast about 128, saturation about the luma (ITU-R 601)
//     mixup           with the image that comes after it in the epoch
//     cutout          as in gather.cu, of the mixture
// All of it in integers: the CPU, which does the same, comes to the same bytes. The batch of a
// streamed data set has one image more than it gives, for the last to be mixed with.
//
// gather.cu stays, for it reads each byte once, with no thought for neighbours.

#include "philox.cuh"
#include "gather.cuh"

enum { CHOICES = 1024, ONE_BITS = 14, ONE = 1 << ONE_BITS, SECOND_DRAW = 0x5851F42D };

struct Settings { int h, w, c, crop, reflect, flip, rotate, colour, cutout; };

// An image, and what was drawn for it.
struct Drawn {
    const unsigned char* bytes;
    int top, left, mirrored, cosine, sine, brightness, contrast, saturation, share;
    int cut_top, cut_left;
};

static __device__ Drawn drawn(const Settings& s, const unsigned char* bytes, long long image,
                              long long epoch, const int* choices, unsigned key0, unsigned key1) {
    unsigned word[4];
    draw(word, image, epoch, key0, key1);
    Drawn d;
    d.bytes = bytes;
    d.top = below(2 * s.crop + 1, word[0]) - s.crop;
    d.left = below(2 * s.crop + 1, word[1]) - s.crop;
    d.mirrored = s.flip && (word[0] & 1);
    d.cut_top = below(s.h, word[2]) - s.cutout / 2;
    d.cut_left = below(s.w, word[3]) - s.cutout / 2;
    draw(word, image, epoch, key0, key1 ^ SECOND_DRAW);
    const int angle = below(CHOICES, word[0]);  // by the highest bits, the share by the lowest
    d.cosine = choices[angle];
    d.sine = choices[CHOICES + angle];
    d.share = choices[2 * CHOICES + (word[0] & (CHOICES - 1))];
    const int steps = 2 * s.colour + 1, least = 256 - s.colour;
    d.brightness = least + below(steps, word[1]);
    d.contrast = least + below(steps, word[2]);
    d.saturation = least + below(steps, word[3]);
    return d;
}

// pixel_at() of any place, however far.
static __device__ int far_pixel_at(int place, int size, int reflect) {
    if (reflect && (place <= -size || place >= 2 * size - 1))
        place = size == 1 ? 0 : place % (2 * (size - 1));
    return pixel_at(place, size, reflect);
}

// After crop and flip.
static __device__ int window_byte(const Settings& s, const Drawn& d, int y, int x, int channel) {
    y = far_pixel_at(y, s.h, s.reflect);
    x = far_pixel_at(x, s.w, s.reflect);
    if (y < 0 || x < 0) return 0;
    const int row = pixel_at(y + d.top, s.h, s.reflect);
    const int column = pixel_at((d.mirrored ? s.w - 1 - x : x) + d.left, s.w, s.reflect);
    if (row < 0 || column < 0) return 0;
    return d.bytes[offset_of(0, row, column, channel, s.h, s.w, s.c)];
}

static __device__ int rotated_byte(const Settings& s, const Drawn& d, int y, int x, int channel) {
    if (!s.rotate) return window_byte(s, d, y, x, channel);
    // Twice the way from the middle, so that it is whole; places are in halves of 1 / ONE then.
    const int dy = 2 * y - (s.h - 1), dx = 2 * x - (s.w - 1);
    const int from_y = d.cosine * dy - d.sine * dx + (s.h - 1) * ONE;
    const int from_x = d.sine * dy + d.cosine * dx + (s.w - 1) * ONE;
    const int top = from_y >> (ONE_BITS + 1), left = from_x >> (ONE_BITS + 1);
    const int down = from_y >> (ONE_BITS - 7) & 255, right = from_x >> (ONE_BITS - 7) & 255;
    const int upper = window_byte(s, d, top, left, channel) * (256 - right)
                    + window_byte(s, d, top, left + 1, channel) * right;
    const int lower = window_byte(s, d, top + 1, left, channel) * (256 - right)
                    + window_byte(s, d, top + 1, left + 1, channel) * right;
    return (upper * (256 - down) + lower * down + (1 << 15)) >> 16;
}

// value + (byte - value) * factor / 256, within the bytes.
static __device__ int away_from(int value, int byte, int factor) {
    const int moved = value + (((byte - value) * factor + 128) >> 8);
    return moved < 0 ? 0 : moved > 255 ? 255 : moved;
}

static __device__ int toned_byte(const Settings& s, const Drawn& d, int y, int x, int channel) {
    return away_from(128, away_from(0, rotated_byte(s, d, y, x, channel), d.brightness),
                     d.contrast);
}

// Of a pixel of three channels whose saturation changes; else nothing needs it.
static __device__ int luma_of(const Settings& s, const Drawn& d, int y, int x) {
    if (!s.colour || s.c != 3) return 0;
    int sum = 128;
#pragma unroll 1  // or the four neighbours of three channels are a long piece of code
    for (int channel = 0; channel < 3; ++channel)
        sum += toned_byte(s, d, y, x, channel) * (channel == 0 ? 77 : channel == 1 ? 150 : 29);
    return sum >> 8;
}

static __device__ int coloured_byte(const Settings& s, const Drawn& d, int y, int x, int channel,
                                    int luma) {
    if (!s.colour) return rotated_byte(s, d, y, x, channel);
    const int toned = toned_byte(s, d, y, x, channel);
    return s.c == 3 ? away_from(luma, toned, d.saturation) : toned;
}

// One thread a pixel: what is drawn, and the luma, serve all of its channels.
extern "C" __global__ void augment_batch(
    const scalar_t* __restrict__ table, scalar_t* __restrict__ x, long long* __restrict__ y_or_null,
    float* __restrict__ targets_or_null, const unsigned char* __restrict__ images,
    const long long* __restrict__ labels, const long long* __restrict__ order,
    const long long* __restrict__ cursor, const int* __restrict__ choices, long long total,
    long long streamed, int n, int h, int w, int c, int classes, int crop, int reflect, int flip,
    int rotate, int colour, int mixup, int cutout, unsigned key0, unsigned key1)
{
    const Settings s = {h, w, c, crop, reflect, flip, rotate, colour, cutout};
    const float missing = __int_as_float(0x7fffffff);
    GRID_STRIDE_LOOP(i, (index_t)n * h * w) {
        Place p = place_of(i, h, w, 1);
        long long place = cursor[0] + p.n, epoch = cursor[1];
        long long other_place = !mixup ? place : streamed || place + 1 < total ? place + 1 : 0;
        bool exists = place >= 0 && place < total && other_place < total;
        long long image = exists ? order[place] : -1, other = exists ? order[other_place] : -1;
        const long long numbers = streamed ? streamed : total;
        exists = image >= 0 && image < numbers && other >= 0 && other < numbers;
        long long lies = streamed ? place : image, other_lies = streamed ? other_place : other;

        Drawn d = {}, e = {};  // this image, and the one that it is mixed with
        if (exists) {
            d = drawn(s, images + offset_of((index_t)lies, 0, 0, 0, h, w, c), image, epoch,
                      choices, key0, key1);
            if (mixup)
                e = drawn(s, images + offset_of((index_t)other_lies, 0, 0, 0, h, w, c), other,
                          epoch, choices, key0, key1);
        }
        if (!mixup) {
            if (p.y == 0 && p.x == 0) y_or_null[p.n] = exists ? labels[lies] : -1;
        } else if (p.y == 0) {
            for (int k = p.x; k < classes; k += w)
                targets_or_null[(index_t)p.n * classes + k] = !exists ? missing
                    : (labels[lies] == k ? d.share / 256.0f : 0.0f)
                    + (labels[other_lies] == k ? (256 - d.share) / 256.0f : 0.0f);
        }

        const bool cut = cutout && p.y >= d.cut_top && p.y < d.cut_top + cutout
                      && p.x >= d.cut_left && p.x < d.cut_left + cutout;
        const bool seen = exists && !cut;
        const int luma = seen ? luma_of(s, d, p.y, p.x) : 0;
        const int other_luma = seen && mixup ? luma_of(s, e, p.y, p.x) : 0;
#pragma unroll 1
        for (int channel = 0; channel < c; ++channel) {
            int entry = exists ? CUT : NO_IMAGE;
            if (seen) {
                entry = coloured_byte(s, d, p.y, p.x, channel, luma);
                if (mixup)
                    entry = (entry * d.share + coloured_byte(s, e, p.y, p.x, channel, other_luma)
                             * (256 - d.share) + 128) >> 8;
            }
            x[i * c + channel] = table[channel * ENTRIES + entry];
        }
    }
}
