// Batch normalisation of the rows of a matrix, channel by channel, forward and backward, with the
// addition and the ReLU that follow it (Ioffe and Szegedy 2015):
//
//     x_hat = (x - mean) / sqrt(var + epsilon)
//     y     = gamma x_hat + beta, then + residual, then max(0, .), where these are asked for
//
//     x, y, residual, dx, dy, dz (rows, c)    mean, var, gamma, beta (c,)    dz: dy where y > 0
//
// Both directions are a reduction over the rows, which blocks begin and a merge kernel ends, and
// one pass over the elements. `partial` holds two sums for each block and channel: (bands, 2, c).
// All merging is in an order that depends on the shape alone: no atomics, so always the same bits.

#include "moments.cuh"

#define THREADS 256  // of a block

// A block works on a band of rows and up to `width` columns of VEC channels: its thread t on column
// t % width, on every (THREADS / width)-th row. Neighbouring threads read neighbouring channels,
// and what a thread needs to know of its own it reads once. width is a power of two.
struct Tile { int column; bool inside; index_t row, end; int step; };

static __device__ Tile tile_of(index_t rows, int columns, index_t band, int width) {
    Tile t;
    t.column = blockIdx.x * width + threadIdx.x % width;
    t.inside = t.column < columns;
    index_t start = blockIdx.y * band;
    t.row = start + threadIdx.x / width;
    t.end = rows - start < band ? rows : start + band;
    t.step = THREADS / width;
    return t;
}

// Merges what the threads of a column have `mine`. Returns whether this thread is the one of them
// that finds all of it in shared[threadIdx.x].
template <class T>
static __device__ bool merge_threads(T* shared, const T& mine, const Tile& t, int width) {
    shared[threadIdx.x] = mine;
    for (int half = THREADS / 2; half >= width; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) shared[threadIdx.x].merge(shared[threadIdx.x + half]);
    }
    return t.inside && threadIdx.x < width;
}

static __device__ Sums load_sums(const accum_t* p, index_t i) {
    Sums s;
    for (int v = 0; v < VEC; ++v) s.at[v] = p[i * VEC + v];
    return s;
}
static __device__ void store_sums(accum_t* p, index_t i, const Sums& s) {
    for (int v = 0; v < VEC; ++v) p[i * VEC + v] = s.at[v];
}

// Where the first (0) or the second (1) of a band's two sums of a column lies in partial.
static __device__ index_t in_partial(index_t band, int which, int columns, int column) {
    return (band * 2 + which) * columns + column;
}

// ---- the statistics of a batch ------------------------------------------------------------------

// How many values, and their moments.
struct Moments {
    accum_t count;
    Sums mean, m2;

    // One more value a channel (Welford 1962).
    __device__ void add(const Scalars& x) {
        count += 1;
        accum_t share = 1 / count;
        for (int v = 0; v < VEC; ++v) {
            accum_t value = x.at[v], d = value - mean.at[v];
            mean.at[v] += d * share;
            m2.at[v] += d * (value - mean.at[v]);
        }
    }

    __device__ void merge(const Moments& other) {
        if (other.count == 0) return;
        accum_t share = other.count / (count + other.count);
        for (int v = 0; v < VEC; ++v)
            merge_moments(mean.at[v], m2.at[v], count, share, other.mean.at[v], other.m2.at[v]);
        count += other.count;
    }
};

// partial: the mean and m2 of each band.
extern "C" __global__ void batch_norm_moments(
    const scalar_t* __restrict__ x, accum_t* __restrict__ partial,
    index_t rows, int c, index_t band, int width)
{
    const int cv = c / VEC;
    Tile t = tile_of(rows, cv, band, width);
    Moments mine = {};
    if (t.inside) {
        #pragma unroll 4  // so that the reads of four rows are under way at once
        for (index_t row = t.row; row < t.end; row += t.step)
            mine.add(load(x, row * cv + t.column));
    }
    __shared__ Moments shared[THREADS];
    if (!merge_threads(shared, mine, t, width)) return;
    store_sums(partial, in_partial(blockIdx.y, 0, cv, t.column), shared[threadIdx.x].mean);
    store_sums(partial, in_partial(blockIdx.y, 1, cv, t.column), shared[threadIdx.x].m2);
}

