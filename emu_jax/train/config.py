"""The configuration of a training run: one frozen dataclass, filled by a file in configs/."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from emu_jax.config import (
    EmuConfig,
    MatmulDtypeConfig,
    RematConfig,
    digits,
    load_json,
    to_dict,
)
from emu_jax.data.digits import HELD_OUT
from emu_jax.data.pipeline import DataConfig
from emu_jax.data.sources import SourceConfig
from emu_jax.errors import UserError, suggest
from emu_jax.models.attention import BACKENDS
from emu_jax.models.low_precision import MATMUL_DTYPES
from emu_jax.models.quantized import check_quantization
from emu_jax.models.remat import REMAT
from emu_jax.sharding import flatten
from emu_jax.train.telemetry.tracing import parse_steps

DECAYS = ("cosine", "linear", "constant", "steps")
BEST = ("min", "max")
EVAL_NAME = re.compile(r"[A-Za-z0-9_-]+")  # part of file and metric names
SPIKE_THRESHOLD = 10.0  # of the configs that record loss spikes
TRACKERS = ("wandb",)  # services beside the files of the run directory
DTYPES = ("bfloat16", "float32")  # of the computation
EIGHT_BITS = "int8"
MOMENTS_DTYPES = (*DTYPES, EIGHT_BITS)  # of the optimizer's moments
_AT_LEAST_ONE = (
    "steps",
    "accumulate",
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
    "max_bad_steps",
)
_AT_LEAST_ZERO = (
    "text_weight",
    "regression_weight",
    "kl_weight",
    "noise_offset",
    "loss_block",
    "hang_seconds",
    "spike_threshold",
)
# Config keys that may change when a run resumes.
MAY_CHANGE = (
    "steps",
    "log_every",
    "tower_metrics",
    "spike_threshold",
    "checkpoint_every",
    "keep_checkpoints",
    "keep_best",
    "eval",
    "max_bad_steps",
    "mesh",
    "remat",
    "log_documents",
    "profile_steps",
    "hang_seconds",
    "tracker",
    "wandb",
    "attention",
    "loss_block",
    "tuned",
    "parents",
    "init_from",
    "data.root",
    "data.tokenizer",
    "data.decode_threads",
    "data.prefetch",
    "data.cache",
    "data.cache_bytes",
    "data.max_damaged_rate",
    "model.vae.scaling_factor",
)


def _check_range(
    config: object,
    name: str,
    least: float,
    *,
    below: float = math.inf,
    exclusive: bool = False,
    where: str = "",
) -> None:
    """Checks that a number is finite, at least `least` (or above it) and less than `below`.

    Raises:
        UserError: the number is out of range.
    """
    value = getattr(config, name)
    if (value > least if exclusive else value >= least) and value < below:
        return
    rule = f"above {least}" if exclusive else f"at least {least}"
    rule += f" and below {below}" if below < math.inf else ""
    raise UserError(f"{name} is {value}{where}: make it {rule}")


@dataclasses.dataclass(frozen=True)
class ObjectiveTraits:
    """The settings that an objective supports. `train.objectives` has its module and its loss."""

    matmul_towers: tuple[str, ...] = ()  # whose matmuls `matmul_dtype` may compute in 8 bits
    compares_rows: bool = False  # the loss compares all rows of a batch, which must then be whole
    trains_unet: bool = False  # such a run may read `latents`


OBJECTIVE_TRAITS = {
    "emu": ObjectiveTraits(matmul_towers=("visual", "llama")),
    "text": ObjectiveTraits(matmul_towers=("llama",)),
    "clip": ObjectiveTraits(compares_rows=True),
    "vae": ObjectiveTraits(),
    "decoder": ObjectiveTraits(trains_unet=True),
    "painter": ObjectiveTraits(trains_unet=True),
}


@dataclasses.dataclass(frozen=True)
class GroupConfig:
    """Parameters whose dotted path matches `pattern` (`re.search`; the first group wins)."""

    pattern: str = ".*"
    lr: float = 1e-3  # peak; 0 freezes: no gradient, no optimizer state
    delay_steps: int = 0  # frozen before this step; gradients still flow through
    warmup_steps: int = 0  # from the end of the delay
    # cosine or linear (to `final_fraction` of the peak at the last step), constant, or steps (by
    # `drops`)
    decay: str = "cosine"
    final_fraction: float = 0.0
    drops: tuple[tuple[float, float], ...] = ()  # (step, learning rate from there on), in order

    def __post_init__(self) -> None:
        """Checks the settings.

        Raises:
            UserError: a setting is out of range, the pattern is invalid, or the drops are not in
                order after the warm-up.
        """
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise UserError(f"optimizer pattern {self.pattern!r}: {error}") from None
        where = f" (optimizer group {self.pattern!r})"
        for name in ("lr", "delay_steps", "warmup_steps", "final_fraction"):
            _check_range(self, name, 0.0, where=where)
        if self.decay not in DECAYS:
            raise UserError(f"unknown decay {self.decay!r}{where}{suggest(self.decay, DECAYS)}")
        start = self.delay_steps + self.warmup_steps
        steps = [start, *(step for step, _ in self.drops)]
        if self.decay == "steps" and any(a >= b for a, b in itertools.pairwise(steps)):
            raise UserError(f"optimizer drops {self.drops} must rise from after step {start}")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW; weight decay spares norms, biases and other vectors."""

    groups: tuple[GroupConfig, ...] = (GroupConfig(),)  # the first that matches takes it
    # The dtype of the first moment; "bfloat16" halves its memory. The second moment stays in
    # float32: near b2 = 1 its updates are below what bfloat16 resolves, and it would stand still.
    # "int8" stores both moments in 8 bits, rounded stochastically, with a scale for each block of
    # up to 128 values; it leaves embeddings and small arrays in float32.
    moments_dtype: str = "float32"
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-6
    weight_decay: float = 0.05
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        """Checks the settings.

        Raises:
            UserError: a setting is out of range, or the dtype is unknown.
        """
        if self.moments_dtype not in MOMENTS_DTYPES:
            raise UserError(
                f"unknown optimizer.moments_dtype {self.moments_dtype!r}"
                f"{suggest(self.moments_dtype, MOMENTS_DTYPES)}"
            )
        for name in ("b1", "b2"):
            _check_range(self, name, 0.0, below=1.0, where=" (optimizer)")
        for name in ("eps", "clip_norm"):
            _check_range(self, name, 0.0, exclusive=True, where=" (optimizer)")
        _check_range(self, "weight_decay", 0.0, where=" (optimizer)")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Ways along each mesh axis; `sharding.choose_mesh` decides those that are 0."""

    data: int = 0
    fsdp: int = 0
    tensor: int = 0
    # Devices that share each row of tokens, for long rows; never chosen automatically.
    context: int = 1
    max_fsdp: int = 0  # limit of `fsdp` where that is chosen; 0: none

    def __post_init__(self) -> None:
        """Checks the settings.

        Raises:
            UserError: a number is negative.
        """
        for name in ("data", "fsdp", "tensor", "max_fsdp"):
            _check_range(self, name, 0, where=" (mesh)")
        _check_range(self, "context", 1, where=" (mesh)")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """A held-out evaluation, repeated during training.

    Its documents come from `sources`, or else from the files in `root/split`, or else from the
    held-out split of the embedded data, or else are those that `data.holdout` leaves out of
    training.
    """

    name: str = "heldout"  # in metrics, file names and reports; must be unique
    every: int = 500  # steps; the last step is always evaluated
    # "loss", "captions", "images", "continuations", or a task of `emu-jax eval`
    kind: str = "loss"
    split: str = ""  # a folder in `root`
    root: str = ""  # by default the run's data.root
    sources: tuple[SourceConfig, ...] = ()
    batches: int = 4  # of each source; for kinds other than "loss", of all together
    batch_size: int = 0  # rows of a batch, over all processes; 0: that training computes at once
    # For "captions", "images" and "continuations": fields of `generate.settings.GenerationConfig`.
    generation: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks the settings.

        Raises:
            UserError: a setting is out of range, or the name is not fit for a file.
        """
        if not EVAL_NAME.fullmatch(self.name):
            raise UserError(f"eval.name is {self.name!r}: use letters, digits, - and _")
        where = f" (evaluation {self.name!r})"
        for name, least in (("every", 1), ("batches", 1), ("batch_size", 0)):
            _check_range(self, name, least, where=where)

    def data(self, data: DataConfig) -> DataConfig:
        """Returns the config of the held-out documents, given that of the training data.

        The seed is fixed, images are not augmented, and the decoder's contexts are not dropped, so
        that runs with other seeds or augmentation are compared on equal batches.

        Raises:
            UserError: the evaluation names no documents, or those of the training data.
        """
        root, split = self.root or data.root, self.split
        if not self.sources and not split and data.embedded:
            split = HELD_OUT.get(data.split, "")
        if self.sources or split:
            if not self.sources and (Path(root), split) == (Path(data.root), data.split):
                raise UserError(
                    f"its split {split!r} is the one that the run trains on: set it to a held-out "
                    "split"
                )
            split = split or data.split
            held_out = dataclasses.replace(
                data, root=root, split=split, sources=self.sources, holdout=0.0
            )
        elif data.holdout:
            # The documents of a block are packed together. Few of them are held out.
            block = math.ceil(data.block_documents / data.holdout)
            held_out = dataclasses.replace(data, held_out=True, block_documents=block)
        else:
            raise UserError(
                "no held-out data: set its split or sources to documents that are not trained on"
            )
        if self.batch_size:
            sources = tuple(dataclasses.replace(s, batch_size=0) for s in held_out.sources)
            held_out = dataclasses.replace(held_out, sources=sources, batch_size=self.batch_size)
        return dataclasses.replace(held_out, seed=0, augment=False, drop_condition=0.0, prefetch=0)


