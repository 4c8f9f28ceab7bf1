"""What scripts/gpu_check.py measures.

    limits.py         the copy and the matrix product that all else is a share of
    benchmark.py      whole networks beside PyTorch and JAX, by scripts/benchmark.py
    step.py           an epoch of training, and steps for compute-sanitizer
    memory.py         the kernels bound by memory: one line each
    nets.py           the networks, and every distinct convolution in them
    convolutions.py   each of those beside cuDNN, and in every tile
    cudnn.py          the same convolutions through torch
    children.py       what runs in a process of its own: the tests, compute-sanitizer

    context.py        what they share, and the modes of convolution
    measure.py        how a call is timed and checked
    report.py         the table, and the JSON that grows row by row
"""