// mean and var (biased, divided by rows) from the bands' moments; the running ones follow them by
// the share `momentum`, the variance unbiased (divided by rows - 1). Threads share out the bands.
extern "C" __global__ void batch_norm_merge_moments(
    const accum_t* __restrict__ partial, accum_t* __restrict__ mean, accum_t* __restrict__ var,
    accum_t* __restrict__ running_mean, accum_t* __restrict__ running_var,
    index_t rows, int c, index_t band, index_t bands, int width, accum_t momentum)
{
    const int cv = c / VEC;
    Tile t = tile_of(bands, cv, bands, width);
    Moments mine = {};
    if (t.inside)
        for (index_t i = t.row; i < t.end; i += t.step) {
            index_t start = i * band;
            Moments of_band;
            of_band.count = rows - start < band ? rows - start : band;
            of_band.mean = load_sums(partial, in_partial(i, 0, cv, t.column));
            of_band.m2 = load_sums(partial, in_partial(i, 1, cv, t.column));
            mine.merge(of_band);
        }
    __shared__ Moments shared[THREADS];
    if (!merge_threads(shared, mine, t, width)) return;
    const Moments& all = shared[threadIdx.x];
    for (int v = 0; v < VEC; ++v) {
        int channel = t.column * VEC + v;
        mean[channel] = all.mean.at[v];
        var[channel] = all.m2.at[v] / rows;
        running_mean[channel] = (1 - momentum) * running_mean[channel] + momentum * mean[channel];
        running_var[channel] = (1 - momentum) * running_var[channel]
                               + momentum * (all.m2.at[v] / (rows - 1));
    }
}

// ---- normalisation ------------------------------------------------------------------------------

// What a thread knows of its VEC channels.
struct Norm {
    Sums mean, inverse_std, gamma, beta;

    __device__ accum_t x_hat(int v, accum_t x) const {
        return (x - mean.at[v]) * inverse_std.at[v];
    }
    __device__ accum_t z(int v, accum_t x) const { return gamma.at[v] * x_hat(v, x) + beta.at[v]; }
};

static __device__ Norm load_norm(const accum_t* mean, const accum_t* var, const accum_t* gamma,
                                 const accum_t* beta, accum_t epsilon, int column) {
    Norm norm = {load_sums(mean, column), load_sums(var, column), load_sums(gamma, column),
                 load_sums(beta, column)};
    for (int v = 0; v < VEC; ++v)
        norm.inverse_std.at[v] = 1 / sqrt(norm.inverse_std.at[v] + epsilon);
    return norm;
}

// Forward: one read of x (and of the residual), one write of y.
extern "C" __global__ void batch_norm(
    const scalar_t* __restrict__ x, const scalar_t* __restrict__ residual_or_null,
    const accum_t* __restrict__ mean, const accum_t* __restrict__ var,
    const accum_t* __restrict__ gamma, const accum_t* __restrict__ beta,
    scalar_t* __restrict__ y,
    index_t rows, int c, index_t band, int width, accum_t epsilon, int relu)
{
    const int cv = c / VEC;
    Tile t = tile_of(rows, cv, band, width);
    if (!t.inside) return;
    const Norm norm = load_norm(mean, var, gamma, beta, epsilon, t.column);
    for (index_t row = t.row; row < t.end; row += t.step) {
        index_t i = row * cv + t.column;
        Scalars s = load(x, i), other = residual_or_null ? load(residual_or_null, i) : zeros();
        Sums z;
        for (int v = 0; v < VEC; ++v) {
            z.at[v] = norm.z(v, s.at[v]) + (accum_t)other.at[v];
            if (relu && z.at[v] <= 0) z.at[v] = 0;  // NaN stays
        }
        store(y, i, z);
    }
}

// ---- the gradients ------------------------------------------------------------------------------

// dz: dy, but 0 where the ReLU cut z off. y says where; without it z is computed from x once more.
static __device__ Sums load_dz(const scalar_t* dy, const scalar_t* y_or_null, index_t i,
                               const Norm& norm, const Scalars& x, int relu) {
    Scalars g = load(dy, i), y = relu && y_or_null ? load(y_or_null, i) : zeros();
    Sums dz;
    for (int v = 0; v < VEC; ++v) {
        accum_t z = y_or_null ? (accum_t)y.at[v] : norm.z(v, x.at[v]);
        dz.at[v] = relu && z <= 0 ? 0 : (accum_t)g.at[v];
    }
    return dz;
}

struct Gradients {
    Sums dbeta, dgamma;
    accum_t gap;  // makes it an odd number of words, as Moments is: neighbours' in other banks

    __device__ void merge(const Gradients& other) {
        for (int v = 0; v < VEC; ++v) {
            dbeta.at[v] += other.dbeta.at[v];
            dgamma.at[v] += other.dgamma.at[v];
        }
    }
};

