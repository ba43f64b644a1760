"""The command line, `emu-jax VERB`. Each verb is one function below.

Results go to stdout, progress and errors to stderr. Exit status: 0 success, 1 a failed check, 2 an
error that the user can fix (reported in one line), 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import io
import json
import logging
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import emu_jax
from emu_jax.errors import UserError, suggest
from emu_jax.hub import HubAddress, downloaded, is_hub
from emu_jax.storage import as_path, is_remote

if TYPE_CHECKING:
    from emu_jax.convert.convert import ConversionReport
    from emu_jax.data.build.build import Manifest

Command = Callable[[argparse.Namespace], "dict[str, Any]"]

CONFIG_HELP = "a Python file. It is executed: do not use files that you have not read"


def _path(text: str) -> Path:
    """Argument type of flags that name a local file or directory, or one in an object store.

    Raises:
        argparse.ArgumentTypeError: the text is a URL that no store of `storage.SCHEMES` serves.
    """
    try:
        return as_path(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _readable(text: str) -> Path | str:
    """Argument type of flags that name a model to read: a path, or an address on the Hub, which the
    verb downloads.

    Raises:
        argparse.ArgumentTypeError: not an address on the Hub, and no path either.
    """
    if not is_hub(text):
        return _path(text)
    try:
        return str(HubAddress.parse(text))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _local_path(text: str) -> Path:
    """Argument type of flags that name a local file or directory.

    Raises:
        argparse.ArgumentTypeError: the text is a URL.
    """
    if is_remote(text):
        raise argparse.ArgumentTypeError(
            f"{text} is not a local path: copy it to this machine, or mount the bucket, for "
            "example with Cloud Storage FUSE (docs/launch.md)"
        )
    return Path(text)


def _parent(text: str) -> Path | str:
    """Argument type of `init`'s parents: a local path, or an address on the Hub.

    Raises:
        argparse.ArgumentTypeError: the text is another URL.
    """
    return _readable(text) if is_hub(text) else _local_path(text)


def _seed(text: str) -> int:
    """Argument type of `--seed`.

    Raises:
        argparse.ArgumentTypeError: not a whole number from 0 to 2**32 - 1 (JAX keeps 32 bits).
    """
    try:
        seed = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid int value: {text[:40]!r}") from None
    if not 0 <= seed < 2**32:
        raise argparse.ArgumentTypeError(
            f"{text[:40]} is not a seed: give a whole number from 0 to {2**32 - 1}"
        )
    return seed


# Each verb declares its flags on the parser and returns a function that runs it: it takes the
# parsed arguments and returns the JSON object. Imports are inside it to keep `--help` fast.


def demo(parser: argparse.ArgumentParser) -> Command:
    """train Emu on handwritten digits and write a report of the results"""
    parser.add_argument("--workdir", type=_path, default=Path("runs/demo"), metavar="DIR")
    parser.add_argument("--seed", type=_seed, default=0, metavar="N")
    parser.add_argument(
        "--validation",
        action="store_true",
        help="score on a part of the training split instead, for choosing settings",
    )
    parser.add_argument(
        "--family", choices=("emu", "emu2"), default="emu", help="the model to train (default: emu)"
    )

    def run(args: argparse.Namespace) -> dict[str, Any]:
        from emu_jax.demo import demo

        args.json = True  # always print the figures: they are the result
        return demo.run_demo(args.workdir, args.seed, args.validation, args.family).to_json()

    return run


def train(parser: argparse.ArgumentParser) -> Command:
    """train a model from a config file, or resume a run"""
    parser.usage = (
        "%(prog)s --config configs/X.py --workdir DIR [--config.a.b=VALUE ...] [--dry-run] [--json]"
    )
    parser.add_argument(
        "--config", type=_local_path, required=True, metavar="FILE", help=CONFIG_HELP
    )
    parser.add_argument("--workdir", type=_path, required=True, metavar="DIR")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="report what the run would do, and exit with status 2 if something would stop it; "
        "takes no step, writes nothing, and reads no more of the data than headers",
    )
    parser.epilog = "--config.a.b=VALUE overrides one key of the config and may be repeated."

    def run(args: argparse.Namespace) -> dict[str, Any]:
        import jax

        from emu_jax.evaluate.in_training import EVALUATION_KINDS
        from emu_jax.hardware import chip_name
        from emu_jax.train.config import TrainConfig
        from emu_jax.train.config_file import load_config
        from emu_jax.train.distributed import initialize_distributed
        from emu_jax.train.dry_run import dry_run, dry_run_summary
        from emu_jax.train.loop import train

        initialize_distributed()
        chip = chip_name(jax.devices()[0].device_kind)
        cfg = load_config(TrainConfig, args.config, args.overrides, chip)
        if args.dry_run:
            report = dry_run(
                cfg, args.workdir, load_config(TrainConfig, args.config, []), EVALUATION_KINDS
            )
            if not args.json and jax.process_index() == 0:
                print(dry_run_summary(report))
            for problem in report.problems:
                _complain(problem)
            args.failure = 2
            return dataclasses.asdict(report)
        result = train(cfg, args.workdir, EVALUATION_KINDS)
        if not args.json:
            print(f"trained to step {result.step}: {args.workdir}")
        return result.to_json()

    return run


def precompute(parser: argparse.ArgumentParser) -> Command:
    """compute a decoder's conditions and latents once, for `train --config.latents=DIR`"""
    parser.usage = (
        "%(prog)s --config configs/X.py --out DIR --rows N [--config.a.b=VALUE ...] [--json]"
    )
    parser.add_argument(
        "--config", type=_local_path, required=True, metavar="FILE", help=CONFIG_HELP
    )
    parser.add_argument("--out", type=_path, required=True, metavar="DIR")
    parser.add_argument("--rows", type=int, required=True, metavar="N", help="documents to read")

    def run(args: argparse.Namespace) -> dict[str, Any]:
        from emu_jax.train.config import TrainConfig
        from emu_jax.train.config_file import load_config
        from emu_jax.train.precompute import precompute

        cfg = load_config(TrainConfig, args.config, args.overrides)
        result = precompute(cfg, args.out, args.rows)
        if not args.json:
            print(f"{result.rows} conditions and latents: {args.out}")
        return dataclasses.asdict(result)

    return run


