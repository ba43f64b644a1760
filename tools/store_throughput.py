"""Compares reading from emulated object stores with reading locally.

Makes batches of packed rows of generated JPEGs of web size, in tars and in ArrayRecord files. They
lie in a local folder, or on `gs://` and `s3://` emulators on the loopback that delay every request.
Prints a JSON object with images a second, and the ratio of each store to the local folder.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHARD_DOCUMENTS = 200
ROW_IMAGES = 36
FORMATS = {"webdataset": "*.tar", "records": "*.array_record"}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--latency", type=float, default=0.02, help="seconds a request (0.02)")
    parser.add_argument("--documents", type=int, default=2 * SHARD_DOCUMENTS)
    parser.add_argument("--batches", type=int, default=12, help="of 4 rows, for each figure")
    parser.add_argument("--stores", nargs="+", default=["gs", "s3"])
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        folder, form, tokenizer = args.measure
        print(measure(folder, form, tokenizer, args.batches))
        return 0
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
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
    images = [jpeg(rng) for _ in range(50)]
    pairs = [(images[n % 50], caption(rng)) for n in range(documents)]
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


def compare(folder: str, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Returns images a second of each format and place, and their ratios to the local folder."""
    import fsspec
    from stores import Store

    report: dict[str, dict[str, float]] = {}
    for form, scheme in itertools.product(FORMATS, args.stores):
        store = Store(scheme)
        os.environ |= store.environment
        fs = fsspec.filesystem(scheme, skip_instance_cache=True)
        for path in Path(folder).glob(FORMATS[form]):
            fs.pipe_file(f"{store.folder}/{path.name}", path.read_bytes())

        def rate(place: str, form: str = form) -> float:
            command = [sys.executable, __file__, f"--batches={args.batches}"]
            command += ["--measure", place, form, f"{folder}/tokenizer"]
            return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

        store.latency = args.latency
        before, remote, after = rate(folder), rate(store.folder), rate(folder)
        local = (before + after) / 2
        report[f"{form} {scheme}"] = {
            "local": round(local, 1),
            "remote": round(remote, 1),
            "ratio": round(remote / local, 3),
            "requests": len(store.requests),
        }
        store.close()
    return report


def measure(folder: str, form: str, tokenizer: str, count: int) -> float:
    """Returns the images a second of one thread that makes batches."""
    sys.path.insert(0, str(ROOT))
    from emu_jax.data import Batches, DataConfig
    from emu_jax.data.sources import SourceConfig

    with tempfile.TemporaryDirectory() as cache:
        source = SourceConfig("pairs", form, (f"{folder}/{FORMATS[form]}",), paired=True)
        cfg = DataConfig(
            sources=(source,),
            tokenizer=tokenizer,
            cache=cache,
            batch_size=4,
            row_tokens=2176,
            row_images=ROW_IMAGES,
            prefetch=0,
        )
        with Batches(cfg, cfg.load_tokenizer(), "rows") as batches:
            next(batches)
            began = time.perf_counter()
            images = sum(int(next(batches)["image_valid"].sum()) for _ in range(count))
            return images / (time.perf_counter() - began)


if __name__ == "__main__":
    sys.exit(main())
