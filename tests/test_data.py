"""The IDX reader, Fashion-MNIST, Dataset and Loader. "rowN" is a row of the table of faults."""
import gc
import gzip
import hashlib
import http.server
import os
import re
import struct
import subprocess
import sys
import threading
import tracemalloc
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from gpucnn.data import Dataset, Loader, check_labels, fashion_mnist, read_idx, to_float
from gpucnn.errors import DataError


def idx_bytes(array, shape=None, type_code=8):
    shape = array.shape if shape is None else shape
    return (bytes([0, 0, type_code, len(shape)]) + struct.pack(f">{len(shape)}I", *shape)
            + array.tobytes())


def dataset(n=10, classes=4):
    images = np.arange(n * 6, dtype=np.uint8).reshape(n, 3, 2, 1)
    return Dataset(images, np.arange(n) % classes, tuple("abcd"[:classes]), "tiny")


ARRAY = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
GOOD = idx_bytes(ARRAY)


# ---- read_idx

@pytest.mark.parametrize("array", [np.array([7], np.uint8), ARRAY[0], ARRAY, ARRAY[..., None]],
                         ids=lambda a: f"{a.ndim}-D")
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gz"])
def test_read_idx_gives_the_array_whatever_the_name_says(tmp_path, array, pack):
    path = tmp_path / ("a.gz" if pack is bytes else "a")
    path.write_bytes(pack(idx_bytes(array)))
    for ndim in (None, array.ndim):
        got = read_idx(path, ndim)
        assert got.dtype == np.uint8
        np.testing.assert_array_equal(got, array)
    assert got.flags.writeable


def test_read_idx_joins_chunks(tmp_path, rng):
    array = rng.integers(0, 256, (3, 1000, 1001), np.uint8)  # 3 MB: more than two chunks
    (tmp_path / "plain").write_bytes(idx_bytes(array))
    (tmp_path / "gz").write_bytes(gzip.compress(idx_bytes(array), 1))
    np.testing.assert_array_equal(read_idx(tmp_path / "plain"), array)
    np.testing.assert_array_equal(read_idx(tmp_path / "gz"), array)


BAD_IDX = {
    "empty": (b"", "empty file; expected an IDX file"),
    "row14 dims 0": (idx_bytes(ARRAY[:0]), "a dimension of (0, 3, 4) is 0"),
    "row29 text": (b"hello, world", "not an IDX file (magic 0x68656c6c, expected 0x00000803)"),
    "row29 two bytes": (b"\0\0", "not an IDX file (magic 0x0000, expected 0x00000803)"),
    "row29 float32": (idx_bytes(ARRAY, type_code=0x0D),
                      "IDX type code 0x0d (float32) is not supported; use 0x08 (unsigned byte)"),
    "row29 type unknown": (idx_bytes(ARRAY, type_code=1), "IDX type code 0x01 (unknown)"),
    "row29 labels for images": (idx_bytes(ARRAY[0, 0]),
                                "1 dimensions (magic 0x00000801), expected 3"),
    "row29 header cut": (GOOD[:9], "truncated: the file ends inside its header"),
    "row29 one byte short": (GOOD[:-1], "truncated: the header promises (2, 3, 4), 24 bytes, "
                                        "but 23 follow"),
    "row29 one byte too many": (GOOD + b"x", "more bytes follow than the header's (2, 3, 4)"),
    "row29 4 TB": (idx_bytes(ARRAY, (2**32 - 1, 32, 32)),
                   "truncated: the header promises (4294967295, 32, 32), 4398046510080 bytes, "
                   "more than the file can hold"),
}


@pytest.mark.parametrize(("content", "message"), BAD_IDX.values(), ids=BAD_IDX)
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gz"])
def test_read_idx_refuses(tmp_path, content, message, pack):
    path = tmp_path / "train-images"
    path.write_bytes(pack(content))
    with pytest.raises(DataError, match=f"^{re.escape(f'{path}: {message}')}") as e:
        read_idx(path, ndim=3)
    assert "\n" not in str(e.value)


BAD_GZIP = {
    "row29 gzipped twice": (gzip.compress(gzip.compress(GOOD)),
                            "not an IDX file (magic 0x1f8b0800, expected 0x00000803); "
                            "is it still gzipped?"),
    "row29 gz magic alone": (b"\x1f\x8b", "damaged gzip file"),
    "row29 gz truncated": (gzip.compress(GOOD)[:-9], "damaged gzip file"),
    "row29 gz wrong checksum": (gzip.compress(GOOD)[:-8] + bytes(4) + gzip.compress(GOOD)[-4:],
                                "damaged gzip file"),
    "row29 gz not deflate": (gzip.compress(GOOD)[:10] + b"\xff" * 60, "damaged gzip file"),
}