def _quantize_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--quantize",
        choices=("int8", "int4"),
        help="keep the model's matrices in int8 or int4, of the image decoder in int8",
    )


def _dtype_option(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default=default,
        help=f"of the computation and of all matrices that are not quantized (default: {default})",
    )


def generate(parser: argparse.ArgumentParser) -> Command:
    """continue a sequence of text and images"""
    parser.add_argument("--checkpoint", type=_readable, required=True, metavar="DIR")
    parser.add_argument(
        "--output",
        choices=("text", "image", "auto"),
        default="auto",
        help="auto (the default): text and images, as the model decides",
    )
    parser.add_argument(
        "--save",
        type=_local_path,
        default=Path("emu.png"),
        metavar="FILE",
        help="file of the image; with --output auto, FILE-1, FILE-2, ... (default: emu.png)",
    )
    parser.add_argument("--seed", type=_seed, default=0, metavar="N")
    _dtype_option(parser, "float32")
    _quantize_option(parser)
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="text tokens to generate (default: from the checkpoint's generation.json, or 50; "
        "10 with Emu2)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        dest="settings",
        help="set another field of GenerationConfig, such as num_beams=1 or grounding=true; may be "
        "repeated",
    )
    parser.add_argument(
        "--batch",
        type=_local_path,
        metavar="FILE",
        help="file of many prompts, a JSON list of PARTs per line; prints one JSON list per line",
    )
    parser.add_argument(
        "parts",
        nargs="*",
        metavar="PART",
        help="text, or @FILE for an image or a video (@@ for text that begins with @)",
    )

    def run(args: argparse.Namespace) -> dict[str, Any]:
        import jax.numpy as jnp

        from emu_jax.generate import cli_io

        if bool(args.parts) == bool(args.batch):
            raise UserError("give the PARTs of one prompt, or --batch FILE")
        cli_io.check_save(args.save)
        settings = cli_io.parse_settings(args.output, args.settings)
        if args.batch:
            prompts = cli_io.read_batch(args.batch)
        else:
            prompts = [[cli_io.parse_part(part) for part in args.parts]]
        cli_io.check_seeds(args.output, args.seed, len(prompts))  # before loading the model
        numbered = args.output == "auto"
        answers = cli_io.answer(
            emu_jax.load(args.checkpoint, dtype=jnp.dtype(args.dtype), quantize=args.quantize),
            prompts,
            args.output,
            args.seed,
            args.max_new_tokens,
            settings,
        )
        if args.batch:
            shown = cli_io.save_batch(answers, args.save, numbered=numbered)
            if not args.json:
                print(cli_io.lines(shown))
            return {"answers": shown}
        parts = cli_io.save(answers[0], args.save, numbered=numbered)
        if not args.json:
            for part in parts:
                print(*part.values())
        return {"parts": parts}

    return run


