// One function for each PTX instruction that the simulator executes. inline_ptx.py makes the calls
// out of asm statements: the name is the opcode with all its modifiers, so what is not here does
// not compile. The operands' types are checked as ptxas does. Section names are those of the PTX
// ISA 9.0. runtime_ptx.h has the semantics of whatever more than one thread takes part in.
#pragma once

// ------------------------------------------------------------------------------------ operands

// An integer that stands in the instruction itself: some operands must be one.
template <long long N> struct PtxImmediate {};

#define GPUSIM_CONSTRAINT(letter, register_t, allowed, meaning) \
    template <class T> NOT_CHECKED auto& gpusim_output_##letter(T& variable) { \
        static_assert((allowed) && !std::is_pointer_v<T>, "constraint " #letter ": " meaning); \
        return (register_t&)variable; \
    } \
    template <class T> NOT_CHECKED register_t gpusim_input_##letter(const T& value) { \
        static_assert(allowed, "constraint " #letter ": " meaning); \
        return (register_t)value; \
    }
GPUSIM_CONSTRAINT(h, uint16_t, std::is_integral_v<T> && sizeof(T) == 2, "takes 16-bit integers")
GPUSIM_CONSTRAINT(r, uint32_t, std::is_integral_v<T> && sizeof(T) == 4, "takes 32-bit integers")
GPUSIM_CONSTRAINT(l, uint64_t, (std::is_integral_v<T> && sizeof(T) == 8) || std::is_pointer_v<T>,
                  "takes 64-bit integers, and pointers as inputs")
GPUSIM_CONSTRAINT(f, float, (std::is_same_v<T, float>), "takes float")
GPUSIM_CONSTRAINT(d, double, (std::is_same_v<T, double>), "takes double")

template <class T> NOT_CHECKED void gpusim_poison(T& variable) {
    if constexpr (!std::is_same_v<T, bool>) memset(&variable, 0xFF, sizeof variable);
}

// A source operand: a register of exactly this type, or an immediate.
template <class T> struct PtxSource {
    T value;
    PtxSource(const T& v) : value(v) {}
    template <long long N> PtxSource(PtxImmediate<N>) : value((T)N) {}
    template <class U> PtxSource(const U&) = delete;
};

// {%0, %1, ...}: registers, as a destination or to be read.
template <class T, int N> struct PtxVector { T* at[N]; };
template <class T, class... Rest>
PtxVector<T, 1 + (int)sizeof...(Rest)> ptx_vector(T& first, Rest&... rest) {
    return {{&first, &rest...}};
}
template <class T, int N> struct PtxSources {
    T at[N];
    PtxSources(const PtxVector<T, N>& v) { for (int i = 0; i < N; i++) at[i] = *v.at[i]; }
    PtxSources(const PtxVector<const T, N>& v) { for (int i = 0; i < N; i++) at[i] = *v.at[i]; }
};

// [register + immediate]. Addresses of shared memory may have 32 bits, others must have 64.
template <class T> struct PtxAddress { T at; };
template <class T, long long Offset>
PtxAddress<T> ptx_address(const T& base, int sign, PtxImmediate<Offset>) {
    static_assert(std::is_same_v<T, uint32_t> || std::is_same_v<T, uint64_t>, "not an address");
    return {(T)(base + sign * Offset)};
}
typedef PtxAddress<uint64_t> PtxGlobal;
struct PtxShared {
    uint64_t at;
    template <class T> PtxShared(PtxAddress<T> a) : at(a.at) {}
};

extern "C" {
uint32_t gpusim_shared_number(const void* p, void* pc);
void* gpusim_shared_access(uint64_t number, unsigned size, bool write, void* pc);
void* gpusim_global_access(uint64_t address, unsigned size, bool write, bool constant, void* pc);
void gpusim_cp_async(uint64_t to, uint64_t from, unsigned size, unsigned source_size, void* pc);
void gpusim_cp_async_commit();
void gpusim_cp_async_wait(unsigned groups_left);
void gpusim_ldmatrix(uint32_t* const* to, unsigned matrices, bool transposed, uint64_t row,
                     void* pc);
void gpusim_mma(float* const* d, const uint32_t* a, const uint32_t* b, const float* c,
                unsigned type, unsigned k, void* pc);
void gpusim_fence_proxy_async();
void gpusim_wgmma(float* const* d, uint64_t a, uint64_t b, unsigned n, unsigned type,
                  bool accumulate, float scale, bool transposed_a, bool transposed_b, void* pc);
void gpusim_wgmma_fence(void* pc);
void gpusim_wgmma_commit(void* pc);
void gpusim_wgmma_wait(unsigned groups_left, void* pc);
uint16_t gpusim_half(float x);
uint16_t gpusim_bfloat16(float x);
float gpusim_from_half(uint16_t h);
}