@dataclasses.dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases, if it is the tracker. Its own variables (WANDB_MODE, ...) apply too."""

    project: str = "emu_jax"
    entity: str = ""  # a team or user; "": the default of the account
    run_name: str = ""  # "": the name of the stage
    tags: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One stage of training."""

    name: str = "emu"  # of the stage, in logs and reports
    objective: str = "emu"  # emu | text | clip | vae | decoder | painter
    model: EmuConfig = EmuConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    # A run directory, or a converted release, to fine-tune: its model and all its towers. The image
    # size, `model.pooling` and `model.llama.vocab_multiple` are this config's, if they are set.
    init_from: str = ""
    # Towers that start from another run: {tower: run directory}, relative to this run's.
    parents: dict[str, str] = dataclasses.field(default_factory=dict)
    # A folder of `emu-jax precompute`, for a decoder that reads its conditions and latents there.
    latents: str = ""
    steps: int = 1000
    seed: int = 0
    text_weight: float = 1.0  # of the cross-entropy
    regression_weight: float = 1.0  # of the l2 regression
    kl_weight: float = 1e-4  # of the autoencoder's KL term
    # Decoder tuning: standard deviation of the noise that all pixels of a channel share.
    noise_offset: float = 0.0
    accumulate: int = 1  # microbatches of a step, computed one after the other
    ema_decay: float = 0.0  # decay of the average of the trained parameters; 0: none
    remat: RematConfig = RematConfig()
    attention: str = "auto"  # models.attention.choose_backend
    loss_block: int = 512  # positions of a row whose logits exist at once; 0: all, and are kept
    # Compute dtype, and dtype of frozen parameters. Trained ones and the optimizer are float32.
    dtype: str = "bfloat16"
    # Quantized training, for the objectives emu and text. "": the compute dtype.
    matmul_dtype: MatmulDtypeConfig = MatmulDtypeConfig()
    # "int8" or "int4": of the frozen matrices that `emu_jax.load(..., quantize=...)` rounds. Their
    # parents hold them, so set `save_frozen` to False.
    quantize: str = ""
    # Overrides for one kind of chip, {chip: ("a.b=value", ...)}, as `hardware.CHIPS` names them;
    # those of the command line win over them.
    tuned: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    log_every: int = 10
    tower_metrics: bool = False  # gradient norms, update-to-weight ratios, learning rates
    # Losses this many deviations above the median of recent steps are recorded with the documents
    # of their step (train.telemetry.spikes), non-finite ones too; 0 records none.
    spike_threshold: float = 0.0
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    eval: tuple[EvalConfig, ...] = ()  # held-out evaluations
    # Also keeps the checkpoint with the best value of a held-out metric: {"EVALUATION/METRIC":
    # "min" or "max"}, such as {"heldout/loss": "min"}.
    keep_best: dict[str, str] = dataclasses.field(default_factory=dict)
    # False: a checkpoint holds the trained parameters; the others stay in the parents' directories.
    save_frozen: bool = True
    log_documents: bool = False  # which documents each step read (train.telemetry.metrics.StepLog)
    profile_steps: str = ""  # "10:13" traces steps 10, 11 and 12; SIGUSR1 traces the next three
    hang_seconds: float = 600.0  # without a step: stack traces of all threads; 0 writes none
    tracker: str = ""  # "wandb": metrics, tables and images go to Weights & Biases too
    wandb: WandbConfig = WandbConfig()
    max_bad_steps: int = 20  # consecutive non-finite steps before training stops

    def __post_init__(self) -> None:
        """Checks the settings that need neither devices nor data.

        Raises:
            UserError: a setting is out of range, a name is unknown, or the objective does not
                support a setting.
        """
        if self.objective not in OBJECTIVE_TRAITS:
            raise UserError(
                f"unknown objective {self.objective!r}{suggest(self.objective, OBJECTIVE_TRAITS)}"
            )
        for tower, policy in dataclasses.asdict(self.remat).items():
            if policy not in REMAT:
                raise UserError(f"unknown remat.{tower} {policy!r}{suggest(policy, REMAT)}")
        if self.dtype not in DTYPES:
            raise UserError(f"unknown dtype {self.dtype!r}{suggest(self.dtype, DTYPES)}")
        self._check_matmul_dtype()
        check_quantization(self.quantize or None)
        if self.quantize and self.save_frozen:
            raise UserError(
                f"quantize is {self.quantize!r}, but quantized parameters are not saved: set "
                "save_frozen to False"
            )
        if self.tracker not in ("", *TRACKERS):
            raise UserError(f"unknown tracker {self.tracker!r}{suggest(self.tracker, TRACKERS)}")
        backends = ("auto", *BACKENDS)
        if self.attention not in backends:
            raise UserError(
                f"unknown attention {self.attention!r}{suggest(self.attention, backends)}"
            )
        for name in _AT_LEAST_ONE:
            _check_range(self, name, 1)
        for name in _AT_LEAST_ZERO:
            _check_range(self, name, 0)
        _check_range(self, "ema_decay", 0.0, below=1.0)
        if self.accumulate > 1 and self.traits.compares_rows:
            raise UserError(
                f"the objective {self.objective!r} compares all rows of a batch with each other: "
                "set accumulate to 1"
            )
        if self.latents and not self.traits.trains_unet:
            raise UserError(f"the objective {self.objective!r} reads no latents: remove latents")
        parse_steps(self.profile_steps)
        names = [evaluation.name for evaluation in self.eval]
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f"two evaluations are called {twice[0]!r}: give one another name")
        self._check_best()

    @property
    def traits(self) -> ObjectiveTraits:
        """The settings that the objective supports."""
        return OBJECTIVE_TRAITS[self.objective]

    def _check_matmul_dtype(self) -> None:
        """Checks that the matmuls of each tower can be computed in their dtype.

        Raises:
            UserError: a dtype is unknown, or the config does not support it.
        """
        towers = self.traits.matmul_towers
        chosen = {t: d for t, d in dataclasses.asdict(self.matmul_dtype).items() if d}
        for tower, dtype in chosen.items():
            name = f"matmul_dtype.{tower} {dtype!r}"
            if dtype not in MATMUL_DTYPES:
                raise UserError(f"unknown {name}{suggest(dtype, MATMUL_DTYPES)}")
            if not towers:
                able = [key for key, traits in OBJECTIVE_TRAITS.items() if traits.matmul_towers]
                raise UserError(
                    f"{name} is for the objectives {' and '.join(able)}, not {self.objective}: "
                    "leave it out"
                )
            if tower not in towers:
                raise UserError(
                    f"{name} with the objective {self.objective!r}, which has no tower "
                    f"{tower!r}: leave it out"
                )
            if self.quantize:
                raise UserError(
                    f"{name} with quantize={self.quantize!r}: the matrices are stored in 8 bits "
                    "or fewer already; leave one of the two out"
                )

    def _check_best(self) -> None:
        """Checks that checkpoints can be compared by `keep_best`.

        Raises:
            UserError: there is no such evaluation, or no checkpoint would have a value.
        """
        every = {evaluation.name: evaluation.every for evaluation in self.eval}
        for metric, best in self.keep_best.items():
            if best not in BEST:
                raise UserError(f"keep_best.{metric} is {best!r}: use {' or '.join(BEST)}")
            name = metric.partition("/")[0]
            if name not in every:
                raise UserError(
                    f"keep_best.{metric}: there is no evaluation {name!r}{suggest(name, every)}"
                )
            steps = self.checkpoint_every, every[name]
            if max(steps) % min(steps):
                raise UserError(
                    f"keep_best.{metric}: evaluations every {steps[1]} steps and checkpoints every "
                    f"{steps[0]} do not meet: make one a multiple of the other"
                )


