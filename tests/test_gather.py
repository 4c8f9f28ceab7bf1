"""Batches gathered from a data set on the backend: kernels/gather.cu, its NumPy counterpart,
Augmentation, and what Loader does with them."""
from __future__ import annotations

import re

import ml_dtypes  # noqa: F401  NumPy knows bfloat16 then
import numpy as np
import pytest

from gpucnn import use_backend
from gpucnn.augmentation import CUT, ENTRIES, NO_IMAGE
from gpucnn.backend import batch_gather, cuda_kernel, make_backend
from gpucnn.backend.cuda_kernel import Variant, kernel_dir, read_source
from gpucnn.data import Augmentation, Dataset, Loader, to_float
from gpucnn.rng import random_words
from tests.conftest import needs_simulator
from tests.gpusim import nvrtc
from tests.gpusim.mutation import caught

KEY = 0xFEDC_BA98_7654_3210
SHAPES = {"grey": (11, 5, 8, 1), "colour": (9, 4, 4, 3), "four channels": (5, 6, 7, 4),
          "no multiple of 4": (7, 7, 5, 1), "a pixel": (3, 1, 1, 1)}
AUGMENTATIONS = {
    "none": Augmentation(),
    "crop": Augmentation(crop=2),
    "reflect": Augmentation(crop=3, padding="reflect"),
    "flip": Augmentation(flip=True),
    "cutout": Augmentation(cutout=3, mean=0.25, std=0.5),
    "all": Augmentation(crop=1, flip=True, cutout=2, padding="reflect", mean=0.4, std=0.3),
    "all, zero": Augmentation(crop=3, flip=True, cutout=4, mean=0.5, std=(0.25,)),
}


def data_set(shape, seed=0):
    rng = np.random.default_rng(seed)
    return Dataset(rng.integers(0, 256, shape, np.uint8), rng.integers(0, 4, shape[0]),
                   tuple("abcd"), "random")


def fitting(shape):
    """The augmentations that fit images of this shape, by name."""
    for name, augmentation in AUGMENTATIONS.items():
        try:
            augmentation.check_fits(*shape[1:])
        except ValueError:
            continue
        yield name, augmentation


def gather(backend, data, order, position, n, augmentation, *, epoch=0, dtype=np.float32, key=KEY):
    """The batch in host memory; nothing but x and y may be written."""
    given = (data.images, data.labels, np.asarray(order), np.array([position, epoch]),
             augmentation.table(data.images.shape[3], dtype))
    there = [backend.asarray(a) for a in given]
    images, labels, order, cursor, table = there
    x, y = backend.gather_batch(images, labels, order, cursor, n, table, augmentation, key)
    for a, b in zip(given, there):
        assert a.tobytes() == backend.to_numpy(b).tobytes()
    assert (x.shape, x.dtype) == ((n, *data.images.shape[1:]), dtype)
    assert (y.shape, y.dtype) == ((n,), np.int64)
    return np.asarray(backend.to_numpy(x)), np.asarray(backend.to_numpy(y))


def expected(data, order, position, n, augmentation, *, epoch=0, dtype=np.float32, key=KEY):
    """The same by a plain loop over images and NumPy's own functions."""
    total, h, w, _ = data.images.shape
    words = random_words(4 * total, key, epoch).reshape(total, 4)
    crop, k = augmentation.crop, augmentation.cutout
    kind = np.float64 if dtype == np.float64 else np.float32
    mean, std = (np.asarray(v, kind) for v in (augmentation.mean, augmentation.std))
    batch = []
    for i in order[position:position + n]:
        draw = [int(word) for word in words[i]]
        mode = {"zero": "constant", "reflect": "reflect"}[augmentation.padding]
        padded = np.pad(data.images[i], ((crop, crop), (crop, crop), (0, 0)), mode=mode)
        top, left = (word * (2 * crop + 1) >> 32 for word in draw[:2])
        window = padded[top:top + h, left:left + w]
        if augmentation.flip and draw[0] % 2:
            window = window[:, ::-1]
        x = (window.astype(kind) / kind(255) - mean) / std
        if k:
            top, left = (draw[2] * h >> 32) - k // 2, (draw[3] * w >> 32) - k // 2
            x[max(0, top):top + k, max(0, left):left + k] = 0
        batch.append(x.astype(dtype))
    return np.stack(batch), data.labels[order[position:position + n]]


