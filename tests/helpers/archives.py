"""Small random archives in the original formats of MNIST and CIFAR, and a local HTTP server for them."""

import contextlib
import gzip
import hashlib
import http.server
import io
import tarfile
import threading

import numpy as np
from tensorflow_datasets.core.download.checksums import UrlInfo

from imp_jax import data

IDX_PREFIXES = {"train": "train", "test": "t10k"}
CIFAR_FILES = {
    "cifar10": {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]},
    "cifar100": {"train": ["train.bin"], "test": ["test.bin"]},
}


def random_splits(name, train=30, test=20):
    """Return random data for the set `name`: {split: (images, {label feature: labels})}."""
    rng = np.random.default_rng(0)
    shape = (32, 32, 3) if name.startswith("cifar") else (28, 28, 1)
    classes = {"coarse_label": 20, "label": 100} if name == "cifar100" else {"label": 10}
    return {
        split: (
            rng.integers(0, 256, (size, *shape), np.uint8),
            {feature: rng.integers(0, count, size, np.uint8) for feature, count in classes.items()},
        )
        for split, size in (("train", train), ("test", test))
    }


def pack(name, splits):
    """Return `splits` in the original files of the set, {file name: bytes}."""
    if not name.startswith("cifar"):
        return {
            f"{IDX_PREFIXES[split]}-{kind}-ubyte.gz": gzip.compress(_idx(array), mtime=0)
            for split, (images, labels) in splits.items()
            for kind, array in (("images-idx3", images[..., 0]), ("labels-idx1", labels["label"]))
        }
    number = name.removeprefix("cifar")
    folder = "cifar-10-batches-bin" if number == "10" else "cifar-100-binary"
    contents = {f"{folder}/readme.html": b"<html>not a record</html>"}
    for feature, file in _class_name_files(name).items():
        contents[f"{folder}/{file}"] = "".join(f"{n}\n" for n in class_names(name, feature)).encode() + b"\n"
    for split, (images, labels) in splits.items():
        planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
        records = np.concatenate([*(column[:, None] for column in labels.values()), planes], 1)
        files = CIFAR_FILES[name][split]
        for file, part in zip(files, np.array_split(records, len(files)), strict=True):
            contents[f"{folder}/{file}"] = part.tobytes()
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for path, content in contents.items():
            member = tarfile.TarInfo(path)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return {f"cifar-{number}-binary.tar.gz": archive.getvalue()}


def class_names(name, feature):
    """Return the class names of a label feature of CIFAR-10 or CIFAR-100."""
    return [f"{feature}_{i}" for i in range({"cifar10": 10, "cifar100": 100}[name])][
        : 20 if feature == "coarse_label" else None
    ]


def register(patch, name, files, url):
    """Make the builder of `name` download `files` from the folder `url`."""
    infos = {
        f"{url}/{file}": UrlInfo(len(content), hashlib.sha256(content).hexdigest(), file)
        for file, content in files.items()
    }
    patch.setattr(data.BUILDERS[name], "url_infos", infos)


class Server:
    """Serves `files` on localhost. The first requests get `actions`, in order; later ones are served normally.

    Actions: ("cut", n) closes the connection after n bytes; ("stall", n) stops sending after n bytes;
    ("status", code) answers with an HTTP error; ("html",) sends a web page; ("silent",) sends nothing;
    ("whole",) sends the whole file although a range is requested; ("good",) serves the request normally.
    """

    def __init__(self, files, actions=()):
        self.files = files
        self.actions = list(actions)
        self.requests = []  # (file, first byte)
        self.asked = threading.Event()
        self._ended = threading.Event()

    def __enter__(self):
        handler = type("Handler", (_Handler,), {"owner": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/data"
        threading.Thread(target=self._server.serve_forever, args=[0.01], daemon=True).start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()

    def wait_for_end(self):
        """Tell the test that a request has arrived, then keep its connection open until the server ends."""
        self.asked.set()
        self._ended.wait(30)


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        name = self.path.removeprefix("/data/")
        content = self.owner.files[name]
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        self.owner.requests.append((name, start))
        action, *values = self.owner.actions.pop(0) if self.owner.actions else ("good",)
        if action == "silent":
            return self.owner.wait_for_end()
        if action == "status":
            return self.send_error(*values)
        if action == "html":
            return self._send(200, b"<html>log in</html>", {"Content-Type": "text/html; charset=utf-8"})
        partial = start > 0 and action != "whole"
        headers = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if partial else {}
        body = content[start:] if partial else content
        with contextlib.suppress(ConnectionError):
            self._send(206 if partial else 200, body, headers, values[0] if values else len(body))
            if action == "stall":
                self.owner.wait_for_end()
        return None

    def _send(self, status, body, headers, size=None):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[:size])
        self.wfile.flush()

    def log_message(self, *_):
        pass


def _idx(array):
    header = np.array([0x0800 + array.ndim, *array.shape], ">i4")
    return header.tobytes() + array.tobytes()


def _class_name_files(name):
    if name == "cifar10":
        return {"label": "batches.meta.txt"}
    return {"coarse_label": "coarse_label_names.txt", "label": "fine_label_names.txt"}