def pretraining(name: str, model: EmuConfig, **changes: Any) -> TrainConfig:
    """Pretraining of a whole model with the paper's hyperparameters (section 3.1 and appendix):
    AdamW with a peak learning rate for each tower, warmup over a fifth of the steps, cosine.

    A row has 2,048 tokens and room for 16 images, whose 512 embeddings are among the tokens.
    Documents in `data/heldout` are not trained on.
    """
    steps = 10_000
    base = TrainConfig(
        name=name,
        model=model,
        data=DataConfig(batch_size=1024, row_tokens=2048, row_images=16, row_group=8),
        optimizer=OptimizerConfig(
            groups=(
                GroupConfig(r"^(visual|ln_visual)\.", lr=4e-5, warmup_steps=steps // 5),
                GroupConfig(r"^cformer\.", lr=1e-4, warmup_steps=steps // 5),
                GroupConfig(r"^llama\.", lr=3e-5, warmup_steps=steps // 5),
            ),
            b1=0.9,
            b2=0.98,
            eps=1e-6,
            weight_decay=0.05,
            clip_norm=1.0,
        ),
        steps=steps,
        eval=(EvalConfig(every=500, split="heldout", batches=1, batch_size=256),),
        remat=RematConfig.everywhere("full"),
        spike_threshold=SPIKE_THRESHOLD,
    )
    return dataclasses.replace(base, **changes)


def digits_data(**changes: Any) -> DataConfig:
    """The embedded handwritten digits at the size of `config.digits()`."""
    base = DataConfig(
        root="runs/digits_data",
        embedded="digits",
        row_tokens=64,
        row_images=8,
        n_causal=4,
        image_size=32,
        target_size=32,
        learn_img=True,
        augment=True,
        shift=0.08,
    )
    return dataclasses.replace(base, **changes)


def config_dict(cfg: TrainConfig) -> ConfigDict:
    """Returns a config as the ConfigDict that a file in configs/ returns."""
    return ConfigDict(to_dict(cfg))


def digits_config(name: str, **changes: Any) -> ConfigDict:
    """Returns the config of a stage on the digits: the small model, in float32."""
    base = {
        "model": digits(),
        "dtype": "float32",
        "tower_metrics": True,
        "spike_threshold": SPIKE_THRESHOLD,
    }
    return config_dict(TrainConfig(name=name, **base | changes))


def resume_config(cfg: TrainConfig, workdir: Path) -> TrainConfig:
    """Returns the config of the run in `workdir`, with `MAY_CHANGE` taken from `cfg`.

    The order of documents (`data.row_group`) stays that of the run, whatever `cfg` says.

    Raises:
        UserError: `cfg` describes another run.
    """
    saved = load_json(TrainConfig, workdir / "train.json")
    if conflicts := resume_conflicts(cfg, saved, workdir):
        raise UserError(conflicts[0])
    cfg = _with_order_of(saved, cfg)
    return dataclasses.replace(cfg, model=saved.model, parents=saved.parents)


def resume_conflicts(cfg: TrainConfig, saved: TrainConfig, workdir: Path) -> list[str]:
    """Returns a line for each key outside `MAY_CHANGE` in which `cfg` differs from `saved`, the
    config of the run in `workdir`."""
    cfg = _with_order_of(saved, cfg)
    model = saved.model if saved.init_from else cfg.model
    model = dataclasses.replace(model, vae=model.vae and saved.model.vae)
    ours = flatten(to_dict(without_paths(dataclasses.replace(cfg, model=model))))
    theirs = flatten(to_dict(without_paths(saved)))
    return [
        f"{workdir} holds a run with {key}={theirs.get(key)!r}, not {ours.get(key)!r}: "
        "give another --workdir, or that value"
        for key in sorted(ours.keys() | theirs.keys())
        if not any(key == name or key.startswith(name + ".") for name in MAY_CHANGE)
        and ours.get(key) != theirs.get(key)
    ]


def _with_order_of(saved: TrainConfig, cfg: TrainConfig) -> TrainConfig:
    """Returns `cfg` with the order in which the saved run reads its documents."""
    data = dataclasses.replace(cfg.data, row_group=saved.data.row_group)
    return dataclasses.replace(cfg, data=data)


def without_paths(cfg: TrainConfig) -> TrainConfig:
    """Returns a config without the locations of its sources, which do not change what a run
    computes."""
    sources = tuple(dataclasses.replace(s, paths=(), media=()) for s in cfg.data.sources)
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, sources=sources))