def check_everything(backend, dtype=np.float32):
    """Every shape with every augmentation that fits, against the loop, bit for bit."""
    for number, (what, shape) in enumerate(SHAPES.items()):
        data = data_set(shape, number)
        order = np.random.default_rng(number).permutation(shape[0])
        for name, augmentation in fitting(shape):
            for position, n, epoch in ((0, shape[0], 0), (1, 2, 2**40 + 3)):
                options = {"epoch": epoch, "dtype": np.dtype(dtype)}
                got = gather(backend, data, order, position, n, augmentation, **options)
                want = expected(data, order, position, n, augmentation, **options)
                for a, b in zip(got, want):
                    np.testing.assert_array_equal(a, b, err_msg=f"{what}, {name}")


# ---- the op

@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_a_batch_is_what_a_plain_loop_gives(backend, dtype):
    check_everything(backend, dtype)


def test_64_bit_offsets_give_the_same(cupy_backend, monkeypatch):
    monkeypatch.setattr(cuda_kernel, "MAX_INT_INDEX", -1)
    check_everything(cupy_backend)


def test_epochs_and_images_of_64_bits_draw_numbers_of_their_own(backend):
    data, order, augmentation = data_set((9, 16, 16, 3)), np.arange(9), AUGMENTATIONS["all"]
    got = gather(backend, data, order, 0, 9, augmentation, epoch=-1)  # as int64
    want = expected(data, order, 0, 9, augmentation, epoch=2**64 - 1)
    np.testing.assert_array_equal(got[0], want[0])
    images, epoch = [5, 2**32 + 5, 2**40], 2**40 + 3
    for image, words in zip(images, batch_gather._draw(np.array(images), epoch, KEY)):
        np.testing.assert_array_equal(words, random_words(4, KEY, epoch, start=4 * image))


def test_each_thread_does_more_than_one_step(cupy_backend, monkeypatch):
    monkeypatch.setattr(cuda_kernel, "MAX_GRID", 1)
    data, order = data_set((9, 16, 16, 3)), np.arange(9)
    augmentation = AUGMENTATIONS["all"]
    for a, b in zip(gather(cupy_backend, data, order, 0, 9, augmentation),
                    expected(data, order, 0, 9, augmentation)):
        np.testing.assert_array_equal(a, b)


def test_a_data_set_past_2_to_the_31_bytes(cupy_backend):
    """4.3e9 zeros, of which hardly any page is touched; the last image is far behind 2^31."""
    xp = cupy_backend.xp
    images = xp.zeros((2**26 + 1, 8, 8, 1), np.uint8)
    images[2**26, 7, 7, 0] = 255
    order = xp.zeros(len(images), np.int64)
    order[1] = 2**26
    labels = xp.zeros(len(images), np.int64)
    labels[2**26] = 3
    augmentation = Augmentation()
    x, y = cupy_backend.gather_batch(
        images, labels, order, cupy_backend.asarray(np.array([0, 0])), 2,
        cupy_backend.asarray(augmentation.table(1, np.float32)), augmentation, KEY)
    want = np.zeros((2, 8, 8, 1), np.float32)
    want[1, 7, 7] = 1
    np.testing.assert_array_equal(cupy_backend.to_numpy(x), want)
    np.testing.assert_array_equal(cupy_backend.to_numpy(y), [0, 3])


@pytest.mark.parametrize("name", ["none", "all"])
@pytest.mark.parametrize(("order", "position", "missing"), [
    ([0, 1, 2, 9, 4, 5, 6, 7, 8], 2, [False, True, False]),   # 9 images: 0 to 8
    ([0, 1, -1, 2**40, -2**40, 5, 6, 7, 8], 2, [True, True, True]),
    (range(9), 8, [False, True, True]),
    (range(9), -2, [True, True, False]),
    (range(9), 2**40, [True, True, True]),
], ids=["one too far", "far out", "past the end", "before the start", "far past"])
def test_what_is_not_there_is_nan_and_nothing_else_is_read(backend, name, order, position, missing):
    data, order = data_set((9, 4, 4, 3)), np.array(order)
    augmentation = AUGMENTATIONS[name]
    x, y = gather(backend, data, order, position, 3, augmentation)
    for i, absent in enumerate(missing):
        if absent:
            assert np.isnan(x[i]).all()
            assert y[i] == -1
        else:
            want_x, want_y = expected(data, order, position + i, 1, augmentation)
            np.testing.assert_array_equal(x[i], want_x[0])
            assert y[i] == want_y[0]


