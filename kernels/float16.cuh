// The two 16-bit floats, as types that are stored only: one is read as a float, and written from
// one, rounded to the nearest even. Joined in front of the rest where scalar_t is one of them.
// Written with PTX, so that no kernel needs a header, which CuPy may or may not find.

struct alignas(2) float16 {
    unsigned short bits;
    float16() = default;
    __device__ float16(float f) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(f)); }
    __device__ operator float() const {
        float f;
        asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
        return f;
    }
};

// The upper half of a float. Architectures before sm_80 have no instruction that rounds to it.
struct alignas(2) bfloat16 {
    unsigned short bits;
    bfloat16() = default;
    __device__ bfloat16(float f) {
        unsigned all = __float_as_uint(f);
        unsigned rounded = all + 0x7fffu + ((all >> 16) & 1);
        bits = (unsigned short)((f != f ? all | 0x400000u : rounded) >> 16);
    }
    __device__ operator float() const { return __uint_as_float((unsigned)bits << 16); }
};
