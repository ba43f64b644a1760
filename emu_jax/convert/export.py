"""Exports: the release's own files, and folders for transformers, diffusers and peft."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from emu_jax.config import EmuConfig, LlamaConfig, SchedulerConfig, UNetConfig, VAEConfig, to_dict
from emu_jax.convert import release_config, tensor_files
from emu_jax.convert.layouts import LayoutKind, complete_emu2, emu2_layout, mlp_ratio
from emu_jax.convert.source import (
    ModelSource,
    ReleaseLayout,
    each_layer,
    layers,
    release_layout,
    rows_of,
)
from emu_jax.convert.tables import TableRow, peft_key
from emu_jax.convert.tensors import Shape, TensorWriter, dtype_name, finishing
from emu_jax.convert.torch_format import TORCH_SUFFIXES
from emu_jax.errors import UserError

_PADDING = ("llama.vocab_multiple",)  # rows that pad a table are not exported
# Settings of training and initialization, and the longest prompt, which the user must respect.
_TRAINING_ONLY = (
    "cformer.dropout",
    "llama.embed_std",
    "llama.lora.dropout",
    "llama.max_positions",
)
# transformers' class of each backbone.
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# The name of the weights in each folder for other libraries.
_STEMS = {
    "llama": "model",
    "lora": "adapter_model",
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
}


def release_tensors(
    layers: Iterable[tuple[TableRow, int]], read: Callable[[str, int], np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the release's tensors, each with its key in the tables.

    Args:
        layers: rows, each with the number of a layer.
        read: returns a layer of the parameter with this path, as `ModelSource.read` does.
    """
    for row, layer in layers:
        yield row.keys[layer], row.transform.to_release(read(row.path, layer))


def write_tensors(
    source: ModelSource, rows: Sequence[TableRow], names: Mapping[str, str], writer: TensorWriter
) -> None:
    """Writes the tensors of these rows, layer by layer.

    Args:
        names: {key in the tables: key of the writer}.
    """
    for key, tensor in release_tensors(each_layer(source, rows, "writing"), source.read):
        writer.write(names[key], tensor)


# --- The release's own files -----------------------------------------------------------------


def write_release(
    source: ModelSource, folder: Path, dst: Path, kind: LayoutKind | None = None
) -> list[str]:
    """Writes the release's own files.

    Tensors return to their original dtypes unless that would lose precision: parameters that were
    trained since then stay float32.

    Args:
        folder: where to write: a folder, or a file if `dst` is a single file.
        dst: the destination that `folder` replaces later.
        kind: Emu2's layout; by default the one that came.

    Returns:
        Notes on settings that the release's files do not keep.

    Raises:
        UserError: the release's code would compute another model.
    """
    single_file = is_single_file(dst)
    file = folder.name if single_file else None
    folder = folder.parent if single_file else folder
    if source.cfg.family == "emu2":
        layout, unused = emu2_layout(source, folder, kind=kind, file=file)
    elif kind is not None:
        raise UserError(f"--layout {kind} is for Emu2; Emu1 has a single layout: leave it out")
    else:
        layout, unused = release_layout(source)
        layout = _in_one_file(layout, file, dst) if file else layout
    rows = rows_of(source.cfg, source.shapes)
    names = layout.style.names(rows, source.cfg)
    shapes: dict[str, Shape] = {key: tensor.shape for key, tensor in unused.items()}
    for row in rows:
        shape = row.release_shape(source.shapes[row.path].shape)
        shapes |= {names[key]: shape for key in row.keys}
    dtypes = {key: tensor.dtype for key, tensor in unused.items()}
    dtypes |= _exact_dtypes(source, rows, names, layout.dtypes)
    notes = check_release(source, layout, shapes)
    contents = {
        file: {key: (shapes[key], dtypes[key]) for key in keys}
        for file, keys in layout.tensors.items()
    }
    writer = tensor_files.ShardedWriter(contents, folder, layout.wrapper_keys)
    with finishing(writer):
        for key, tensor in unused.items():
            writer.write(key, tensor.read())
        write_tensors(source, rows, names, writer)
    if not single_file:
        copy_files(layout.carried, folder)
        complete_release(source, folder, hub=layout.style.hub)
    return notes