NOT_CHECKED static inline size_t __cvta_generic_to_shared(const void* p) {
    return gpusim_shared_number(p, PC);
}

// ----------------------------------------------------------------- loads and stores ("ld", "st")

#define GPUSIM_IS_b(T, size) (sizeof(T) == size)
#define GPUSIM_IS_u(T, size) (std::is_integral_v<T> && sizeof(T) == size)
#define GPUSIM_IS_s(T, size) (std::is_integral_v<T> && sizeof(T) == size)
#define GPUSIM_IS_f(T, size) (std::is_floating_point_v<T> && sizeof(T) == size)

// One register, and vectors of 2 and 4; `at` is the checked host address.
#define PTX_LOAD(name, kind, bits, Address, access) \
    template <class T> NOT_CHECKED void ptx_##name##_##kind##bits(T& to, Address a) { \
        static_assert(GPUSIM_IS_##kind(T, bits / 8), "register type"); \
        const unsigned size = bits / 8; \
        memcpy(&to, access, size); \
    } \
    PTX_LOAD_VECTOR(name, 2, kind, bits, Address, access) \
    PTX_LOAD_VECTOR(name, 4, kind, bits, Address, access)
#define PTX_LOAD_VECTOR(name, n, kind, bits, Address, access) \
    template <class T> NOT_CHECKED \
    void ptx_##name##_v##n##_##kind##bits(PtxVector<T, n> to, Address a) { \
        static_assert(GPUSIM_IS_##kind(T, bits / 8) && n * bits <= 128, "register type"); \
        const unsigned size = n * bits / 8; \
        const char* at = (const char*)access; \
        for (int i = 0; i < n; i++) memcpy(to.at[i], at + i * (bits / 8), bits / 8); \
    }
#define PTX_STORE(name, kind, bits, Address, access) \
    template <class T> NOT_CHECKED void ptx_##name##_##kind##bits(Address a, const T& from) { \
        static_assert(GPUSIM_IS_##kind(T, bits / 8), "register type"); \
        const unsigned size = bits / 8; \
        memcpy(access, &from, size); \
    } \
    PTX_STORE_VECTOR(name, 2, kind, bits, Address, access) \
    PTX_STORE_VECTOR(name, 4, kind, bits, Address, access)
#define PTX_STORE_VECTOR(name, n, kind, bits, Address, access) \
    template <class T> NOT_CHECKED \
    void ptx_##name##_v##n##_##kind##bits(Address a, PtxVector<T, n> from) { \
        static_assert(GPUSIM_IS_##kind(T, bits / 8) && n * bits <= 128, "register type"); \
        const unsigned size = n * bits / 8; \
        char* at = (char*)access; \
        for (int i = 0; i < n; i++) memcpy(at + i * (bits / 8), from.at[i], bits / 8); \
    }
#define SHARED(write) gpusim_shared_access(a.at, size, write, PC)
#define GLOBAL(write, constant) gpusim_global_access(a.at, size, write, constant, PC)
#define PTX_LOADS_AND_STORES(kind, bits) \
    PTX_LOAD(ld_shared, kind, bits, PtxShared, SHARED(false)) \
    PTX_STORE(st_shared, kind, bits, PtxShared, SHARED(true)) \
    PTX_LOAD(ld_global, kind, bits, PtxGlobal, GLOBAL(false, false)) \
    PTX_LOAD(ld_global_nc, kind, bits, PtxGlobal, GLOBAL(false, true)) \
    PTX_LOAD(ld_global_nc_L1_no_allocate, kind, bits, PtxGlobal, GLOBAL(false, true)) \
    PTX_LOAD(ld_global_nc_L2_128B, kind, bits, PtxGlobal, GLOBAL(false, true)) \
    PTX_LOAD(ld_global_nc_L1_no_allocate_L2_128B, kind, bits, PtxGlobal, GLOBAL(false, true)) \
    PTX_STORE(st_global, kind, bits, PtxGlobal, GLOBAL(true, false))
