"""Compares reading from emulated object stores with reading locally.

Makes batches of packed rows of generated JPEGs of web size, in tars and in ArrayRecord files. They
lie in a local folder, and on emulators of `gs://` and `s3://` that delay every request. No document
is read twice in a turn, as in a corpus that is read once. The places take turns; the local folder
is first and last. Prints a JSON object with the images a second of
each place, its requests, and its ratio to the local folder. `alone` is the same for the processor
time of the reader, which other jobs on the machine hardly change; it leaves out waiting.

The emulators take 5 to 30 ms of processor time for a range of an object, on the cores that decode
the images. So ranges are cut from the local file, behind the same delay.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stores import Store  # pyright: ignore[reportMissingImports]

ROOT = Path(__file__).resolve().parent.parent
SHARD_DOCUMENTS = 200
ROW_IMAGES, BATCH_ROWS = 36, 4
FORMATS = {"webdataset": "*.tar", "records": "*.array_record"}
LOCAL = "local"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--latency", type=float, default=0.02, help="seconds a request (0.02)")
    parser.add_argument("--documents", type=int, default=4 * SHARD_DOCUMENTS)
    parser.add_argument("--batches", type=int, default=3, help="of 4 rows, in each turn (3)")
    parser.add_argument("--stores", nargs="+", default=["gs", "s3"])
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    # One batch is made before the clock starts, and one is requested ahead at the end.
    if (least := (args.batches + 2) * BATCH_ROWS * ROW_IMAGES) > args.documents:
        parser.error(f"--documents must be at least {least}, so that none is read twice")
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    if args.measure:
        places, form, tokenizer = args.measure
        print(json.dumps(measure(json.loads(places), form, tokenizer, args.batches)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), args.documents)
        print(json.dumps(compare(folder, args), indent=1))
    return 0


def write(folder: Path, documents: int) -> None:
    """Writes the shards of both formats, and a tokenizer."""
    import numpy as np

    from benchmarks.data import caption, jpeg
    from emu_jax.data import Document, Image, Text
    from emu_jax.data.documents import write_documents
    from emu_jax.tokenizer import Tokenizer

    rng = np.random.default_rng(0)
    images = [jpeg(rng) for _ in range(30)]
    pairs = [(images[n % len(images)], caption(rng)) for n in range(documents)]
    Tokenizer.train([words for _, words in pairs], 1000).save(folder / "tokenizer")
    for start in range(0, documents, SHARD_DOCUMENTS):
        shard = pairs[start : start + SHARD_DOCUMENTS]
        write_documents(
            folder / f"{start}.array_record",
            (Document((Image(image), Text(words))) for image, words in shard),
        )
        with tarfile.open(folder / f"{start}.tar", "w") as archive:
            for n, (image, words) in enumerate(shard, start):
                for name, content in ((f"{n}.jpg", image), (f"{n}.txt", words.encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))


def compare(folder: str, args: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    """Returns figures of each format and place. The stores run in this process, the reader in
    another one."""
    stores = {scheme: _store(scheme, folder) for scheme in args.stores}
    report: dict[str, dict[str, dict[str, float]]] = {}
    try:
        for store in stores.values():
            os.environ |= store.environment
            store.latency = args.latency
        for form in FORMATS:
            folders = {LOCAL: folder, **{name: store.folder for name, store in stores.items()}}
            command = [sys.executable, __file__, f"--batches={args.batches}", "--measure"]
            command += [json.dumps(folders), form, f"{folder}/tokenizer"]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            rates = {
                name: [statistics.mean(each) for each in zip(*turns, strict=True)]
                for name, turns in json.loads(output).items()
            }
            report[form] = {
                name: {
                    "images_a_second": round(wall, 1),
                    "ratio": round(wall / rates[LOCAL][0], 3),
                    "images_a_second_alone": round(processor, 1),
                    "ratio_alone": round(processor / rates[LOCAL][1], 3),
                }
                for name, (wall, processor) in rates.items()
            }
            for name, store in stores.items():
                report[form][name]["requests"] = len(store.requests)
                store.requests.clear()
    finally:
        for store in stores.values():
            store.close()
    return report


def _store(scheme: str, folder: str) -> Store:
    """Returns an emulated store that has the shards."""
    from stores import Store  # pyright: ignore[reportMissingImports]

    class RangeStore(Store):
        """A store that answers requests for a range of an object from a copy of it."""

        def __init__(self) -> None:
            self.copies: dict[str, Path] = {}  # local files, by the names of objects
            super().__init__(scheme)

        def forward(
            self, method: str, path: str, body: bytes, headers: dict[str, str]
        ) -> tuple[int, dict[str, str], bytes]:
            span = re.fullmatch(r"bytes=(\d+)-(\d+)", headers.get("range", ""))
            copy = self.copies.get(self._name(path, body))
            if method != "GET" or span is None or copy is None:
                return super().forward(method, path, body, headers)
            size = copy.stat().st_size
            first, last = int(span[1]), min(int(span[2]), size - 1)
            with copy.open("rb") as file:
                content = os.pread(file.fileno(), last + 1 - first, first)
            answered = {
                "Content-Length": str(last + 1 - first),
                "Content-Range": f"bytes {first}-{last}/{size}",
                "Content-Type": "application/octet-stream",
                "ETag": '"0"',
            }
            return 206, answered, content

        def _generation(self, name: str) -> str:
            return "1" if name in self.copies else super()._generation(name)

    import fsspec

    store = RangeStore()
    os.environ |= store.environment
    fs = fsspec.filesystem(scheme, skip_instance_cache=True)
    key = store.folder.partition("://")[2].partition("/")[2]
    for pattern in FORMATS.values():
        for path in Path(folder).glob(pattern):
            fs.pipe_file(f"{store.folder}/{path.name}", path.read_bytes())
            store.copies[f"{key}/{path.name}"] = path
    store.requests.clear()
    return store


def measure(
    folders: Mapping[str, str], form: str, tokenizer: str, count: int
) -> dict[str, list[tuple[float, float]]]:
    """Returns the images a second of a thread that makes batches, and the images a second of its
    processor time, for each turn of a place."""
    from emu_jax.data import Batches, DataConfig
    from emu_jax.data.sources import SourceConfig

    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in folders}
    with tempfile.TemporaryDirectory() as cache:
        for name in [*folders, *reversed(list(folders))]:
            source = SourceConfig("pairs", form, (f"{folders[name]}/{FORMATS[form]}",), paired=True)
            cfg = DataConfig(
                sources=(source,),
                tokenizer=tokenizer,
                cache=f"{cache}/{name}",
                batch_size=BATCH_ROWS,
                block_documents=SHARD_DOCUMENTS,
                row_tokens=2176,
                row_images=ROW_IMAGES,
                prefetch=0,
            )
            with Batches(cfg, cfg.load_tokenizer(), "rows") as batches:
                next(batches)
                began, began_processor = time.perf_counter(), time.process_time()
                images = sum(int(next(batches)["image_valid"].sum()) for _ in range(count))
                wall = time.perf_counter() - began
                rates[name].append(
                    (images / wall, images / (time.process_time() - began_processor))
                )
    return rates


if __name__ == "__main__":
    sys.exit(main())
