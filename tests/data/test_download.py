"""Download and preparation of MNIST, Fashion-MNIST and CIFAR from the original files, and their failures."""

import contextlib
import gzip
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
import types

import numpy as np
import pandas as pd
import pytest
import tensorflow_datasets as tfds
from absl import flags
from filelock import FileLock
from tensorflow_datasets.image_classification import cifar
from tensorflow_datasets.image_classification import mnist as tfds_mnist

from imp_jax import data, main, runs
from imp_jax.data import __main__, download
from imp_jax.errors import UserError
from tests.conftest import quick_config
from tests.helpers import ROOT, archives, folders
from tests.helpers.archives import Server

FIRST_ANSWER_TIMEOUT_S = download._FIRST_ANSWER_TIMEOUT_S
CLASSICS = ("mnist", "fashion_mnist", "cifar10", "cifar100")


class _NoTensorFlow:
    """A module finder that fails to import TensorFlow, as if it were not installed."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "tensorflow":
            raise ImportError(f"{name} is imported")


@pytest.fixture(autouse=True)
def no_tensorflow(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [_NoTensorFlow(), *sys.meta_path])


@pytest.fixture(autouse=True)
def short_timeouts(monkeypatch):
    """Shorten timeouts to at most a second, and waits to hundredths of a second."""
    monkeypatch.setattr(download, "_FIRST_ANSWER_TIMEOUT_S", 1)
    monkeypatch.setattr(download, "_STALL_TIMEOUT_S", 0.2)
    monkeypatch.setattr(download, "_RETRY_WAITS_S", (0.01, 0.02, 0.03))


@pytest.fixture
def serve(monkeypatch):
    """Return a function that serves random archives of a set, and makes the builder download them."""
    with contextlib.ExitStack() as stack:

        def serve(name, actions=(), files=None):
            files = files or archives.pack(name, archives.random_splits(name))
            server = stack.enter_context(Server(files, actions))
            archives.register(monkeypatch, name, files, server.url)
            return server

        yield serve


def stored_files(folder):
    """Return the relative paths of all files below a folder, except for locks."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock")


def sorted_examples(images, labels):
    return sorted((int(y), x.tobytes()) for x, y in zip(np.asarray(images), np.asarray(labels), strict=True))