def is_single_file(dst: Path) -> bool:
    """Returns whether a release is written to one file of this name, not to a folder."""
    return dst.suffix in (*TORCH_SUFFIXES, ".safetensors")


def _in_one_file(layout: ReleaseLayout, name: str, dst: Path) -> ReleaseLayout:
    """Returns the layout of a model whose tensors all go to the file of this name."""
    if len(layout.tensors) > 1:
        raise UserError(f"{dst}: a model with its image decoder needs a folder, not a file")
    ((original, tensors),) = layout.tensors.items()
    return dataclasses.replace(
        layout,
        tensors={name: tensors},
        carried={},
        wrapper_keys={name: layout.wrapper_keys.get(original)},
    )


def _exact_dtypes(
    source: ModelSource,
    rows: Sequence[TableRow],
    names: Mapping[str, str],
    original: Mapping[str, np.dtype],
) -> dict[str, np.dtype]:
    """Returns {name: its original dtype, or the stored one if casting would change a value}.

    A parameter has a wider dtype than its original if other layers needed it, or if it was trained
    since. Only its values show which. They are read first, because a file declares its dtypes
    before its tensors.
    """
    dtypes = {names[key]: original[names[key]] for row in rows for key in row.keys}
    wider = [
        row
        for row in rows
        if any(dtypes[names[key]] != source.shapes[row.path].dtype for key in row.keys)
    ]
    for row, layer in each_layer(source, wider, "checking dtypes"):
        name = names[row.keys[layer]]
        stored = source.read(row.path, layer)
        parts = (stored[i : i + 256] for i in range(0, len(stored), 256))
        if any(_loses(part, dtypes[name]) for part in parts):
            dtypes[name] = source.shapes[row.path].dtype
    return dtypes


def _loses(part: np.ndarray, dtype: np.dtype) -> bool:
    """Returns whether casting to another dtype changes any value."""
    return not np.array_equal(part.astype(dtype).astype(part.dtype), part)


def copy_files(carried: Mapping[str, Path], folder: Path) -> None:
    """Copies files and folders unchanged to their names under `folder`."""
    for name, path in carried.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.copytree(path, target)
        else:
            shutil.copy2(path, target)


def complete_release(source: ModelSource, folder: Path, *, hub: bool) -> tuple[Path, Path]:
    """Writes the release's files other than tensors that the source did not provide.

    Args:
        hub: whether the folder has Emu2's layout on the Hub.

    Returns:
        The JSON files with the model's sizes, and with LLaMA's.
    """
    cfg = source.cfg
    if cfg.family == "emu2":
        described = complete_emu2(source, folder, hub=hub, llama_values=llama_json(cfg))
        write_decoder_json(cfg, folder)
        return described.model, described.llama
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
    return folder / "Emu.json", config