def convert(parser: argparse.ArgumentParser) -> Command:
    """convert a release to a run directory, back, or for other libraries"""
    parser.add_argument(
        "src",
        type=_readable,
        metavar="SRC",
        help="a release folder, one of its native files (Emu-instruct.pt, "
        "Emu2_pytorch_model.bf16.bin), a run directory, or a peft folder (with --base); "
        "or one on the Hub: hf://ORG/NAME[@REV][/SUB]",
    )
    parser.add_argument("dst", type=_path, metavar="DST")
    parser.add_argument(
        "--to",
        choices=("jax", "emu", "hf"),
        default="jax",
        help="a run directory (the default), the release's own files, or folders for "
        "transformers, diffusers and peft",
    )
    parser.add_argument(
        "--model-config",
        type=_local_path,
        metavar="FILE",
        help="the release's model JSON (default: Emu.json, Emu2.json or the Hub's config.json, "
        "beside the weights)",
    )
    parser.add_argument(
        "--tokenizer",
        type=_local_path,
        metavar="DIR",
        help="a LLaMA tokenizer folder (default: tokenizer/ beside the weights)",
    )
    parser.add_argument(
        "--layout",
        choices=("native", "hub"),
        help="with --to emu, the layout of an Emu2's files: one native file, or a folder as on the "
        "Hub (default: the one that came)",
    )
    parser.add_argument(
        "--fast-tokenizer",
        action="store_true",
        help="keep white space next to special tokens, as AutoTokenizer does on the Hub (the "
        "release strips it)",
    )
    parser.add_argument("--base", type=_path, metavar="DIR", help="the base model of a peft folder")
    parser.add_argument(
        "--merge-lora", action="store_true", help="merge LoRA adapters into the weights, in float32"
    )
    _quantize_option(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace DST")

    def run(args: argparse.Namespace) -> dict[str, Any]:
        from emu_jax.convert.convert import convert

        result = convert(
            args.src,
            args.dst,
            to=args.to,
            model_config=args.model_config,
            tokenizer=args.tokenizer,
            base=args.base,
            merge_lora=args.merge_lora,
            layout=args.layout,
            fast_tokenizer=args.fast_tokenizer,
            quantize=args.quantize,
            overwrite=args.overwrite,
        )
        if not args.json:
            for note in result.notes:
                print(note)
            print(_converted(args.dst, result))
        return dataclasses.asdict(result)

    return run


def init(parser: argparse.ArgumentParser) -> Command:
    """initialize a new Emu from LLaMA, EVA-CLIP and Stable Diffusion"""
    parser.add_argument("dst", type=_path, metavar="DST")
    parser.add_argument(
        "--llama", type=_parent, required=True, metavar="DIR", help="a transformers folder"
    )
    parser.add_argument(
        "--eva-clip", type=_parent, required=True, metavar="FILE", help="EVA-CLIP's .pt file"
    )
    parser.add_argument(
        "--sd",
        type=_parent,
        required=True,
        metavar="DIR",
        help="a diffusers folder: Stable Diffusion v1.5 or SDXL",
    )
    parser.add_argument(
        "--family", choices=("emu", "emu2"), default="emu", help="which Emu to build (default: emu)"
    )
    parser.epilog = "Each parent may be on the Hub: hf://ORG/NAME[@REV][/SUB]."
    parser.add_argument(
        "--model-config",
        type=_local_path,
        metavar="FILE",
        help="the release's model JSON (default: the released model's sizes)",
    )
    parser.add_argument(
        "--tokenizer",
        type=_local_path,
        metavar="DIR",
        help="a LLaMA tokenizer folder (default: --llama)",
    )
    parser.add_argument("--seed", type=_seed, default=0, metavar="N")
    parser.add_argument("--overwrite", action="store_true", help="replace DST")

    def run(args: argparse.Namespace) -> dict[str, Any]:
        from emu_jax.convert.init import init

        result = init(
            args.dst,
            llama=args.llama,
            eva_clip=args.eva_clip,
            sd=args.sd,
            family=args.family,
            seed=args.seed,
            model_config=args.model_config,
            tokenizer=args.tokenizer,
            overwrite=args.overwrite,
        )
        if not args.json:
            for note in result.notes:
                print(note)
            print(f"at random: {len(result.fresh)} parameters")
            print(_converted(args.dst, result))
        return dataclasses.asdict(result)

    return run


def push(parser: argparse.ArgumentParser) -> Command:
    """upload a run's weights and a model card to the Hugging Face Hub"""
    parser.add_argument("run_directory", type=_path, metavar="RUN")
    parser.add_argument("address", metavar="hf://ORG/NAME", help="a repository, created if new")
    parser.add_argument(
        "--to",
        choices=("jax", "emu", "hf"),
        default="jax",
        help="layout of the weights, as for convert: a run directory (the default), the release's "
        "own files, or folders for transformers, diffusers and peft",
    )
    parser.add_argument(
        "--layout",
        choices=("native", "hub"),
        help="with --to emu, the layout of an Emu2's files, as for convert",
    )
    parser.add_argument(
        "--license",
        default="",
        metavar="ID",
        help="license of the model (default: that of its parents, if they agree)",
    )
    parser.add_argument("--private", action="store_true", help="create a private repository")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the files of the repository"
    )
    parser.add_argument(
        "--out",
        type=_local_path,
        metavar="DIR",
        help="write what would be uploaded here, and upload nothing",
    )

    def run(args: argparse.Namespace) -> dict[str, Any]:
        from emu_jax.publish import push

        result = push(
            args.run_directory,
            args.address,
            to=args.to,
            layout=args.layout,
            license=args.license,
            private=args.private,
            overwrite=args.overwrite,
            out=args.out,
        )
        if not args.json:
            for note in result.notes:
                print(note)
            where = f"{result.address}, commit {result.commit}" if result.commit else args.out
            print(f"{where}: {result.files:,} files, {result.bytes:,} bytes")
        return dataclasses.asdict(result)

    return run


def verify(parser: argparse.ArgumentParser) -> Command:
    """compare a checkpoint with outputs of the released code"""
    parser.add_argument("--checkpoint", type=_readable, required=True, metavar="DIR")
    parser.add_argument(
        "--golden",
        type=_local_path,
        required=True,
        metavar="DIR",
        help="a folder written by tools/record_golden.py",
    )

    def run(args: argparse.Namespace) -> dict[str, Any]:
        from emu_jax.verify import verdict_summary, verdict_table, verify

        with downloaded(args.checkpoint) as checkpoint:
            family, rows = verify(checkpoint, args.golden)
        result = verdict_summary(family, rows)
        print(verdict_table(rows))
        if not args.json:
            left_out = ", ".join(f"{n} {k}/*" for k, n in result.not_applicable_groups.items())
            print(f"not applicable: {left_out or 'none'}")
            print(f"{family}: {result.checked} checked, {len(result.failed)} failed")
        return dataclasses.asdict(result)

    return run