// partial: each band's part of dbeta = sum dz and of dgamma = sum dz x_hat. dz is the gradient of
// the residual as well; where it is written, the next kernel reads it, and neither dy nor y.
extern "C" __global__ void batch_norm_sums(
    const scalar_t* __restrict__ dy, const scalar_t* __restrict__ x,
    const scalar_t* __restrict__ y_or_null,
    const accum_t* __restrict__ mean, const accum_t* __restrict__ var,
    const accum_t* __restrict__ gamma, const accum_t* __restrict__ beta,
    accum_t* __restrict__ partial, scalar_t* __restrict__ dz_or_null,
    index_t rows, int c, index_t band, int width, accum_t epsilon, int relu)
{
    const int cv = c / VEC;
    Tile t = tile_of(rows, cv, band, width);
    Gradients mine = {};
    if (t.inside) {
        const Norm norm = load_norm(mean, var, gamma, beta, epsilon, t.column);
        #pragma unroll 4
        for (index_t row = t.row; row < t.end; row += t.step) {
            index_t i = row * cv + t.column;
            Scalars s = load(x, i);
            Sums dz = load_dz(dy, y_or_null, i, norm, s, relu);
            if (dz_or_null) store(dz_or_null, i, dz);
            for (int v = 0; v < VEC; ++v) {
                mine.dbeta.at[v] += dz.at[v];
                mine.dgamma.at[v] += dz.at[v] * norm.x_hat(v, s.at[v]);
            }
        }
    }
    __shared__ Gradients shared[THREADS];
    if (!merge_threads(shared, mine, t, width)) return;
    store_sums(partial, in_partial(blockIdx.y, 0, cv, t.column), shared[threadIdx.x].dbeta);
    store_sums(partial, in_partial(blockIdx.y, 1, cv, t.column), shared[threadIdx.x].dgamma);
}

// dbeta and dgamma from the bands' parts; of no bands, 0.
extern "C" __global__ void batch_norm_merge_sums(
    const accum_t* __restrict__ partial, accum_t* __restrict__ dbeta, accum_t* __restrict__ dgamma,
    int c, index_t bands, int width)
{
    const int cv = c / VEC;
    Tile t = tile_of(bands, cv, bands, width);
    Gradients mine = {};
    if (t.inside)
        for (index_t i = t.row; i < t.end; i += t.step) {
            Gradients of_band = {load_sums(partial, in_partial(i, 0, cv, t.column)),
                                 load_sums(partial, in_partial(i, 1, cv, t.column))};
            mine.merge(of_band);
        }
    __shared__ Gradients shared[THREADS];
    if (!merge_threads(shared, mine, t, width)) return;
    store_sums(dbeta, t.column, shared[threadIdx.x].dbeta);
    store_sums(dgamma, t.column, shared[threadIdx.x].dgamma);
}

// dx = gamma / sqrt(var + epsilon) (dz - dbeta / rows - x_hat dgamma / rows), where mean and var,
// which depend on x as well, take out the mean of dz and its part along x_hat.
extern "C" __global__ void batch_norm_backward(
    const scalar_t* __restrict__ dy, const scalar_t* __restrict__ x,
    const accum_t* __restrict__ mean, const accum_t* __restrict__ var,
    const accum_t* __restrict__ gamma, const accum_t* __restrict__ beta,
    const accum_t* __restrict__ dgamma, const accum_t* __restrict__ dbeta,
    scalar_t* __restrict__ dx,
    index_t rows, int c, index_t band, int width, accum_t epsilon, int relu)
{
    const int cv = c / VEC;
    Tile t = tile_of(rows, cv, band, width);
    if (!t.inside) return;
    const Norm norm = load_norm(mean, var, gamma, beta, epsilon, t.column);
    Gradients means = {load_sums(dbeta, t.column), load_sums(dgamma, t.column)};
    for (int v = 0; v < VEC; ++v) {
        means.dbeta.at[v] /= rows;
        means.dgamma.at[v] /= rows;
    }
    for (index_t row = t.row; row < t.end; row += t.step) {
        index_t i = row * cv + t.column;
        Scalars s = load(x, i);
        Sums dz = load_dz(dy, nullptr, i, norm, s, relu);
        for (int v = 0; v < VEC; ++v)
            dz.at[v] = norm.gamma.at[v] * norm.inverse_std.at[v]
                       * (dz.at[v] - means.dbeta.at[v]
                          - norm.x_hat(v, s.at[v]) * means.dgamma.at[v]);
        store(dx, i, dz);
    }
}
