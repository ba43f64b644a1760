"""CLIP-T, CLIP-I and DINO: cosine similarities of features, for generated images.

CLIP-T compares an image with its prompt, CLIP-I and DINO compare it with a reference image. The
user provides the networks as folders of transformers (`CLIPModel`, DINO's `ViTModel`). Papers use
`openai/clip-vit-base-patch32` or `-large-patch14`, and `facebook/dino-vits16`. They run in torch.
Figures are means of the cosine, in percent.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from emu_jax.convert.torch_format import torch_or_explain
from emu_jax.data.images import open_image
from emu_jax.errors import UserError
from emu_jax.evaluate.scorers import Scores
from emu_jax.progress import track

BATCH = 32  # images or texts that are computed at once
SMALLEST_NORM = 1e-12  # of two features together; keeps those of zeros from dividing 0 by 0


@dataclasses.dataclass(frozen=True)
class SimilarityOptions:
    """The networks of CLIP-T, CLIP-I and DINO. Without a network its scores are left out."""

    clip: Path | None = None
    dino: Path | None = None

    def __post_init__(self) -> None:
        """Checks that the folders exist.

        Raises:
            UserError: one does not.
        """
        for name, path in (("clip", self.clip), ("dino", self.dino)):
            if path is not None and not (path / "config.json").is_file():
                raise UserError(
                    f"--{name} {path} is not a folder of transformers: it has no config.json"
                )


def clip_t(clip: Path, images: Sequence[Path], texts: Sequence[str]) -> Scores:
    """Returns CLIP-T: the mean similarity of images with their texts.

    Raises:
        UserError: the network cannot be read, or torch is missing.
    """
    network = _Network(clip)
    cosine = _cosine(network.images(images), network.texts(texts))
    return Scores({"CLIP-T": 100 * float(cosine.mean())}, (network.note,))


def clip_i(clip: Path, images: Sequence[Path], references: Sequence[Path]) -> Scores:
    """Returns CLIP-I: the mean similarity of images with their reference images.

    Raises:
        UserError: as `clip_t`.
    """
    return _image_score("CLIP-I", clip, images, references)


def dino(network: Path, images: Sequence[Path], references: Sequence[Path]) -> Scores:
    """Returns the DINO score: as CLIP-I, on the class token of DINO.

    Raises:
        UserError: as `clip_t`.
    """
    return _image_score("DINO", network, images, references)


def _image_score(
    name: str, folder: Path, images: Sequence[Path], references: Sequence[Path]
) -> Scores:
    network = _Network(folder)
    cosine = _cosine(network.images(images), network.images(references))
    return Scores({name: 100 * float(cosine.mean())}, (network.note,))


def _cosine(a: Float[np.ndarray, "N D"], b: Float[np.ndarray, "N D"]) -> Float[np.ndarray, " N"]:
    """Returns the cosine similarity of each pair of rows, and 0 where a row is zero."""
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(1) / np.maximum(norms, SMALLEST_NORM)


class _Network:
    """A folder of transformers that maps images, and CLIP's also texts, to features.

    Raises:
        UserError: the folder cannot be read, or torch is missing.
    """

    def __init__(self, folder: Path) -> None:
        self._torch = torch_or_explain(folder)
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        try:
            kind = json.loads((folder / "config.json").read_text()).get("model_type", "")
            self._model = AutoModel.from_pretrained(folder).eval()
            self._process = AutoImageProcessor.from_pretrained(folder)
            self._is_clip = kind == "clip"
            self._tokenize = AutoTokenizer.from_pretrained(folder) if self._is_clip else None
        except Exception as error:  # a damaged file raises errors of three libraries
            reason = (str(error).strip().split("\n")[0] or type(error).__name__)[:300]
            raise UserError(f"cannot read the network in {folder}: {reason}") from None
        self.note = f"features of {kind} in {folder.name}, resized as its processor does"

    def images(self, paths: Sequence[Path]) -> Float[np.ndarray, "N D"]:
        """Returns the features of image files."""

        def features(batch: Sequence[Path]) -> Any:
            opened: list[Image.Image] = [open_image(p.read_bytes()).convert("RGB") for p in batch]
            pixels = self._process(opened, return_tensors="pt").pixel_values
            if self._is_clip:
                return _tensor(self._model.get_image_features(pixels))
            return self._model(pixels).last_hidden_state[:, 0]

        return self._batched(features, paths, "features of images")

    def texts(self, texts: Sequence[str]) -> Float[np.ndarray, "N D"]:
        """Returns CLIP's features of texts, cut at its maximum length.

        Raises:
            UserError: the network is not CLIP.
        """
        if self._tokenize is None:
            raise UserError("CLIP-T needs CLIP: --clip names a network without a text tower")
        tokenize = self._tokenize

        def features(batch: Sequence[str]) -> Any:
            longest = self._model.config.text_config.max_position_embeddings
            ids = tokenize(
                list(batch), padding=True, truncation=True, max_length=longest, return_tensors="pt"
            )
            return _tensor(self._model.get_text_features(**ids))

        return self._batched(features, texts, "features of texts")

    def _batched(
        self, features: Callable[[Any], Any], inputs: Sequence[Any], name: str
    ) -> Float[np.ndarray, "N D"]:
        batches = [inputs[i : i + BATCH] for i in range(0, len(inputs), BATCH)]
        with self._torch.inference_mode():
            return np.concatenate(
                [
                    features(batch).float().numpy()
                    for batch in track(batches, len(batches), name, "batch")
                ]
            )


def _tensor(output: Any) -> Any:
    """Returns the features of an output: transformers 5 wraps the tensor of earlier versions."""
    return output if hasattr(output, "numpy") else output.pooler_output
