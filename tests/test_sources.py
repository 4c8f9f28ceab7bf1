"""open_dataset: the named data sets and .npz files. "rowN" is a row of the table of faults."""
import argparse
import gzip
import hashlib
import io
import re
import tracemalloc
import zipfile

import numpy as np
import pytest

from gpucnn import cli
from gpucnn.data import mnist, official, open_dataset
from gpucnn.data.cifar import CIFAR100_NAMES
from gpucnn.data.mnist import EMNIST
from gpucnn.errors import DataError
from tests.test_data import idx_bytes


@pytest.fixture(autouse=True)
def no_folder_of_the_user(monkeypatch, tmp_path):
    monkeypatch.delenv("GPUCNN_DATA_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_idx(folder, train, test, labels, rng, pack=gzip.compress):
    """Two images of 28 x 28 with these labels, in both parts; returns them."""
    folder.mkdir(parents=True, exist_ok=True)
    images = rng.integers(0, 256, (2, 28, 28), np.uint8)
    for prefix in (train, test):
        for kind, array in (("images-idx3", images), ("labels-idx1", np.uint8(labels))):
            suffix = ".gz" if pack is gzip.compress else ""
            (folder / f"{prefix}-{kind}-ubyte{suffix}").write_bytes(pack(idx_bytes(array)))
    return images


# ---- MNIST and EMNIST

@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gz"])
@pytest.mark.parametrize("inner", ["", "mnist", "MNIST/raw"])
def test_mnist_from_a_folder(tmp_path, rng, pack, inner):
    images = write_idx(tmp_path / inner, "train", "t10k", [7, 0], rng, pack)
    train, test = open_dataset("mnist", data_dir=tmp_path)
    for part, name in ((train, "mnist-train"), (test, "mnist-test")):
        np.testing.assert_array_equal(part.images[..., 0], images)
        assert part.labels.tolist() == [7, 0]
        assert (part.class_names, part.name) == (tuple("0123456789"), name)


def test_the_folder_of_all_data_sets_has_a_sub_folder_for_each(tmp_path, rng, monkeypatch):
    """Fashion-MNIST's files are called as MNIST's are, and must not be taken for them."""
    monkeypatch.setenv("GPUCNN_DATA_DIR", str(tmp_path))
    write_idx(tmp_path, "train", "t10k", [1, 1], rng)
    assert open_dataset("fashion-mnist")[0].labels.tolist() == [1, 1]
    with pytest.raises(DataError, match=r"^GPUCNN_DATA_DIR=.*: train-images-idx3-ubyte\.gz, .* not "
                                        r"found there; expected .* \(with or without \.gz\)$"):
        open_dataset("mnist")
    write_idx(tmp_path / "mnist", "train", "t10k", [2, 2], rng)
    write_idx(tmp_path / "fashion-mnist", "train", "t10k", [3, 3], rng)
    assert open_dataset("mnist")[0].labels.tolist() == [2, 2]
    assert open_dataset("fashion-mnist")[0].labels.tolist() == [3, 3]


def test_mnist_from_the_cache_is_verified(tmp_path, rng, monkeypatch):
    cache = tmp_path / "cache" / "gpucnn" / "mnist"
    write_idx(cache, "train", "t10k", [4, 5], rng)
    with monkeypatch.context() as patched:
        patched.setattr(mnist, "SHA256", {
            name: hashlib.sha256((cache / name).read_bytes()).hexdigest() for name in mnist.SHA256})
        assert open_dataset("mnist")[1].labels.tolist() == [4, 5]
    monkeypatch.setattr(mnist, "BASE_URL", "http://127.0.0.1:9/")
    pytest.importorskip("pooch")
    with pytest.raises(DataError, match=r"^cannot download http://127\.0\.0\.1:9/train-images"):
        open_dataset("mnist")


@pytest.mark.parametrize(("split", "classes"), [("balanced", 47), ("byclass", 62), ("bymerge", 47),
                                                ("digits", 10), ("letters", 26), ("mnist", 10)])
def test_emnist_is_turned_upright_and_its_letters_begin_at_1(tmp_path, rng, split, classes):
    first = int(split == "letters")
    last = classes - 1 + first
    images = write_idx(tmp_path / "emnist", f"emnist-{split}-train", f"emnist-{split}-test",
                       [first, last], rng)
    for part in open_dataset(f"emnist-{split}", data_dir=tmp_path):
        np.testing.assert_array_equal(part.images[..., 0], images.transpose(0, 2, 1))
        assert part.images.flags.c_contiguous
        assert part.labels.tolist() == [0, classes - 1]
        assert len(set(part.class_names)) == part.n_classes == classes
        assert part.name.startswith(f"emnist-{split}-t")


def test_emnist_of_another_set_is_refused(tmp_path, rng):
    write_idx(tmp_path, "emnist-letters-train", "emnist-letters-test", [0, 26], rng)
    with pytest.raises(DataError, match=r"emnist-letters-train: label -1 at position 0 is out of"):
        open_dataset("emnist-letters", data_dir=tmp_path)
    with pytest.raises(DataError, match=r"^data_dir=.*: emnist-digits-train-images-idx3-ubyte\.gz, "
                                        r".*; https://www\.nist\.gov/.* has them in gzip\.zip$"):
        open_dataset("emnist-digits", data_dir=tmp_path)
    with pytest.raises(DataError, match=r"^EMNIST is not downloaded; unpack gzip\.zip from http"):
        open_dataset("emnist-digits")
    with pytest.raises(ValueError, match=r"split must be one of balanced, .*; got 'all'$"):
        mnist.load_emnist("all")
    assert EMNIST["balanced"][:36] == "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"


# ---- CIFAR

def write_cifar(folder, rng, files, labels):
    """One or more labels and 3072 pixels a record; all images in order of the files."""
    folder.mkdir(parents=True, exist_ok=True)
    images = rng.integers(0, 256, (2 * len(files), 32, 32, 3), np.uint8)
    for file, pair in zip(files, images.reshape(-1, 2, 32, 32, 3)):
        (folder / file).write_bytes(b"".join(
            bytes(labels) + image.transpose(2, 0, 1).tobytes() for image in pair))
    return images


CIFAR10_FILES = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]


