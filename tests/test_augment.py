"""Rotation, colour and mixup: kernels/augment.cu and its NumPy counterpart, bit for bit, and both
against the same in float64."""
from __future__ import annotations

import functools
import math
import re

import numpy as np
import pytest

from gpucnn import layers, losses, optim, training, use_backend
from gpucnn.augmentation import CHOICES, ONE, _beta_quantiles
from gpucnn.backend import batch_gather, cuda_kernel, make_backend
from gpucnn.backend.cuda_kernel import Variant, kernel_dir, read_source
from gpucnn.data import Augmentation, Loader
from gpucnn.rng import random_words
from tests.conftest import needs_simulator
from tests.gpusim import nvrtc
from tests.gpusim.mutation import caught
from tests.test_gather import KEY, batches, data_set, joined

SHAPES = {"grey": (7, 5, 8, 1), "colour": (6, 4, 4, 3), "wide": (5, 3, 16, 3), "tall": (5, 9, 2, 1),
          "a pixel": (3, 1, 1, 3)}
AUGMENTATIONS = {
    "rotate": Augmentation(rotate=20),
    "far": Augmentation(rotate=45, padding="reflect"),
    "colour": Augmentation(colour=0.4),
    "mixup": Augmentation(mixup=0.4),
    "all": Augmentation(crop=1, flip=True, rotate=30, colour=0.3, mixup=1, cutout=2, mean=0.4,
                        std=0.3),
    "all, reflected": Augmentation(crop=3, flip=True, rotate=10.5, colour=0.99, mixup=5, cutout=3,
                                   padding="reflect"),
}


def fits(augmentation, shape):
    try:
        augmentation.check_fits(*shape[1:])
    except ValueError:
        return False
    return True


def gather(backend, data, order, position, n, augmentation, *, epoch=0, dtype=np.float32):
    """The batch in host memory; nothing but it may be written."""
    given = (data.images, data.labels, np.asarray(order), np.array([position, epoch]),
             augmentation.table(data.images.shape[3], dtype), augmentation.choices())
    there = [backend.asarray(a) for a in given]
    batch = backend.gather_batch(there[0], there[1], there[2], there[3], n, there[4], augmentation,
                                 KEY, choices=there[5], classes=data.n_classes)
    for a, b in zip(given, there):
        assert a.tobytes() == backend.to_numpy(b).tobytes()
    assert (batch[0].shape, batch[0].dtype) == ((n, *data.images.shape[1:]), dtype)
    assert batch[1].dtype == (np.float32 if augmentation.mixup else np.int64)
    return [np.asarray(backend.to_numpy(a)) for a in batch]


# ---- the same in float64, image by image

def words_for(i, epoch):
    second = KEY ^ 0x5851F42D << 32
    return [[int(w) for w in random_words(4, key, epoch, start=4 * int(i))]
            for key in (KEY, second)]


def reflected(place, size):
    """numpy.pad's rule, one step at a time."""
    while not 0 <= place < size:
        place = 0 if size == 1 else -place if place < 0 else 2 * (size - 1) - place
    return place


def rotated(image, degrees, reflect):
    """Bilinear, around the middle: (h, w, c) float64."""
    h, w, c = image.shape
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))

    def pixel(y, x):
        if reflect:
            return image[reflected(y, h), reflected(x, w)]
        return image[y, x] if 0 <= y < h and 0 <= x < w else np.zeros(c)

    out = np.empty(image.shape)
    for y, x in np.ndindex(h, w):
        dy, dx = y - (h - 1) / 2, x - (w - 1) / 2
        sy = cosine * dy - sine * dx + (h - 1) / 2
        sx = sine * dy + cosine * dx + (w - 1) / 2
        top, left = math.floor(sy), math.floor(sx)
        down, right = sy - top, sx - left
        out[y, x] = ((1 - down) * ((1 - right) * pixel(top, left) + right * pixel(top, left + 1))
                     + down * ((1 - right) * pixel(top + 1, left)
                               + right * pixel(top + 1, left + 1)))
    return out


def coloured(image, brightness, contrast, saturation):
    x = np.clip(image * brightness, 0, 255)
    x = np.clip(128 + (x - 128) * contrast, 0, 255)
    if image.shape[2] == 3:
        luma = (x @ [0.299, 0.587, 0.114])[..., None]
        x = np.clip(luma + (x - luma) * saturation, 0, 255)
    return x