def check_release(
    source: ModelSource, layout: ReleaseLayout, shapes: Mapping[str, Shape]
) -> list[str]:
    """Compares a model's configuration with the one that the release's files will give.

    Args:
        shapes: {tensor's name in the files: its shape}.

    Returns:
        Notes on settings that the files do not keep and that do not change the computation.

    Raises:
        UserError: a setting would be lost that does: the release's code would compute another
            model.
    """
    cfg = source.cfg
    if not cfg.llama.is_release:
        raise UserError(
            "the release's code cannot compute this model: its language model is LLaMA-1, this one "
            "a later decoder: use it with emu_jax, or --to hf for its language model and decoder"
        )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        copy_files(
            {
                name: path
                for name, path in layout.carried.items()
                if name.endswith(".json") or name.split("/")[0] in ("tokenizer", "scheduler")
            },
            folder,
        )
        model_path, llama_path = complete_release(source, folder, hub=layout.style.hub)
        reread = release_config.multimodal(
            {key: shape for key, shape in shapes.items() if ":" not in key},
            where="the release",
            base_vocab=source.tokenizer.base_size,
            model_json=model_path,
            llama_json=llama_path,
        )
        if cfg.unet is not None and cfg.vae is not None:
            unet, vae, scheduler = release_config.decoder(folder)
            reread = dataclasses.replace(reread, unet=unet, vae=vae, scheduler=scheduler)
    # The release's code ignores this key of the JSON.
    reread = dataclasses.replace(
        reread, llama=dataclasses.replace(reread.llama, rope_theta=LlamaConfig.rope_theta)
    )
    lost, notes = [], []
    for name, (value, restored) in differences(cfg, reread).items():
        if name in _PADDING or (name.startswith("scheduler.") and cfg.unet is None):
            continue
        if name == "llama.attention_width" and value == cfg.llama.width:
            continue
        if name in _TRAINING_ONLY:
            notes.append(f"the release's files do not keep {name} = {value} (there: {restored})")
        else:
            lost.append(f"{name} is {value} (there: {restored})")
    if lost:
        raise UserError(
            f"the release's code cannot compute this model: {'; '.join(lost)}: use it with "
            "emu_jax, or --to hf for its language model and decoder"
        )
    return notes


def differences(a: Any, b: Any, where: str = "") -> dict[str, tuple[Any, Any]]:
    """Returns {dotted name: (value in a, value in b)} of all fields that differ."""
    changes: dict[str, tuple[Any, Any]] = {}
    for field in dataclasses.fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if dataclasses.is_dataclass(x) and dataclasses.is_dataclass(y):
            changes |= differences(x, y, f"{where}{field.name}.")
        elif x != y:
            changes[where + field.name] = (x, y)
    return changes


def copy_tokenizer(source: ModelSource, folder: Path) -> None:
    """Writes the LLaMA tokenizer, without the note that `Tokenizer.save` adds."""
    source.tokenizer.save(folder)
    (folder / "emu_tokenizer.json").unlink()


def write_decoder_json(cfg: EmuConfig, folder: Path) -> None:
    """Writes the decoder's JSON files that the folder does not have yet."""
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
    return {
        "embed_dim": vision.clip_width,
        "vision_cfg": {
            "image_size": vision.image_size,
            "layers": vision.layers,
            "width": vision.width,
            "head_width": vision.head_width,
            "mlp_ratio": mlp_ratio(cfg),
            "patch_size": vision.patch_size,
            "eva_model_name": "eva-clip-g-14-x",
            "drop_path_rate": 0,
            "xattn": True,
            "freeze": False,
        },
        "multimodal_cfg": {
            "name": "llama-13B",
            "xattn": True,
            "n_causal": cfg.n_embeddings,
            "freeze": False,
        },
        "vladapter_cfg": {"name": "cformer", "n_causal": cfg.n_embeddings},
    }


def llama_json(cfg: EmuConfig, **more: Any) -> dict[str, Any]:
    """Returns a transformers `config.json`."""
    llama = cfg.llama
    values = {key: getattr(llama, field) for field, key in release_config.LLAMA_JSON.items()}
    later: dict[str, Any] = {}
    if llama.backbone != "llama" or llama.attention_width:
        later["head_dim"] = llama.head_width
    if llama.backbone != "llama" or llama.key_value_heads:
        later["num_key_value_heads"] = llama.kv_heads
    if llama.backbone == "mistral":
        later["sliding_window"] = llama.sliding_window or None
    if scaling := llama.rope_scaling:
        names = release_config.ROPE_JSON.items()
        numbers = {key: getattr(scaling, field) for field, key in names}
        later["rope_scaling"] = {"rope_type": "llama3", **numbers}
    return {
        "architectures": [ARCHITECTURES[llama.backbone]],
        "model_type": llama.backbone,
        "hidden_act": "silu",
        "bos_token_id": cfg.tokens.bos,
        "eos_token_id": cfg.tokens.eos,
        "pad_token_id": cfg.tokens.pad,
        "tie_word_embeddings": llama.tied_embeddings,
        **later,
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
        SchedulerConfig: {},
    }[type(part)]
    values = {key: value for key, value in to_dict(part).items() if value is not None}
    if isinstance(part, SchedulerConfig):
        extra = {"_class_name": release_config.SCHEDULERS[values.pop("sampler")]}
    if isinstance(part, VAEConfig):
        levels = len(part.block_out_channels)
        extra = {k: v[:1] * levels if isinstance(v, list) else v for k, v in extra.items()}
    return extra | values