@pytest.mark.parametrize("inner", ["", "cifar10", "cifar-10-batches-bin"])
def test_cifar10(tmp_path, rng, inner):
    images = write_cifar(tmp_path / inner, rng, CIFAR10_FILES, [9])
    train, test = open_dataset("cifar10", data_dir=tmp_path)
    np.testing.assert_array_equal(train.images, images[:10])
    np.testing.assert_array_equal(test.images, images[10:])
    assert train.labels.tolist() == [9] * 10
    assert (train.class_names[9], train.name, test.name) == ("truck", "cifar10-train",
                                                             "cifar10-test")


def test_cifar100_has_fine_labels(tmp_path, rng):
    images = write_cifar(tmp_path, rng, ["train.bin", "test.bin"], [13, 99])
    train, test = open_dataset("cifar100", data_dir=tmp_path)
    np.testing.assert_array_equal(np.concatenate([train.images, test.images]), images)
    assert train.labels.tolist() == test.labels.tolist() == [99, 99]
    assert len(CIFAR100_NAMES) == len(set(CIFAR100_NAMES)) == 100
    assert list(CIFAR100_NAMES) == sorted(CIFAR100_NAMES)


@pytest.mark.parametrize(("content", "message"), [
    (b"", "damaged or not CIFAR's binary version: 0 bytes are no whole records of 3073; fetch it"),
    (bytes(3073 + 3072), "damaged or not CIFAR's binary version: 6145 bytes are no whole records"),
    (b"\x0a" + bytes(3072), "damaged or not cifar10: label 10 of 10 classes; fetch it again"),
], ids=["empty", "truncated", "label"])
def test_damaged_cifar_is_named(tmp_path, rng, content, message):
    write_cifar(tmp_path, rng, CIFAR10_FILES, [0])
    path = tmp_path / "data_batch_3.bin"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"^{re.escape(f'{path}: {message}')}"):
        open_dataset("cifar10", data_dir=tmp_path)


