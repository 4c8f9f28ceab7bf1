// What a training step found, written where the host reads it some steps later.
//
//     ring (2 * half, 2)    loss and number of hits of the last 2 * half steps
//     count (1,)            how many steps were recorded
//
// The row is chosen on the device, so that a CUDA graph can replay the launch. One thread.

extern "C" __global__ void record_step(
    const accum_t* __restrict__ loss, const int* __restrict__ hits, double* __restrict__ ring,
    long long* __restrict__ count, int rows)
{
    if (blockIdx.x > 0 || threadIdx.x > 0) return;
    const long long step = *count, row = step % rows;
    ring[2 * row] = (double)*loss;
    ring[2 * row + 1] = *hits;
    *count = step + 1;
}
