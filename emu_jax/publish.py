"""`emu-jax push`: uploads a run's weights to the Hugging Face Hub, with a generated model card.

Only the newest weights, the model's configuration, its tokenizer and the card leave this machine.
The optimizer's state, the run's configuration with its paths, and the records of training stay.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from emu_jax import checkpoint, hub
from emu_jax.config import EmuConfig, load_json, to_dict
from emu_jax.convert.convert import (
    Target,
    check_layout,
    check_one_process,
    replacing,
    write_model,
)
from emu_jax.convert.layouts import LayoutKind
from emu_jax.convert.source import RunSource
from emu_jax.errors import UserError
from emu_jax.hub import HubAddress, HubSource
from emu_jax.markdown import table
from emu_jax.sharding import make_mesh
from emu_jax.storage import fetched, join, shipped
from emu_jax.train.config import TrainConfig
from emu_jax.train.config_file import load_config
from emu_jax.train.telemetry.metrics import read_evaluations

# Files of a run directory that `load` reads beside the model.
_SETTINGS_FILES = ("generation.json",)
_ROW_KEYS = ("stage", "evaluation", "step", "time", "seconds")  # of evaluations.jsonl: no figures
# Figures of the demo's metrics.json for the card. Its other keys are about the machine and paths.
_DEMO_FIGURES = (
    "caption_accuracy",
    "drawn_accuracy",
    "continuation_accuracy",
    "autoencoded_accuracy",
)
_NOT_IN_COMMANDS = ("model.", "parents.", "data.root")  # sizes, which have a table, and locations
_STAGE_COLUMNS = ["stage", "objective", "steps", "batch size", "data"]
_ROLES = {
    "model": "converted from",
    "llama": "language model",
    "eva_clip": "visual encoder",
    "sd": "image decoder",
}
_LAYOUTS = {
    "jax": "a run directory of emu_jax",
    "emu": "the files of the Emu release",
    "hf": "folders for transformers, diffusers and peft",
}
_PAPERS = {
    "emu": "[Emu](https://arxiv.org/abs/2307.05222)",
    "emu2": "[Emu2](https://arxiv.org/abs/2312.13286)",
}
_CONNECTORS = {"emu": "the Causal Transformer", "emu2": "its projections"}


@dataclasses.dataclass(kw_only=True)
class PushReport:
    """The result of a push. All fields have JSON types.

    Attributes:
        address: the repository, with the new commit as its revision.
        commit: the commit's hash; "" if nothing was uploaded.
        license: the license in the model card; "" if it names none.
        notes: settings that the layout stores differently or not at all.
    """

    address: str
    commit: str
    license: str
    files: int
    bytes: int
    notes: list[str]


def push(
    run: Path,
    address: str,
    *,
    to: Target = "jax",
    layout: LayoutKind | None = None,
    license: str = "",
    private: bool = False,
    overwrite: bool = False,
    out: Path | None = None,
) -> PushReport:
    """Uploads the newest weights of a run directory to the Hub.

    Averaged parameters are preferred where the run has them, and towers that the run takes from a
    base are included, as in `emu_jax.load`.

    Args:
        address: hf://ORG/NAME[/FOLDER].
        to: the layout of the weights, as for `convert`.
        layout: the layout of Emu2's files with `to="emu"`, as for `convert`.
        license: the model's license; by default that of its parents, if they agree.
        private: create a private repository.
        overwrite: replace the files of the repository.
        out: write the files here, and upload nothing.

    Raises:
        UserError: the run directory or the address is wrong, the parameters are quantized, the
            repository has files and may not be overwritten, the login may not write to it, or the
            Hub cannot be reached.
    """
    check_one_process()
    target = HubAddress.parse(address)
    if target.revision:
        raise UserError(f"{address} names a revision: push to the repository, which gets a commit")
    check_layout(to, layout)
    checkpoint.refuse_quantized(run, checkpoint.run_shapes(run))
    if out is None:  # before weights are written
        hub.prepare_upload(target, private=private, overwrite=overwrite)
    parents = list(dict.fromkeys(_parents(run)))
    license = license or _common_license(parents)
    with tempfile.TemporaryDirectory(prefix="emu-jax-push-") as staging:
        folder = Path(staging) / "model"
        folder.mkdir()
        source = RunSource.open(run, make_mesh(), Path(staging))
        notes = write_model(source, folder, folder, to, layout)
        if to == "jax":
            for name in _SETTINGS_FILES:
                if (run / name).is_file():
                    shutil.copy(fetched(run / name), folder / name)
            hub.record_sources(folder, hub.recorded_sources(run))
        card = model_card(run, target, source.cfg, to=to, license=license, parents=parents)
        (folder / "README.md").write_text(card)
        files = [path for path in folder.rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        commit = ""
        if out is not None:
            with replacing(out, overwrite, [run]) as destination:
                shutil.copytree(folder, destination, dirs_exist_ok=True)
        else:
            message = f"Upload {target.repository.split('/')[1]} with emu_jax"
            commit = hub.upload_folder(folder, target, message, overwrite=overwrite)
    return PushReport(
        address=str(dataclasses.replace(target, revision=commit)),
        commit=commit,
        license=license,
        files=len(files),
        bytes=size,
        notes=notes,
    )


def _parents(run: Path) -> Iterator[tuple[str, HubSource]]:
    """Yields (role, provenance) of a run and of the local runs that it was trained from."""
    for path in _lineage(run):
        yield from hub.recorded_sources(path).items()


def _lineage(run: Path, seen: set[Path] | None = None) -> Iterator[Path]:
    """Yields the local runs that a run was trained from, each once in training order, and it."""
    seen = set() if seen is None else seen
    seen.add(run.absolute())
    if cfg := _stage(run):
        for location in [*filter(None, [cfg.init_from]), *cfg.parents.values()]:
            candidates = (join(run, location), Path(location))
            parent = next((path for path in candidates if path.is_dir()), None)
            if parent is not None and parent.absolute() not in seen:
                yield from _lineage(parent, seen)
    yield run


def _stage(run: Path) -> TrainConfig | None:
    """Returns the configuration that a run was trained with, or None if it was converted."""
    path = run / "train.json"
    return load_json(TrainConfig, path) if path.is_file() else None


def _common_license(parents: Sequence[tuple[str, HubSource]]) -> str:
    licenses = {source.license for _, source in parents}
    return licenses.pop() if len(licenses) == 1 else ""


def model_card(
    run: Path,
    target: HubAddress,
    cfg: EmuConfig,
    *,
    to: Target,
    license: str,
    parents: Sequence[tuple[str, HubSource]],
) -> str:
    """Returns the model card: what the model is, how to use it, its data, figures and parents.

    It names no path of this machine.
    """
    bases = [HubAddress.parse(source.address).repository for _, source in parents]
    front: dict[str, Any] = {"library_name": "emu_jax", "tags": ["emu", "jax", "multimodal"]}
    front |= {"pipeline_tag": "any-to-any"} if cfg.unet else {"pipeline_tag": "image-text-to-text"}
    front |= {"license": license} if license else {}
    front |= {"base_model": sorted(set(bases))} if bases else {}
    stages = [
        (stage, max(checkpoint.complete_steps(path), default=0))
        for path in _lineage(run)
        if (stage := _stage(path))
    ]
    digits = bool(stages and stages[-1][0].data.embedded)
    drawn = "the digit seven" if digits else "a red circle"
    sections = [
        f"---\n{_yaml(front)}---",
        f"# {target.repository.split('/')[1]}",
        f"A multimodal autoregressive model of the {_PAPERS[cfg.family]} family, stored as "
        f"{_LAYOUTS[to]}. This card was generated by `emu-jax push`.",
        "## Use\n\n" + _usage(target, cfg, to, drawn),
        "## Model\n\n" + _sizes(cfg),
    ]
    if stages:
        sections.append("## Training\n\n" + _training(stages))
    if figures := _figures(run):
        sections.append("## Figures\n\n" + figures)
    sections.append("## Parents and license\n\n" + _provenance(parents, license))
    return "\n\n".join(sections) + "\n"


def _yaml(values: Mapping[str, Any]) -> str:
    """Formats strings and lists of strings. JSON strings are YAML strings."""
    lines = []
    for key, value in values.items():
        if isinstance(value, list):
            lines += [f"{key}:", *(f"- {json.dumps(item)}" for item in value)]
        else:
            lines.append(f"{key}: {json.dumps(value)}")
    return "\n".join(lines) + "\n"


def _usage(target: HubAddress, cfg: EmuConfig, to: Target, drawn: str) -> str:
    """Formats code that loads the model and asks it.

    Args:
        drawn: a prompt for an image.
    """
    if to == "hf":
        return (
            "`llama/` opens with transformers, `unet/`, `vae/` and `scheduler/` with diffusers, "
            "`lora/` with peft, where they exist. The visual encoder and "
            f"{_CONNECTORS[cfg.family]} have no counterpart in these libraries."
        )
    paints = f'\nemu.generate_image(["{drawn}"])  # a PIL image' if cfg.unet else ""
    return (
        "```python\nimport emu_jax\nfrom PIL import Image\n\n"
        f'emu = emu_jax.load("{target}")\n'
        f'emu.generate_text([Image.open("image.png"), "a picture of"]){paints}\n```\n\n'
        "```sh\n"
        f"emu-jax generate --checkpoint {target} --output text @image.png 'a picture of'\n"
        f"emu-jax convert {target} runs/model\n```"
    )


def _sizes(cfg: EmuConfig) -> str:
    """Formats the sizes of the towers."""
    return table(
        ["setting", "value"],
        [
            ["image size", str(cfg.vision.image_size)],
            ["embeddings per image", str(cfg.n_embeddings)],
            ["visual encoder", f"{cfg.vision.layers} layers of width {cfg.vision.width}"],
            ["language model", f"{cfg.llama.layers} layers of width {cfg.llama.width}"],
            ["tokens", f"{cfg.llama.vocab_size:,}"],
            ["LoRA", f"rank {cfg.llama.lora.rank}" if cfg.llama.lora else "no"],
            ["image decoder", "yes" if cfg.unet else "no"],
        ],
    )


def _training(stages: Sequence[tuple[TrainConfig, int]]) -> str:
    """Formats the stages of a training, and the hyperparameters of the last one. Locations of the
    data are left out.

    Args:
        stages: the configuration and the newest step of each, in training order.
    """
    rows = [
        [f"`{cfg.name}`", cfg.objective, f"{step:,}", f"{cfg.data.batch_size:,}", _data_names(cfg)]
        for cfg, step in stages
    ]
    cfg, step = stages[-1]
    parts = [
        f"Stages, in the order of training:\n\n{table(_STAGE_COLUMNS, rows)}",
        _commands([cfg for cfg, _ in stages]),
        f"Settings of `{cfg.name}`:\n\n{_settings(cfg, step)}",
    ]
    return "\n\n".join(parts)


def _data_names(cfg: TrainConfig) -> str:
    if cfg.data.sources:
        return ", ".join(source.name for source in cfg.data.sources)
    return cfg.data.embedded or "ArrayRecord files"


def _commands(stages: Sequence[TrainConfig]) -> str:
    """Formats the commands that train the stages.

    Numbers that differ from those of the config become overrides. Texts that differ, such as paths,
    may be private: only their keys are named.
    """
    lines, different = [], set()
    ours = {path.stem for path in shipped("configs").iterdir()}
    for cfg in stages:
        if cfg.name not in ours:
            lines.append(f"# The config of {cfg.name} does not come with emu_jax.")
            continue
        file = Path("configs") / f"{cfg.name}.py"
        original = dict(_leaves(to_dict(load_config(TrainConfig, file, []))))
        words = [f"emu-jax train --config {file} --workdir runs/{cfg.name}"]
        for key, value in _leaves(to_dict(cfg)):
            if key.startswith(_NOT_IN_COMMANDS) or original.get(key, value) == value:
                continue
            if isinstance(value, int | float):
                words.append(f"--config.{key}={value}")
            else:
                different.add(key)
        lines.append(" \\\n  ".join(words))
    commands = "\n".join(["```sh", *lines, "```"])
    if not different:
        return commands
    keys = ", ".join(f"`{key}`" for key in sorted(different))
    return f"{commands}\n\nThese keys also differ from the configs: {keys}."


def _leaves(values: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted key, value) of nested dicts and lists."""
    if not isinstance(values, dict | list | tuple):
        yield key, values
        return
    items = values.items() if isinstance(values, dict) else enumerate(values)
    for name, value in items:
        yield from _leaves(value, f"{key}.{name}" if key else str(name))


