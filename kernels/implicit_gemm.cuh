// Convolution as a matrix product whose left matrix is never stored: an implicit GEMM. What
// conv_gemm.cu and conv_tensor.cu have in common: which element of which tensor stands where in the
// matrices. docs/kernels.md explains it with drawings.
//
//     forward          y[m][o]  = sum over k of X[m][k] W[k][o]   m = (in, oy, ox) k = (ky, kx, ic)
//     input gradient   dx[m][i] = sum over k of D[m][k] V[k][i]   m = (in, iy, ix) k = (ky, kx, oc)
//
// X is what im2col would write:
//
//     X[m][k] = x[in][oy * sh - top + ky * dh][ox * sw - left + kx * dw][ic]
//
// A block reads the piece that it needs straight from x into shared memory, and fills in zeros
// where the pixel lies in the padding. D holds the outputs that pixel m reached through tap
// (ky, kx). W and V are the filters (kh, kw, c / groups, c_out), read with rows and columns swapped
// for V.
//
// Which outputs reach a pixel: with stride s, output p covers pixel i by tap t where
// p s - pad + t d = i. Pixels i = phase, phase + s, phase + 2 s, ... have the same taps, and pixel
// number q of such a phase has outputs q + start, q + start + step, ...: once more a convolution,
// of stride 1. So the gradient is s * s small convolutions, one for each phase, which together
// write every pixel once, without a wasted product.

// One axis of a convolution. Its output number p reads, with tap number t, the pixel
// p * stride + start + t * step, and weighs it with tap first + t * every of the filter.
struct Axis {
    int size;                  // pixels that may be read
    int outputs;               // p goes from 0 to outputs - 1
    int stride, start, step;
    int taps, first, every;    // t goes from 0 to taps - 1
    int offset, spacing;       // output p is pixel offset + p * spacing of what is written
};

static __device__ Axis forward_axis(int size, int outputs, int taps, int stride, int pad,
                                    int dilation) {
    return {size, outputs, stride, -pad, dilation, taps, 0, 1, 0, 1};
}

static __device__ int common_divisor(int a, int b) {
    while (b != 0) {
        int rest = a % b;
        a = b;
        b = rest;
    }
    return a;
}

// size: pixels of the image; outputs: of the forward pass, which are read here.
static __device__ Axis gradient_axis(int phase, int size, int outputs, int taps, int stride,
                                     int pad, int dilation) {
    int common = common_divisor(stride, dilation), every = stride / common, first = 0;
    while (first < taps && (phase + pad - first * dilation) % stride != 0) ++first;
    Axis a;
    a.size = outputs;
    a.outputs = phase < size ? (size - 1 - phase) / stride + 1 : 0;
    a.stride = 1;
    a.start = (phase + pad - first * dilation) / stride;
    a.step = -(dilation / common);
    a.taps = first < taps ? (taps - 1 - first) / every + 1 : 0;
    a.first = first;
    a.every = every;
    a.offset = phase;
    a.spacing = stride;
    return a;
}

// Position k = (ty * taps_x + tx) * channels + c in the sum.
struct Term {
    int ty, tx, c;

    __device__ Term(int k, int taps_x, int channels) {
        c = k % channels;
        k /= channels;
        tx = taps_x > 0 ? k % taps_x : 0;
        ty = taps_x > 0 ? k / taps_x : 0;
    }
    __device__ void advance(int by, int taps_x, int channels) {
        c += by;
        while (c >= channels) {
            c -= channels;
            if (++tx == taps_x) {
                tx = 0;
                ++ty;
            }
        }
    }
};

// Where the pixels that row m of X holds begin: at (top, left) of an image that begins `lines` rows
// of pixels into x. lines is -1 where there is no row m.
struct Corner { int top, left; index_t lines; };

// The tensors of one product, in the terms of the forward pass or of the gradient.
struct Product {
    const scalar_t *x, *w;
    int images, y_height, y_width;
    Axis vertical, horizontal;
    int x_channels, terms;       // of x, and how many of them a group reads: c in k = (ky, kx, c)
    int y_channels, results;     // of y, and how many of them a group writes
    int filter_columns, filter_inputs, filter_outputs;  // kw, c / groups, c_out

    __device__ index_t rows() const {
        return (index_t)images * vertical.outputs * horizontal.outputs;
    }
    __device__ int length() const { return vertical.taps * horizontal.taps * terms; }