@pytest.mark.parametrize(("content", "message"), BAD_GZIP.values(), ids=BAD_GZIP)
def test_read_idx_refuses_damaged_gzip(tmp_path, content, message):
    path = tmp_path / "train-images.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"^{re.escape(f'{path}: {message}')}"):
        read_idx(path, ndim=3)


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gz"])
@pytest.mark.parametrize(("shape", "content"), [
    ((2**32 - 1,) * 3, b"xx"),
    # Possible for a gzip file of this size, but not there.
    ((1000, 1000, 100), np.random.default_rng(0).bytes(200_000)),
    # Promises 10 bytes and unpacks to 50 MB.
    ((10,), bytes(50_000_000)),
], ids=["row29 absurd", "row29 promises 100 MB", "bomb"])
def test_read_idx_allocates_only_what_is_there(tmp_path, pack, shape, content):
    path = tmp_path / "f"
    path.write_bytes(pack(idx_bytes(np.frombuffer(content, np.uint8), shape)))
    tracemalloc.start()
    try:
        with pytest.raises(DataError):
            read_idx(path)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def test_read_idx_of_what_is_no_file(tmp_path):
    with pytest.raises(DataError, match=r": a folder; give the path of a file$"):
        read_idx(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_idx(tmp_path / "nowhere")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_read_idx_does_not_wait_on_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match=r"pipe: not a regular file"):
        read_idx(tmp_path / "pipe")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no newlines in names")
def test_row42_a_newline_in_a_name_stays_on_one_line(tmp_path):
    path = tmp_path / "a\nb\x1b[31m"
    path.write_bytes(b"text")
    with pytest.raises(DataError, match=r"a\\nb\\x1b\[31m: not an IDX file") as e:
        read_idx(path)
    assert str(e.value).isprintable()


# ---- Dataset

def test_dataset_holds_what_it_was_given():
    data = dataset()
    assert (len(data), data.n_classes, data.name) == (10, 4, "tiny")
    assert len(Dataset(data.images[:0], data.labels[:0], data.class_names, "none")) == 0


def test_row28_counts_differ():
    data = dataset()
    with pytest.raises(ValueError, match=r"^10 images but 3 labels$"):
        Dataset(data.images, data.labels[:3], data.class_names, "x")


@pytest.mark.parametrize(("label", "dtype"), [(4, np.uint8), (4, np.int64), (-1, np.int64)],
                         ids=["row25 uint8", "row25 int64", "row26"])
def test_rows25_26_label_out_of_range(label, dtype):
    labels = np.array([0, label, 3], dtype)
    message = rf"^label {label} at position 1 is out of range for 4 classes \(0\.\.3\)$"
    with pytest.raises(ValueError, match=message):
        check_labels(labels, 4)
    with pytest.raises(ValueError, match=message):
        Dataset(np.zeros((3, 2, 2, 1), np.uint8), labels, tuple("abcd"), "x")


@pytest.mark.parametrize(("labels", "message"), [
    (np.zeros((2, 4), np.float32), "got float32 (2, 4); for one-hot use labels.argmax(1)"),
    (np.zeros((2, 1), np.int64), "got int64 (2, 1)"),
    (np.zeros(2, np.float32), "got float32 (2,)"),
    (np.zeros(2, bool), "got bool (2,)"),
    (np.array(1), "got int64 ()"),
], ids=["one-hot", "column", "float", "bool", "scalar"])
def test_row27_labels_of_the_wrong_kind(labels, message):
    with pytest.raises(TypeError, match=re.escape("labels must be integers of shape (N,), "
                                                  + message)):
        check_labels(labels, 4)
    with pytest.raises(TypeError, match="labels must be integers"):
        Dataset(np.zeros((2, 2, 2, 1), np.uint8), labels, tuple("abcd"), "x")


