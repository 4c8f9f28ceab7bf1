// The activations g of gpucnn/activations.py, by their place in its NAMES, counted from 1. 0: none.

enum { NO_ACTIVATION, RELU, LEAKY_RELU, SIGMOID, TANH };

constexpr accum_t LEAKY_SLOPE = (accum_t)0.01;

static __device__ accum_t activate(accum_t z, int activation, accum_t slope = LEAKY_SLOPE) {
    switch (activation) {
        case RELU: return z > 0 || z != z ? z : 0;  // NaN stays NaN
        case LEAKY_RELU: return z > 0 ? z : slope * z;
        case SIGMOID: {  // 1 / (1 + exp(-z)), for z < 0 as exp(z) / (1 + exp(z)): no overflow
            accum_t small = exp(z < 0 ? z : -z);
            return (z < 0 ? small : 1) / (1 + small);
        }
        case TANH: return tanh(z);
        default: return z;
    }
}

// dz = da g'(z), from a = g(z).
static __device__ accum_t deactivate(accum_t da, accum_t a, int activation,
                                     accum_t slope = LEAKY_SLOPE) {
    switch (activation) {
        case RELU: return a <= 0 ? 0 : da;
        case LEAKY_RELU: return a > 0 ? da : slope * da;
        case SIGMOID: return da * (a - a * a);
        case TANH: return da * (1 - a * a);
        default: return da;
    }
}

// What is done to a sum of products before it is stored. The launcher defines ACTIVATION.
static __device__ scalar_t finish(accum_t z, const accum_t* bias, int channel,
                                  const scalar_t* residual, index_t place) {
    if (bias) z += bias[channel];
    if (residual) z += (accum_t)residual[place];
    return (scalar_t)activate(z, ACTIVATION);
}