def test_a_batch_of_none(backend):
    x, y = gather(backend, data_set((3, 4, 4, 1)), np.arange(3), 3, 0, AUGMENTATIONS["all"])
    assert (x.shape, y.shape) == ((0, 4, 4, 1), (0,))


def test_the_same_image_in_the_same_epoch_is_augmented_alike_in_any_batch(backend):
    data, augmentation = data_set((9, 6, 6, 1)), AUGMENTATIONS["all"]
    order = np.random.default_rng(3).permutation(9)
    whole, _ = gather(backend, data, np.arange(9), 0, 9, augmentation, epoch=5)
    for position, n in ((0, 1), (2, 4), (8, 1)):
        x, _ = gather(backend, data, order, position, n, augmentation, epoch=5)
        np.testing.assert_array_equal(x, whole[order[position:position + n]])
    assert (gather(backend, data, np.arange(9), 0, 9, augmentation, epoch=6)[0] != whole).any()
    assert (gather(backend, data, np.arange(9), 0, 9, augmentation, epoch=5, key=KEY + 1)[0]
            != whole).any()


@pytest.mark.parametrize("wrong", ["images", "labels", "order", "cursor"])
def test_an_array_of_another_dtype_is_refused_by_the_launcher(cupy_backend, wrong):
    data, augmentation = data_set((3, 4, 4, 1)), Augmentation()
    arrays = {"images": data.images, "labels": data.labels, "order": np.arange(3),
              "cursor": np.array([0, 0])}
    arrays[wrong] = arrays[wrong].astype(np.int32)
    message = rf"^gather_batch, argument '{wrong}': int32 where the kernel reads (uint8|int64)$"
    with pytest.raises(TypeError, match=message):
        cupy_backend.gather_batch(
            *map(cupy_backend.asarray, arrays.values()), 2,
            cupy_backend.asarray(augmentation.table(1, np.float32)), augmentation, KEY)


# ---- what is drawn

N = 4000


@pytest.fixture(scope="module")
def many():
    """N times an image whose pixels all differ: 1 to 30."""
    image = np.arange(1, 31, dtype=np.uint8).reshape(5, 6, 1)
    return Dataset(np.repeat(image[None], N, axis=0), np.zeros(N, np.int64), ("a",), "same")


def drawn(data, augmentation):
    x, _ = gather(make_backend("numpy"), data, np.arange(N), 0, N, augmentation)
    return np.rint(255 * x[..., 0]).astype(int)


def check_share(count, share):
    """Within five standard errors."""
    assert abs(count - N * share) < 5 * (N * share * (1 - share)) ** 0.5, (count, N * share)


def test_half_of_the_images_are_mirrored(many):
    x = drawn(many, Augmentation(flip=True))
    mirrored = (x == many.images[0, :, ::-1, 0]).all(axis=(1, 2))
    assert (mirrored ^ (x == many.images[0, :, :, 0]).all(axis=(1, 2))).all()
    check_share(mirrored.sum(), 0.5)


def test_every_window_comes_as_often_and_mirrored_in_half_of_its_cases(many):
    x = drawn(many, Augmentation(crop=1, flip=True))
    padded = np.pad(many.images[0, :, :, 0], 1)
    for top, left, step in np.ndindex(3, 3, 2):
        window = padded[top:top + 5, left:left + 6][:, ::1 - 2 * step]
        check_share((x == window).all(axis=(1, 2)).sum(), 1 / 18)


def test_cutout_stands_at_every_centre_as_often_and_is_cut_off_at_the_border(many):
    cut = drawn(many, Augmentation(cutout=3)) == 0
    for y, x in np.ndindex(5, 6):
        square = np.zeros((5, 6), bool)
        square[max(0, y - 1):y + 2, max(0, x - 1):x + 2] = True
        check_share((cut == square).all(axis=(1, 2)).sum(), 1 / 30)


# ---- Augmentation