@pytest.mark.parametrize("name", CLASSICS)
def test_a_set_is_downloaded_and_prepared_on_first_use(name, serve, tmp_path, capsys):
    server = serve(name)
    splits = archives.random_splits(name)
    dataset = data.load(name, tmp_path)
    for split, (images, labels) in splits.items():
        loaded = getattr(dataset, split)
        assert sorted_examples(loaded.images, loaded.labels) == sorted_examples(images, labels["label"])
    assert dataset.num_classes == (100 if name == "cifar100" else 10)
    assert sorted(server.requests) == [(file, 0) for file in sorted(server.files)]
    out, err = capsys.readouterr()
    assert f"preparing {name} in {dataset.folder}\n" in out
    assert not err

    downloads = {f"downloads/{name}/{file}" for file in server.files}
    assert downloads == {path for path in stored_files(tmp_path) if not path.startswith(f"{name}/")}
    files = [(path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")]
    with pytest.MonkeyPatch.context() as patch:  # no lock: a prepared set may be on a read-only disk
        patch.setattr(data.tfds, "FileLock", None)
        data.load(name, tmp_path)
        assert data.prepare(name, tmp_path) == dataset.folder
    assert [(path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")] == files
    assert len(server.requests) == len(server.files)


@pytest.mark.parametrize("name", CLASSICS)
def test_a_prepared_folder_equals_that_of_tfds(name, serve, tmp_path):
    """The expected folder has examples from the parser of TFDS, written by the builder of TFDS."""
    server = serve(name)
    ours = data.prepare(name, tmp_path / "ours")
    with pytest.MonkeyPatch.context() as patch:
        examples, label_names = parse_with_tfds(name, server.files, tmp_path / "unpacked", patch)
    encoded = {
        split: [example | {"image": folders.encoded(example["image"])} for example in split_examples]
        for split, split_examples in examples.items()
    }
    folders.write(name, tmp_path / "theirs", encoded, label_names if name.startswith("cifar") else {})

    builders = [tfds.builder(name, data_dir=tmp_path / folder) for folder in ("ours", "theirs")]
    assert all(type(builder).__module__.startswith("tensorflow_datasets") for builder in builders)
    assert str(ours) == builders[0].data_dir
    names = [sorted(path.name for path in builder.data_path.iterdir()) for builder in builders]
    assert names[0] == names[1]
    for file in (n for n in names[0] if n == "features.json" or n.endswith("labels.txt")):
        texts = [(builder.data_path / file).read_text() for builder in builders]
        assert texts[0] == texts[1]
    infos = [json.loads((builder.data_path / "dataset_info.json").read_text()) for builder in builders]
    assert infos[0]["downloadSize"] == str(sum(map(len, server.files.values())))
    for field in ("splits", "version", "name", "fileFormat", "description"):
        assert infos[0][field] == infos[1][field]
    for split in ("train", "test"):
        records = [builder.as_data_source(split) for builder in builders]
        for one, other in zip(*records, strict=True):
            assert one.keys() == other.keys()
            for feature in one:
                np.testing.assert_array_equal(one[feature], other[feature])


def parse_with_tfds(name, files, folder, patch):
    """Parse archives with TFDS's builder; replace the functions of TensorFlow with which it reads files.

    Returns: examples, {split: list}, and names of the classes, {label feature: names}.
    """
    real = tfds.builder(name, data_dir=folder)
    gfile = types.SimpleNamespace(io=types.SimpleNamespace(gfile=types.SimpleNamespace(GFile=open)))
    patch.setattr(cifar, "tf", gfile)
    patch.setattr(tfds_mnist, "tf", gfile)
    folder.mkdir()
    if name.startswith("cifar"):
        with tarfile.open(fileobj=io.BytesIO(*files.values())) as archive:
            archive.extractall(folder, filter="data")
        splits = real._split_generators(types.SimpleNamespace(download_and_extract=lambda url: folder))
    else:
        for file, content in files.items():
            (folder / file).write_bytes(gzip.decompress(content))
        splits = {}
        for (split, prefix), size in zip(archives.IDX_PREFIXES.items(), (30, 20), strict=True):
            paths = (folder / f"{prefix}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1"))
            splits[split] = real._generate_examples(size, *paths)
    features = {name: feature for name, feature in real.info.features.items() if "label" in name}
    names = {name: feature.names for name, feature in features.items()}
    return {str(split): [example for _, example in examples] for split, examples in splits.items()}, names


def test_a_round_trains_on_the_original_files(serve, tmp_path):
    server = serve("mnist")
    config = quick_config(
        str(tmp_path / "data"),
        **{"dataset.name": "mnist", "dataset.normalize": True, "model.width": 0.02},
        **{"rounds": 1, "batch_size": 10, "arms": ("imp",)},
    )
    runs.run(config, tmp_path / "run")
    assert pd.read_csv(tmp_path / "run" / "results.csv")["round"].tolist() == [0]
    assert len(server.requests) == 4
    assert "tensorflow" not in sys.modules


def test_the_main_command_without_a_network_fails_with_one_sentence(tmp_path, monkeypatch):
    """It uses the real URL, but tests have a proxy that does not exist."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    flags.FLAGS(["main", "--config=configs/conv4.py", f"--workdir={tmp_path}/run"])
    url = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
    sentence = (
        rf"error: cannot download {url}: .*; download it by hand and put it into {tmp_path}/downloads/manual$"
    )
    start = time.monotonic()
    with pytest.raises(SystemExit, match=sentence):
        main.main(["main"])
    assert time.monotonic() - start < 10
    assert not (tmp_path / "run").exists()


def test_a_download_resumes_where_it_stopped(serve, tmp_path, capsys):
    server = serve("cifar10", [("cut", 1000), ("stall", 2500), ("cut", 0), ("status", 503), ("good",)])
    (name,), (content,) = server.files.keys(), server.files.values()
    data.prepare("cifar10", tmp_path)
    assert server.requests == [(name, start) for start in (0, 1000, 3500, 3500, 3500)]
    assert (tmp_path / "downloads/cifar10" / name).read_bytes() == content

    # a later call resumes the partial file of a process that was killed
    part = tmp_path / "later/downloads/cifar10" / f"{name}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(content[:2000])
    del server.requests[:]
    data.prepare("cifar10", tmp_path / "later")
    assert server.requests == [(name, 2000)]

    # a server without ranges, a complete partial file, and a partial file of other content
    for actions, partial, requests in (
        ([("whole",)], content[:2000], [(name, 2000)]),
        ([], content, []),
        ([], bytes(3000), [(name, 3000), (name, 0)]),
    ):
        folder = tmp_path / f"{len(partial)}"
        part = folder / "downloads/cifar10" / f"{name}.part"
        part.parent.mkdir(parents=True)
        part.write_bytes(partial)
        server.actions, server.requests[:] = actions, []
        data.prepare("cifar10", folder)
        assert server.requests == requests
        assert (folder / "downloads/cifar10" / name).read_bytes() == content
        assert stored_files(folder / "downloads") == [f"cifar10/{name}"]
    assert f"downloading {server.url}/{name} (0.1 MiB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("actions", "requests", "reason", "kept_bytes"),
    [
        ([("html",)], 1, "the server sends a web page instead of the file", 0),
        ([("status", 404)], 1, "the server answers 404 Not Found", 0),
        ([("status", 503)], 1, "the server answers 503 Service Unavailable", 0),
        ([("silent",)], 1, "no answer within 1 s", 0),
        ([("cut", 60_000)] + 4 * [("cut", 0)], 5, "the connection was lost", 60_000),
        ([("stall", 60_000)] + 4 * [("stall", 0)], 5, "nothing was received for 0.2 s", 60_000),
    ],
)  # fmt: skip
def test_a_bad_server_is_reported_in_one_sentence(actions, requests, reason, kept_bytes, serve, tmp_path):
    server = serve("cifar10", actions)
    (name,) = server.files
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        data.load("cifar10", tmp_path)
    assert time.monotonic() - start < 5
    resume = "run the same command again to resume at 0.1 MiB, or " if kept_bytes else ""
    assert str(error.value) == (
        f"cannot download {server.url}/{name}: {reason}; {resume}download it by hand and put it into "
        f"{tmp_path}/downloads/manual"
    )
    assert len(server.requests) == requests
    part = f"downloads/cifar10/{name}.part"
    assert stored_files(tmp_path) == ([part] if kept_bytes else [])
    if kept_bytes:
        assert (tmp_path / part).read_bytes() == server.files[name][:kept_bytes]
    assert not (tmp_path / "cifar10").exists()
    data.load("cifar10", tmp_path)  # the same command, with a good server
    assert server.requests[-1] == (name, kept_bytes)


def test_files_with_wrong_content_are_removed(serve, tmp_path):
    server = serve("cifar10")
    ((name, content),) = server.files.items()
    for served, difference in (
        (content[:-1] + b"x", r"was removed: its sha256 is \w{64} and should be \w{64}"),
        (content + b"x", "offers a file of [0-9,]+ bytes instead of"),
    ):
        server.files[name] = served
        with pytest.raises(UserError, match=rf"cannot download .*{difference}.*; download it by hand"):
            data.load("cifar10", tmp_path)
        assert not stored_files(tmp_path)
    server.files[name] = content
    damaged = tmp_path / "downloads/cifar10" / name
    damaged.write_bytes(content[:-1] + b"x")
    data.load("cifar10", tmp_path)
    assert damaged.read_bytes() == content


def test_files_downloaded_by_hand_are_used_without_a_network(serve, tmp_path, monkeypatch, capsys):
    server = serve("mnist")
    archives.register(monkeypatch, "mnist", server.files, "http://127.0.0.1:9/none")  # a port without a server
    manual = tmp_path / "downloads/manual"
    with pytest.raises(UserError) as error:
        data.load("mnist", tmp_path)
    urls = [f"http://127.0.0.1:9/none/{name}" for name in server.files]
    assert re.fullmatch(
        rf"cannot download {urls[0]}: ConnectionRefusedError: .*; download it and {', '.join(urls[1:])} by "
        rf"hand and put them into {manual}",
        str(error.value),
    )
    assert not stored_files(tmp_path)

    archives.register(monkeypatch, "mnist", server.files, "http://no.such.host.invalid")
    with pytest.raises(UserError, match=r"cannot download http://no\.such\.host\.invalid/.*; download it and"):
        data.load("mnist", tmp_path)

    for name, content in server.files.items():
        manual.mkdir(parents=True, exist_ok=True)
        (manual / name).write_bytes(content)
    other = manual / next(iter(server.files))  # as if from Fashion-MNIST, which has the same file names
    other.write_bytes(b"<html>")
    capsys.readouterr()
    with pytest.raises(UserError, match=f"download it by hand and put it into {manual}/mnist$"):
        data.load("mnist", tmp_path)
    assert re.match(
        rf"{other} is not used, because it is not the file of http:.*: it has 6 bytes and should have [\d,]+$",
        capsys.readouterr().err,
    )
    assert other.read_bytes() == b"<html>"  # the user's file is unchanged
    (manual / "mnist").mkdir()
    own = manual / "mnist" / other.name
    own.write_bytes(b"<html>")
    with pytest.raises(UserError, match=rf"{own} is not the file of http://.*; replace or remove it"):
        data.load("mnist", tmp_path)
    own.write_bytes(server.files[other.name])
    images, labels = archives.random_splits("mnist")["test"]
    test = data.load("mnist", tmp_path).test
    assert sorted_examples(test.images, test.labels) == sorted_examples(images, labels["label"])
    assert not server.requests


def test_files_of_another_set_in_the_manual_folder_do_not_prevent_a_download(serve, tmp_path):
    server = serve("fashion_mnist")
    (tmp_path / "downloads/manual").mkdir(parents=True)
    for name in server.files:
        (tmp_path / "downloads/manual" / name).write_bytes(b"of MNIST")
    data.prepare("fashion_mnist", tmp_path)
    assert len(server.requests) == 4


def test_a_server_that_never_answers_is_reported_within_ten_seconds(tmp_path, monkeypatch):
    """With the default timeout."""
    monkeypatch.setattr(download, "_FIRST_ANSWER_TIMEOUT_S", FIRST_ANSWER_TIMEOUT_S)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        files = archives.pack("mnist", archives.random_splits("mnist"))
        archives.register(monkeypatch, "mnist", files, f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(UserError, match=r"cannot download .*: no answer within \d+ s; download it and"):
            data.load("mnist", tmp_path)
    assert time.monotonic() - start < 8  # a command also spends two seconds on imports


def test_prepare_continues_if_its_output_is_closed(serve, tmp_path, monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    serve("mnist")
    monkeypatch.setattr(sys, "argv", ["data", "prepare", "mnist", f"--data_dir={tmp_path}"])
    monkeypatch.setattr(sys, "stdout", Closed())
    __main__.main()
    assert data.prepared_builder("mnist", tmp_path).is_prepared()


def test_prepare_waits_for_another_process_that_prepares_the_set(serve, tmp_path, capsys):
    server = serve("cifar10")
    prepared = []
    with FileLock(tmp_path / ".cifar10.lock"):
        waiting = threading.Thread(target=lambda: prepared.append(data.prepare("cifar10", tmp_path)))
        waiting.start()
        time.sleep(0.2)
        assert not server.requests
        folders.write_cifar10(tmp_path)  # in place of the process that holds the lock
    waiting.join(10)
    assert prepared == [next(tmp_path.glob("cifar10/3*"))]
    assert not server.requests
    lines = [line for line in capsys.readouterr().out.splitlines() if "cifar10" in line]
    assert lines[0] == (
        f"waiting for another process that is preparing cifar10 (it holds {tmp_path}/.cifar10.lock)"
    )


def test_leftovers_of_a_killed_process_are_removed(serve, tmp_path):
    serve("mnist")
    for folder in ("mnist/incomplete.AB12CD_3.0.1", "downloads/mnist/file.gz.tmp.0123"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "part").touch()
    data.prepare("mnist", tmp_path)
    assert not [path for path in tmp_path.rglob("*") if "incomplete" in path.name or ".tmp." in path.name]
    assert sorted(path.name for path in (tmp_path / "mnist").iterdir()) == ["3.0.1"]


def test_ctrl_c_interrupts_a_download_at_once(serve, tmp_path, monkeypatch):
    server = serve("mnist", [("stall", 5000)])

    def press_ctrl_c():
        server.asked.wait(10)
        time.sleep(0.4)  # by then the main thread waits for the server
        os.kill(os.getpid(), signal.SIGINT)

    previous_handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=press_ctrl_c).start()
        monkeypatch.setattr(download, "_STALL_TIMEOUT_S", 10)
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            data.prepare("mnist", tmp_path)
    finally:
        signal.signal(signal.SIGINT, previous_handler)
    assert time.monotonic() - start < 5
    (name, content), *_ = server.files.items()
    assert stored_files(tmp_path) == [f"downloads/mnist/{name}.part"]
    assert (tmp_path / stored_files(tmp_path)[0]).read_bytes() == content[:5000]


DRIVER = """
    import sys, time
    from pathlib import Path
    from imp_jax.data import __main__, classics
    from tests.helpers import archives

    def wait(path):
        Path({folder!r}, "ready").touch()
        time.sleep(30)

    class Patch:
        setattr = staticmethod(setattr)

    archives.register(Patch, "mnist", archives.pack("mnist", archives.random_splits("mnist")), {url!r})
    classics._read_idx = wait
    sys.argv = ["data", "prepare", "mnist", "--data_dir={folder}"]
    __main__.main()
"""


def test_ctrl_c_ends_the_command_at_once_and_leaves_no_incomplete_set(serve, tmp_path):
    server = serve("mnist")
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(DRIVER.format(url=server.url, folder=str(tmp_path)))],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "ready").exists() and process.poll() is None:
        time.sleep(0.01)
    assert list(tmp_path.glob("mnist/incomplete.*"))
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert time.monotonic() - start < 5
    assert process.returncode == 128 + signal.SIGINT
    assert err == "stopped at once by SIGINT; the same command continues from what is on disk\n"
    assert not (tmp_path / "mnist").exists()
    assert stored_files(tmp_path) == [*sorted(f"downloads/mnist/{file}" for file in server.files), "ready"]


def test_progress_is_a_bar_on_a_terminal_and_lines_otherwise(serve, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(download, "_LINE_EVERY_S", 0)
    monkeypatch.setattr(download, "_BLOCK_BYTES", 10_000)
    serve("cifar10")
    data.prepare("cifar10", tmp_path / "plain")
    out, err = capsys.readouterr()
    assert re.search(r"^cifar-10-binary.tar.gz: 0\.\d of 0\.1 MiB, \d+\.\d\d MiB/s(, 0 min left)?$", out, re.M)
    assert not err

    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    data.prepare("cifar10", tmp_path / "terminal")
    shown = terminal.getvalue()
    assert "MiB/s" in shown
    assert "cifar-10-binary.tar.gz" in shown
    assert "preparing train of cifar10" in shown
    out = capsys.readouterr().out
    assert out.startswith("preparing cifar10 in")
    assert "Downloading and preparing dataset" not in shown + out  # a message of TFDS
    assert shown.count("\x1b[?25h") == shown.count("\x1b[?25l") > 0  # the cursor is shown again


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("CIFAR10", "cifar10"),
        ("cifar-10", "cifar10"),
        ("Cifar_10", "cifar10"),
        ("CIFAR-100", "cifar100"),
        ("fashion-mnist", "fashion_mnist"),
        ("Fashion MNIST", "fashion_mnist"),
        ("MNIST5K", "mnist5k"),
        ("svhn-croped", "svhn_cropped"),
        ("ImageFolder", "folder"),
    ],
)
def test_a_misspelt_name_of_a_set_is_reported_with_a_suggestion(name, suggestion, tmp_path):
    with pytest.raises(UserError, match=rf"dataset.name is {name!r}; .*\(did you mean {suggestion}\?\)$"):
        data.load(name, tmp_path)


def test_the_home_folder_is_expanded_and_an_empty_data_dir_is_refused(serve, tmp_path, monkeypatch):
    serve("mnist")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert data.prepare("mnist", "~/data") == tmp_path / "data/mnist/3.0.1"
    assert data.load("mnist", "~/data").folder == tmp_path / "data/mnist/3.0.1"
    assert not (tmp_path / "~").exists()
    for function in (data.prepare, data.load):
        with pytest.raises(UserError, match=r"dataset.data_dir is empty; it should be the path of a folder"):
            function("mnist", "")