    __device__ Corner corner_of(index_t row) const {
        index_t line = row / horizontal.outputs;
        return {(int)(line % vertical.outputs) * vertical.stride + vertical.start,
                (int)(row % horizontal.outputs) * horizontal.stride + horizontal.start,
                row < rows() ? line / vertical.outputs * vertical.size : -1};
    }
    // Whether there is a pixel for this term of the row that begins there. place: of its channel.
    __device__ bool sees(const Corner& from, const Term& t, int group, index_t& place) const {
        int y = from.top + t.ty * vertical.step, x = from.left + t.tx * horizontal.step;
        place = ((from.lines + y) * horizontal.size + x) * x_channels + group * terms + t.c;
        return t.ty < vertical.taps && from.lines >= 0 && y >= 0 && y < vertical.size && x >= 0
               && x < horizontal.size;
    }
    // The places in w of W[k][result] and V[k][result].
    __device__ index_t forward_weight(int k, int group, int result) const {
        return (index_t)k * filter_outputs + group * results + result;
    }
    __device__ index_t gradient_weight(const Term& k, int group, int result) const {
        int ky = vertical.first + k.ty * vertical.every;
        int kx = horizontal.first + k.tx * horizontal.every;
        return ((index_t)(ky * filter_columns + kx) * filter_inputs + result) * filter_outputs
               + group * terms + k.c;
    }
    // The pixel of y that row m is in the gradient, counted through all images. Forward it is m.
    __device__ index_t gradient_pixel(index_t row) const {
        index_t line = row / horizontal.outputs, image = line / vertical.outputs;
        int y = (int)(line % vertical.outputs) * vertical.spacing + vertical.offset;
        int x = (int)(row % horizontal.outputs) * horizontal.spacing + horizontal.offset;
        return (image * y_height + y) * y_width + x;
    }
};

static __device__ Product forward_product(
    const scalar_t* x, const scalar_t* filters, int n, int h, int w, int c, int oh, int ow, int kh,
    int kw, int sh, int sw, int top, int left, int dh, int dw, int c_out, int groups) {
    return {x, filters, n, oh, ow, forward_axis(h, oh, kh, sh, top, dh),
            forward_axis(w, ow, kw, sw, left, dw), c, c / groups, c_out, c_out / groups,
            kw, c / groups, c_out};
}

static __device__ int gradient_phases(int h, int w, int sh, int sw) {
    return min(sh, h) * min(sw, w);
}
static __device__ Product gradient_product(
    const scalar_t* dy, const scalar_t* filters, int phase, int n, int h, int w, int c, int oh,
    int ow, int kh, int kw, int sh, int sw, int top, int left, int dh, int dw, int c_out,
    int groups) {
    int across = min(sw, w);
    return {dy, filters, n, h, w, gradient_axis(phase / across, h, oh, kh, sh, top, dh),
            gradient_axis(phase % across, w, ow, kw, sw, left, dw), c_out, c_out / groups,
            c, c / groups, kw, c / groups, c_out};
}

// What one block computes: a tile of one group of one phase, summed over one of the splits of k.
// Results vary fastest among blocks, so that those which read the same pixels run together; then
// splits, groups, phases, and rows.
struct Share { int first_result, split, group, phase; index_t first_row; };

static __device__ Share share_of_block(int results, int splits, int groups, int phases) {
    const int columns = (results + TILE_N - 1) / TILE_N;
    int block = blockIdx.x;
    Share s;
    s.first_result = block % columns * TILE_N;  block /= columns;
    s.split = block % splits;                   block /= splits;
    s.group = block % groups;                   block /= groups;
    s.phase = block % phases;
    s.first_row = (index_t)(block / phases) * TILE_M;
    return s;
}

// The stages of a sum, TILE_K terms each, of which a split adds those from start to end - 1.
template <class T> struct Stages { T start, end; };

template <class T>
static __device__ Stages<T> stages_of_split(T length, int split, int splits) {
    const T stages = (length + TILE_K - 1) / TILE_K, share = (stages + splits - 1) / splits;
    const T start = split * share;
    return {start, min(start + share, stages)};
}

// ---- the weight gradient, dw[k][o] = sum over m of X[m][k] dz[m][o] -----------------------------

// Output pixel number m = (image * oh + y) * ow + x.
struct Pixel {
    index_t image;
    int y, x;

    __device__ void set(index_t m, int oh, int ow) {
        x = (int)(m % ow);
        y = (int)(m / ow % oh);
        image = m / ow / oh;
    }
    __device__ void advance(int by, int oh, int ow) {
        x += by;
        while (x >= ow) {
            x -= ow;
            if (++y == oh) {
                y = 0;
                ++image;
            }
        }
    }
    // The same without a loop, whose turns follow one another and are many where a stage is longer
    // than a row; at the price of registers. step: so many pixels, as set() divides them.
    __device__ void advance(const Pixel& step, int oh, int ow) {
        x += step.x;
        const bool row = x >= ow;
        x -= row ? ow : 0;
        y += step.y + row;
        const bool next = y >= oh;
        y -= next ? oh : 0;
        image += step.image + next;
    }
};

// What one block computes: a tile of dw of one group, summed over one of the splits of m. Outputs
// vary fastest among blocks.
struct WeightShare { int first_output, first_term, group, split; };

static __device__ WeightShare weight_share_of_block(int outputs, int terms, int groups) {
    const int columns = (outputs + TILE_N - 1) / TILE_N, rows = (terms + TILE_M - 1) / TILE_M;
    int block = blockIdx.x;
    WeightShare s;
    s.first_output = block % columns * TILE_N;  block /= columns;
    s.first_term = block % rows * TILE_M;       block /= rows;
    s.group = block % groups;
    s.split = block / groups;
    return s;
}
