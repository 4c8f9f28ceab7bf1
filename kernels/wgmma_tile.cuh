// The tile of tensor_tile.cuh by Hopper's wgmma (sm_90a, 16-bit elements): four warps, a warpgroup,
// multiply 64 rows by all TILE_N columns at once, and the tensor cores read both factors from
// shared memory themselves, while the threads go on. Warpgroups lie one below the other.
//
// The launcher defines TILE_M, TILE_N (64 or 128), WARP_M = 64 m for m times 64 rows a warpgroup,
// WARP_N = TILE_N, and STAGES. Copies are STAGES - 2 tiles ahead: one is being multiplied, and one
// may still be.

#include "ptx.cuh"

constexpr int PIECE = 8, PIECES = 8;  // elements a piece of 16 bytes, pieces a row of k
constexpr int TILE_K = PIECES * PIECE;
constexpr int THREADS = TILE_M / WARP_M * 128;
constexpr int COLUMN_WARPS = THREADS / 32;  // all have all columns
constexpr int FRAGMENTS_M = WARP_M / 64, FRAGMENTS_N = TILE_N / 8;
constexpr int ALIGNMENT = 1024, BLOCKS_EACH = 1;  // on a multiprocessor

// Both layouts are those of "128-byte swizzling" in the PTX ISA: rows of 128 bytes, of which 8 make
// an atom of 1024 bytes; pieces change places by row. Terms that are neighbours make one column of
// such rows ("K-major"), columns that are neighbours one for each 64 of them ("MN-major").
constexpr int ROW_BYTES = 128, ATOM_BYTES = 1024, BLOCK_BYTES = TILE_K * ROW_BYTES;

template <int WIDTH> constexpr int term_bytes = WIDTH * ROW_BYTES;
template <int WIDTH> constexpr int column_bytes = WIDTH / 64 * BLOCK_BYTES;

static __device__ int term_offset(int row, int piece) {
    return row * ROW_BYTES + ((piece ^ (row & 7)) << 4);
}
template <int WIDTH> static __device__ int column_offset(int row, int piece) {
    return piece / 8 * BLOCK_BYTES + term_offset(row, piece % 8);
}

// Where this warp's fragments of 16 x 8 sums lie in the tile.
static __device__ int fragment_row(int i) {
    const int warp = threadIdx.x / 32;
    return warp / 4 * WARP_M + i * 64 + warp % 4 * 16;
}
static __device__ int first_column() { return 0; }

// "Matrix descriptor": address, distance of blocks of 64 columns, distance of atoms, in 16 bytes.
static __device__ unsigned long long descriptor(unsigned address) {
    return (unsigned long long)(address >> 4 & 0x3FFF)
           | (unsigned long long)(BLOCK_BYTES >> 4) << 16
           | (unsigned long long)(ATOM_BYTES >> 4) << 32 | 1ull << 62;
}

// sums += A B, 64 x TILE_N, for 16 terms. COLUMNS: the factor's columns are neighbours.
#define SUMS(j) "+f"(sums[j][0]), "+f"(sums[j][1]), "+f"(sums[j][2]), "+f"(sums[j][3])
#define SUMS_32(j) SUMS(j), SUMS(j + 1), SUMS(j + 2), SUMS(j + 3), SUMS(j + 4), SUMS(j + 5), \
                   SUMS(j + 6), SUMS(j + 7)
#define WGMMA_64(type)                                                                           \
    asm volatile("{ .reg .pred add; setp.ne.b32 add, 1, 0;\n"                                    \
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32." type " "                          \
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "       \
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, "   \
                 "%31}, %32, %33, add, 1, 1, %34, %35; }"                                        \
                 : SUMS_32(0) : "l"(a), "l"(b), "n"(A_COLUMNS), "n"(B_COLUMNS))