def augmented(image, i, epoch, a):
    """An image before mixup: (h, w, c) float64, 0 to 255."""
    first, second = words_for(i, epoch)
    h, w, _ = image.shape
    mode = {"zero": "constant", "reflect": "reflect"}[a.padding]
    padded = np.pad(image, ((a.crop, a.crop), (a.crop, a.crop), (0, 0)), mode=mode)
    top, left = (word * (2 * a.crop + 1) >> 32 for word in first[:2])
    x = padded[top:top + h, left:left + w].astype(float)
    x = x[:, ::-1] if a.flip and first[0] % 2 else x
    if a.rotate:
        degrees = a.rotate * ((2 * (second[0] * CHOICES >> 32) + 1) / CHOICES - 1)
        x = rotated(x, degrees, a.padding == "reflect")
    steps = round(256 * a.colour)
    if steps:
        x = coloured(x, *(1 + ((word * (2 * steps + 1) >> 32) - steps) / 256
                          for word in second[1:]))
    return x


def expected(data, order, position, n, a, epoch):
    """Of the batch: pixels before normalising, and which of them are cut out."""
    _, h, w, _ = data.images.shape
    for place in range(position, position + n):
        i, other = order[place], order[(place + 1) % len(order)]
        x = augmented(data.images[i], i, epoch, a)
        first, second = words_for(i, epoch)
        share = 1.0
        if a.mixup:
            share = a.choices()[2, second[0] % CHOICES] / 256
            x = share * x + (1 - share) * augmented(data.images[other], other, epoch, a)
        cut = np.zeros((h, w), bool)
        top, left = (first[2] * h >> 32) - a.cutout // 2, (first[3] * w >> 32) - a.cutout // 2
        cut[max(0, top):max(0, top + a.cutout), max(0, left):max(0, left + a.cutout)] = True
        labels = np.zeros(data.n_classes)
        labels[data.labels[i]] += share
        labels[data.labels[other]] += 1 - share
        yield x, cut, labels if a.mixup else data.labels[i]


def cases():
    """Every shape with every augmentation that fits."""
    for number, (what, shape) in enumerate(SHAPES.items()):
        data = data_set(shape, number)
        order = np.random.default_rng(number).permutation(shape[0])
        for name, a in AUGMENTATIONS.items():
            if fits(a, shape):
                yield f"{what}, {name}", data, order, 0, shape[0], a, 0
                yield f"{what}, {name}", data, order, 1, 2, a, 2**40 + 3


@functools.cache
def of_numpy(dtype):
    """The batches of all cases, on the CPU."""
    return [gather(make_backend("numpy"), *case, epoch=epoch, dtype=np.dtype(dtype))
            for _, *case, epoch in cases()]


def check_bits(backend, dtype="float32"):
    for (what, *case, epoch), want in zip(cases(), of_numpy(dtype)):
        got = gather(backend, *case, epoch=epoch, dtype=np.dtype(dtype))
        for mine, wanted in zip(got, want):
            assert mine.tobytes() == wanted.tobytes(), what


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_the_gpu_gives_the_bits_of_the_cpu(cupy_backend, dtype):
    check_bits(cupy_backend, dtype)


def test_64_bit_offsets_and_few_threads_give_the_same(cupy_backend, monkeypatch):
    monkeypatch.setattr(cuda_kernel, "MAX_INT_INDEX", -1)
    monkeypatch.setattr(cuda_kernel, "MAX_GRID", 1)
    check_bits(cupy_backend)


def test_the_numbers_are_those_of_float64():
    for (what, *case, a, epoch), (x, labels) in zip(cases(), of_numpy("float64")):
        # Bytes, rounded up to three times, and factors of up to 2 between.
        most = 8 if a.colour > 0.5 else 3.5
        for got, of_image, (pixels, cut, label) in zip(x, labels, expected(*case, a, epoch)):
            np.testing.assert_array_equal(of_image, label, err_msg=what)
            assert (got[cut] == 0).all(), what
            difference = 255 * (got * np.asarray(a.std) + np.asarray(a.mean)) - pixels
            assert (abs(difference[~cut]) < most).all(), (what, abs(difference).max())


