// One step of an optimiser over the flat arrays of a model, in up to three launches.
//
//     theta, g, m, s (size,)    the parameters, their gradients, and the optimiser's averages
//     copy (size,)              the new parameters once more, in 16 bits
//     control (7,)              what changes from step to step, in the order below
//     loss_scale (2,)           what g was multiplied with; good steps since it last changed
//     average (size,)           the parameters' moving average, where one is kept
//     averaging (2,)            how many updates it has had, and the share of the last one
//
// 1. sum_of_squares   only where gradients are clipped, or have a loss scale
// 2. prepare_step     one block: by how much to scale g, whether to skip the step, its number
// 3. update           all the parameters
//
// and for an average two more: prepare_average, by one thread, and update_average.
//
// The host waits for none of it, and passes nothing that changes from step to step: a captured
// graph replays it. gpucnn/update.py does the same on the CPU.

#include "reduce.cuh"

enum { RATE, STEPS, SCALE, SKIP, CORRECTION1, CORRECTION2, NORM };

// VEC neighbours; at the end of an array the `count` that are left of them.
template <class T> struct alignas(VEC * sizeof(T)) Group { T at[VEC]; };
typedef Group<accum_t> Values;

static __device__ int left_of_group(index_t i, long long size) {
    return size - (long long)i * VEC < VEC ? (int)(size - (long long)i * VEC) : VEC;
}
static __device__ Values read(const accum_t* p, index_t i, int count) {
    if (count == VEC) return reinterpret_cast<const Values*>(p)[i];
    Values values = {};
    for (int v = 0; v < VEC; ++v)
        if (v < count) values.at[v] = p[i * VEC + v];
    return values;
}
template <class T>
static __device__ void write(T* p, index_t i, int count, const Values& values) {
    Group<T> stored;
    for (int v = 0; v < VEC; ++v) stored.at[v] = (T)values.at[v];
    if (count == VEC) {
        reinterpret_cast<Group<T>*>(p)[i] = stored;
        return;
    }
    for (int v = 0; v < VEC; ++v)
        if (v < count) p[i * VEC + v] = stored.at[v];
}