def eval_(parser: argparse.ArgumentParser) -> Command:
    """run a benchmark of the paper: official files in, official result file out"""
    parser.add_argument("--checkpoint", type=_readable, required=True, metavar="DIR")
    parser.add_argument(
        "--task", required=True, metavar="TASK", help="coco_caption, vqav2, ...: docs/evaluation.md"
    )
    parser.add_argument(
        "--data",
        type=_local_path,
        required=True,
        metavar="DIR",
        help="folder in the official layout",
    )
    parser.add_argument(
        "--out",
        type=_path,
        required=True,
        metavar="FILE",
        help="the result file, .json; predictions, scores and a page are written beside it",
    )
    parser.add_argument("--split", default="", help="split of the data (default: the task's)")
    parser.add_argument(
        "--mode",
        choices=("auto", "pretrain", "instruct", "chat"),
        default="auto",
        help="kind of prompts (default: auto, by the kind of checkpoint)",
    )
    parser.add_argument(
        "--examples",
        choices=("none", "text", "random", "rices"),
        default="none",
        help="in-context examples (default: none): text only, random ones, or those with the most "
        "similar images",
    )
    parser.add_argument("--shots", type=int, metavar="K", help="examples per question (default: 2)")
    parser.add_argument(
        "--support",
        type=_local_path,
        metavar="DIR",
        help="folder with the task's training split, the source of examples (default: --data)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="evaluate only the first N items")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="items per batch (default: 16)"
    )
    _dtype_option(parser, "bfloat16")
    _quantize_option(parser)
    parser.add_argument(
        "--hosts-per-model",
        type=int,
        default=1,
        metavar="N",
        help="hosts whose devices hold a model together (default: 1, a model on each host)",
    )
    parser.add_argument(
        "--inception", type=_local_path, metavar="FILE", help="the network for FID, as TorchScript"
    )
    parser.add_argument(
        "--reference",
        type=_local_path,
        metavar="FILE",
        help="statistics (mu, sigma) of real images for FID (default: the images in --data)",
    )
    parser.add_argument(
        "--resize",
        choices=("network", "clean"),
        default="network",
        help="resizing before Inception: the network's own (default) or clean-fid's",
    )
    parser.add_argument(
        "--clip",
        type=_local_path,
        metavar="DIR",
        help="CLIP for CLIP-T and CLIP-I, a transformers folder",
    )
    parser.add_argument(
        "--dino", type=_local_path, metavar="DIR", help="DINO for its score, a transformers folder"
    )

    def run(args: argparse.Namespace) -> dict[str, Any]:
        from emu_jax.evaluate.run import Options, evaluate
        from emu_jax.evaluate.scorers.similarity import SimilarityOptions
        from emu_jax.evaluate.tasks.base import FidOptions

        names = (
            "split",
            "mode",
            "examples",
            "shots",
            "support",
            "limit",
            "seed",
            "batch_size",
            "dtype",
            "quantize",
            "hosts_per_model",
        )
        options = Options(
            **{name: getattr(args, name) for name in names},
            fid=FidOptions(args.inception, args.reference, args.resize),
            similarity=SimilarityOptions(args.clip, args.dino),
        )
        with downloaded(args.checkpoint) as checkpoint:
            result = evaluate(checkpoint, args.task, args.data, args.out, options)
        if not args.json:
            for name, value in (result.scores or {}).items():
                print(f"{name}: {value:.2f}")
            print(f"{result.items:,} answers: {args.out}")
        return dataclasses.asdict(result)

    return run


def data_build(parser: argparse.ArgumentParser) -> Command:
    """filter, resize and encode raw data into the files that training reads"""
    parser.add_argument("paths", nargs="+", metavar="SRC", help="files or folders")
    parser.add_argument("dst", metavar="DST", help="output folder, new or partly built")
    parser.add_argument("--format", required=True, help="format of SRC, see docs/data.md")
    parser.add_argument("--name", default="pairs", help="name of the output files (default: pairs)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="set a key of the cleaning and encoding (clean.min_side=64) or of the source "
        "(source.frames=4); may be repeated",
    )
    parser.add_argument(
        "--shard-documents",
        type=int,
        default=4096,
        metavar="N",
        help="documents of SRC per output file",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count(),
        metavar="N",
        help="processes (default: one per core)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        metavar="N",
        help="threads per worker; use more if reading SRC is slow",
    )
    parser.add_argument(
        "--beam",
        metavar="OPTIONS",
        help="run on Apache Beam with these options: '--runner=DataflowRunner ...'",
    )

    def run(args: argparse.Namespace) -> dict[str, Any]:
        from emu_jax.data.build.build import BuildConfig, beam_runner, build, embedded
        from emu_jax.data.sources import SourceConfig
        from emu_jax.train.config_file import override

        # Low similarity is filtered by `clean`, which counts rejections.
        source = SourceConfig(
            name=args.name, format=args.format, paths=tuple(args.paths), min_similarity=-1.0
        )
        cfg = BuildConfig(source=source, shard_documents=args.shard_documents)
        if args.beam is None:
            runner = embedded(args.workers, args.threads)
        else:
            runner = beam_runner(shlex.split(args.beam), args.threads)
        if bare := [setting for setting in args.set if "=" not in setting]:
            raise UserError(f"--set {bare[0]} has no value: write --set {bare[0]}=VALUE")
        manifest = build(args.dst, override(cfg, args.set), runner)
        if not args.json:
            print(_built(args.dst, manifest))
        counts = {key: manifest.to_json()[key] for key in ("documents", "images", "unused")}
        return counts | {"bytes": manifest.bytes, "manifest": f"{args.dst}/manifest.json"}

    return run


