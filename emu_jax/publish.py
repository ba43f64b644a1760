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
from emu_jax.config import EmuConfig, load_json
from emu_jax.convert.convert import Target, check_one_process, replacing, write_model
from emu_jax.convert.source import RunSource
from emu_jax.errors import UserError
from emu_jax.hub import HubAddress, HubSource
from emu_jax.markdown import table
from emu_jax.sharding import make_mesh
from emu_jax.storage import fetched, join
from emu_jax.train.config import TrainConfig
from emu_jax.train.telemetry.metrics import read_evaluations

# Files of a run directory that `load` reads beside the model.
_SETTINGS_FILES = ("generation.json",)
_ROW_KEYS = ("stage", "evaluation", "step", "time", "seconds")  # of evaluations.jsonl: no figures
# Figures of the demo's metrics.json for the card. Its other keys are about the machine and paths.
_DEMO_FIGURES = ("caption_accuracy", "drawn_accuracy", "continuation_accuracy")
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
    checkpoint.refuse_quantized(run, checkpoint.run_shapes(run))
    if out is None:  # before weights are written
        hub.prepare_upload(target, private=private, overwrite=overwrite)
    parents = list(dict.fromkeys(_parents(run)))
    license = license or _common_license(parents)
    with tempfile.TemporaryDirectory(prefix="emu-jax-push-") as staging:
        folder = Path(staging) / "model"
        folder.mkdir()
        source = RunSource.open(run, make_mesh(), Path(staging))
        notes = write_model(source, folder, folder, to)
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


def _parents(run: Path, seen: tuple[Path, ...] = ()) -> Iterator[tuple[str, HubSource]]:
    """Yields (role, provenance) of a run and of the local runs that it was trained from."""
    yield from hub.recorded_sources(run).items()
    if not (run / "train.json").is_file():
        return
    cfg = load_json(TrainConfig, run / "train.json")
    for location in dict.fromkeys([*filter(None, [cfg.init_from]), *cfg.parents.values()]):
        for parent in (join(run, location), Path(location)):
            if parent not in seen and parent.is_dir():
                yield from _parents(parent, (*seen, run, parent))
                break


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
    train = load_json(TrainConfig, run / "train.json") if (run / "train.json").is_file() else None
    bases = [HubAddress.parse(source.address).repository for _, source in parents]
    front: dict[str, Any] = {"library_name": "emu_jax", "tags": ["emu", "jax", "multimodal"]}
    front |= {"pipeline_tag": "any-to-any"} if cfg.unet else {"pipeline_tag": "image-text-to-text"}
    front |= {"license": license} if license else {}
    front |= {"base_model": sorted(set(bases))} if bases else {}
    sections = [
        f"---\n{_yaml(front)}---",
        f"# {target.repository.split('/')[1]}",
        "A multimodal autoregressive model of the [Emu](https://arxiv.org/abs/2307.05222) family, "
        f"stored as {_LAYOUTS[to]}. This card was generated by `emu-jax push`.",
        "## Use\n\n" + _usage(target, cfg, to),
        "## Model\n\n" + _sizes(cfg),
    ]
    if train is not None:
        sections.append("## Training\n\n" + _training(train, checkpoint.latest_step(run)))
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


def _usage(target: HubAddress, cfg: EmuConfig, to: Target) -> str:
    if to == "hf":
        return (
            "`llama/` opens with transformers, `unet/`, `vae/` and `scheduler/` with diffusers, "
            "`lora/` with peft, where they exist. The visual encoder and the Causal Transformer "
            "have no counterpart in these libraries."
        )
    paints = '\nemu.generate_image(["a red circle"])  # a PIL image' if cfg.unet else ""
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


def _training(cfg: TrainConfig, step: int) -> str:
    """Formats the data and the hyperparameters of a run. Locations of the data are left out."""
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