@pytest.mark.parametrize(("options", "error", "message"), [
    ({"crop": -1}, ValueError, "crop must be >= 0, got -1"),
    ({"crop": 1.0}, TypeError, "crop must be an int, got 1.0"),
    ({"cutout": True}, TypeError, "cutout must be an int, got True"),
    ({"flip": 0.5}, TypeError, "flip must be a bool, got 0.5"),
    ({"padding": "edge"}, ValueError, "padding must be 'zero' or 'reflect', got 'edge'"),
    ({"mean": "grey"}, TypeError, "mean must be a number or one for each channel, got 'grey'"),
    ({"mean": ()}, TypeError, "mean must be a number or one for each channel, got ()"),
    ({"std": "0.5"}, TypeError, "std must be a number or one for each channel, got '0.5'"),
    ({"mean": None}, TypeError, "mean must be a number or one for each channel, got None"),
    ({"std": [[1, 2]]}, TypeError, "std must be a number or one for each channel, got [[1, 2]]"),
    ({"mean": float("nan")}, ValueError, "mean must be finite, got nan"),
    ({"std": (0.2, 0)}, ValueError, "std must be finite and > 0, got (0.2, 0)"),
    ({"std": 1e-60}, ValueError, "std must be finite and > 0, got 1e-60"),
    ({"std": 1e60}, ValueError, "std must be finite and > 0, got 1e+60"),
])
def test_wrong_values_are_refused_in_one_line(options, error, message):
    with pytest.raises(error, match=f"^Augmentation: {re.escape(message)}$"):
        Augmentation(**options)


@pytest.mark.parametrize(("options", "message"), [
    ({"crop": 4}, "crop must be less than the height and the width of the images, 4x5; got 4"),
    ({"cutout": 5}, "cutout must be at most the height and the width of the images, 4x5; got 5"),
    ({"mean": (0.5, 0.5)}, "mean has 2 values, the images have 3 channels"),
    ({"std": (1, 1, 1, 1)}, "std has 4 values, the images have 3 channels"),
])
def test_what_does_not_fit_the_images_is_refused_when_the_loader_is_made(options, message):
    with pytest.raises(ValueError, match=f"^Augmentation: {re.escape(message)}$"):
        Loader(data_set((2, 4, 5, 3)), 2, seed=0, augmentation=Augmentation(**options))


def test_the_largest_cutout_and_crop_fit(backend):
    data = data_set((2, 4, 5, 3))
    for options in ({"cutout": 4}, {"crop": 3, "padding": "reflect"}):
        augmentation = Augmentation(**options)
        got = gather(backend, data, range(2), 0, 2, augmentation)
        np.testing.assert_array_equal(got[0], expected(data, range(2), 0, 2, augmentation)[0])


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.uint64])
def test_labels_of_any_integers_are_int64(backend, dtype):
    data = data_set((6, 2, 2, 1))
    loader = Loader(Dataset(data.images, data.labels.astype(dtype), data.class_names, "d"), 4)
    (_, y), _ = batches(loader)
    assert y.dtype == np.int64
    np.testing.assert_array_equal(y, data.labels[:4])


def test_the_table_is_what_normalise_gives():
    augmentation = Augmentation(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.2))
    for dtype in ("float32", "float64", "float16", "bfloat16"):
        table = augmentation.table(3, dtype)
        assert (table.shape, table.dtype) == ((3, ENTRIES), np.dtype(dtype))
        pixels = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None], (1, 1, 256, 3))
        x = np.empty(pixels.shape, dtype)
        augmentation.normalise(pixels, out=x)
        np.testing.assert_array_equal(table[:, :256], x[0, 0].T)
        assert not table[:, CUT].any()
        assert np.isnan(table[:, NO_IMAGE]).all()
    exact = (np.arange(256) / 255 - 0.3) / 0.2
    np.testing.assert_allclose(augmentation.table(3, np.float64)[2, :256], exact, rtol=1e-12)


# ---- Loader

def batches(loader, *where):
    return [tuple(loader.backend.to_numpy(a) for a in batch) for batch in loader.epoch(*where)]


def joined(loader, *where):
    return [np.concatenate(a) for a in zip(*batches(loader, *where))]