def test_cifar_that_is_not_there(tmp_path, rng):
    write_cifar(tmp_path, rng, CIFAR10_FILES[1:], [0])
    with pytest.raises(DataError, match=r"^data_dir=.*: data_batch_1\.bin not found there; expected"
                                        r" data_batch_1\.bin, .*cifar-10-binary\.tar\.gz has"):
        open_dataset("cifar10", data_dir=tmp_path)
    with pytest.raises(DataError, match=r"^cifar100 is not downloaded; unpack https://.* and give "
                                        r"the folder with --data-dir or GPUCNN_DATA_DIR/cifar100$"):
        open_dataset("cifar100")


# ---- .npz

ARRAYS = {"x_train": np.arange(60, dtype=np.uint8).reshape(5, 4, 3),
          "y_train": np.array([[0], [1], [2], [1], [0]]),
          "x_test": np.arange(24, dtype=np.uint8).reshape(2, 4, 3),
          "y_test": np.array([2, 1], np.uint8)}


def npz(path, save=np.savez, **changed):
    save(path, **{key: value for key, value in {**ARRAYS, **changed}.items() if value is not None})
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("keys", [("x_train", "y_train", "x_test", "y_test"),
                                  ("train_images", "train_labels", "test_images", "test_labels")])
def test_an_npz_file(tmp_path, save, keys):
    save(tmp_path / "a.npz", **dict(zip(keys, ARRAYS.values())))
    train, test = open_dataset(tmp_path / "a.npz")
    np.testing.assert_array_equal(train.images, ARRAYS["x_train"][..., None])
    np.testing.assert_array_equal(test.images, ARRAYS["x_test"][..., None])
    assert train.labels.tolist() == [0, 1, 2, 1, 0]
    assert test.labels.tolist() == [2, 1]
    assert train.class_names == test.class_names == ("0", "1", "2")
    assert (train.name, test.name) == ("a-train", "a-test")


def test_an_npz_file_of_colour_in_fortran_order_with_names(tmp_path, rng):
    colour = np.asfortranarray(rng.integers(0, 256, (5, 4, 3, 3), np.uint8))
    train, _ = open_dataset(npz(tmp_path / "a.npz", x_train=colour, x_test=colour[:2],
                                class_names=np.array(["cat", "dog", "owl", "rat"])))
    np.testing.assert_array_equal(train.images, colour)
    assert train.class_names == ("cat", "dog", "owl", "rat")


def test_an_npz_file_without_a_test_part_is_split_in_each_class(tmp_path, rng):
    labels = np.repeat([0, 1, 2], [50, 10, 1])
    images = np.arange(61, dtype=np.uint8).reshape(61, 1, 1)
    path = tmp_path / "a.npz"
    np.savez(path, images=images, labels=labels)
    train, test = open_dataset(path)
    assert np.bincount(test.labels, minlength=3).tolist() == [10, 2, 0]
    assert sorted([*train.images.ravel(), *test.images.ravel()]) == list(range(61))
    np.testing.assert_array_equal(labels[train.images.ravel()], train.labels)
    np.testing.assert_array_equal(labels[test.images.ravel()], test.labels)
    assert test.images.ravel().tolist() != list(range(10))
    np.testing.assert_array_equal(open_dataset(path)[1].images, test.images)
    assert len(open_dataset(path, test_share=0.5)[1]) == 30
    for wrong in (0, 1, -1, 1.5):
        with pytest.raises(ValueError, match=f"^test_share must be more than 0 .* got {wrong}$"):
            open_dataset(path, test_share=wrong)
    with pytest.raises(ValueError, match=r"a test part, x_test; leave out --test-share"):
        open_dataset(npz(tmp_path / "b.npz"), test_share=0.1)