PTX_LOADS_AND_STORES(b, 16) PTX_LOADS_AND_STORES(u, 16) PTX_LOADS_AND_STORES(s, 16)
PTX_LOADS_AND_STORES(b, 32) PTX_LOADS_AND_STORES(u, 32) PTX_LOADS_AND_STORES(s, 32)
PTX_LOADS_AND_STORES(f, 32)
PTX_LOADS_AND_STORES(b, 64) PTX_LOADS_AND_STORES(u, 64) PTX_LOADS_AND_STORES(f, 64)
#undef SHARED
#undef GLOBAL

// -------------------------------------------------------------------- asynchronous copies

// "cp.async": cp-size is an immediate; src-size, where given, is how many bytes are read, the rest
// is zero.
#define PTX_CP_ASYNC(name, allowed) \
    template <long long Size> NOT_CHECKED \
    void ptx_cp_async_##name(PtxShared to, PtxGlobal from, PtxImmediate<Size>) { \
        static_assert(allowed, "cp-size of cp.async." #name); \
        gpusim_cp_async(to.at, from.at, Size, Size, PC); \
    } \
    template <long long Size> NOT_CHECKED \
    void ptx_cp_async_##name(PtxShared to, PtxGlobal from, PtxImmediate<Size>, \
                             PtxSource<uint32_t> source_size) { \
        static_assert(allowed, "cp-size of cp.async." #name); \
        gpusim_cp_async(to.at, from.at, Size, source_size.value, PC); \
    }
PTX_CP_ASYNC(ca_shared_global, Size == 4 || Size == 8 || Size == 16)
PTX_CP_ASYNC(ca_shared_global_L2_128B, Size == 4 || Size == 8 || Size == 16)
PTX_CP_ASYNC(ca_shared_global_L2_256B, Size == 4 || Size == 8 || Size == 16)
PTX_CP_ASYNC(cg_shared_global, Size == 16)
PTX_CP_ASYNC(cg_shared_global_L2_128B, Size == 16)
PTX_CP_ASYNC(cg_shared_global_L2_256B, Size == 16)

static inline void ptx_cp_async_commit_group() { gpusim_cp_async_commit(); }
template <long long N> void ptx_cp_async_wait_group(PtxImmediate<N>) { gpusim_cp_async_wait(N); }
static inline void ptx_cp_async_wait_all() {
    gpusim_cp_async_commit();
    gpusim_cp_async_wait(0);
}

// ----------------------------------------------------- matrix fragments ("ldmatrix", "mma")

#define PTX_LDMATRIX(n) \
    NOT_CHECKED static inline void ptx_ldmatrix_sync_aligned_m8n8_x##n##_shared_b16( \
        PtxVector<uint32_t, n> to, PtxShared row) { \
        gpusim_ldmatrix(to.at, n, false, row.at, PC); \
    } \
    NOT_CHECKED static inline void ptx_ldmatrix_sync_aligned_m8n8_x##n##_trans_shared_b16( \
        PtxVector<uint32_t, n> to, PtxShared row) { \
        gpusim_ldmatrix(to.at, n, true, row.at, PC); \
    }
PTX_LDMATRIX(1) PTX_LDMATRIX(2) PTX_LDMATRIX(4)

enum GpusimType { GPUSIM_F16, GPUSIM_BF16, GPUSIM_TF32 };

#define PTX_MMA(shape, k, types, type, a_registers, b_registers) \
    NOT_CHECKED static inline void ptx_mma_sync_aligned_##shape##_row_col_##types( \
        PtxVector<float, 4> d, PtxSources<uint32_t, a_registers> a, \
        PtxSources<uint32_t, b_registers> b, PtxSources<float, 4> c) { \
        gpusim_mma(d.at, a.at, b.at, c.at, type, k, PC); \
    }
