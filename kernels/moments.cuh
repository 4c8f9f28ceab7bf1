// The moments of some values are their mean and m2, the sum of squared differences from it: as
// exact as a second pass with the mean at hand, where the sum of squares less the square of the sum
// would cancel.

// Of `count` values, together with those of others, which are the share `share` of all (Chan, Golub
// and LeVeque 1983). Where count is 0, mean and m2 must be too.
static __device__ void merge_moments(accum_t& mean, accum_t& m2, accum_t count, accum_t share,
                                     accum_t other_mean, accum_t other_m2) {
    const accum_t d = other_mean - mean;
    mean += d * share;
    m2 += other_m2 + d * (count * share) * d;
}