# --- Folders for other libraries -------------------------------------------------------------


def write_hf(source: ModelSource, folder: Path) -> list[str]:
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
        _copy_decoder_json(source, folder)
    names = {}  # {key in the tables: FOLDER:name}
    dtypes: dict[str, np.dtype] = {}  # by folder
    rows = []
    for row in rows_of(cfg, source.shapes):
        row_names = {key: name for key in row.keys if (name := _hf_name(key))}
        if row_names:
            rows.append(row)
            names |= row_names
            part = row_names[row.keys[0]].split(":")[0]
            dtype = np.dtype(source.shapes[row.path].dtype)
            same = dtypes.setdefault(part, dtype) == dtype
            dtypes[part] = dtype if same else np.dtype(np.float32)
    contents: dict[str, dict[str, tuple[Shape, np.dtype]]] = {part: {} for part in dtypes}
    for row in rows:
        shape = row.release_shape(source.shapes[row.path].shape)
        for key in row.keys:
            part = names[key].split(":")[0]
            contents[part][names[key]] = (shape, dtypes[part])
    files = {
        f"{part}/{file}": shard
        for part, tensors in contents.items()
        for file, shard in tensor_files.split_into_shards(
            folder / part, _STEMS[part], tensors
        ).items()
    }
    writer = tensor_files.ShardedWriter(files, folder)
    with finishing(writer):
        write_tensors(source, rows, names, writer)

    torch_dtype = dtype_name(dtypes["llama"])
    write_json(folder / "llama" / "config.json", llama_json(cfg, torch_dtype=torch_dtype))
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


def _copy_decoder_json(source: ModelSource, folder: Path) -> None:
    """Copies the decoder's JSON files, or writes those that the source lacks.

    Raises:
        UserError: the copied files describe another decoder.
    """
    carried = source.layout.carried if source.layout else {}
    names = ("unet/config.json", "vae/config.json", "scheduler")
    copy_files({name: path for name, path in carried.items() if name in names}, folder)
    write_decoder_json(source.cfg, folder)
    unet, vae, scheduler = release_config.decoder(folder)
    copied = dataclasses.replace(source.cfg, unet=unet, vae=vae, scheduler=scheduler)
    if lost := differences(copied, source.cfg):
        said = "; ".join(f"{name} is {value}, not {there}" for name, (there, value) in lost.items())
        raise UserError(f"the release's own JSON files do not describe this decoder: {said}")


def hf_tensors(
    cfg: EmuConfig, params: Mapping[str, jax.Array | np.ndarray]
) -> dict[str, dict[str, np.ndarray]]:
    """Returns the tensors `write_hf` writes of a model in memory: {folder: {name: tensor}}."""
    rows = {row.path: row for row in rows_of(cfg, params)}

    def read(path: str, layer: int) -> np.ndarray:
        return rows[path].layer(np.asarray(params[path]), layer)

    folders: dict[str, dict[str, np.ndarray]] = {}
    every_layer = ((row, layer) for row in rows.values() for layer in layers(row))
    for key, tensor in release_tensors(every_layer, read):
        if name := _hf_name(key):
            part, name = name.split(":")
            folders.setdefault(part, {})[name] = np.ascontiguousarray(tensor)
    return folders


def _hf_name(key: str) -> str | None:
    """Returns FOLDER:name of a tensor in other libraries' folders, or None if it is left out."""
    if ":" in key:
        return key
    if not key.startswith("decoder.lm.") or "stu_regress_head" in key:
        return None
    if ".lora_" in key:
        return f"lora:{peft_key(key)}"
    return f"llama:{key.removeprefix('decoder.lm.')}"
