// The CUDA C++ that a kernel sees when g++ compiles it: keywords, built-in variables, vector types,
// barriers, warp collectives, atomics and a few intrinsics. runtime.cpp schedules and checks.
#pragma once
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <type_traits>
#include <utility>

#define __CUDA_ARCH__ 900  // as fake_cupy.py tells
#define __grid_constant__
#define __global__
#define __device__
#define __host__
#define __constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
// All static shared memory lies in one section, so that its bounds are known and it can be filled
// with garbage before each block.
#define __shared__ static __attribute__((section("gpusim_shared")))
#define __align__(n) __attribute__((aligned(n)))
#define NOT_CHECKED __attribute__((no_sanitize("thread", "undefined")))
#define assert(e) ((e) ? (void)0 : gpusim_trap("assert(" #e ")"))
#define __trap() gpusim_trap("__trap()")

// ------------------------------------------------------------ vector types, aligned as on a GPU

#define GPUSIM_VECTOR2(T, name, alignment) struct alignas(alignment) name { T x, y; }; \
    static inline name make_##name(T x, T y) { return {x, y}; }
#define GPUSIM_VECTOR3(T, name) struct name { T x, y, z; }; \
    static inline name make_##name(T x, T y, T z) { return {x, y, z}; }
#define GPUSIM_VECTOR4(T, name, alignment) struct alignas(alignment) name { T x, y, z, w; }; \
    static inline name make_##name(T x, T y, T z, T w) { return {x, y, z, w}; }
GPUSIM_VECTOR2(float, float2, 8) GPUSIM_VECTOR2(double, double2, 16) GPUSIM_VECTOR2(int, int2, 8)
GPUSIM_VECTOR2(unsigned, uint2, 8)
GPUSIM_VECTOR3(float, float3) GPUSIM_VECTOR3(int, int3) GPUSIM_VECTOR3(unsigned, uint3)
GPUSIM_VECTOR4(float, float4, 16) GPUSIM_VECTOR4(int, int4, 16) GPUSIM_VECTOR4(unsigned, uint4, 16)
GPUSIM_VECTOR4(unsigned char, uchar4, 4)
typedef uint3 dim3;

// Declared const because g++ does not instrument reads of const objects; the runtime changes them
// only while no thread runs.
extern const uint3 threadIdx __asm__("gpusim_threadIdx");
extern const uint3 blockIdx __asm__("gpusim_blockIdx");
extern const uint3 blockDim __asm__("gpusim_blockDim");
extern const uint3 gridDim __asm__("gpusim_gridDim");
static const int warpSize = 32;

extern "C" {
void gpusim_syncthreads(int predicate, int* result, void* pc);
void gpusim_collective(unsigned mask, void* arg, void (*operation)(void** lanes, unsigned mask),
                       void* pc);
void gpusim_access(const void* p, unsigned size, bool write, bool atomic, void* pc);
void* gpusim_dynamic_shared();
void gpusim_trap(const char* why) __attribute__((noreturn));
}

// ------------------------------------------------------------------------------------ barriers

// Functions that are not checked are never inlined into code that is, so that PC lies in the
// kernel's own line.
#define PC __builtin_return_address(0)

NOT_CHECKED static inline void __syncthreads() { gpusim_syncthreads(0, nullptr, PC); }
NOT_CHECKED static inline int __syncthreads_count(int p) {
    int count;
    gpusim_syncthreads(p != 0, &count, PC);
    return count;
}
NOT_CHECKED static inline int __syncthreads_or(int p) {
    int count;
    gpusim_syncthreads(p != 0, &count, PC);
    return count != 0;
}
NOT_CHECKED static inline int __syncthreads_and(int p) {
    int count;
    gpusim_syncthreads(p == 0, &count, PC);
    return count == 0;
}
NOT_CHECKED static inline void __syncwarp(unsigned mask = ~0u) {
    gpusim_collective(mask, nullptr, nullptr, PC);
}
static inline void __threadfence() {}
static inline void __threadfence_block() {}