#define WGMMA_128(type)                                                                          \
    asm volatile("{ .reg .pred add; setp.ne.b32 add, 1, 0;\n"                                    \
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32." type " "                         \
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "       \
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, "   \
                 "%31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, "   \
                 "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, "   \
                 "%61, %62, %63}, %64, %65, add, 1, 1, %66, %67; }"                              \
                 : SUMS_32(0), SUMS_32(8) : "l"(a), "l"(b), "n"(A_COLUMNS), "n"(B_COLUMNS))

template <int A_COLUMNS, int B_COLUMNS>
static __device__ void start_product(float (&sums)[8][4], unsigned long long a,
                                     unsigned long long b, const float16*) {
    WGMMA_64("f16.f16");
}
template <int A_COLUMNS, int B_COLUMNS>
static __device__ void start_product(float (&sums)[8][4], unsigned long long a,
                                     unsigned long long b, const bfloat16*) {
    WGMMA_64("bf16.bf16");
}
template <int A_COLUMNS, int B_COLUMNS>
static __device__ void start_product(float (&sums)[16][4], unsigned long long a,
                                     unsigned long long b, const float16*) {
    WGMMA_128("f16.f16");
}
template <int A_COLUMNS, int B_COLUMNS>
static __device__ void start_product(float (&sums)[16][4], unsigned long long a,
                                     unsigned long long b, const bfloat16*) {
    WGMMA_128("bf16.bf16");
}

// Keeps the compiler from moving the sums to other registers while products are under way.
static __device__ void hold(float (&sums)[FRAGMENTS_M][FRAGMENTS_N][4]) {
#pragma unroll
    for (int i = 0; i < FRAGMENTS_M; ++i)
#pragma unroll
        for (int j = 0; j < FRAGMENTS_N; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(sums[i][j][e]) :: "memory");
}

// Starts sums += A B for one tile, as a group of its own. A_COLUMNS, B_COLUMNS: whether the factor
// lies in rows of neighbouring columns, else of neighbouring terms.
template <bool A_COLUMNS, bool B_COLUMNS>
static __device__ void multiply_tile(float (&sums)[FRAGMENTS_M][FRAGMENTS_N][4], unsigned a_tile,
                                     unsigned b_tile) {
    constexpr int A_STEP = A_COLUMNS ? 2 * ATOM_BYTES : 32;
    constexpr int B_STEP = B_COLUMNS ? 2 * ATOM_BYTES : 32;
    const int first = threadIdx.x / 128 * FRAGMENTS_M;
    hold(sums);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int i = 0; i < FRAGMENTS_M; ++i) {
        unsigned a = a_tile + (first + i) * (A_COLUMNS ? BLOCK_BYTES : 64 * ROW_BYTES);
#pragma unroll
        for (int step = 0; step < TILE_K / 16; ++step)
            start_product<A_COLUMNS, B_COLUMNS>(sums[i], descriptor(a + step * A_STEP),
                                                descriptor(b_tile + step * B_STEP),
                                                (const scalar_t*)nullptr);
    }
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    hold(sums);
}

// As in tensor_tile.cuh.
template <int STAGE_BYTES, class Fetch, class Multiply>
static __device__ void run_stages(unsigned memory, index_t start, index_t end, Fetch fetch,
                                  Multiply multiply, float (&sums)[FRAGMENTS_M][FRAGMENTS_N][4]) {
#pragma unroll
    for (int s = 0; s < STAGES - 2; ++s) {
        if (start + s < end) fetch(memory + s * STAGE_BYTES);
        end_group_of_copies();
    }
    int reading = 0, writing = STAGES - 2;
    for (index_t stage = start; stage < end; ++stage) {
        wait_for_copies<STAGES - 3>();
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // shows copies to wgmma
        __syncthreads();  // this tile has arrived, and the one before the last is multiplied
        multiply(memory + reading * STAGE_BYTES);
        if (stage + STAGES - 2 < end) fetch(memory + writing * STAGE_BYTES);
        end_group_of_copies();
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
        reading = reading + 1 == STAGES ? 0 : reading + 1;
        writing = writing + 1 == STAGES ? 0 : writing + 1;
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    hold(sums);
    wait_for_copies<0>();
    __syncthreads();  // the memory is free
}
