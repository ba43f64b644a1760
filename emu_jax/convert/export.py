"""Exports for other libraries: JSON beside the release's tensors, and folders for transformers,
diffusers and peft."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from emu_jax.config import EmuConfig, LlamaConfig, SchedulerConfig, UNetConfig, VAEConfig, to_dict
from emu_jax.convert import release_config, tensor_files
from emu_jax.convert.source import Layout, Source, rows_of
from emu_jax.convert.tables import Row, peft_key
from emu_jax.convert.tensors import Shape, dtype_name, finishing
from emu_jax.errors import UserError

Progress = Callable[[Source, Sequence[Row], str], Iterator[tuple[Row, int]]]


def copy(carried: Mapping[str, Path], folder: Path) -> None:
    """Copies files and folders unchanged to their names under `folder`."""
    for name, path in carried.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.copytree(path, target)
        else:
            shutil.copy2(path, target)


def complete_release(source: Source, folder: Path) -> None:
    """Writes the release's files other than tensors that the source did not provide."""
    cfg = source.cfg
    if not (folder / "Emu.json").exists():
        write_json(folder / "Emu.json", model_json(cfg))
    if not (folder / "tokenizer").exists():
        copy_tokenizer(source, folder / "tokenizer")
    config = folder / "tokenizer" / "config.json"
    if not config.exists():
        # The release's file is LLaMA's own, from before Emu's tokens were added.
        base = source.tokenizer.base_size
        write_json(config, llama_json(cfg, vocab_size=base, pad_token_id=0))
    write_decoder_json(cfg, folder)


def check_release(source: Source, layout: Layout, shapes: Mapping[str, Shape]) -> list[str]:
    """Compares a model's configuration with the one that the release's files will give.

    Args:
        shapes: {tensor's name as the files spell it: its shape}.

    Returns:
        Notes on settings that the files do not keep and that do not change the computation.

    Raises:
        UserError: a setting would be lost that does: the release's code would compute another
            model.
    """
    cfg = source.cfg
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        read = ("Emu.json", "tokenizer", "unet/config.json", "vae/config.json", "scheduler")
        copy(
            {n: p for n, p in layout.carried.items() if n.split("/")[0] in read or n in read},
            folder,
        )
        complete_release(source, folder)
        again = release_config.multimodal(
            {key: shape for key, shape in shapes.items() if ":" not in key},
            where="the release",
            base_vocab=source.tokenizer.base_size,
            model_json=folder / "Emu.json",
            llama_json=folder / "tokenizer" / "config.json",
        )
        if cfg.unet is not None and cfg.vae is not None:
            unet, vae, scheduler = release_config.decoder(folder)
            again = dataclasses.replace(again, unet=unet, vae=vae, scheduler=scheduler)
    # The release's code ignores this key of the JSON.
    again = dataclasses.replace(
        again, llama=dataclasses.replace(again.llama, rope_theta=LlamaConfig.rope_theta)
    )
    lost, notes = [], []
    for name, (ours, theirs) in differences(cfg, again).items():
        if name in _PADDING or (name.startswith("scheduler.") and cfg.unet is None):
            continue
        if name == "llama.attention_width" and ours == cfg.llama.width:
            continue
        if name in _OF_TRAINING:
            notes.append(f"the release's files do not keep {name} = {ours} (there: {theirs})")
        else:
            lost.append(f"{name} is {ours} (there: {theirs})")
    if lost:
        raise UserError(
            f"the release's code cannot compute this model: {'; '.join(lost)}: use it with "
            "emu_jax, or --to hf for its language model and decoder"
        )
    return notes


_PADDING = ("llama.vocab_multiple",)  # rows that pad a table are not exported
# Settings of training and initialization, and the longest prompt, which the user must respect.
_OF_TRAINING = (
    "cformer.dropout",
    "llama.embed_std",
    "llama.lora.dropout",
    "llama.max_positions",
)


