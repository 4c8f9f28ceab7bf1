"""The first 10,000 training and 2,000 test images of Fashion-MNIST (MIT licence, see LICENSE).

The classes are nearly balanced: 942 to 1,027 images of each in training, 188 to 219 in the test.
Each file was made from the official one of that name, by these two lines with n = 10000 or 2000:

    a = read_idx(file)[:n]; head = bytes([0, 0, 8, a.ndim]) + np.array(a.shape, ">u4").tobytes()
    (subset / file.name).write_bytes(gzip.compress(head + a.tobytes(), 9, mtime=0))
"""
