// The instructions of tensor cores, and of copies that do not pass through registers, which CUDA
// C++ gives no name to without a header. sm_80 and later.
//
// Layouts of fragments: PTX ISA, "Matrix fragments for mma.m16n8k16" and "for mma.m16n8k8". With
// g = lane / 4 and t = lane % 4, a 32-bit register of A holds row g or g + 8 and the elements of k
// in the t-th 4 bytes; of B, column g and the same elements of k; C has row g (or g + 8) and
// columns 2 t and 2 t + 1.

struct float16;
struct bfloat16;

static __device__ unsigned shared_address(const void* p) {
    return (unsigned)__cvta_generic_to_shared(p);
}

// Starts copying 16 bytes into shared memory, or writing 16 zero bytes there.
static __device__ void start_copy(unsigned to, const void* from, bool present) {
    int bytes = present ? 16 : 0;  // the rest is filled with zeros; with 0, nothing is read
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(to), "l"(from), "r"(bytes) : "memory");
}
static __device__ void end_group_of_copies() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until all but the N newest groups of this thread's copies have arrived.
template <int N> static __device__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8.
static __device__ void load_matrices(unsigned (&r)[4], unsigned row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
}
static __device__ void load_matrices_transposed(unsigned (&r)[4], unsigned row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
}
static __device__ unsigned load_word(unsigned from) {
    unsigned word;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(from) : "memory");
    return word;
}

// C += A B for a 16 x 8 piece of C and 32 bytes of k: 16 elements of 16 bits, or 8 of 32, whose
// last 13 bits a tensor core ignores. The last argument is not read; its type says what the
// elements are.
#define MULTIPLY(instruction)                                                              \
    asm volatile(instruction " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                          \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))

static __device__ void multiply_fragments(float (&c)[4], const unsigned (&a)[4], unsigned b0,
                                          unsigned b1, const float16*) {
    MULTIPLY("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32");
}
static __device__ void multiply_fragments(float (&c)[4], const unsigned (&a)[4], unsigned b0,
                                          unsigned b1, const bfloat16*) {
    MULTIPLY("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32");
}
static __device__ void multiply_fragments(float (&c)[4], const unsigned (&a)[4], unsigned b0,
                                          unsigned b1, const float*) {
    MULTIPLY("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32");
}

// A float rounded to the 10 bits that tf32 keeps, ties away from zero; NaN stays NaN.
static __device__ unsigned round_to_tf32(unsigned bits) {
    unsigned rounded;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(bits)));
    return rounded;
}