def differences(a: Any, b: Any, where: str = "") -> dict[str, tuple[Any, Any]]:
    """Returns {dotted name: (value in a, value in b)} of all fields that differ."""
    found: dict[str, tuple[Any, Any]] = {}
    for field in dataclasses.fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if dataclasses.is_dataclass(x) and dataclasses.is_dataclass(y):
            found |= differences(x, y, f"{where}{field.name}.")
        elif x != y:
            found[where + field.name] = (x, y)
    return found


def copy_tokenizer(source: Source, folder: Path) -> None:
    """Writes the LLaMA tokenizer, without the note that `Tokenizer.save` adds."""
    source.tokenizer.save(folder)
    (folder / "emu_tokenizer.json").unlink()


def write_decoder_json(cfg: EmuConfig, folder: Path) -> None:
    if cfg.unet is None or cfg.vae is None:
        return
    for name, part in (
        ("unet/config.json", cfg.unet),
        ("vae/config.json", cfg.vae),
        ("scheduler/scheduler_config.json", cfg.scheduler),
    ):
        if not (folder / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_json(folder / name, diffusers_json(part))


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")


def model_json(cfg: EmuConfig) -> dict[str, Any]:
    """Returns the sizes in the format of the release's `Emu-14B.json`."""
    vision = cfg.vision
    ratio = round(vision.mlp_width / vision.width, 4)
    if int(vision.width * ratio) != vision.mlp_width:
        ratio = (vision.mlp_width + 0.5) / vision.width
    return {
        "embed_dim": vision.clip_width,
        "vision_cfg": {
            "image_size": vision.image_size,
            "layers": vision.layers,
            "width": vision.width,
            "head_width": vision.head_width,
            "mlp_ratio": ratio,
            "patch_size": vision.patch_size,
            "eva_model_name": "eva-clip-g-14-x",
            "drop_path_rate": 0,
            "xattn": True,
            "freeze": False,
        },
        "multimodal_cfg": {
            "name": "llama-13B",
            "xattn": True,
            "n_causal": cfg.cformer.n_causal,
            "freeze": False,
        },
        "vladapter_cfg": {"name": "cformer", "n_causal": cfg.cformer.n_causal},
    }


def llama_json(cfg: EmuConfig, **more: Any) -> dict[str, Any]:
    """Returns a transformers `config.json`."""
    values = {
        theirs: getattr(cfg.llama, ours) for ours, theirs in release_config.LLAMA_JSON.items()
    }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "bos_token_id": cfg.tokens.bos,
        "eos_token_id": cfg.tokens.eos,
        "pad_token_id": cfg.tokens.pad,
        "tie_word_embeddings": False,
        **({"head_dim": cfg.llama.head_width} if cfg.llama.attention_width else {}),
        **values,
        **more,
    }


def diffusers_json(part: UNetConfig | VAEConfig | SchedulerConfig) -> dict[str, Any]:
    """Returns a diffusers configuration."""
    extra: dict[str, Any] = {
        UNetConfig: {"_class_name": "UNet2DConditionModel"},
        VAEConfig: {
            "_class_name": "AutoencoderKL",
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
        },
        SchedulerConfig: {"_class_name": "PNDMScheduler"},
    }[type(part)]
    if isinstance(part, VAEConfig):
        levels = len(part.block_out_channels)
        extra = {k: v[:1] * levels if isinstance(v, list) else v for k, v in extra.items()}
    return extra | to_dict(part)