@pytest.mark.parametrize("reflect", [False, True])
@pytest.mark.parametrize(("h", "w"), [(32, 32), (20, 31)])
def test_rotation_is_that_of_torch(h, w, reflect):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (1, h, w, 3), np.uint8)
    angle = math.radians(-37.5)
    cosine, sine = math.cos(angle), math.sin(angle)
    ys, xs = np.mgrid[:h, :w] - np.array([(h - 1) / 2, (w - 1) / 2])[:, None, None]
    grid = np.stack([(sine * ys + cosine * xs) * 2 / (w - 1),
                     (cosine * ys - sine * xs) * 2 / (h - 1)], axis=-1)
    want = torch.nn.functional.grid_sample(
        torch.tensor(image.transpose(0, 3, 1, 2).astype(float)), torch.tensor(grid[None]),
        mode="bilinear", padding_mode="reflection" if reflect else "zeros", align_corners=True)
    got = batch_gather._rotate(image, *(np.array([round(ONE * v)], np.int32)
                                        for v in (cosine, sine)), reflect)
    np.testing.assert_allclose(got[0], want[0].numpy().transpose(1, 2, 0), atol=2.5)


def test_an_image_far_from_square_is_reflected_more_than_once(backend):
    data = data_set((4, 2, 31, 1))
    a = Augmentation(rotate=45, padding="reflect")
    x, _ = gather(backend, data, range(4), 0, 4, a)
    for got, (want, _, _) in zip(x, expected(data, range(4), 0, 4, a, 0)):
        np.testing.assert_allclose(255 * got, want, atol=2.5)


@pytest.mark.parametrize(("order", "position", "missing"), [
    ([0, 1, 2, 9, 4, 5], 1, [False, True, True]), ([0, -1, 2, 3, 4, 5], 2, [False] * 3),
    (range(6), 4, [False, False, True]), (range(6), -2, [True, True, False]),
    (range(6), 2**40, [True] * 3)], ids=["too far", "before", "past the end", "negative", "far"])
def test_what_is_not_there_or_mixed_with_what_is_not_is_nan(backend, order, position, missing):
    data, a = data_set((6, 4, 4, 3)), AUGMENTATIONS["all"]
    x, labels = gather(backend, data, np.array(order), position, 3, a)
    assert np.isnan(x).all(axis=(1, 2, 3)).tolist() == missing
    assert np.isnan(labels).all(axis=1).tolist() == missing
    assert np.isnan(labels).any(axis=1).tolist() == missing
    x, labels = gather(backend, data, np.array(order), position, 3, AUGMENTATIONS["rotate"])
    absent = np.isnan(x).all(axis=(1, 2, 3))
    assert ((labels == -1) == absent).all()
    assert absent.sum() <= sum(missing)


# ---- what is drawn

def test_the_shares_of_mixup_are_quantiles_of_beta():
    """Where its distribution function is known, and by its variance, 1 / (8 a + 4)."""
    wanted = (np.arange(CHOICES) + 0.5) / CHOICES
    for alpha, cdf in ((1, lambda x: x), (2, lambda x: 3 * x**2 - 2 * x**3),
                       (0.5, lambda x: 2 / np.pi * np.arcsin(np.sqrt(x)))):
        np.testing.assert_allclose(cdf(_beta_quantiles(alpha)), wanted, atol=1e-5)
    for alpha in (0.1, 0.2, 1, 3, 10):
        shares = Augmentation(mixup=alpha).choices()[2] / 256
        assert shares.mean() == 0.5
        assert shares.var() == pytest.approx(1 / (8 * alpha + 4), rel=0.01), alpha
        assert (np.diff(shares) >= 0).all()
    assert np.isfinite(Augmentation(mixup=1e-3).choices()).all()


def test_angles_and_factors_reach_both_ends():
    a = Augmentation(rotate=30)
    degrees = np.degrees(np.arctan2(*a.choices()[1::-1]))
    assert degrees[0] == pytest.approx(-30, abs=0.05)
    assert degrees[-1] == pytest.approx(30, abs=0.05)
    assert np.allclose(np.diff(degrees), 60 / CHOICES, atol=0.01)
    grey = data_set((400, 1, 1, 1))
    grey.images[...] = 100
    x, _ = gather(make_backend("numpy"), grey, range(400), 0, 400, Augmentation(colour=0.25))
    seen = 255 * x.ravel()  # 128 + (100 b - 128) c, of b and c from 0.75 to 1.25
    assert 61 <= seen.min() < 75
    assert 115 < seen.max() <= 126


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"rotate": 46}, ValueError, "rotate must be >= 0 and <= 45, got 46"),
    ({"rotate": -1}, ValueError, "rotate must be >= 0 and <= 45, got -1"),
    ({"rotate": float("nan")}, ValueError, "rotate must be >= 0 and <= 45, got nan"),
    ({"rotate": True}, TypeError, "rotate must be a number, got True"),
    ({"colour": 1}, ValueError, "colour must be >= 0 and < 1, got 1"),
    ({"colour": "0.5"}, TypeError, "colour must be a number, got '0.5'"),
    ({"mixup": 10.5}, ValueError, "mixup must be >= 0 and <= 10, got 10.5"),
])
def test_wrong_values_are_refused_in_one_line(options, error, message):
    with pytest.raises(error, match=f"^Augmentation: {re.escape(message)}$"):
        Augmentation(**options)