@pytest.mark.parametrize(("changed", "message"), [
    ({"x_test": None}, "holds x_train, y_train, y_test; expected x_train, y_train, x_test, y_test; "
                       "or train_images, "),
    (dict.fromkeys(ARRAYS), "holds no arrays; expected x_train"),
    ({"x_train": ARRAYS["x_train"] / 255}, "x_train holds float64; images must be uint8 (0..255); "
                                           "if they are 0 to 1, save (255 * x).round()"),
    ({"x_train": ARRAYS["x_train"].astype(np.int16)}, "x_train holds int16; images must be uint8"),
    ({"x_train": ARRAYS["x_train"][0]}, "x_train has shape (4, 3); images must be (n, h, w) or"),
    ({"x_test": ARRAYS["x_test"][:, :2]}, "x_train holds images of (4, 3, 1), x_test of (2, 3, 1)"),
    ({"y_train": np.zeros((5, 3))}, "y_train holds float64 (5, 3); labels must be integers (n,)"),
    ({"y_test": np.array([0, -1])}, "label -1 at position 1 is out of range for 3 classes (0..2)"),
    ({"y_test": np.array([0])}, "2 images but 1 labels"),
    ({"class_names": np.array(["a", "b"])}, "label 2 at position 2 is out of range for 2 classes"),
    ({"class_names": np.array([1, 2, 3])}, "class_names holds int64 (3,); it must be strings"),
    ({"x_test": ARRAYS["x_test"][:0], "y_test": np.array([], int)}, "a-test has 0 images"),
    ({"y_train": np.array([0, 1, 2, 1, None])},
     "y_train.npy holds Python objects, which gpucnn never loads"),
], ids=range(13))
def test_row30_an_npz_file_that_holds_something_else(tmp_path, changed, message):
    path = npz(tmp_path / "a.npz", **changed)
    with pytest.raises(DataError, match=f"^{re.escape(f'{path}: {message}')}") as e:
        open_dataset(path)
    assert "\n" not in str(e.value)