def write_hf(source: Source, folder: Path, progress: Progress) -> list[str]:
    """Writes folders for transformers (`llama/`), diffusers (`unet/`, `vae/`, `scheduler/`) and
    peft (`lora/`).

    Each folder has one dtype, the widest of its tensors. The visual encoder, the Causal
    Transformer and the regression head have no counterpart in these libraries.

    Returns:
        Notes on where transformers computes differently.

    Raises:
        UserError: the decoder's carried JSON files describe another decoder.
    """
    cfg = source.cfg
    if cfg.unet is not None:
        carried = source.layout.carried if source.layout else {}
        wanted = ("unet/config.json", "vae/config.json", "scheduler")
        copy({n: p for n, p in carried.items() if n in wanted}, folder)
        write_decoder_json(cfg, folder)
        decoder = dict(
            zip(("unet", "vae", "scheduler"), release_config.decoder(folder), strict=True)
        )
        if lost := differences(dataclasses.replace(cfg, **decoder), cfg):
            said = "; ".join(
                f"{name} is {ours}, not {there}" for name, (there, ours) in lost.items()
            )
            raise UserError(f"the release's own JSON files do not describe this decoder: {said}")
    places: dict[str, tuple[str, str]] = {}  # {tensor: (folder, name there)}
    rows = {row.path: row for row in rows_of(cfg, source.shapes)}
    for row in rows.values():
        for key in row.keys:
            if place := _place(key):
                places[key] = place
    dtypes: dict[str, np.dtype] = {}
    for row in rows.values():
        for key in row.keys:
            if key in places:
                part, dtype = places[key][0], np.dtype(source.shapes[row.path].dtype)
                dtypes[part] = _wider(dtypes.get(part, dtype), dtype)
    contents: dict[str, dict[str, tuple[tuple[int, ...], np.dtype]]] = {}
    for row in rows.values():
        shape = row.transform.release_shape(row.layer_shape(source.shapes[row.path].shape))
        for key in row.keys:
            if key in places:
                part, name = places[key]
                contents.setdefault(part, {})[name] = (shape, dtypes[part])
    writers = {
        part: tensor_files.write_shards(folder / part, _STEMS[part], tensors)
        for part, tensors in contents.items()
    }
    wanted = [row for row in rows.values() if row.keys[0] in places]
    with contextlib.ExitStack() as stack:
        for writer in writers.values():
            stack.enter_context(finishing(writer))
        for row, layer in progress(source, wanted, "writing"):
            part, name = places[row.keys[layer]]
            writers[part].write(name, row.transform.to_release(source.read(row.path, layer)))

    name = dtype_name(dtypes["llama"])
    write_json(folder / "llama" / "config.json", llama_json(cfg, torch_dtype=name))
    copy_tokenizer(source, folder / "llama")
    if lora := cfg.llama.lora:
        adapter = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": "../llama",
            "r": lora.rank,
            "lora_alpha": lora.alpha,
            "lora_dropout": lora.dropout,
            "target_modules": list(lora.targets),
            "bias": "none",
            "inference_mode": True,
        }
        write_json(folder / "lora" / "adapter_config.json", adapter)
    if cfg.llama.rope_dtype == "float32":
        return []
    return [
        f"transformers computes rotary tables in float32, this model in {cfg.llama.rope_dtype}: "
        "its logits differ by a few parts in ten thousand"
    ]


def hf_tensors(cfg: EmuConfig, params: Mapping[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    """Returns the tensors `write_hf` writes of a model in memory: {folder: {name: tensor}}."""
    folders: dict[str, dict[str, np.ndarray]] = {}
    for row in rows_of(cfg, params):
        array = np.asarray(params[row.path])
        for i, key in enumerate(row.keys):
            if place := _place(key):
                tensor = row.transform.to_release(array[i] if row.stacked else array)
                folders.setdefault(place[0], {})[place[1]] = np.ascontiguousarray(tensor)
    return folders


_STEMS = {
    "llama": "model",
    "lora": "adapter_model",
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
}


def _place(key: str) -> tuple[str, str] | None:
    """Returns the folder that a tensor goes to and its name there, or None if it is left out."""
    if ":" in key:
        tower, name = key.split(":")
        return tower, name
    if not key.startswith("decoder.lm.") or "stu_regress_head" in key:
        return None
    if ".lora_" in key:
        return "lora", peft_key(key)
    return "llama", key.removeprefix("decoder.lm.")


@functools.cache
def _wider(a: np.dtype, b: np.dtype) -> np.dtype:
    return a if a == b else np.dtype(np.float32)