def test_images_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"colour takes images of 1 or 3 channels, got 4$"):
        Loader(data_set((3, 4, 4, 4)), 2, seed=0, augmentation=Augmentation(colour=0.5))
    with pytest.raises(ValueError, match=r"rotate takes images of up to 16384 pixels a side, got"):
        Augmentation(rotate=1).check_fits(1, 16385, 1)
    with pytest.raises(ValueError, match=r"draws random numbers needs a seed$"):
        Loader(data_set((3, 4, 4, 1)), 2, augmentation=Augmentation(mixup=0.2))


# ---- Loader and TrainStep

@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
@pytest.mark.parametrize("position", [0, 4, 8])
def test_streamed_and_resident_and_any_batch_size_give_the_same(backend, augmentation, position):
    data, a = data_set((11, 5, 6, 3)), AUGMENTATIONS[augmentation]
    want = joined(Loader(data, 11, seed=7, augmentation=a, streamed=False), 3)
    for streamed in (False, True):
        loader = Loader(data, 4, seed=7, augmentation=a, streamed=streamed)
        kept = list(loader.epoch(3, position))  # none may be written to by the next
        for i, (x, y) in enumerate(kept):
            start = position + 4 * i
            np.testing.assert_array_equal(backend.to_numpy(x), want[0][start:start + 4])
            np.testing.assert_array_equal(backend.to_numpy(y), want[1][start:start + 4])
    with use_backend("numpy"):
        here = joined(Loader(data, 3, seed=7, augmentation=a), 3)
    for mine, theirs in zip(here, want):
        np.testing.assert_array_equal(mine, theirs)
    assert (joined(Loader(data, 11, seed=8, augmentation=a), 3)[0] != want[0]).any()


def test_mixup_blends_labels_as_images():
    data = data_set((300, 1, 1, 1))
    data.images[:, 0, 0, 0] = 50 * data.labels
    x, y = joined(Loader(data, 300, seed=1, augmentation=Augmentation(mixup=1)))
    np.testing.assert_allclose(255 * x.ravel(), y @ [0, 50, 100, 150], atol=0.51)
    np.testing.assert_array_equal(y.sum(axis=1), 1)
    assert 0.4 < (y.max(axis=1) < 0.9).mean() < 0.8


def net():
    model = layers.Sequential([layers.Conv2D(4, 3), layers.Flatten(), layers.Dense(4)])
    model.build((6, 6, 3), seed=0)
    return model


@pytest.mark.parametrize("streamed", [False, True])
def test_a_captured_step_with_mixup_gives_the_bits_of_plain_calls(backend, streamed):
    """Two epochs with a short last batch; hits count by the larger share."""
    data, a = data_set((10, 6, 6, 3)), AUGMENTATIONS["all"]
    results = []
    for capture in (True, False):
        model = net()
        step = training.TrainStep(model, losses.SoftmaxCrossEntropy(0.1), optim.Adam(model),
                                  capture=capture)
        loader = Loader(data, 4, seed=3, augmentation=a, streamed=streamed)
        losses_seen = [r for epoch in range(3) for r in step.epoch(loader, epoch)]
        assert step.not_captured is None
        results.append((losses_seen, backend.to_numpy(model.flat_data).tobytes()))
    assert results[0] == results[1]
    model = net()
    x, t = batches(Loader(data, 10, seed=3, augmentation=a))[0]
    value, hits = training.train_step(model, losses.SoftmaxCrossEntropy(), optim.Adam(model), x, t)
    assert hits == (backend.to_numpy(net().forward(backend.asarray(x))).argmax(1)
                    == t.argmax(1)).sum()
    for micro_batches in (1, 3):
        model = net()
        step = training.TrainStep(model, losses.SoftmaxCrossEntropy(), optim.Adam(model),
                                  micro_batches=micro_batches)
        step(x, t)  # from the host
        [result] = step.results()
        assert (result.loss, result.hits) == (pytest.approx(value, rel=1e-5), hits)


