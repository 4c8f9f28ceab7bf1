// What the matrix products on tensor cores share: 16-bit elements with sums in float32, or float32
// elements of which the product sees 10 bits (tf32).
//
// Tiles of A and B go from global to shared memory in 16-byte pieces that no thread holds in
// registers (cp.async), STAGES - 1 tiles ahead of the products. Where a piece lies in the padding,
// zeros are written instead. A warp computes WARP_M x WARP_N sums in fragments of 16 x 8; ldmatrix
// brings the elements into the registers of the lanes that the tensor core takes them from.
//
// The launcher sees to it that channels come in 16-byte pieces, and defines TILE_M, TILE_N, WARP_M,
// WARP_N and STAGES. It gives STAGES * (bytes of both tiles) of dynamic shared memory.

#include "ptx.cuh"

constexpr bool TF32 = sizeof(scalar_t) == 4;
constexpr int PIECE = 16 / sizeof(scalar_t), PIECES = 4;      // elements a piece, pieces a row of k
constexpr int TILE_K = PIECES * PIECE;
constexpr int WARPS_M = TILE_M / WARP_M, WARPS_N = TILE_N / WARP_N;
constexpr int THREADS = 32 * WARPS_M * WARPS_N;
constexpr int COLUMN_WARPS = WARPS_M;  // in a row, which have the same columns
constexpr int FRAGMENTS_M = WARP_M / 16, FRAGMENTS_N = WARP_N / 8;

// A tile lies in shared memory in one of two ways, as its elements are neighbours in global memory:
// in rows of TILE_K terms, or in TILE_K rows of WIDTH = TILE_M or TILE_N columns. Eight pieces
// which ldmatrix reads at once must lie in 8 different groups of 4 banks: so pieces change places
// by row. Where rows of columns are read word by word (tf32), a gap of 32 bytes keeps the 4 rows
// that a warp reads at once in different banks.
constexpr int TERM_PITCH = 16 * PIECES;  // bytes from a row to the next
constexpr int ALIGNMENT = 128, BLOCKS_EACH = 2;  // on a multiprocessor

static __device__ int term_offset(int row, int piece) {
    return row * TERM_PITCH + ((piece ^ (row >> 1 & 3)) << 4);
}

template <int WIDTH> constexpr int column_pitch = WIDTH * (int)sizeof(scalar_t) + (TF32 ? 32 : 0);

template <int WIDTH> constexpr int term_bytes = WIDTH * TERM_PITCH;
template <int WIDTH> constexpr int column_bytes = TILE_K * column_pitch<WIDTH>;

template <int WIDTH> static __device__ int column_offset(int row, int piece) {
    int moved = TF32 ? piece : piece ^ (WIDTH >= 64 ? row & 7 : row >> 1 & 3);
    return row * column_pitch<WIDTH> + (moved << 4);
}

// Where this warp's fragments of 16 x 8 sums lie in the tile.
static __device__ int fragment_row(int i) {
    return threadIdx.x / 32 % WARPS_M * WARP_M + i * 16;
}
static __device__ int first_column() { return threadIdx.x / 32 / WARPS_M * WARP_N; }