def test_dataset_refuses_images_of_the_wrong_kind():
    data = dataset()
    with pytest.raises(TypeError, match="images must be a NumPy array of uint8, got float32"):
        Dataset(data.images.astype(np.float32), data.labels, data.class_names, "x")
    with pytest.raises(TypeError, match="got list"):
        Dataset([[1]], data.labels, data.class_names, "x")
    with pytest.raises(ValueError, match=r"got 3: \(10, 3, 2\); add a channel axis"):
        Dataset(data.images[..., 0], data.labels, data.class_names, "x")
    with pytest.raises(TypeError, match="labels must be a NumPy array, got list"):
        Dataset(data.images, [0] * 10, data.class_names, "x")


# ---- to_float and Loader

def test_to_float_is_a_correctly_rounded_division():
    x = to_float(np.arange(256, dtype=np.uint8))
    assert x.dtype == np.float32
    np.testing.assert_array_equal(x, (np.arange(256) / 255).astype(np.float32))
    with pytest.raises(TypeError, match="images are float32; expected uint8"):
        to_float(x)


@pytest.mark.parametrize(("batch_size", "sizes"), [(4, [4, 4, 2]), (5, [5, 5]), (10, [10]),
                                                   (64, [10]), (1, [1] * 10)])
def test_loader_in_order(batch_size, sizes):
    data = dataset()
    loader = Loader(data, batch_size)
    batches = list(loader.epoch())
    assert len(loader) == len(batches)
    assert [len(y) for x, y in batches] == sizes
    assert {(x.dtype, x.shape[1:], y.dtype) for x, y in batches} == {
        (np.dtype(np.float32), (3, 2, 1), np.dtype(np.int64))}
    np.testing.assert_array_equal(np.concatenate([x for x, y in batches]), to_float(data.images))
    np.testing.assert_array_equal(np.concatenate([y for x, y in batches]), data.labels)