def data_index(parser: argparse.ArgumentParser) -> Command:
    """find the documents of a config's sources and count their tokens, in parallel"""
    parser.usage = "%(prog)s --config configs/X.py [--config.a.b=VALUE ...] [--shard I/N] [--json]"
    parser.add_argument(
        "--config", type=_local_path, required=True, metavar="FILE", help=CONFIG_HELP
    )
    parser.add_argument(
        "--shard",
        default="0/1",
        metavar="I/N",
        help="do share I, from 0, of N that other machines do at the same time; all see one cache",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count(),
        metavar="N",
        help="processes (default: one per core)",
    )
    parser.add_argument(
        "--beam",
        metavar="OPTIONS",
        help="run on Apache Beam with these options: '--runner=DataflowRunner ...'",
    )

    def run(args: argparse.Namespace) -> dict[str, Any]:
        from emu_jax.data.build.indexing import index_sources
        from emu_jax.data.build.runners import on_beam, on_processes
        from emu_jax.train.config import TrainConfig
        from emu_jax.train.config_file import load_config
        from emu_jax.train.objectives import get_objective

        if not (match := re.fullmatch(r"(\d+)/(\d+)", args.shard)):
            raise UserError(f"--shard {args.shard} is not I/N: write --shard 0/4, for example")
        cfg = load_config(TrainConfig, args.config, args.overrides)
        tokenizer = get_objective(cfg).prepare_data()
        options = None if args.beam is None else shlex.split(args.beam)
        indexed = index_sources(
            cfg.data,
            tokenizer,
            lambda work: (
                on_processes(work, args.workers, caller_works=True)
                if options is None
                else contextlib.nullcontext(on_beam(work, options))
            ),
            (int(match[1]), int(match[2])),
        )
        if not args.json:
            for name, totals in indexed.items():
                print(
                    f"source {name}: {totals.documents:,} documents, {totals.tokens:,} tokens of "
                    f"text, {totals.images:,} images"
                )
        return {"sources": {name: totals._asdict() for name, totals in indexed.items()}}

    return run


def data_simulate(parser: argparse.ArgumentParser) -> Command:
    """plan the batches of a run on simulated documents, up to billions, without any file"""
    parser.usage = "%(prog)s --config configs/X.py --lengths NAME[=WEIGHT] ... [--hosts N] [--json]"
    parser.add_argument(
        "--config", type=_local_path, required=True, metavar="FILE", help=CONFIG_HELP
    )
    parser.add_argument(
        "--lengths",
        action="append",
        required=True,
        metavar="NAME[=WEIGHT]",
        help="distribution of document lengths (laion, mmc4, storyboards, or a JSON file) and its "
        "weight in the mixture; may be repeated",
    )
    parser.add_argument("--hosts", type=int, default=1, metavar="N", help="hosts (default: 1)")
    parser.add_argument(
        "--documents",
        type=int,
        nargs="+",
        metavar="N",
        help="numbers of documents (default: 10^6 to 10^10)",
    )
    parser.add_argument(
        "--steps", type=int, default=100, metavar="N", help="steps to plan (default: 100)"
    )
    parser.add_argument("--out", type=_local_path, metavar="FILE", help="plot to write (PNG)")

    def run(args: argparse.Namespace) -> dict[str, Any]:
        from emu_jax.data import simulate
        from emu_jax.train.config import TrainConfig
        from emu_jax.train.config_file import load_config

        if min(args.steps, *(args.documents or [1])) < 1:
            raise UserError("--steps and --documents must be positive: write --steps 100")
        cfg = load_config(TrainConfig, args.config, args.overrides)
        mixture = []
        for given in args.lengths:
            name, _, weight = given.partition("=")
            if weight and not (re.fullmatch(r"\d+\.?\d*|\.\d+", weight) and float(weight)):
                raise UserError(f"--lengths {given}: write NAME=WEIGHT with a positive weight")
            mixture.append((simulate.load_distribution(name), float(weight or 1)))
        results = [
            simulate.simulate(cfg.data, mixture, documents, args.hosts, args.steps)
            for documents in args.documents or simulate.DOCUMENTS
        ]
        if not args.json:
            print(simulate.simulations_table(results))
        if args.out:
            simulate.plot(results, args.out)
        return {"hosts": args.hosts, "simulations": [result._asdict() for result in results]}

    return run


def data_inspect(parser: argparse.ArgumentParser) -> Command:
    """write a page of the data a training run would read, with packing and speed figures"""
    parser.usage = "%(prog)s --config configs/X.py [--config.a.b=VALUE ...] [--out FILE] [--json]"
    parser.add_argument(
        "--config", type=_local_path, required=True, metavar="FILE", help=CONFIG_HELP
    )
    parser.add_argument("--out", type=_local_path, default=Path("inspect.html"), metavar="FILE")
    parser.add_argument(
        "--rows", type=int, default=6, metavar="N", help="rows to show (default: 6)"
    )
    parser.add_argument(
        "--documents",
        type=int,
        default=1000,
        metavar="N",
        help="minimum number of documents to read for the measurement (default: 1000)",
    )

    def run(args: argparse.Namespace) -> dict[str, Any]:
        from emu_jax.data.inspect import inspect
        from emu_jax.page import number
        from emu_jax.train.config import TrainConfig
        from emu_jax.train.config_file import load_config
        from emu_jax.train.objectives import get_objective

        cfg = load_config(TrainConfig, args.config, args.overrides)
        objective = get_objective(cfg)
        report = inspect(
            args.out,
            cfg.data,
            objective.prepare_data(),
            objective.batch_kind,
            rows=args.rows,
            documents=args.documents,
        )
        if not args.json:
            for name, value in report.to_json().items():
                if name != "sources":
                    print(f"{name.replace('_', ' ')}: {number(value)}")
            for name, tally in report.sources.items():
                print(f"source {name}: {tally.summary()}")
        return report.to_json()

    return run