// partials[b] = the sum of g^2 over what block b sees. In double no float32 overflows or vanishes
// when it is squared, and the sum is finite if all of them are.
extern "C" __global__ void sum_of_squares(
    const accum_t* __restrict__ g, double* __restrict__ partials, long long size)
{
    __shared__ double of_warps[32];
    double sum = 0;
    GRID_STRIDE_LOOP(i, (index_t)((size + VEC - 1) / VEC)) {
        Values values = read(g, i, left_of_group(i, size));
        for (int v = 0; v < VEC; ++v) sum += (double)values.at[v] * values.at[v];
    }
    sum = block_sum(sum, of_warps);
    if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

#define LEAST_SCALE 1.1754943508222875e-38  // 2^-126: float holds it and its inverse

// control for this step, by one block. A loss that is not finite skips it. With a loss scale, so does
// a sum that is not finite, which halves the scale; `interval` good steps in a row double it
// (Micikevicius et al. 2018).
extern "C" __global__ void prepare_step(
    double* __restrict__ control, const double* __restrict__ partials_or_null, int n,
    const accum_t* __restrict__ loss_or_null, double* __restrict__ loss_scale_or_null,
    int interval, double limit, double beta1, double beta2)
{
    __shared__ double of_warps[32];
    double sum = 0;
    GRID_STRIDE_LOOP(i, (index_t)n) sum += partials_or_null[i];
    sum = block_sum(sum, of_warps);
    if (threadIdx.x > 0) return;

    const double scale = loss_scale_or_null ? loss_scale_or_null[0] : 1;
    const double norm = sqrt(sum) / scale;
    bool skip = loss_or_null && *loss_or_null - *loss_or_null != 0;
    if (loss_scale_or_null && !skip) {
        skip = sum - sum != 0;  // inf or NaN
        double good = skip ? 0 : loss_scale_or_null[1] + 1;
        if (skip) loss_scale_or_null[0] = max(scale / 2, LEAST_SCALE);
        if (good >= interval) {
            loss_scale_or_null[0] = scale * 2;
            good = 0;
        }
        loss_scale_or_null[1] = good;
    }
    control[NORM] = norm;
    control[SKIP] = skip;
    control[SCALE] = (norm > limit ? limit / norm : 1) / scale;
    if (skip) return;
    const double step = control[STEPS] + 1;
    control[STEPS] = step;
    control[CORRECTION1] = 1 / (1 - pow(beta1, step));
    control[CORRECTION2] = 1 / sqrt(1 - pow(beta2, step));
}

#define DESCENT 0
#define MOMENTUM 1
#define RMS_PROP 2
#define ADAM 3
#ifndef RULE
#define RULE ADAM
#endif

// In accum_t, but 1 - beta is rounded once: in float, 1 - 0.999 keeps three digits less.
struct Settings { accum_t rate, correction2, beta1, rest1, beta2, rest2, epsilon; int nesterov; };

// What to subtract from a parameter, given its gradient; brings its averages up to date.
static __device__ accum_t change(accum_t g, accum_t& m, accum_t& s, const Settings& c) {
#if RULE == DESCENT
    return c.rate * g;
#elif RULE == MOMENTUM
    m = c.beta1 * m + g;
    return c.rate * (c.nesterov ? g + c.beta1 * m : m);
#elif RULE == RMS_PROP
    s = c.beta2 * s + c.rest2 * (g * g);
    return c.rate * g / (sqrt(s) + c.epsilon);
#else
    m = c.beta1 * m + c.rest1 * g;
    s = c.beta2 * s + c.rest2 * (g * g);
    return c.rate * (m / (sqrt(s) * c.correction2 + c.epsilon));
#endif
}

// One thread updates VEC parameters. Weight decay is decoupled (Loshchilov and Hutter 2019), and
// for the first decayed_size of them only.
extern "C" __global__ void update(
    accum_t* __restrict__ theta, const accum_t* __restrict__ g, accum_t* __restrict__ m_or_null,
    accum_t* __restrict__ s_or_null, scalar_t* __restrict__ copy_or_null,
    const double* __restrict__ control, long long size, long long decayed_size,
    double weight_decay, double beta1, double beta2, double epsilon, int nesterov)
{
    if (control[SKIP] != 0) return;
    const accum_t scale = (accum_t)control[SCALE];
    const accum_t kept = (accum_t)(1 - control[RATE] * weight_decay);
    const Settings settings = {
        (accum_t)(control[RATE] * (RULE == ADAM ? control[CORRECTION1] : 1)),
        (accum_t)control[CORRECTION2], (accum_t)beta1, (accum_t)(1 - beta1), (accum_t)beta2,
        (accum_t)(1 - beta2), (accum_t)epsilon, nesterov};
    GRID_STRIDE_LOOP(i, (index_t)((size + VEC - 1) / VEC)) {
        const int count = left_of_group(i, size);
        Values t = read(theta, i, count), d = read(g, i, count), m = {}, s = {};
        if (m_or_null) m = read(m_or_null, i, count);
        if (s_or_null) s = read(s_or_null, i, count);
        for (int v = 0; v < VEC; ++v) {
            if (i * VEC + v < decayed_size) t.at[v] *= kept;
            t.at[v] -= change(d.at[v] * scale, m.at[v], s.at[v], settings);
        }
        write(theta, i, count, t);
        if (m_or_null) write(m_or_null, i, count, m);
        if (s_or_null) write(s_or_null, i, count, s);
        if (copy_or_null) write(copy_or_null, i, count, t);
    }
}

enum { UPDATES, SHARE };

// The share that the parameters of this step have in their average: none where it was skipped. The
// average forgets its beginning sooner where decay is held down by the number of updates.
extern "C" __global__ void prepare_average(
    double* __restrict__ averaging, const double* __restrict__ control, double decay, int warm_up)
{
    if (blockIdx.x > 0 || threadIdx.x > 0) return;
    const bool skip = control[SKIP] != 0;
    const double t = averaging[UPDATES];
    const double kept = warm_up ? min(decay, (1 + t) / (10 + t)) : decay;
    averaging[SHARE] = skip ? 0 : 1 - kept;
    if (!skip) averaging[UPDATES] = t + 1;
}

// average += share (theta - average), VEC of them by one thread.
extern "C" __global__ void update_average(
    const accum_t* __restrict__ theta, accum_t* __restrict__ average,
    const double* __restrict__ averaging, long long size)
{
    const accum_t share = (accum_t)averaging[SHARE];
    if (share == 0) return;
    GRID_STRIDE_LOOP(i, (index_t)((size + VEC - 1) / VEC)) {
        const int count = left_of_group(i, size);
        const Values t = read(theta, i, count);
        Values a = read(average, i, count);
        for (int v = 0; v < VEC; ++v) a.at[v] += share * (t.at[v] - a.at[v]);
        write(average, i, count, a);
    }
}
