// Joined in front of every kernel file by gpucnn/backend/cuda_kernel.py, which first writes
//
//     typedef float scalar_t;         // or double, float16, bfloat16: what the tensors hold
//     typedef float accum_t;          // or double: what sums are kept in
//     typedef int index_t;            // or long long, where a tensor comes near 2^31 elements
//     typedef unsigned char mask_t;   // or int: a place in a pooling window
//     #define VEC 4                   // channels a thread handles: 16 bytes' worth, or 1
//
// Joined rather than #included: CuPy's kernel cache does not notice a change inside an include.

// Visits each i in [0, n) once, whatever the launch configuration.
#define GRID_STRIDE_LOOP(i, n)                                                    \
    for (index_t i = (index_t)blockIdx.x * blockDim.x + threadIdx.x; i < (n);     \
         i += (index_t)blockDim.x * gridDim.x)

// VEC neighbouring channels: one 16-byte access instead of four of 4 bytes. The launcher chooses
// VEC > 1 only where the channel count is a multiple of it and every tensor is aligned.
struct alignas(VEC * sizeof(scalar_t)) Scalars { scalar_t at[VEC]; };
struct alignas(VEC * sizeof(mask_t)) Masks { mask_t at[VEC]; };

struct Sums { accum_t at[VEC]; };

static __device__ Scalars load(const scalar_t* p, index_t i) {
    return reinterpret_cast<const Scalars*>(p)[i];
}
static __device__ void store(scalar_t* p, index_t i, const Scalars& s) {
    reinterpret_cast<Scalars*>(p)[i] = s;
}
static __device__ void store(scalar_t* p, index_t i, const Sums& sums) {
    Scalars s;
    for (int v = 0; v < VEC; ++v) s.at[v] = (scalar_t)sums.at[v];
    store(p, i, s);
}
static __device__ Masks load_masks(const mask_t* p, index_t i) {
    return reinterpret_cast<const Masks*>(p)[i];
}
static __device__ void store_masks(mask_t* p, index_t i, const Masks& m) {
    reinterpret_cast<Masks*>(p)[i] = m;
}
static __device__ Scalars zeros() {
    Scalars s;
    for (int v = 0; v < VEC; ++v) s.at[v] = (scalar_t)0.0f;
    return s;
}

// Where element i of an (n, h, w, c) tensor lies, counted in groups of VEC channels.
struct Place { index_t n; int y, x, c; };

static __device__ Place place_of(index_t i, int h, int w, int c) {
    Place p;
    p.c = i % c;  i /= c;
    p.x = i % w;  i /= w;
    p.y = i % h;
    p.n = i / h;
    return p;
}
static __device__ index_t offset_of(index_t n, int y, int x, int c, int height, int width,
                                    int channels) {
    return ((n * height + y) * width + x) * channels + c;
}

// The outputs first..last (along one axis) whose window may cover the pixel that lies `padded`
// pixels from the start of the padded image.
struct Outputs { int first, last; };

static __device__ Outputs outputs_over(int padded, int taps, int stride, int dilation, int out) {
    int start = padded - (taps - 1) * dilation;
    Outputs o;
    o.first = start <= 0 ? 0 : (start - 1) / stride + 1;  // start / stride, rounded up
    o.last = padded / stride < out ? padded / stride : out - 1;
    return o;
}

// Calls visit(oy, ox, ky, kx) for each output (oy, ox) that tap (ky, kx) of its window read pixel
// (y, x) for, in order. With it the backward passes gather what reaches a pixel instead of
// scattering into it: no atomics, so the order of every sum is fixed.
template <class Visit>
static __device__ void for_each_output(int y, int x, int oh, int ow, int kh, int kw, int sh, int sw,
                                       int top, int left, int dh, int dw, Visit visit) {
    Outputs rows = outputs_over(y + top, kh, sh, dh, oh);
    Outputs columns = outputs_over(x + left, kw, sw, dw, ow);
    for (int oy = rows.first; oy <= rows.last; ++oy) {
        int ky = y + top - oy * sh;
        if (ky % dh != 0) continue;
        for (int ox = columns.first; ox <= columns.last; ++ox) {
            int kx = x + left - ox * sw;
            if (kx % dw != 0) continue;
            visit(oy, ox, ky / dh, kx / dw);
        }
    }
}