PTX_MMA(m16n8k16, 16, f32_f16_f16_f32, GPUSIM_F16, 4, 2)
PTX_MMA(m16n8k16, 16, f32_bf16_bf16_f32, GPUSIM_BF16, 4, 2)
PTX_MMA(m16n8k8, 8, f32_f16_f16_f32, GPUSIM_F16, 2, 1)
PTX_MMA(m16n8k8, 8, f32_bf16_bf16_f32, GPUSIM_BF16, 2, 1)
PTX_MMA(m16n8k8, 8, f32_tf32_tf32_f32, GPUSIM_TF32, 4, 2)

// ------------------------------- asynchronous products ("wgmma.mma_async"), both operands in shared

#define PTX_WGMMA_OF(n, name, type) \
    template <long long ScaleA, long long ScaleB, long long TransA, long long TransB> NOT_CHECKED \
    void ptx_wgmma_mma_async_sync_aligned_m64n##n##k16_f32_##name( \
        PtxVector<float, n / 2> d, PtxSource<uint64_t> a, PtxSource<uint64_t> b, \
        PtxSource<bool> scale_d, PtxImmediate<ScaleA>, PtxImmediate<ScaleB>, \
        PtxImmediate<TransA>, PtxImmediate<TransB>) { \
        static_assert((ScaleA == 1 || ScaleA == -1) && (ScaleB == 1 || ScaleB == -1), "imm-scale"); \
        static_assert(TransA >> 1 == 0 && TransB >> 1 == 0, "imm-trans"); \
        gpusim_wgmma(d.at, a.value, b.value, n, type, scale_d.value, ScaleA * ScaleB, TransA, \
                     TransB, PC); \
    }
#define PTX_WGMMA(n) \
    PTX_WGMMA_OF(n, f16_f16, GPUSIM_F16) PTX_WGMMA_OF(n, bf16_bf16, GPUSIM_BF16)
PTX_WGMMA(8) PTX_WGMMA(16) PTX_WGMMA(24) PTX_WGMMA(32) PTX_WGMMA(40) PTX_WGMMA(48) PTX_WGMMA(56)
PTX_WGMMA(64) PTX_WGMMA(72) PTX_WGMMA(80) PTX_WGMMA(88) PTX_WGMMA(96) PTX_WGMMA(104)
PTX_WGMMA(112) PTX_WGMMA(120) PTX_WGMMA(128) PTX_WGMMA(136) PTX_WGMMA(144) PTX_WGMMA(152)
PTX_WGMMA(160) PTX_WGMMA(168) PTX_WGMMA(176) PTX_WGMMA(184) PTX_WGMMA(192) PTX_WGMMA(200)
PTX_WGMMA(208) PTX_WGMMA(216) PTX_WGMMA(224) PTX_WGMMA(232) PTX_WGMMA(240) PTX_WGMMA(248)
PTX_WGMMA(256)

NOT_CHECKED static inline void ptx_wgmma_fence_sync_aligned() { gpusim_wgmma_fence(PC); }
NOT_CHECKED static inline void ptx_wgmma_commit_group_sync_aligned() { gpusim_wgmma_commit(PC); }
template <long long N> NOT_CHECKED
void ptx_wgmma_wait_group_sync_aligned(PtxImmediate<N>) { gpusim_wgmma_wait(N, PC); }
static inline void ptx_fence_proxy_async() { gpusim_fence_proxy_async(); }
static inline void ptx_fence_proxy_async_shared() { gpusim_fence_proxy_async(); }

// ------------------------------------------------------ conversions and arithmetic ("cvt", ...)

static inline void ptx_cvt_rn_f16_f32(uint16_t& d, PtxSource<float> a) {
    d = gpusim_half(a.value);
}
static inline void ptx_cvt_f32_f16(float& d, PtxSource<uint16_t> a) {
    d = gpusim_from_half(a.value);
}
static inline void ptx_cvt_rn_bf16_f32(uint16_t& d, PtxSource<float> a) {
    d = gpusim_bfloat16(a.value);
}
// The first source goes to the upper half.
static inline void ptx_cvt_rn_f16x2_f32(uint32_t& d, PtxSource<float> a, PtxSource<float> b) {
    d = (uint32_t)gpusim_half(a.value) << 16 | gpusim_half(b.value);
}
static inline void ptx_cvt_rn_bf16x2_f32(uint32_t& d, PtxSource<float> a, PtxSource<float> b) {
    d = (uint32_t)gpusim_bfloat16(a.value) << 16 | gpusim_bfloat16(b.value);
}
// To nearest, ties away from zero: 10 bits of mantissa are left.
static inline void ptx_cvt_rna_tf32_f32(uint32_t& d, PtxSource<float> a) {
    d = std::isnan(a.value) ? 0x7FFFFFFF : (gpusim_bits<uint32_t>(a.value) + 0x1000) & 0xFFFFE000;
}