def order(loader, epoch):
    """Which images the epoch visits; the first pixel of image i of dataset(10) is 6 i."""
    return [round(255 * float(v)) // 6 for x, y in loader.epoch(epoch) for v in x[:, 0, 0, 0]]


def test_loader_shuffles_anew_each_epoch_and_keeps_labels_beside_images():
    loader = Loader(dataset(), 4, seed=3)
    orders = [order(loader, e) for e in range(5)]
    assert all(sorted(o) == list(range(10)) for o in orders)
    assert len({tuple(o) for o in [*orders, range(10)]}) == 6
    assert [len(y) for x, y in loader.epoch(0)] == [4, 4, 2]
    labels = [int(v) for x, y in loader.epoch(2) for v in y]
    assert labels == [i % 4 for i in orders[2]]


def test_loader_order_depends_on_seed_and_epoch_alone():
    loader = Loader(dataset(), 4, seed=3)
    late = order(loader, 7)
    np.random.default_rng().random()
    assert order(loader, 0) == order(Loader(dataset(), 3, seed=3), 0)
    assert order(Loader(dataset(), 10, seed=3), 7) == late
    assert order(Loader(dataset(), 4, seed=4), 7) != late
    assert order(Loader(dataset(), 4, seed=7), 3) != late


def test_loader_order_never_changes_between_releases():
    assert order(Loader(dataset(), 4, seed=0), 0) == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert order(Loader(dataset(), 4, seed=2**64 - 1), 5) == [0, 9, 2, 1, 5, 7, 6, 4, 8, 3]


def test_loader_of_an_empty_set():
    data = dataset()
    empty = Dataset(data.images[:0], data.labels[:0], data.class_names, "none")
    assert len(Loader(empty, 4, seed=0)) == 0
    assert list(Loader(empty, 4, seed=0).epoch()) == []


@pytest.mark.parametrize(("batch_size", "seed", "epoch", "error", "message"), [
    (0, None, 0, ValueError, "batch_size must be >= 1, got 0"),
    (-3, None, 0, ValueError, "batch_size must be >= 1, got -3"),
    (1.0, None, 0, TypeError, "batch_size must be an int, got 1.0"),
    (True, None, 0, TypeError, "batch_size must be an int, got True"),
    (4, -1, 0, ValueError, "seed must be >= 0, got -1"),
    (4, 2**64, 0, ValueError, f"seed must be < 2**64, got {2**64}"),
    (4, "0", 0, TypeError, "seed must be an int, got '0'"),
    (4, 0, -1, ValueError, "epoch must be >= 0, got -1"),
    (4, 0, 1.5, TypeError, "epoch must be an int, got 1.5"),
])
def test_row17_loader_refuses_wrong_numbers_at_once(batch_size, seed, epoch, error, message):
    with pytest.raises(error, match=re.escape(f"Loader: {message}")):
        Loader(dataset(), batch_size, seed=seed).epoch(epoch)


# ---- Fashion-MNIST

def test_subset_is_complete_and_nearly_balanced():
    train, test = fashion_mnist.load(subset=True)
    assert (train.name, test.name) == ("fashion-mnist-subset-train", "fashion-mnist-subset-test")
    assert train.images.shape == (10_000, 28, 28, 1)
    assert test.images.shape == (2_000, 28, 28, 1)
    assert train.class_names == test.class_names == fashion_mnist.CLASS_NAMES
    assert np.bincount(train.labels).tolist() == [942, 1027, 1016, 1019, 974, 989, 1021, 1022,
                                                  990, 1000]
    assert np.bincount(test.labels).tolist() == [200, 203, 214, 190, 219, 195, 197, 200, 194, 188]
    content = b"".join(a.tobytes() for d in (train, test) for a in (d.images, d.labels))
    assert hashlib.sha256(content).hexdigest() == (
        "4084017359325b0b158fe7759bc20781f98a81c5bd2d091c099af840dbce1625")


def test_subset_ships_small_and_with_its_licence():
    folder = Path(fashion_mnist.__file__).parent / "fashion_mnist_subset"
    assert sum(p.stat().st_size for p in folder.glob("*.gz")) < 6_000_000
    assert "Zalando SE" in (folder / "LICENSE").read_text(encoding="utf-8")


@pytest.fixture
def official(tmp_path):
    """A folder with small files under the four official names."""
    folder = tmp_path / "official"
    folder.mkdir()
    for prefix, n in (("train", 5), ("t10k", 3)):
        images = np.full((n, 28, 28), n, np.uint8)
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(images)))
        (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(
            gzip.compress(idx_bytes(np.arange(n, dtype=np.uint8))))
    return folder


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """No data set on this machine, and an empty cache of its own."""
    monkeypatch.delenv("GPUCNN_DATA_DIR", raising=False)
    monkeypatch.setattr(fashion_mnist, "DEBIAN_DIR", tmp_path / "debian")
    monkeypatch.setattr(fashion_mnist, "BASE_URL", "http://127.0.0.1:9/")  # nobody listens there
    pytest.importorskip("pooch")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return tmp_path / "cache" / "gpucnn" / "fashion-mnist"


def counts(pair):
    return tuple(len(d) for d in pair)


def test_load_from_a_folder(official, nowhere):
    train, test = fashion_mnist.load(official)
    assert counts((train, test)) == (5, 3)
    assert (train.name, test.name) == ("fashion-mnist-train", "fashion-mnist-test")
    assert train.images.shape == (5, 28, 28, 1)
    assert test.labels.tolist() == [0, 1, 2]


def test_load_takes_unpacked_files_too(official, nowhere):
    packed = official / "train-images-idx3-ubyte.gz"
    (official / "train-images-idx3-ubyte").write_bytes(gzip.decompress(packed.read_bytes()))
    packed.unlink()
    assert counts(fashion_mnist.load(official)) == (5, 3)


def test_load_looks_in_the_argument_then_the_variable_then_debian(official, nowhere, monkeypatch,
                                                                  tmp_path):
    monkeypatch.setattr(fashion_mnist, "DEBIAN_DIR", official)
    assert counts(fashion_mnist.load()) == (5, 3)
    monkeypatch.setenv("GPUCNN_DATA_DIR", "")
    assert counts(fashion_mnist.load()) == (5, 3)
    monkeypatch.setenv("GPUCNN_DATA_DIR", str(tmp_path))
    with pytest.raises(DataError, match=r"^GPUCNN_DATA_DIR="):
        fashion_mnist.load()
    assert counts(fashion_mnist.load(official)) == (5, 3)


def test_a_folder_that_was_named_is_never_passed_over(official, nowhere, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "DEBIAN_DIR", official)
    other = official.parent / "other"
    other.mkdir()
    for name in list(fashion_mnist.SHA256)[:3]:
        (other / name).write_bytes((official / name).read_bytes())
    message = (f"data_dir={other}: t10k-labels-idx1-ubyte.gz not found there; expected "
               "train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, "
               "t10k-images-idx3-ubyte.gz, t10k-labels-idx1-ubyte.gz (with or without .gz)")
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        fashion_mnist.load(other)


def test_load_refuses_a_folder_and_the_subset_at_once(official):
    with pytest.raises(ValueError, match="leave out data_dir"):
        fashion_mnist.load(official, subset=True)


@pytest.mark.parametrize(("labels", "message"), [
    (np.zeros(4, np.uint8), "train: 5 images but 4 labels"),
    (np.full(5, 10, np.uint8), r"train: label 10 at position 0 is out of range for 10 classes"),
], ids=["row28", "row25"])
def test_files_that_do_not_fit_name_their_folder(official, nowhere, labels, message):
    (official / "train-labels-idx1-ubyte.gz").write_bytes(idx_bytes(labels))
    with pytest.raises(DataError, match=f"official: {message}"):
        fashion_mnist.load(official)


@pytest.fixture
def server(official, nowhere, monkeypatch):
    """An HTTP server of the official folder; the loader knows its checksums. Lists requests."""
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format, *args):
            requests.append(self.path.lstrip("/"))

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0),
                                            partial(Handler, directory=official))
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setattr(fashion_mnist, "BASE_URL", f"http://127.0.0.1:{httpd.server_port}/")
    monkeypatch.setattr(fashion_mnist, "SHA256", {
        name: hashlib.sha256((official / name).read_bytes()).hexdigest()
        for name in fashion_mnist.SHA256})
    yield requests
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def test_download_once_then_read_the_cache(server, nowhere):
    assert counts(fashion_mnist.load()) == (5, 3)
    assert server == list(fashion_mnist.SHA256)
    assert sorted(p.name for p in nowhere.iterdir()) == sorted(fashion_mnist.SHA256)
    assert counts(fashion_mnist.load()) == (5, 3)
    assert len(server) == 4