// ---------------------------------------------------------------------------- warp collectives

NOT_CHECKED static inline int gpusim_lane() {
    return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) & 31;
}

template <class T> struct Shuffle { T in, out; int source; };

template <class T> NOT_CHECKED void gpusim_shuffle_lanes(void** lanes, unsigned) {
    for (int i = 0; i < 32; i++) {
        if (!lanes[i]) continue;
        auto* me = (Shuffle<T>*)lanes[i];
        auto* source = (Shuffle<T>*)lanes[me->source];
        if (source)
            me->out = source->in;
        else  // an inactive lane: undefined, here NaN
            memset((void*)&me->out, 0xFF, sizeof(T));
    }
}
template <class T> NOT_CHECKED T gpusim_shuffle(unsigned mask, T value, int source, void* pc) {
    Shuffle<T> s;
    s.in = value;
    s.source = source;
    gpusim_collective(mask, &s, gpusim_shuffle_lanes<T>, pc);
    return s.out;
}
template <class T> NOT_CHECKED T __shfl_sync(unsigned mask, T v, int source, int width = 32) {
    return gpusim_shuffle(mask, v, (gpusim_lane() & ~(width - 1)) | (source & (width - 1)), PC);
}
template <class T> NOT_CHECKED T __shfl_up_sync(unsigned mask, T v, unsigned by, int width = 32) {
    int lane = gpusim_lane(), source = lane - (int)by;
    return gpusim_shuffle(mask, v, source < (lane & ~(width - 1)) ? lane : source, PC);
}
template <class T> NOT_CHECKED T __shfl_down_sync(unsigned mask, T v, unsigned by, int width = 32) {
    int lane = gpusim_lane(), source = lane + (int)by;
    return gpusim_shuffle(mask, v, source > (lane | (width - 1)) ? lane : source, PC);
}
template <class T> NOT_CHECKED T __shfl_xor_sync(unsigned mask, T v, int by, int width = 32) {
    int lane = gpusim_lane(), source = lane ^ by;
    return gpusim_shuffle(mask, v, source > (lane | (width - 1)) ? lane : source, PC);
}

struct Vote { int in; unsigned out; };

NOT_CHECKED static inline void gpusim_vote_lanes(void** lanes, unsigned) {
    unsigned ballot = 0;
    for (int i = 0; i < 32; i++)
        if (lanes[i] && ((Vote*)lanes[i])->in) ballot |= 1u << i;
    for (int i = 0; i < 32; i++)
        if (lanes[i]) ((Vote*)lanes[i])->out = ballot;
}
NOT_CHECKED static inline unsigned __ballot_sync(unsigned mask, int p) {
    Vote v{p, 0};
    gpusim_collective(mask, &v, gpusim_vote_lanes, PC);
    return v.out;
}
NOT_CHECKED static inline int __any_sync(unsigned mask, int p) {
    Vote v{p, 0};
    gpusim_collective(mask, &v, gpusim_vote_lanes, PC);
    return v.out != 0;
}
NOT_CHECKED static inline int __all_sync(unsigned mask, int p) {
    Vote v{!p, 0};
    gpusim_collective(mask, &v, gpusim_vote_lanes, PC);
    return v.out == 0;
}

// ------------------------------------------------------------------------------------- atomics

// All threads share one thread of the host, so a plain update is atomic.
#define GPUSIM_ATOMIC(name, updated) \
    template <class T, class U> NOT_CHECKED T name(T* p, U u) { \
        gpusim_access(p, sizeof(T), true, true, PC); \
        T value = (T)u, old = *p; \
        *p = (updated); \
        return old; \
    }
