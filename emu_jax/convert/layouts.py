"""The layouts of Emu2's releases: native files, and folders as on the Hub.

A native file holds everything under the names of the tables (Emu2-Gen's has a prefix for each
part). A Hub folder holds shards with an index, `config.json` and the tokenizer, or diffusers'
folders if there is an image decoder.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import ml_dtypes
import numpy as np

from emu_jax.config import EmuConfig
from emu_jax.convert import tensor_files
from emu_jax.convert.source import (
    DECODER_FOLDERS,
    FREQUENCIES_FILE,
    ModelSource,
    ReleaseLayout,
    default_unused,
    rows_of,
)
from emu_jax.convert.tables import SAFETY_CHECKER, KeyStyle
from emu_jax.convert.tensors import Contents, Shape, Tensor, dtype_name, dtype_of
from emu_jax.errors import UserError
from emu_jax.storage import read_json_object
from emu_jax.tokenizer import Tokenizer

LayoutKind = Literal["native", "hub"]

_CHECKER_FILE = "safety_checker/model.safetensors"


def emu2_layout(
    source: ModelSource, folder: Path, *, kind: LayoutKind | None, file: str | None
) -> tuple[ReleaseLayout, dict[str, Tensor]]:
    """Returns the layout in which an Emu2 is written, and the unused tensors that it contains.

    It is the layout of the source, unless another kind is requested or the model has other tensors.

    Args:
        folder: the destination. The index of new shards is written there.
        kind: by default that of the source; for a model that was not read from a release, "native"
            for a file and "hub" for a folder.
        file: the only file's name, or None to write a folder.

    Raises:
        UserError: the model has adapters, or a folder's layout is requested for a file.
    """
    cfg, came = source.cfg, source.layout
    if cfg.llama.lora is not None:
        raise UserError("Emu2's releases have no LoRA adapters: add --merge-lora")
    if file and kind == "hub":
        raise UserError(f"{file}: --layout hub is a folder: name one, or use --layout native")
    came_as = None if came is None else "hub" if came.style.hub else "native"
    kind = kind or ("native" if file else came_as or "hub")
    if came is not None and kind == came_as and _is_complete(source, came):
        present = {*came.style.names(rows_of(cfg, source.shapes), cfg).values(), *source.unused}
        came = came.only(lambda key: key in present)
        if not file:
            return came, source.unused
        if len(came.tensors) == 1:
            (tensors,) = came.tensors.values()
            wrapper_keys = {file: next(iter(came.wrapper_keys.values()), None)}
            layout = ReleaseLayout(came.style, {file: tensors}, wrapper_keys)
            return layout, source.unused
    if kind == "native":
        return _native(source, file or _native_name(source))
    return _hub(source, folder)


def _is_complete(source: ModelSource, layout: ReleaseLayout) -> bool:
    """Returns whether a layout has a place for each tensor of a model, under the right name."""
    names = layout.style.names(rows_of(source.cfg, source.shapes), source.cfg)
    decoder = source.cfg.unet is not None
    if layout.style.one_file != (decoder and not layout.style.hub):
        return False
    return layout.dtypes.keys() >= set(names.values())


def _dtypes(source: ModelSource) -> dict[str, np.dtype]:
    """Returns {key in the tables: the dtype that its tensor came with, or has}."""
    came = source.layout
    original = came.dtypes if came else {}
    return {
        key: original.get(came.style.write(key) if came else key, np.dtype(shape.dtype))
        for row in rows_of(source.cfg, source.shapes)
        for shape in (source.shapes[row.path],)
        for key in row.keys
    }


def _checker(source: ModelSource) -> dict[str, Tensor]:
    """Returns the tensors of the safety checker that came with the model, without a prefix."""
    inside = {
        key.removeprefix(SAFETY_CHECKER): tensor
        for key, tensor in source.unused.items()
        if key.startswith(SAFETY_CHECKER)
    }
    folder = source.layout.carried.get("safety_checker") if source.layout else None
    if inside or folder is None:
        return inside
    opened, _ = tensor_files.open_tensors(tensor_files.find(folder, "model", "pytorch_model"))
    return {key: tensor for tensors in opened.values() for key, tensor in tensors.items()}


def _frequencies(source: ModelSource) -> dict[str, Tensor]:
    """Returns the rotary frequencies of a native file, by their key in the tables.

    They are those of the native file that the model came from, which may have had none, and by
    default the release's.
    """
    came = source.layout
    frequencies = _default_frequencies(source)
    if came is None:
        return frequencies
    if not came.style.hub:
        names = {key: came.style.write(key) for key in frequencies}
        return {k: source.unused[name] for k, name in names.items() if name in source.unused}
    recorded = came.carried.get(FREQUENCIES_FILE)
    if recorded is None:
        return frequencies
    try:
        return {key: _tensor(**value) for key, value in read_json_object(recorded).items()}
    except (TypeError, ValueError, LookupError) as error:
        raise UserError(
            f"{recorded} is damaged ({error}): restore it, or remove it to use the release's values"
        ) from None


def _default_frequencies(source: ModelSource) -> dict[str, Tensor]:
    """Returns the release's rotary frequencies in the dtype of the language model."""
    dtype = _dtypes(source)["decoder.lm.model.layers.0.self_attn.q_proj.weight"]
    return default_unused(source.cfg, dtype)


