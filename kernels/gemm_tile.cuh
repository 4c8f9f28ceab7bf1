// What the matrix products of this project share: how a block of threads computes one tile of
// C = A B. Included by the files that say what A and B are.
//
//                 TILE_N
//               +---------+
//               |    B    | TILE_K terms at a time, in shared memory
//        TILE_K +---------+
//       +-----+ +---------+
//       |     | |         |
//       |  A  | |    C    | TILE_M     each thread keeps 4 QUADS_M x 4 QUADS_N sums of C
//       |     | |         |            in registers
//       +-----+ +---------+
//
// An element of A that was read once from far away serves TILE_N products, one of B TILE_M: that is
// what the tile is for. The launcher defines TILE_M, TILE_N, QUADS_M and QUADS_N.

constexpr int TILE_K = 8;
constexpr int SUMS_M = 4 * QUADS_M, SUMS_N = 4 * QUADS_N;
constexpr int THREADS_M = TILE_M / SUMS_M, THREADS_N = TILE_N / SUMS_N;
constexpr int THREADS = THREADS_M * THREADS_N;
// Blocks that a multiprocessor must have registers for; 0: as the compiler likes. It would spill
// some of the small tiles, for more blocks at a time than are needed. tests/gpusim/resources.py
// shows what each variant takes.
constexpr int BLOCKS = THREADS >= 128 ? 0 : SUMS_M * SUMS_N < 32 ? 8 : 4;
// What a row of shared memory is longer, so that threads which store A's columns hit other banks.
constexpr int PAD = 4;

// Both tiles, twice: while the threads multiply with one pair, the next arrives in the other.
struct alignas(4 * sizeof(accum_t)) Tiles {
    accum_t a[2][TILE_K][TILE_M + PAD];
    accum_t b[2][TILE_K][TILE_N + PAD];
};

struct alignas(4 * sizeof(accum_t)) Quad { accum_t at[4]; };

// Row i of a thread's sums is this row of the tile. A thread's quads lie far apart, so that
// neighbouring threads read neighbouring quads.
static __device__ int tile_row(int i) {
    return i / 4 * (TILE_M / QUADS_M) + threadIdx.x / THREADS_N * 4 + i % 4;
}
static __device__ int tile_column(int j) {
    return j / 4 * (TILE_N / QUADS_N) + threadIdx.x % THREADS_N * 4 + j % 4;
}

// sums += A B over the TILE_K terms in one pair of buffers.
static __device__ void multiply_add(accum_t (&sums)[SUMS_M][SUMS_N],
                                    const accum_t (&a)[TILE_K][TILE_M + PAD],
                                    const accum_t (&b)[TILE_K][TILE_N + PAD]) {
#pragma unroll
    for (int k = 0; k < TILE_K; ++k) {
        Quad row[QUADS_M], column[QUADS_N];
#pragma unroll
        for (int q = 0; q < QUADS_M; ++q)
            row[q] = *reinterpret_cast<const Quad*>(&a[k][tile_row(4 * q)]);
#pragma unroll
        for (int q = 0; q < QUADS_N; ++q)
            column[q] = *reinterpret_cast<const Quad*>(&b[k][tile_column(4 * q)]);
#pragma unroll
        for (int i = 0; i < SUMS_M; ++i)
#pragma unroll
            for (int j = 0; j < SUMS_N; ++j)
                sums[i][j] += row[i / 4].at[i % 4] * column[j / 4].at[j % 4];
    }
}

// How often each thread reads N elements when all together read SIZE.
template <int N, int SIZE> constexpr int loads_each = SIZE / (N * THREADS);
static_assert(TILE_M * TILE_K % (4 * THREADS) == 0 && TILE_N * TILE_K % (4 * THREADS) == 0,
              "each thread reads 4 elements of A, and of B, at least");

// N neighbouring elements, read at once where N > 1. index: of the first; a multiple of N.
template <int N> struct alignas(N * sizeof(scalar_t)) Chunk { scalar_t at[N]; };

template <int N> static __device__ Chunk<N> chunk_at(const scalar_t* p, index_t index) {
    return *reinterpret_cast<const Chunk<N>*>(p + index);
}
template <int N> static __device__ Chunk<N> zero_chunk() {
    Chunk<N> chunk;
    for (int v = 0; v < N; ++v) chunk.at[v] = (scalar_t)0.0f;
    return chunk;
}