def test_a_loader_stays_on_the_backend_in_use_and_gives_to_float(backend):
    data = data_set((10, 4, 5, 3))
    loader = Loader(data, 4)
    assert loader.backend is backend
    assert all(isinstance(a, backend.xp.ndarray) for batch in loader.epoch() for a in batch)
    assert [len(y) for _, y in batches(loader)] == [4, 4, 2]
    x, y = joined(loader)
    assert x.dtype == np.float32
    np.testing.assert_array_equal(x, to_float(data.images))
    np.testing.assert_array_equal(y, data.labels)


def test_a_loader_augments_by_seed_epoch_and_image(backend):
    data, augmentation = data_set((10, 5, 5, 3)), AUGMENTATIONS["all"]
    data = Dataset(data.images, np.arange(10), tuple("abcdefghij"), "numbered")
    x, y = joined(Loader(data, 4, seed=1, augmentation=augmentation), 2)
    for batch_size in (1, 3, 10, 64):
        again, labels = joined(Loader(data, batch_size, seed=1, augmentation=augmentation), 2)
        np.testing.assert_array_equal(again, x)
        np.testing.assert_array_equal(labels, y)
    with use_backend("numpy"):
        here, _ = joined(Loader(data, 4, seed=1, augmentation=augmentation), 2)
    np.testing.assert_array_equal(here, x)
    order = np.argsort(joined(Loader(data, 4, seed=1), 2)[1], kind="stable")
    for seed, epoch in ((1, 3), (2, 2)):
        other = Loader(data, 4, seed=seed, augmentation=augmentation)
        back = np.argsort(joined(other, epoch)[1], kind="stable")
        assert (joined(other, epoch)[0][back] != x[order]).any()


def test_an_interrupted_epoch_goes_on(backend):
    data = data_set((10, 5, 5, 1))
    loader = Loader(data, 4, seed=7, augmentation=AUGMENTATIONS["all"])
    whole = batches(loader, 3)
    for seen in range(3):
        rest = batches(loader, 3, 4 * seen)
        assert len(rest) == 3 - seen
        for (x, y), (want_x, want_y) in zip(rest, whole[seen:]):
            np.testing.assert_array_equal(x, want_x)
            np.testing.assert_array_equal(y, want_y)
    assert batches(loader, 3, 10) == []
    assert [len(y) for _, y in batches(loader, 3, 5)] == [4, 1]
    with pytest.raises(ValueError, match=r"^Loader: position must be <= 10, the number of images, "
                                         r"got 11$"):
        loader.epoch(0, 11)


def test_two_epochs_at_once_do_not_meet(backend):
    loader = Loader(data_set((6, 5, 5, 1)), 2, seed=7, augmentation=AUGMENTATIONS["all"])
    for (a, _), (b, _), want_a, want_b in zip(loader.epoch(0), loader.epoch(1), batches(loader, 0),
                                              batches(loader, 1)):
        np.testing.assert_array_equal(loader.backend.to_numpy(a), want_a[0])
        np.testing.assert_array_equal(loader.backend.to_numpy(b), want_b[0])


