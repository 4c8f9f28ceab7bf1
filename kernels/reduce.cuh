// A value that all threads of a block make together, the same bits in each of them. The order
// depends on blockDim.x alone, which is a multiple of 32, at most 1024.
//
// of_warps: shared memory for one value of each warp.
template <class T, class Combine>
static __device__ T over_block(T value, T* of_warps, Combine combine) {
    for (int by = 16; by > 0; by /= 2) value = combine(value, __shfl_xor_sync(~0u, value, by));
    if (blockDim.x == 32) return value;
    __syncthreads();  // what was here before has been read
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = value;
    __syncthreads();
    value = of_warps[0];
    for (int warp = 1; warp < (int)blockDim.x / 32; ++warp) value = combine(value, of_warps[warp]);
    return value;
}

template <class T> static __device__ T block_sum(T value, T* of_warps) {
    return over_block(value, of_warps, [](T a, T b) { return a + b; });
}

// The sum of each of COUNT values over the lanes of a block, thread lane * across + column: lane 0
// of a column finds it in `values`. In pairs, so in an order that depends on `lanes` alone; one lane
// that added what all others left would take longer than their work where there are hundreds.
//
// shared: COUNT values for each two of THREADS threads.
template <int THREADS, int COUNT>
static __device__ void add_lanes(accum_t (&values)[COUNT], accum_t* shared, int lane, int lanes,
                                 int across) {
    for (int left = lanes; left > 1;) {
        const int kept = (left + 1) / 2, partner = (int)threadIdx.x - kept * across;
        if (lane >= kept && lane < left)
            for (int v = 0; v < COUNT; ++v) shared[v * (THREADS / 2) + partner] = values[v];
        __syncthreads();
        if (lane < left - kept)
            for (int v = 0; v < COUNT; ++v)
                values[v] += shared[v * (THREADS / 2) + (int)threadIdx.x];
        __syncthreads();
        left = kept;
    }
}