static inline float gpusim_larger(float a, float b) {  // +0 is larger than -0
    return a == b ? (std::signbit(a) ? b : a) : fmaxf(a, b);
}
static inline float gpusim_smaller(float a, float b) {
    return a == b ? (std::signbit(a) ? a : b) : fminf(a, b);
}
#define PTX_MIN_MAX(name, chosen) \
    static inline void ptx_##name##_f32(float& d, PtxSource<float> a, PtxSource<float> b) { \
        d = chosen(a.value, b.value); \
    } \
    static inline void ptx_##name##_NaN_f32(float& d, PtxSource<float> a, PtxSource<float> b) { \
        bool nan = std::isnan(a.value) || std::isnan(b.value); \
        d = nan ? gpusim_bits<float>(0x7FFFFFFF) : chosen(a.value, b.value); \
    }
PTX_MIN_MAX(max, gpusim_larger) PTX_MIN_MAX(min, gpusim_smaller)

static inline void ptx_fma_rn_f32(float& d, PtxSource<float> a, PtxSource<float> b,
                                  PtxSource<float> c) {
    d = fmaf(a.value, b.value, c.value);
}

template <class T, class U> void ptx_mov_b32(T& d, const U& a) {
    static_assert(sizeof(T) == 4 && sizeof(U) == 4, "register type");
    memcpy(&d, &a, 4);
}
template <class T, long long N> void ptx_mov_b32(T& d, PtxImmediate<N>) {
    ptx_mov_b32(d, (uint32_t)N);
}
template <class T, class U> void ptx_mov_b32(T& d, PtxVector<U, 2> halves) {  // packs
    static_assert(sizeof(T) == 4 && sizeof(U) == 2, "register type");
    memcpy(&d, halves.at[0], 2);
    memcpy((char*)&d + 2, halves.at[1], 2);
}
template <class T, class U> void ptx_mov_b32(PtxVector<T, 2> halves, const U& a) {  // unpacks
    static_assert(sizeof(T) == 2 && sizeof(U) == 4, "register type");
    memcpy(halves.at[0], &a, 2);
    memcpy(halves.at[1], (const char*)&a + 2, 2);
}
NOT_CHECKED static inline void ptx_cvta_to_shared_u64(uint64_t& d, PtxSource<uint64_t> a) {
    d = gpusim_shared_number((const void*)a.value, PC);
}
static inline void ptx_cvt_u32_u64(uint32_t& d, PtxSource<uint64_t> a) { d = (uint32_t)a.value; }
static inline void ptx_mov_u32(uint32_t& d, PtxSource<uint32_t> a) { d = a.value; }
static inline void ptx_mov_f32(float& d, PtxSource<float> a) { d = a.value; }
NOT_CHECKED static inline uint32_t ptx_special_laneid() { return gpusim_lane(); }

#define PTX_SETP(name, T, operation) \
    static inline void ptx_setp_##name(bool& d, PtxSource<uint32_t> a, PtxSource<uint32_t> b) { \
        d = (T)a.value operation (T)b.value; \
    }
PTX_SETP(ne_b32, uint32_t, !=) PTX_SETP(eq_b32, uint32_t, ==)
PTX_SETP(ne_u32, uint32_t, !=) PTX_SETP(eq_u32, uint32_t, ==)
PTX_SETP(lt_u32, uint32_t, <) PTX_SETP(ge_u32, uint32_t, >=)
PTX_SETP(ne_s32, int32_t, !=) PTX_SETP(eq_s32, int32_t, ==)
PTX_SETP(lt_s32, int32_t, <) PTX_SETP(ge_s32, int32_t, >=)
PTX_SETP(le_s32, int32_t, <=) PTX_SETP(gt_s32, int32_t, >)
static inline void ptx_selp_b32(uint32_t& d, PtxSource<uint32_t> a, PtxSource<uint32_t> b,
                                bool p) {
    d = p ? a.value : b.value;
}