def bench(parser: argparse.ArgumentParser) -> Command:
    """run benchmarks on this machine, see --list"""
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    parser.add_argument("--list", action="store_true", help="list the benchmarks and exit")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME.KEY=VALUE",
        dest="settings",
        help="set an argument of a benchmark's run() in benchmarks/; may be repeated",
    )
    parser.add_argument(
        "--out",
        type=_local_path,
        default=Path("runs/bench"),
        metavar="DIR",
        help="folder for plots (default: runs/bench)",
    )
    parser.add_argument(
        "--write",
        type=_local_path,
        metavar="FILE",
        help="update the tables in this Markdown file, such as docs/performance.md",
    )
    parser.add_argument(
        "--label",
        default="",
        metavar="TEXT",
        help="with --write: keep the table beside the one without a label",
    )

    def run(args: argparse.Namespace) -> dict[str, Any]:
        from emu_jax import bench

        if args.list:
            result = {name: bench.about(path) for name, path in bench.benchmarks().items()}
        else:
            result = bench.run(
                args.names, args.settings, out=args.out, write=args.write, label=args.label
            )
        if not args.json:
            print(bench.figures_table(result))
        return result

    return run


def _built(dst: str, manifest: Manifest) -> str:
    documents, images = manifest.documents, manifest.images
    lines = [
        f"{dst}: {documents.written:,} of {documents.read:,} documents, "
        f"{images.written:,} of {images.read:,} images, {manifest.bytes / 1e6:,.1f} MB"
    ]
    for what, reasons in (
        ("documents rejected", documents.rejected),
        ("images dropped", images.dropped),
        ("unused", manifest.unused),
    ):
        lines += [f"  {count:,} {what}: {reason}" for reason, count in reasons.items()]
    return "\n".join(lines)


def serve(parser: argparse.ArgumentParser) -> Command:
    """serve a local web page for chat and drawing"""
    parser.add_argument("--checkpoint", type=_readable, default=Path("runs/demo"), metavar="DIR")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen on (default: 127.0.0.1, only this machine)",
    )
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name that clients use for this server, beside loopback names and, with another "
        "--host, IP addresses (repeatable; default with another --host: this machine's names)",
    )
    parser.add_argument("--port", type=int, default=7860, metavar="N")
    _dtype_option(parser, "float32")
    _quantize_option(parser)
    parser.add_argument(
        "--waiting",
        type=int,
        default=64,
        metavar="N",
        help="maximum number of running and waiting requests (default: 64)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=120.0,
        metavar="S",
        help="maximum time to answer a request, in seconds (default: 120)",
    )
    parser.add_argument(
        "--slots",
        type=int,
        default=8,
        metavar="N",
        help="requests that are decoded at once, in one batch (default: 8)",
    )
    parser.add_argument(
        "--image-slots",
        type=int,
        default=None,
        metavar="N",
        help="images that are denoised at once, in one batch (default: 1 on a CPU, 4 elsewhere)",
    )
    parser.add_argument(
        "--api-keys",
        type=_local_path,
        default=None,
        metavar="FILE",
        help="a file of API keys, one a line, of which requests must have one (default: those of "
        "the environment variable EMU_JAX_API_KEYS, separated by commas; with none, everyone may "
        "send requests)",
    )
    parser.add_argument(
        "--per-minute",
        type=int,
        default=0,
        metavar="N",
        help="requests of an API key, or of an address, in a minute (default: no limit)",
    )
    parser.add_argument(
        "--drain",
        type=float,
        default=3.0,
        metavar="S",
        help="time for running answers after SIGTERM, in seconds (default: 3)",
    )
    parser.add_argument(
        "--no-warm-up",
        action="store_true",
        help="answer at once, and compile programs while the first requests wait",
    )

    def run(args: argparse.Namespace) -> dict[str, Any]:
        try:
            from emu_jax.serve.app import Limits, serve
        except ModuleNotFoundError as error:
            raise UserError(f"{error.name} is missing: pip install 'emu_jax[serve]'") from None
        if not 0 <= args.port < 2**16:
            raise UserError("--port must be positive and below 65536")
        if args.slots < 1 or (args.image_slots is not None and args.image_slots < 1):
            raise UserError("--slots and --image-slots must be at least 1")
        limits = Limits(
            waiting=args.waiting,
            seconds=args.seconds,
            per_minute=args.per_minute,
            drain_seconds=args.drain,
        )
        keys = _api_keys(args.api_keys)
        with downloaded(args.checkpoint) as checkpoint:
            serve(
                checkpoint,
                args.host,
                args.port,
                limits,
                args.allow_host,
                slots=args.slots,
                image_slots=args.image_slots,
                keys=keys,
                dtype=args.dtype,
                quantize=args.quantize,
                warm_up=not args.no_warm_up,
            )
        return {}

    return run


def _api_keys(file: Path | None) -> list[str]:
    """Returns the API keys of a file, or else those of the environment.

    Raises:
        UserError: the file or the variable has no keys.
    """
    if file is None:
        given = os.environ.get("EMU_JAX_API_KEYS")
        if given is None:
            return []
        keys = [key for each in given.split(",") if (key := each.strip())]
        if not keys:  # otherwise a secret that is missing would open the server
            raise UserError("EMU_JAX_API_KEYS has no API keys: list them, or unset it")
        return keys
    keys = [key for line in file.read_text().splitlines() if (key := line.strip())]
    if not keys:
        raise UserError(f"no API keys ({file}): write one a line")
    return keys