GPUSIM_ATOMIC(atomicAdd, (T)(old + value))
GPUSIM_ATOMIC(atomicSub, (T)(old - value))
GPUSIM_ATOMIC(atomicMax, old < value ? value : old)
GPUSIM_ATOMIC(atomicMin, value < old ? value : old)
GPUSIM_ATOMIC(atomicExch, value)
GPUSIM_ATOMIC(atomicAnd, (T)(old & value))
GPUSIM_ATOMIC(atomicOr, (T)(old | value))
template <class T> NOT_CHECKED T atomicCAS(T* p, T compare, T value) {
    gpusim_access(p, sizeof(T), true, true, PC);
    T old = *p;
    if (!memcmp(&old, &compare, sizeof(T))) *p = value;
    return old;
}

// ---------------------------------------------------------------------------------- intrinsics

#define GPUSIM_MIN_MAX(T) \
    static inline T min(T a, T b) { return b < a ? b : a; } \
    static inline T max(T a, T b) { return a < b ? b : a; }
GPUSIM_MIN_MAX(int) GPUSIM_MIN_MAX(unsigned) GPUSIM_MIN_MAX(long long)
GPUSIM_MIN_MAX(unsigned long long)
static inline float min(float a, float b) { return fminf(a, b); }
static inline float max(float a, float b) { return fmaxf(a, b); }
static inline double min(double a, double b) { return fmin(a, b); }
static inline double max(double a, double b) { return fmax(a, b); }
static inline double normcdf(double x) { return 0.5 * erfcl(-x * 0.70710678118654752440L); }
static inline float normcdf(float x) { return normcdf((double)x); }
template <class T> static inline T __ldg(const T* p) { return *p; }
static inline unsigned __umulhi(unsigned a, unsigned b) { return (uint64_t)a * b >> 32; }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
template <class To, class From> NOT_CHECKED To gpusim_bits(From from) {
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
static inline int __float_as_int(float f) { return gpusim_bits<int>(f); }
static inline float __int_as_float(int i) { return gpusim_bits<float>(i); }
static inline unsigned __float_as_uint(float f) { return gpusim_bits<unsigned>(f); }
static inline float __uint_as_float(unsigned u) { return gpusim_bits<float>(u); }

#include "ptx.h"

// ------------------------------------------------------------------------------ launch entries

// The compiler, not a pattern, says what the parameters of a kernel are: "Pcf4,i4," is
// (const float*, int).
template <class T> NOT_CHECKED char* gpusim_type_code(char* s) {
    using U = std::remove_cv_t<T>;
    if constexpr (std::is_pointer_v<U>) {
        using Target = std::remove_pointer_t<U>;
        *s++ = 'P';
        *s++ = std::is_const_v<Target> ? 'c' : 'm';
        return gpusim_type_code<Target>(s);
    } else {
        char kind = std::is_floating_point_v<U> ? 'f' : !std::is_integral_v<U> ? 's'
                    : std::is_signed_v<U>       ? 'i' : 'u';
        return s + sprintf(s, "%c%zu", kind, sizeof(U));
    }
}
template <class F> struct Entry;
template <class... A> struct Entry<void (*)(A...)> {
    template <size_t... I>
    NOT_CHECKED static void unpack(void (*volatile f)(A...), void** a, std::index_sequence<I...>) {
        f(*(std::remove_const_t<A>*)a[I]...);
    }
    NOT_CHECKED static void call(void (*f)(A...), void** a) {
        unpack(f, a, std::index_sequence_for<A...>{});
    }
    NOT_CHECKED static const char* signature() {
        static char text[64 * 16];
        char* s = text;
        ((s = gpusim_type_code<A>(s), *s++ = ','), ...);
        *s = 0;
        return text;
    }
};
#define GPUSIM_ENTRY(kernel, bound) \
    extern "C" { int gpusim_bound_##kernel = (bound); } \
    extern "C" NOT_CHECKED void gpusim_call_##kernel(void** a) { \
        Entry<decltype(&kernel)>::call(&kernel, a); } \
    extern "C" NOT_CHECKED const char* gpusim_signature_##kernel() { \
        return Entry<decltype(&kernel)>::signature(); }