def _record_frequencies(source: ModelSource, folder: Path) -> None:
    """Records rotary frequencies in a Hub folder, which has no tensors of them, unless they are
    the release's."""
    values, default = (
        {
            key: {"dtype": dtype_name(t.dtype), "values": t.read().astype(np.float64).tolist()}
            for key, t in tensors.items()
        }
        for tensors in (_frequencies(source), _default_frequencies(source))
    )
    if values != default:
        (folder / FREQUENCIES_FILE).write_text(json.dumps(values) + "\n")


def _tensor(dtype: str, values: list[float]) -> Tensor:
    array = np.asarray(values).astype(dtype_of(dtype))
    return Tensor(array.shape, array.dtype, lambda: array)


def _native(source: ModelSource, file: str) -> tuple[ReleaseLayout, dict[str, Tensor]]:
    """Returns the layout of one native file."""
    cfg, dtypes = source.cfg, _dtypes(source)
    style = KeyStyle(one_file=cfg.unet is not None)
    unused = {style.write(key): tensor for key, tensor in _frequencies(source).items()}
    if style.one_file:
        unused |= {SAFETY_CHECKER + key: tensor for key, tensor in _checker(source).items()}
    tensors = {style.write(key): dtype for key, dtype in dtypes.items()}
    tensors |= {key: tensor.dtype for key, tensor in unused.items()}
    return ReleaseLayout(style, {file: tensors}, {file: None}, _carried(source)), unused


def _hub(source: ModelSource, folder: Path) -> tuple[ReleaseLayout, dict[str, Tensor]]:
    """Returns the layout of a Hub folder, and writes the index of its shards, and the rotary
    frequencies if they are not the release's."""
    cfg, dtypes, style = source.cfg, _dtypes(source), KeyStyle(hub=True)
    parts: dict[str, dict[str, tuple[Shape, np.dtype]]] = {}
    for row in rows_of(cfg, source.shapes):
        shape = row.release_shape(source.shapes[row.path].shape)
        for key in row.keys:
            part = key.split(":")[0] if ":" in key else ""
            parts.setdefault(part, {})[style.write(key)] = (shape, dtypes[key])
    files: dict[str, Contents] = {}
    for part, contents in parts.items():
        subfolder = part or ("multimodal_encoder" if cfg.unet is not None else ".")
        stem = "diffusion_pytorch_model" if part else "model"
        shards = tensor_files.split_into_shards(folder / subfolder, stem, contents)
        files |= {str(Path(subfolder) / name): shard for name, shard in shards.items()}
    _record_frequencies(source, folder)
    unused = {}
    carried = _carried(source)
    if "safety_checker" not in carried and (checker := _checker(source)):
        unused = {f"safety_checker:{key}": tensor for key, tensor in checker.items()}
        files[_CHECKER_FILE] = {key: (t.shape, t.dtype) for key, t in unused.items()}
    tensors = {
        file: {key: dtype for key, (_, dtype) in contents.items()}
        for file, contents in files.items()
    }
    return ReleaseLayout(style, tensors, {}, carried), unused