def _settings(cfg: TrainConfig, step: int) -> str:
    """Formats the data and the hyperparameters of a stage. Locations of the data are left out."""
    groups = [
        [f"learning rate of `{group.pattern}`", f"{group.lr:g}, {group.decay}"]
        for group in cfg.optimizer.groups
    ]
    settings = table(
        ["setting", "value"],
        [
            ["objective", cfg.objective],
            ["step", f"{step:,} of {cfg.steps:,}"],
            ["batch size", f"{cfg.data.batch_size:,}"],
            ["tokens of a row", f"{cfg.data.row_tokens:,}"],
            *groups,
            ["weight decay", f"{cfg.optimizer.weight_decay:g}"],
            ["compute dtype", cfg.dtype],
            ["seed", str(cfg.seed)],
        ],
    )
    if cfg.data.sources:
        data = table(
            ["source", "format", "weight"],
            [[s.name, s.format, f"{s.weight:g}"] for s in cfg.data.sources],
        )
    elif cfg.data.embedded:
        data = f"Data: the {cfg.data.embedded} that come with emu_jax."
    else:
        data = "Data: ArrayRecord files; the run does not describe them further."
    return f"{settings}\n\n{data}"


def _figures(run: Path) -> str:
    """Formats the newest held-out values of each evaluation, and the demo's scores."""
    parts = []
    for name, rows in read_evaluations(run).items():
        newest = rows[-1]
        figures = [[key, _number(value)] for key, value in _scalars(newest)]
        if figures:
            heading = f"Held-out evaluation `{name}` at step {newest['step']:,}:"
            parts.append(f"{heading}\n\n{table(['metric', 'value'], figures)}")
    if (run / "metrics.json").is_file():
        scores = json.loads((run / "metrics.json").read_text())
        rows = [[key, _number(scores[key])] for key in _DEMO_FIGURES if key in scores]
        if rows:
            parts.append(f"Scores of the demo:\n\n{table(['metric', 'value'], rows)}")
    return "\n\n".join(parts)


def _scalars(row: Mapping[str, Any]) -> Sequence[tuple[str, float]]:
    return [
        (key, value)
        for key, value in row.items()
        if key not in _ROW_KEYS and isinstance(value, int | float) and math.isfinite(value)
    ]


def _number(value: float) -> str:
    return f"{value:.4g}"


def _provenance(parents: Sequence[tuple[str, HubSource]], license: str) -> str:
    lines = []
    if parents:
        rows = [
            [_ROLES.get(role, role), f"`{source.address}`", source.license or "not stated"]
            for role, source in parents
        ]
        lines.append(table(["parent", "repository and commit", "license"], rows))
    if license:
        lines.append(f"License of this model: {license}.")
    else:
        lines.append(
            "The license of this model is not stated. The licenses of its parents, and of the data "
            "that it was trained on, apply to it."
        )
    return "\n\n".join(lines)