def test_evaluation_refuses_mixed_labels():
    loader = Loader(data_set((4, 6, 6, 3)), 4, seed=0, augmentation=Augmentation(mixup=1))
    with pytest.raises(TypeError, match=r"^evaluate: labels must be integers of shape \(N,\), got "
                                        r"float32 \(4, 4\); evaluate with a Loader that has no"):
        training.evaluate(net(), loader.epoch())


# ---- the kernel itself

def test_nothing_spills():
    library, reason = nvrtc.find()
    if library is None:
        pytest.skip(reason)
    f4, u1, i4 = map(np.dtype, ("f4", "u1", "i4"))
    source = read_source(kernel_dir(), "augment.cu", Variant(f4, u1, i4, 1))
    ptx = nvrtc.compile(source, "augment.cu", "compute_90").code
    assert b".local" not in ptx
    assert len(ptx) < 150_000, "loops that are unrolled"


BUGS = {
    "the sine turns the other way": ("augment.cu", "d.cosine * dy - d.sine * dx",
                                     "d.cosine * dy + d.sine * dx"),
    "the middle is a pixel's corner": ("augment.cu", "dx = 2 * x - (s.w - 1)", "dx = 2 * x - s.w"),
    "the right neighbour is left out": ("augment.cu", "top, left + 1, channel) * right;",
                                        "top, left, channel) * right;"),
    "rows are not blended": ("augment.cu", "lower * down", "upper * down"),
    "far places are not folded": ("augment.cu", "place % (2 * (size - 1))", "size - 1"),
    "black beyond the border is read": ("augment.cu", "if (y < 0 || x < 0) return 0;", ""),
    "contrast is about black": ("augment.cu", "away_from(128, away", "away_from(0, away"),
    "colours wrap around": ("augment.cu", "moved > 255 ? 255 : moved", "moved & 255"),
    "green counts as red": ("augment.cu", "0 ? 77 : channel == 1",
                            "1 ? 77 : channel == 0"),
    "saturation shares contrast's word": ("augment.cu", "below(steps, word[3])",
                                          "below(steps, word[2])"),
    "both images have one draw": ("augment.cu", "coloured_byte(s, e,", "coloured_byte(s, d,"),
    "both images have one luma": ("augment.cu", "channel, other_luma)", "channel, luma)"),
    "an image is mixed with itself": ("augment.cu", "place + 1 < total ? place + 1 : 0",
                                      "place + 1 < total ? place : 0"),
    "the last image has no other": ("augment.cu", "place + 1 < total ? place + 1 : 0",
                                    "place + 1"),
    "the share is the angle's": ("augment.cu", "(word[0] & (CHOICES - 1))", "angle"),
    "labels are not blended": ("augment.cu", "(256 - d.share) / 256.0f", "d.share / 256.0f"),
    "cutout is one row short": ("augment.cu", "p.y >= d.cut_top", "p.y > d.cut_top"),
    "half is rounded down": ("augment.cu", "(256 - d.share) + 128) >> 8",
                             "(256 - d.share) + 127) >> 8"),
    "the second draw is the first": ("augment.cu", "key1 ^ SECOND_DRAW", "key1"),
    "a streamed batch wraps around": ("augment.cu", "streamed || place + 1 < total",
                                      "place + 2 < total"),
}


def check_streamed(backend):
    """Two images as a batch of their own, and the one after them."""
    data, order, a = data_set((9, 4, 4, 3)), np.array([8, 6, 7]), AUGMENTATIONS["all"]
    there = [backend.asarray(v) for v in (
        data.images[order], data.labels[order], order, np.array([0, 5]), a.table(3, np.float32),
        a.choices())]
    got = backend.gather_batch(*there[:4], 2, there[4], a, KEY, streamed=9, choices=there[5],
                               classes=4)
    want = gather(make_backend("numpy"), data, order, 0, 2, a, epoch=5)
    for mine, wanted in zip(got, want):
        np.testing.assert_array_equal(backend.to_numpy(mine), wanted)


@needs_simulator
@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_a_planted_bug_is_caught(cupy_backend, bug):
    with caught(*bug):
        check_bits(cupy_backend)
        check_streamed(cupy_backend)


def test_they_pass_where_no_bug_is_planted(backend):
    check_streamed(backend)