def test_a_complete_cache_needs_no_pooch(server, nowhere, monkeypatch):
    fashion_mnist.load()
    monkeypatch.setitem(sys.modules, "pooch", None)
    assert counts(fashion_mnist.load()) == (5, 3)
    (nowhere / "t10k-images-idx3-ubyte.gz").write_bytes(b"damaged")
    with pytest.raises(DataError, match="needs pooch"):
        fashion_mnist.load()


def test_a_damaged_file_in_the_cache_is_fetched_again(server, nowhere):
    fashion_mnist.load()
    (nowhere / "t10k-images-idx3-ubyte.gz").write_bytes(b"damaged")
    assert counts(fashion_mnist.load()) == (5, 3)
    assert server[4:] == ["t10k-images-idx3-ubyte.gz"]


def assert_cannot_download(name, cause):
    with pytest.raises(DataError, match=rf"^cannot download http://127.0.0.1:\d+/{name} \(.*"
                                        rf"{cause}.*\); try again, or give the folder") as e:
        fashion_mnist.load()
    assert "\n" not in str(e.value)


def test_download_with_a_wrong_checksum_is_refused_and_removed(server, nowhere, official):
    (official / "train-labels-idx1-ubyte.gz").write_bytes(b"something else")
    assert_cannot_download("train-labels-idx1-ubyte.gz", "does not match the known hash")
    assert [p.name for p in nowhere.iterdir()] == ["train-images-idx3-ubyte.gz"]


# pooch leaves the connection of a failed request to the garbage collector.
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_download_of_a_file_that_is_gone(server, official):
    (official / "t10k-images-idx3-ubyte.gz").unlink()
    assert_cannot_download("t10k-images-idx3-ubyte.gz", "404")
    gc.collect()


def test_download_without_a_network(nowhere):
    assert_cannot_download("train-images-idx3-ubyte.gz", "(refused|unreachable)")


def test_download_into_a_cache_that_cannot_be_written(server, nowhere):
    nowhere.parent.parent.write_text("a file where the cache folder should be")
    assert_cannot_download("train-images-idx3-ubyte.gz", "cache")


def test_download_without_pooch(nowhere, monkeypatch):
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(DataError, match=r"pip install 'gpucnn\[download\]', or give the folder .*"
                                        r"--data-dir or GPUCNN_DATA_DIR, or use the packaged"):
        fashion_mnist.load()


def test_importing_loads_nothing_heavy():
    script = ("import sys, gpucnn.data, gpucnn.viz, gpucnn.metrics\n"
              "print([m for m in ('PIL', 'matplotlib', 'pooch', 'requests', 'tqdm')\n"
              "       if m in sys.modules])")
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                            check=True, cwd=Path(__file__).parent.parent)
    assert result.stdout.strip() == "[]"