def test_gather_goes_on_from_where_the_device_says(backend):
    """As a CUDA graph replays it: the same arrays each time, the next epoch copied into them."""
    loader = Loader(data_set((6, 5, 5, 1)), 2, seed=7, augmentation=AUGMENTATIONS["all"])
    feed = loader.feed()
    order, cursor = feed.order, feed.cursor
    for epoch in range(2):
        assert feed.begin(epoch, 0) == [2, 2, 2]
        for x, y in batches(loader, epoch):
            got_x, got_y = feed.gather(2)
            np.testing.assert_array_equal(backend.to_numpy(got_x), x)
            np.testing.assert_array_equal(backend.to_numpy(got_y), y)
        assert backend.to_numpy(cursor).tolist() == [6, epoch]
        assert feed.order is order
        assert feed.cursor is cursor


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
@pytest.mark.parametrize(("seed", "position"), [(7, 0), (7, 4), (2**64 - 1, 3)])
def test_a_streamed_data_set_gives_the_same_batches(backend, augmentation, seed, position):
    """All of them kept, so that none may lie in memory that the next one is written to."""
    data = data_set((11, 5, 6, 3))
    given = []
    for streamed in (False, True):
        loader = Loader(data, 4, seed=seed, augmentation=AUGMENTATIONS[augmentation],
                        streamed=streamed)
        given.append([batch for epoch in (0, 3) for batch in loader.epoch(epoch, position)])
    assert len(given[0]) == 2 * -(-(11 - position) // 4)
    for resident, streamed in zip(*given):
        for want, got in zip(resident, streamed):
            np.testing.assert_array_equal(backend.to_numpy(got), backend.to_numpy(want))


def test_a_data_set_streams_where_the_gpu_has_no_room(backend, monkeypatch):
    data = data_set((6, 5, 5, 1))
    assert not Loader(data, 4).streamed
    monkeypatch.setattr(type(backend), "free_bytes", lambda self: 2 * data.images.nbytes - 1)
    assert Loader(data, 4).streamed
    assert not Loader(data, 4, streamed=False).streamed
    with pytest.raises(TypeError, match="^Loader: streamed must be True, False or None, got 'no'$"):
        Loader(data, 4, streamed="no")


def test_an_epoch_is_one_launch_a_batch(cupy_backend):
    launches = getattr(cupy_backend.xp, "launches", None)
    if launches is None:
        pytest.skip("only the simulator counts launches")
    loader = Loader(data_set((10, 5, 5, 1)), 4, seed=7, augmentation=AUGMENTATIONS["all"])
    before = len(launches)
    list(loader.epoch())
    assert [name for name, *_ in launches[before:]] == ["gather_batch"] * 3


def test_a_loader_of_another_dtype(backend):
    data = data_set((5, 4, 4, 3))
    for dtype in ("float16", "float64", "bfloat16"):
        x, _ = joined(Loader(data, 2, dtype=dtype))
        assert x.dtype == np.dtype(dtype)
    with pytest.raises(TypeError, match=r"^Loader: dtype must be float32, float64, float16 or "
                                        r"bfloat16, got int32$"):
        Loader(data, 2, dtype=np.int32)


def test_a_loader_refuses_what_cannot_be_meant():
    with pytest.raises(ValueError, match=r"^Loader: an augmentation that draws random numbers "
                                         r"needs a seed$"):
        Loader(data_set((2, 4, 4, 1)), 2, augmentation=Augmentation(flip=True))
    with pytest.raises(TypeError, match=r"^Loader: augmentation must be an Augmentation or None, "
                                        r"got {'flip': True}$"):
        Loader(data_set((2, 4, 4, 1)), 2, seed=0, augmentation={"flip": True})
    with pytest.raises(ValueError, match=r"^images of 0x4 with 1 channels have no pixels$"):
        Loader(data_set((2, 0, 4, 1)), 2)


def test_the_first_augmentations_never_change_between_releases():
    """A saved seed must mean the same run in every version."""
    images = np.arange(3 * 16, dtype=np.uint8).reshape(3, 4, 4, 1)
    data = Dataset(images, np.arange(3), tuple("abc"), "counted")
    augmentation = Augmentation(crop=1, flip=True, cutout=2)
    x, y = joined(Loader(data, 3, seed=0, augmentation=augmentation), 1)
    assert y.tolist() == [2, 1, 0]
    assert np.rint(255 * x[..., 0]).astype(int).tolist() == [
        [[0, 33, 32, 0], [0, 37, 36, 0], [42, 41, 40, 0], [46, 45, 44, 0]],
        [[0, 0, 0, 0], [0, 19, 18, 17], [0, 0, 22, 21], [0, 0, 26, 25]],
        [[0, 0, 1, 2], [0, 4, 5, 6], [0, 8, 0, 0], [0, 12, 0, 0]]]


# ---- the kernel itself

def test_neighbours_are_one_access():
    library, reason = nvrtc.find()
    if library is None:
        pytest.skip(reason)
    f4, u1, i4 = map(np.dtype, ("f4", "u1", "i4"))
    source = read_source(kernel_dir(), "gather.cu", Variant(f4, u1, i4, 4))
    ptx = nvrtc.compile(source, "gather.cu", "compute_90").code
    assert b"st.global.v4.f32" in ptx
    assert b"st.global.f32" not in ptx
    assert b".local" not in ptx, "no spills to local memory"


BUGS = {
    "the window is one too low": ("gather.cu", "word[0]) - crop, h", "word[0]) - crop + 1, h"),
    "the last place is never chosen": ("gather.cu", "below(2 * crop + 1, word[1])",
                                       "below(2 * crop, word[1])"),
    "rows and columns share a word": ("gather.cu", "below(2 * crop + 1, word[1])",
                                      "below(2 * crop + 1, word[0])"),
    "reflection repeats the border": ("gather.cuh", "2 * (size - 1) - place",
                                      "2 * size - 1 - place"),
    "reflection is missing": ("gather.cuh", "if (!reflect) return -1;", "return -1;"),
    "padding reads before the image": ("gather.cuh", "place >= 0 && place < size)",
                                       "place < size)"),
    "a mirrored row is one to the right": ("gather.cu", "mirrored ? w - 1 - at",
                                           "mirrored ? w - at"),
    "every image is mirrored": ("gather.cu", "flip && (word[0] & 1)", "flip"),
    "the window is mirrored as well": ("gather.cu", "(mirrored ? w - 1 - at : at) + left",
                                       "(mirrored ? w - 1 - at - left : at + left)"),
    "cutout is one row short": ("gather.cu", "p.y < cut_top + cutout",
                                "p.y < cut_top + cutout - 1"),
    "cutout goes by the image's columns": ("gather.cu", "at >= cut_left && at <",
                                           "column >= cut_left && column <"),
    "cutout wins over an image that is missing": (
        "gather.cu", "if (!exists) entry = NO_IMAGE;\n            else if (cut_row",
        "if (!exists) entry = NO_IMAGE;\n            if (cut_row"),
    "what is cut out is black": ("gather.cu", "entry = CUT", "entry = 0"),
    "the epoch is not drawn from": ("gather.cuh", "(unsigned)epoch;", "0u;"),
    "the epoch has 32 bits": ("gather.cuh", "(unsigned)((unsigned long long)epoch >> 32)", "0u"),
    "the place in the batch is drawn from": ("gather.cu", "draw(word, image,", "draw(word, p.n,"),
    "the cursor is not read": ("gather.cu", "cursor[0] + p.n", "p.n"),
    "the order is not read": ("gather.cu", "order[place]", "place"),
    "a place past the end is read": ("gather.cu", "place >= 0 && place < total", "place >= 0"),
    "an image past the end is read": (
        "gather.cu", "image >= 0 && image < (streamed ? streamed : total)", "image >= 0"),
    "a streamed image counts as missing": ("gather.cu", "(streamed ? streamed : total)", "total"),
    "a streamed image is looked for at its number": ("gather.cu", "lies = streamed ? place : image",
                                                     "lies = image"),
    "labels of images that are missing are read": ("gather.cu", "exists ? labels[lies] : -1",
                                                   "labels[lies]"),
    "channels do not wrap": ("gather.cu", "if (++channel == c) { channel = 0; ++at; }", "++at;"),
    "every row writes the label": ("gather.cu", "if (p.y == 0 && p.x == 0) y", "if (p.x == 0) y"),
    "Philox has nine rounds": ("philox.cuh", "round < 10", "round < 9"),
}


def check_what_is_missing(backend):
    for name, position in (("none", 7), ("all", 7)):
        x, y = gather(backend, data_set((9, 4, 4, 3)), np.array([*range(8), 9]), position, 3,
                      AUGMENTATIONS[name])
        assert np.isnan(x[1:]).all()
        assert not np.isnan(x[0]).any()
        assert y[1:].tolist() == [-1, -1]


def check_streamed(backend):
    """The last images of a data set, as a batch of its own."""
    data, order = data_set((9, 4, 4, 3)), np.array([8, 6, 7])
    images, labels, numbers, cursor, table = (backend.asarray(a) for a in (
        data.images[order], data.labels[order], order, np.array([0, 5]),
        AUGMENTATIONS["all"].table(3, np.float32)))
    x, y = backend.gather_batch(images, labels, numbers, cursor, 3, table, AUGMENTATIONS["all"],
                                KEY, streamed=9)
    want = gather(backend, data, order, 0, 3, AUGMENTATIONS["all"], epoch=5)
    for got, wanted in zip((x, y), want):
        np.testing.assert_array_equal(backend.to_numpy(got), wanted)


def check_all(backend):
    check_everything(backend)
    check_what_is_missing(backend)
    check_streamed(backend)


@needs_simulator
@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_a_planted_bug_is_caught(cupy_backend, bug):
    with caught(*bug):
        check_all(cupy_backend)


def test_they_pass_where_no_bug_is_planted(backend):
    check_all(backend)