def plan(parser: argparse.ArgumentParser) -> Command:
    """compile a step for a TPU topology without the TPUs: memory, time, MFU"""
    parser.usage = (
        "%(prog)s --config configs/X.py --topology v5p:4x4x8 [--slices N] [--for PROGRAM] "
        "[--flags SCRIPT] [--sweep] [--config.a.b=VALUE ...] [--json]"
    )
    parser.add_argument("--config", type=_local_path, metavar="FILE", help=CONFIG_HELP)
    parser.add_argument(
        "--topology",
        default="",
        metavar="CHIP:AxB[xC]",
        help="a slice of TPU chips; with --sweep, a comma-separated list",
    )
    parser.add_argument("--slices", type=int, default=1, metavar="N")
    parser.add_argument(
        "--for",
        dest="program",
        default="train",
        metavar="PROGRAM",
        help="train (the config's step; the default), decoder (decoder tuning) or generate (one "
        "token for every row)",
    )
    parser.add_argument(
        "--flags",
        type=_path,
        metavar="SCRIPT",
        help="compile with the flags that SCRIPT prints for the chip and the number of slices: "
        "launch/flags.sh (default: those of LIBTPU_INIT_ARGS)",
    )
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="search meshes, remat policies and batch sizes; plot the scaling of the best",
    )
    parser.add_argument(
        "--scaling",
        default="weak",
        metavar="CURVES",
        help="with --sweep: weak (fixed rows per chip; the default), strong (fixed rows), "
        "weak,strong, or none",
    )
    parser.add_argument(
        "--policies",
        default="dots,minimal,full",
        metavar="NAMES",
        help="with --sweep: the language model's remat policies to try (default: %(default)s)",
    )
    parser.add_argument(
        "--meshes",
        default="widest,half",
        metavar="NAMES",
        help="with --sweep: the widest FSDP axis, half of it, or both (the default)",
    )
    parser.add_argument(
        "--rows",
        default="16,12,8,6,4,3,2,1",
        metavar="NUMBERS",
        help="with --sweep: rows per chip to try (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=_local_path,
        default=Path("runs/plan"),
        metavar="DIR",
        help="folder for the files of a sweep",
    )
    parser.add_argument(
        "--page",
        type=_local_path,
        metavar="FILE",
        help="with --sweep: a Markdown file with a marked place for the table; the plot is written "
        "beside it",
    )
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="predict published runs instead and show the errors",
    )

    def run(args: argparse.Namespace) -> dict[str, Any]:
        os.environ["JAX_PLATFORMS"] = "cpu"  # compile only: nothing runs on a TPU
        from emu_jax.hardware import Topology
        from emu_jax.plan import plan as planning
        from emu_jax.train.config import TrainConfig
        from emu_jax.train.config_file import load_config

        if args.calibrate:
            from emu_jax.plan.calibration import calibrate, calibration_table

            rows = calibrate(args.flags)
            print(calibration_table(rows))
            return {"runs": [row.to_json() for row in rows]}
        if args.config is None or not args.topology:
            raise UserError("give --config and --topology, or --calibrate; see emu-jax plan --help")
        topologies = [Topology.parse(t, args.slices) for t in args.topology.split(",")]
        configs = [
            # Settings tuned for a chip are tuned for training.
            load_config(
                TrainConfig,
                args.config,
                args.overrides,
                chip="" if args.program == "generate" else topology.chip_name,
            )
            for topology in topologies
        ]
        if args.sweep:
            if args.program != "train":
                raise UserError("--sweep plans the config's own step: leave out --for")
            from emu_jax.plan.sweep import CURVES, MESHES, POLICIES, check_page, put_on_page, sweep

            for option, known in (
                ("scaling", [*CURVES, "none"]),
                ("policies", POLICIES),
                ("meshes", MESHES),
            ):
                for name in getattr(args, option).split(","):
                    if name not in known:
                        raise UserError(f"--{option} {name!r} is not known{suggest(name, known)}")
            if not re.fullmatch(r"[1-9]\d{0,3}(,[1-9]\d{0,3})*", args.rows):
                raise UserError(f"--rows {args.rows}: write numbers such as 8,4")
            if args.page:
                check_page(args.page, configs[0].name)  # fails before hours of compiling
            pairs = list(zip(configs, topologies, strict=True))
            result = sweep(
                pairs,
                args.out,
                scaling=[] if args.scaling == "none" else args.scaling.split(","),
                policies=args.policies.split(","),
                meshes=args.meshes.split(","),
                rows=[int(number) for number in args.rows.split(",")],
                flags=args.flags,
            )
            if args.page:
                put_on_page(args.out, args.page, configs[0].name)
            if not args.json:
                print((args.out / "sweep.md").read_text())
                for name, report in result.best.items():
                    print(f"best on {name}:\n{planning.summary(report)}")
            return result.to_json()
        if len(topologies) > 1:
            raise UserError("several topologies need --sweep: give one")
        if args.page:
            raise UserError("--page takes the table of a --sweep: add it, or leave it out")
        flags = planning.compiler_flags(args.flags, topologies[0])
        report = planning.plan_in_subprocess(configs[0], topologies[0], args.program, flags=flags)
        if not args.json:
            print(planning.summary(report))
        return report.to_json()

    return run