// Fragments of A, 16 rows from `row`, and of B, 16 columns from `column`, for one step of k: 32
// bytes of it, two pieces where terms are neighbours. `tile` is the tile's address in shared
// memory.
static __device__ void load_a_terms(unsigned (&a)[4], unsigned tile, int row, int step) {
    const int lane = threadIdx.x % 32;
    load_matrices(a, tile + term_offset(row + lane % 16, step * 2 + lane / 16));
}
static __device__ void load_b_terms(unsigned (&b)[4], unsigned tile, int column, int step) {
    const int lane = threadIdx.x % 32;
    load_matrices(b, tile + term_offset(column + lane % 8 + lane / 16 * 8,
                                        step * 2 + lane / 8 % 2));
}
template <int WIDTH>
static __device__ void load_a_columns(unsigned (&a)[4], unsigned tile, int row, int step) {
    const int lane = threadIdx.x % 32;
    if (TF32)
#pragma unroll
        for (int e = 0; e < 4; ++e)
            a[e] = load_word(tile + (step * 8 + lane % 4 + e / 2 * 4) * column_pitch<WIDTH>
                             + (row + lane / 4 + e % 2 * 8) * 4);
    else
        load_matrices_transposed(a, tile + column_offset<WIDTH>(
            step * 16 + lane % 8 + lane / 16 * 8, row / 8 + lane / 8 % 2));
}
template <int WIDTH>
static __device__ void load_b_columns(unsigned (&b)[4], unsigned tile, int column, int step) {
    const int lane = threadIdx.x % 32;
    if (TF32)
#pragma unroll
        for (int e = 0; e < 4; ++e)
            b[e] = load_word(tile + (step * 8 + lane % 4 + e % 2 * 4) * column_pitch<WIDTH>
                             + (column + lane / 4 + e / 2 * 8) * 4);
    else
        load_matrices_transposed(b, tile + column_offset<WIDTH>(step * 16 + lane % 16,
                                                                column / 8 + lane / 16));
}

// sums += A B for one tile. A_COLUMNS, B_COLUMNS: whether the factor lies in rows of neighbouring
// columns, else of neighbouring terms.
template <bool A_COLUMNS, bool B_COLUMNS>
static __device__ void multiply_tile(float (&sums)[FRAGMENTS_M][FRAGMENTS_N][4], unsigned a_tile,
                                     unsigned b_tile) {
#pragma unroll
    for (int step = 0; step < PIECES / 2; ++step) {
        unsigned a[FRAGMENTS_M][4], b[FRAGMENTS_N / 2][4];
#pragma unroll
        for (int i = 0; i < FRAGMENTS_M; ++i) {
            if (A_COLUMNS) load_a_columns<TILE_M>(a[i], a_tile, fragment_row(i), step);
            else load_a_terms(a[i], a_tile, fragment_row(i), step);
        }
#pragma unroll
        for (int j = 0; j < FRAGMENTS_N / 2; ++j) {
            if (B_COLUMNS) load_b_columns<TILE_N>(b[j], b_tile, first_column() + j * 16, step);
            else load_b_terms(b[j], b_tile, first_column() + j * 16, step);
        }
        if (TF32) {  // b first: the other way round takes more registers than there are
#pragma unroll
            for (int e = 0; e < FRAGMENTS_N * 2; ++e)
                b[e / 4][e % 4] = round_to_tf32(b[e / 4][e % 4]);
#pragma unroll
            for (int e = 0; e < FRAGMENTS_M * 4; ++e)
                a[e / 4][e % 4] = round_to_tf32(a[e / 4][e % 4]);
        }
#pragma unroll
        for (int i = 0; i < FRAGMENTS_M; ++i)
#pragma unroll
            for (int j = 0; j < FRAGMENTS_N; ++j)
                multiply_fragments(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1],
                                   (const scalar_t*)nullptr);
    }
}

// Runs the products over stages start to end - 1: fetch(address) starts the copies of the next
// stage to there, multiply(address) adds to the sums the products of the one that lies there.
template <int STAGE_BYTES, class Fetch, class Multiply>
static __device__ void run_stages(unsigned memory, index_t start, index_t end, Fetch fetch,
                                  Multiply multiply, float (&)[FRAGMENTS_M][FRAGMENTS_N][4]) {
#pragma unroll
    for (int s = 0; s < STAGES - 1; ++s) {
        if (start + s < end) fetch(memory + s * STAGE_BYTES);
        end_group_of_copies();
    }
    int reading = 0, writing = STAGES - 1;
    for (index_t stage = start; stage < end; ++stage) {
        wait_for_copies<STAGES - 2>();
        __syncthreads();  // this tile has arrived, and nobody reads the one before it any more
        if (stage + STAGES - 1 < end) fetch(memory + writing * STAGE_BYTES);
        end_group_of_copies();
        multiply(memory + reading * STAGE_BYTES);
        reading = reading + 1 == STAGES ? 0 : reading + 1;
        writing = writing + 1 == STAGES ? 0 : writing + 1;
    }
    wait_for_copies<0>();
    __syncthreads();  // the memory is free
}