def damaged(content, place, value):
    content = bytearray(content)
    content[place] ^= value
    return bytes(content)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("damage", [lambda c: b"", lambda c: b"hello, world", lambda c: c[:-30],
                                    lambda c: c[:len(c) // 2], lambda c: b"\x93NUMPY" + c[6:-30]],
                         ids=["empty", "text", "end cut", "half", "npy"])
def test_row30_a_damaged_npz_file_is_named(tmp_path, save, damage):
    path = npz(tmp_path / "data.npz", save)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"data\.npz: damaged or not an npz file \(.+\); fetch it"):
        open_dataset(path)


def test_row30_a_flipped_bit_is_found_wherever_it_counts(tmp_path, rng):
    path = npz(tmp_path / "data.npz", np.savez_compressed)
    whole, refused = path.read_bytes(), []
    want = [part.images.tobytes() for part in open_dataset(path)]
    for place in rng.integers(len(whole), size=150):
        path.write_bytes(damaged(whole, place, 1 << int(rng.integers(8))))
        try:
            got = [part.images.tobytes() for part in open_dataset(path)]
        except DataError as e:
            refused.append(str(e))
        else:
            assert got == want
    assert len(refused) > 75
    assert "\n" not in "".join(refused)


def zipped(path, **members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, (header, content) in members.items():
            head = io.BytesIO()
            np.lib.format.write_array_header_1_0(
                head, {"descr": "|u1", "fortran_order": False, "shape": header})
            archive.writestr(f"{name}.npy", head.getvalue() + content)
    return path


def test_row31_an_npz_bomb_is_refused_unless_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr("gpucnn.data.npz._LEAST_LIMIT", 10**6)
    path = zipped(tmp_path / "data.npz", images=((5000, 28, 28), bytes(5000 * 784)),
                  labels=((5000,), bytes(2500) + b"\1" * 2500))
    with pytest.raises(DataError, match=r"^.*data\.npz: member images\.npy unpacks to 4 MB from "
                                        r"0\.00\d+ MB, and 1 MB are left of the limit; raise "
                                        r"--max-unpacked to allow it$"):
        open_dataset(path)
    assert len(open_dataset(path, max_unpacked=5000 * 785)[0]) == 4000
    with pytest.raises(DataError, match=r"member labels\.npy unpacks to 0 MB .* and 0 MB are left"):
        open_dataset(path, max_unpacked=5000 * 785 - 1)


@pytest.mark.parametrize("shape", [(10**12, 1, 1), (1000, 100, 100)], ids=["3.6 TB", "10 MB"])
def test_row31_memory_grows_with_what_is_there(tmp_path, shape):
    path = zipped(tmp_path / "data.npz", images=(shape, bytes(10)), labels=((3,), bytes(3)))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"unpacks to 1000000 MB|does not hold the 10000000 b"):
            open_dataset(path)
        assert tracemalloc.get_traced_memory()[1] < 3_000_000
    finally:
        tracemalloc.stop()


def test_more_bytes_than_the_header_says_are_refused(tmp_path):
    path = zipped(tmp_path / "data.npz", images=((3, 1, 1), bytes(10**7)), labels=((3,), bytes(3)))
    with pytest.raises(DataError, match=r"does not hold the 3 bytes of its header's \(3, 1, 1\)"):
        open_dataset(path)


# ---- the one way in

def test_what_is_no_data_set_is_named(tmp_path):
    with pytest.raises(DataError, match=r"^cifar: no such file or data set; give a folder of images"
                                        r", an \.npz file, or one of fashion-mnist-subset, "):
        open_dataset("cifar")
    (tmp_path / "a.txt").touch()
    with pytest.raises(DataError, match=r"a\.txt: neither a folder nor an \.npz file; give"):
        open_dataset(tmp_path / "a.txt")
    with pytest.raises(FileNotFoundError, match=r"none\.npz"):
        open_dataset(tmp_path / "none.npz")


@pytest.mark.parametrize(("option", "kind"), [
    ({"image_size": (32, 32)}, "an .npz file"), ({"channels": 1}, "an .npz file"),
    ({"data_dir": "x"}, "an .npz file"), ({"workers": 2}, "an .npz file"),
    ({"max_unpacked": 5}, "mnist"), ({"test_share": 0.5}, "mnist"), ({"max_pixels": 5}, "mnist"),
    ({"data_dir": "x"}, "fashion-mnist-subset"), ({"data_dir": "x"}, "a folder of images"),
    ({"max_unpacked": 5}, "a folder of images")])
def test_an_option_that_would_do_nothing_is_refused(tmp_path, option, kind):
    spec = {"an .npz file": tmp_path / "a.npz", "a folder of images": tmp_path}.get(kind, kind)
    (tmp_path / "a.npz").touch()
    [name] = option
    message = f"--{name.replace('_', '-')} ({name}) does not go with {kind}; leave it out"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        open_dataset(spec, **option)


def arguments(*given):
    parser = argparse.ArgumentParser(exit_on_error=False)
    cli.add_data_arguments(parser)
    return parser.parse_args(given)


def test_the_command_line_opens_the_same(tmp_path):
    assert cli.load_data(arguments())[0].name == "fashion-mnist-subset-train"
    assert cli.load_data(arguments("--data", "subset"))[1].name == "fashion-mnist-subset-test"
    path = str(npz(tmp_path / "a.npz"))
    assert cli.load_data(arguments("--data", path, "--max-unpacked", "1"))[0].name == "a-train"
    with pytest.raises(DataError, match="raise --max-unpacked"):
        cli.load_data(arguments("--data", path, "--max-unpacked", "0.00001"))
    with pytest.raises(cli.UsageError, match="--channels .* does not go with an .npz file"):
        cli.load_data(arguments("--data", path, "--channels", "1"))
    assert arguments("--image-size", "48X32").image_size == "48x32"
    assert arguments("--image-size", "48").image_size == "48x48"
    for wrong in ("0x4", "3x3x3", "x", "a"):
        with pytest.raises(argparse.ArgumentError, match=r"--image-size: must be"):
            arguments("--image-size", wrong)


def test_the_folder_of_a_data_set_that_nobody_named(tmp_path):
    assert official.asked_folder(None, ("a",)) is None
