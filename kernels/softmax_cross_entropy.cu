// Softmax cross-entropy, its gradient, and how many predictions are right.
//
//     logits, dlogits (n, classes)    labels, losses, hits (n,)
//     t = z - max(z)    p = exp(t) / sum(exp(t))
//     q = 1 - s at the label, + s / classes everywhere
//     losses = -sum(q log p) = log(sum(exp(t))) - (1 - s) t[label] - s mean(t)
//     dlogits = (p - q) / n * loss scale
//
// The shift by the maximum keeps exp() from overflowing and large logits exact. The loss scale is
// read from device memory, so that a captured graph sees it change.

#include "reduce.cuh"

// A block goes over a row three times, of which the last two find it in the cache. A warp is
// enough for few classes.
extern "C" __global__ void softmax_cross_entropy(
    const scalar_t* __restrict__ logits, const long long* __restrict__ labels,
    const double* __restrict__ loss_scale_or_null, scalar_t* __restrict__ dlogits,
    accum_t* __restrict__ losses, int* __restrict__ hits, int n, int classes, accum_t smoothing)
{
    __shared__ accum_t of_warps[32];
    const accum_t scale = loss_scale_or_null ? (accum_t)*loss_scale_or_null : (accum_t)1;
    for (index_t row = blockIdx.x; row < n; row += gridDim.x) {
        const scalar_t* z = logits + row * classes;
        const long long label = labels[row];
        // A label out of range makes the loss NaN, and reads nothing.
        const bool known = label >= 0 && label < classes;
        const accum_t picked = known ? (accum_t)z[label] : (accum_t)__int_as_float(0x7fffffff);

        accum_t largest = z[0];
        bool beaten = false;  // is another class before the label's? A NaN beats and loses to all
        for (index_t k = threadIdx.x; k < classes; k += blockDim.x) {
            const accum_t value = z[k];
            largest = max(largest, value);
            beaten |= k < label ? !(picked > value) : !(picked >= value);
        }
        largest = over_block(largest, of_warps, [](accum_t a, accum_t b) { return max(a, b); });

        accum_t total = 0, shifted = 0;
        for (index_t k = threadIdx.x; k < classes; k += blockDim.x) {
            const accum_t t = (accum_t)z[k] - largest;
            total += exp(t);
            shifted += t;
        }
        total = block_sum(total, of_warps);

        for (index_t k = threadIdx.x; k < classes; k += blockDim.x) {
            accum_t d = exp((accum_t)z[k] - largest) / total - smoothing / classes;
            if (k == label) d -= 1 - smoothing;
            dlogits[row * classes + k] = (scalar_t)(d / n * scale);
        }

        if (smoothing > 0) shifted = block_sum(shifted, of_warps);
        beaten = __syncthreads_or(beaten);
        if (threadIdx.x == 0) {
            accum_t loss = log(total) - (1 - smoothing) * (picked - largest);
            if (smoothing > 0) loss -= smoothing * (shifted / classes);
            losses[row] = loss;
            hits[row] = !beaten;
        }
    }
}

// The mean of the losses and the sum of the hits, by one block.
extern "C" __global__ void over_rows(
    const accum_t* __restrict__ losses, const int* __restrict__ hits,
    accum_t* __restrict__ loss, int* __restrict__ hit_count, int n)
{
    __shared__ accum_t of_warps[32];
    __shared__ int hits_of_warps[32];
    accum_t total = 0;
    int right = 0;
    GRID_STRIDE_LOOP(row, (index_t)n) {
        total += losses[row];
        right += hits[row];
    }
    total = block_sum(total, of_warps);
    right = block_sum(right, hits_of_warps);
    if (threadIdx.x == 0) {
        *loss = total / n;
        *hit_count = right;
    }
}