def _carried(source: ModelSource) -> dict[str, Path]:
    """Returns the carried files that fit any layout."""
    came = source.layout.carried if source.layout else {}
    if source.cfg.unet is None:
        return {}
    return {name: path for name, path in came.items() if name.split("/")[0] in DECODER_FOLDERS}


def _native_name(source: ModelSource) -> str:
    """Returns the name of the release's native file."""
    dtypes = set(_dtypes(source).values())
    variant = ".bf16" if dtypes == {np.dtype(ml_dtypes.bfloat16)} else ""
    chat = source.tokenizer.instruct
    model = "Emu2-Gen" if source.cfg.unet else "Emu2-Chat" if chat else "Emu2"
    suffix = "safetensors" if source.cfg.unet else "pth" if chat else "bin"
    return f"{model}_pytorch_model{variant}.{suffix}"


class Described(Protocol):
    """The parts of a `ModelSource` that determine Emu2's files other than tensors."""

    cfg: EmuConfig
    tokenizer: Tokenizer


@dataclasses.dataclass(frozen=True)
class Emu2Json:
    """The JSON files that an Emu2's sizes are read from."""

    model: Path
    llama: Path


def complete_emu2(
    source: Described, folder: Path, *, hub: bool, llama_values: Mapping[str, Any]
) -> Emu2Json:
    """Writes Emu2's files other than tensors and the decoder's that a folder does not have yet.

    Args:
        llama_values: LLaMA's sizes in transformers' terms.
    """
    cfg, tokenizer = source.cfg, source.tokenizer
    decoder = cfg.unet is not None
    config = (folder / "multimodal_encoder" if decoder else folder) / "config.json"
    words = folder if hub and not decoder else folder / "tokenizer"
    if not any((words / name).exists() for name in ("tokenizer.model", "tokenizer.json")):
        tokenizer.save(words)
        (words / "emu_tokenizer.json").unlink()
    if not hub:
        vision = {"vision_cfg": vision_json(cfg)}
        if tokenizer.instruct:
            vision["chat_vision_cfg"] = vision["vision_cfg"]
        _write_if_missing(folder / "Emu2.json", vision)
        # As in Emu1's release, LLaMA's own file, from before Emu's tokens were added.
        own = {"vocab_size": tokenizer.base_size, "pad_token_id": 0}
        _write_if_missing(words / "config.json", {**llama_values, **own})
        return Emu2Json(folder / "Emu2.json", words / "config.json")
    added = {token: tokenizer.base_size + i for i, token in enumerate(tokenizer.added)}
    _write_if_missing(words / "added_tokens.json", added)
    values = {
        **llama_values,
        "architectures": ["EmuForCausalLM"],
        "model_type": "Emu",
        "model_version": "chat" if tokenizer.instruct else "base",
        "d_model": cfg.vision.width,
        "num_key_value_heads": cfg.llama.heads,
        "vision_config": vision_json(cfg),
    }
    _write_if_missing(config, values)
    return Emu2Json(config, config)


def vision_json(cfg: EmuConfig) -> dict[str, Any]:
    """Returns the sizes of the visual encoder and of pooling, in the release's terms."""
    vision = cfg.vision
    return {
        "eva_model_name": "eva-clip-4b-14-x",
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "width": vision.width,
        "layers": vision.layers,
        "head_width": vision.head_width,
        "mlp_ratio": mlp_ratio(cfg),
        "layer_norm_eps": vision.eps,
        "qkv_bias": True,
        "drop_path_rate": 0.0,
        "xattn": False,
        "postnorm": vision.post_norm,
        "n_query": cfg.n_embeddings,
        "v_query": cfg.n_frame,
    }


def mlp_ratio(cfg: EmuConfig) -> float:
    """Returns a number that, times the visual encoder's width, truncates to its MLP's width."""
    vision = cfg.vision
    ratio = round(vision.mlp_width / vision.width, 4)
    if int(vision.width * ratio) != vision.mlp_width:
        ratio = (vision.mlp_width + 0.5) / vision.width
    return ratio


def _write_if_missing(path: Path, values: Mapping[str, Any]) -> None:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values, indent=2) + "\n")