def _converted(dst: Path, report: ConversionReport) -> str:
    peak = report.peak_rss_anon_bytes
    memory = "" if peak is None else f", peak RssAnon {peak / 2**30:.2f} GiB"
    return (
        f"{dst}: {report.parameters:,} parameters, {report.bytes / 2**30:.2f} GiB, largest "
        f"{report.largest_parameter_bytes / 2**30:.2f} GiB{memory}, {report.seconds:.0f} s"
    )


def checkpoint_verify(parser: argparse.ArgumentParser) -> Command:
    """read every byte of a checkpoint and report damage"""
    parser.add_argument("run_directory", type=_path, metavar="RUN")
    parser.add_argument(
        "--step",
        type=int,
        metavar="N",
        help="step to verify (default: the newest)",
    )
    parser.add_argument("--all", action="store_true", help="verify every step")

    def run(args: argparse.Namespace) -> dict[str, Any]:
        from emu_jax.checkpoint import verify_steps

        if args.all and args.step is not None:
            raise UserError("give --step or --all, not both")
        report = verify_steps(args.run_directory, args.step, every=args.all)
        if not args.json:
            for step in report.steps:
                state = (
                    "damaged"
                    if step.problems
                    else "sound"
                    if step.verified
                    else ("readable; it has no checksums, so damage within numbers cannot be seen")
                )
                print(f"{step.path}: {step.bytes:,} bytes of arrays, {state}")
                for problem in step.problems:
                    print(f"  {problem}")
        return report.to_json()

    return run


VERBS: dict[str, Callable[[argparse.ArgumentParser], Command]] = {
    "demo": demo,
    "train": train,
    "precompute": precompute,
    "generate": generate,
    "serve": serve,
    "convert": convert,
    "init": init,
    "push": push,
    "verify": verify,
    "eval": eval_,
    "plan": plan,
    "bench": bench,
    "checkpoint verify": checkpoint_verify,
    "data build": data_build,
    "data index": data_index,
    "data simulate": data_simulate,
    "data inspect": data_inspect,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    args = argparse.Namespace()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Do not fail on text or file names that the terminal's encoding lacks.
        sys.stdout.reconfigure(errors="backslashreplace")
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("emu_jax").setLevel(logging.INFO)
    try:
        args = _parse(arguments)
        result = args.run(args)
        if args.json:
            print(json.dumps(result))
        sys.stdout.flush()
        return 0 if result.get("passed", True) else args.failure
    except UserError as error:
        if debug:
            raise
        return _complain(str(error))
    except BrokenPipeError:
        # The reader of stdout is gone. The interpreter flushes stdout once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        # Disk full, no permission, not a directory: one line is enough.
        if debug or (error.filename is None and error.errno != errno.ENOSPC):
            raise
        where = f"{error.filename}: " if error.filename is not None else ""
        return _complain(f"{where}{error.strerror}")
    except KeyboardInterrupt:
        if argv is None:  # a second Ctrl-C must not print after the last line
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        print(f"emu-jax: interrupted{_resumes(args)}", file=sys.stderr)
        return 130


def _resumes(args: argparse.Namespace) -> str:
    """Returns a hint on what rerunning the interrupted command does, or ""."""
    if args.__dict__.get("verb") == "train":
        from emu_jax.checkpoint import complete_steps

        if not (steps := complete_steps(args.workdir)):
            return f"; no step is saved in {args.workdir}: the same command starts from step 0"
        return (
            f"; step {max(steps)} is saved in {args.workdir}: run the same command again to "
            "resume from it"
        )
    if {"workdir", "task"} & vars(args).keys():
        return "; run the same command again to resume from what is saved"
    return ""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        sys.stdout.flush()  # here, where a closed pipe raises
        super().exit(status, message)


def _parse(arguments: list[str]) -> argparse.Namespace:
    """Parses arguments and adds `run` (the verb) and `overrides` (`a.b=value`)."""
    if arguments and arguments[0] in {name.split()[0] for name in VERBS if " " in name}:
        arguments = [" ".join(arguments[:2]), *arguments[2:]]  # a verb of two words
    parser = _Parser(prog="emu-jax", description="Emu, a generative multimodal model, in JAX.")
    parser.add_argument("--version", action="version", version=emu_jax.__version__)
    verbs = parser.add_subparsers(metavar="VERB", dest="verb", required=True)
    for name, declare in VERBS.items():
        about = (declare.__doc__ or "").strip()
        verb = verbs.add_parser(
            name, help=about, description=about[0].upper() + about[1:] + ".", allow_abbrev=False
        )
        verb.set_defaults(run=declare(verb), failure=1)  # exit status of a check that fails
        verb.add_argument(
            "--json", action="store_true", help="print one JSON object as the last line of stdout"
        )
        verb.add_argument("--debug", action="store_true", help="show the traceback of an error")
    # argparse's own messages for a missing or misspelled verb are long.
    if not arguments:
        parser.error(f"no verb given; known: {', '.join(VERBS)}")
    if arguments[0] not in VERBS and not arguments[0].startswith("-"):
        parser.error(f"unknown verb {arguments[0]!r}{suggest(arguments[0], VERBS)}")

    overrides = [a for a in arguments if a.startswith("--config.")]
    args, unknown = parser.parse_known_args(arguments)
    if overrides and "config" not in args:
        raise UserError(f"{overrides[0]}: `emu-jax {arguments[0]}` takes no config")
    unknown = [a for a in unknown if a not in overrides]
    if unknown:
        parser.error(f"unknown argument {unknown[0]!r}")
    args.overrides = [a.removeprefix("--config.") for a in overrides]
    return args


def _complain(message: str) -> int:
    print(f"emu-jax: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
