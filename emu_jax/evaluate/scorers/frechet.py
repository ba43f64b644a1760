"""The Fréchet distance between two sets of images, on the features of an Inception network.

Heusel et al., arXiv:1706.08500. Each set of features is modeled as a Gaussian, and

    d^2 = |m_a - m_b|^2 + Tr S_a + Tr S_b - 2 Tr (S_a S_b)^(1/2)

The user provides the network: the 2015 Inception as TorchScript (`inception-2015-12-05.pt` of
StyleGAN and clean-fid) or any other that maps images to features.
"""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Sequence, Sized
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float, Num, UInt8
from PIL import Image

from emu_jax.convert.torch_format import torch_or_explain
from emu_jax.data.images import open_image
from emu_jax.errors import UserError
from emu_jax.evaluate.scorers import Scores, warned
from emu_jax.progress import track
from emu_jax.storage import writing

Resize = Literal["network", "clean"]
_SIZE = 299  # input size of the 2015 Inception


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of features.

    Attributes:
        count: the number of images; None if unknown, as in statistics files.
    """

    mean: Float[np.ndarray, " D"]
    covariance: Float[np.ndarray, "D D"]
    count: int | None = None


class Moments:
    """Streaming mean and covariance of features, in float64.

    Batches are merged by Chan et al.'s update, which holds a single matrix and stays accurate for a
    large mean.
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean = np.zeros(width)
        self._scatter = np.zeros((width, width))  # sum of outer products about the mean

    def add(self, features: Num[np.ndarray, "B D"]) -> None:
        """Adds the features of a batch of images."""
        features = np.asarray(features, np.float64)
        if not len(features):
            return
        count, mean = len(features), features.mean(0)
        total = self.count + count
        centred, apart = features - mean, mean - self.mean
        self._scatter += centred.T @ centred
        self._scatter += np.outer(apart, apart) * (self.count * count / total)
        self.mean = self.mean + apart * (count / total)
        self.count = total

    def gaussian(self) -> Gaussian:
        """Returns the mean and the unbiased covariance (divided by N - 1).

        Raises:
            UserError: there are fewer than two images.
        """
        if self.count < 2:
            raise UserError(f"a covariance needs at least two images, not {self.count}")
        return Gaussian(self.mean.copy(), self._scatter / (self.count - 1), self.count)


def distance(a: Gaussian, b: Gaussian) -> float:
    """Returns the squared Fréchet distance, the FID of two sets.

    Tr (S_a S_b)^(1/2) is the sum of the singular values of R_a^T R_b for any S = R R^T. Computed
    this way it is real and needs no inverse, so singular covariances are allowed.

    Raises:
        UserError: the widths differ, or a figure is not finite.
    """
    if a.mean.shape != b.mean.shape:
        raise UserError(
            f"features of width {len(a.mean)} cannot be compared with features of width "
            f"{len(b.mean)}: both need the same network"
        )
    for gaussian in (a, b):
        if not (np.isfinite(gaussian.mean).all() and np.isfinite(gaussian.covariance).all()):
            raise UserError("the mean or the covariance of features is not finite")
    apart = a.mean - b.mean
    spread = np.trace(a.covariance) + np.trace(b.covariance)
    common = np.linalg.svd(_root(a.covariance).T @ _root(b.covariance), compute_uv=False).sum()
    return float(apart @ apart + spread - 2 * common)


def _root(covariance: Float[np.ndarray, "D D"]) -> Float[np.ndarray, "D R"]:
    """Returns R with R R^T = covariance.

    Drops directions of pure rounding error: their square root would be 1e-8 of the largest, not
    1e-16.
    """
    values, vectors = np.linalg.eigh(covariance)
    kept = values > values[-1] * len(values) * np.finfo(np.float64).eps
    return vectors[:, kept] * np.sqrt(values[kept])


def load_statistics(path: Path) -> Gaussian:
    """Reads the mean `mu` and covariance `sigma` of reference images from an .npz file, the format
    of pytorch-fid and the TTUR release.

    Raises:
        UserError: the file is missing, is not such an archive, or the shapes do not fit.
    """
    try:
        with path.open("rb") as file, np.load(file) as stored:
            mean, covariance = (np.asarray(stored[key], np.float64) for key in ("mu", "sigma"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except KeyError as error:
        raise UserError(f"{path} has no {error}: reference statistics are mu and sigma") from None
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"cannot read {path} as an .npz: {error}") from None
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise UserError(f"{path}: mu is {mean.shape} and sigma {covariance.shape}")
    return Gaussian(mean, covariance)


def save_statistics(gaussian: Gaussian, path: Path) -> None:
    """Writes a file for `load_statistics`, atomically."""
    with writing(path, shared=True) as temporary, temporary.open("wb") as file:
        np.savez(file, mu=gaussian.mean, sigma=gaussian.covariance)


class Inception:
    """Computes features of images with a TorchScript network.

    Args:
        path: the TorchScript file. The network takes images [N 3 H W] with values 0 to 255 and
            returns features [B D]. If its `forward` has an argument `return_features`, it is set.
        resize: the preprocessing. `network` passes uint8 images unchanged, and the network resizes
            them. `clean` resizes to 299 x 299 in float32 with PIL's bicubic filter.

    Raises:
        UserError: `path` is None or missing, torch is not installed, or the file is not
            TorchScript.
    """

    def __init__(self, path: Path | None, resize: Resize = "network") -> None:
        if path is None:
            raise UserError(
                "FID needs the Inception network, which is not included: give the TorchScript "
                "inception-2015-12-05.pt that StyleGAN and clean-fid use"
            )
        if resize not in get_args(Resize):
            raise UserError(f"images are resized by {get_args(Resize)}, not {resize!r}")
        if not path.is_file():
            raise UserError(f"{path} does not exist")
        self._torch = torch_or_explain(path)
        self._device = "cuda" if self._torch.cuda.is_available() else "cpu"
        self._resize = resize
        try:
            with warnings.catch_warnings():
                # torch.jit is deprecated, but the standard FID network is a torch.jit file.
                warnings.simplefilter("ignore", DeprecationWarning)
                self._network = self._torch.jit.load(path, map_location=self._device).eval()
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{path} is not TorchScript (a state dict is not): {reason}") from None
        arguments = {a.name for a in self._network.forward.schema.arguments}
        self._arguments = {"return_features": True} if "return_features" in arguments else {}
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        way = {
            "network": "resized by it (for the 2015 Inception: bilinearly, not antialiased)",
            "clean": "first resized by PIL to 299 x 299 (bicubic, antialiased; as clean-fid does)",
        }[resize]
        self.note = f"features by {path.name} (sha256 {digest[:12]}), images {way}"

    def __call__(self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]]) -> Float[np.ndarray, "B D"]:
        """Returns the features of images, which may differ in size.

        Raises:
            UserError: the network does not return one row of features per image.
        """
        torch = self._torch
        entering = [_clean(p) for p in images] if self._resize == "clean" else images
        features: list[np.ndarray] = [np.zeros(0)] * len(entering)
        for shape in dict.fromkeys(p.shape for p in entering):
            at = [i for i, p in enumerate(entering) if p.shape == shape]
            batch = np.stack([entering[i].transpose(2, 0, 1) for i in at])
            with torch.inference_mode():
                output = self._network(torch.from_numpy(batch).to(self._device), **self._arguments)
            values = output.float().cpu().numpy()
            if values.ndim != 2 or len(values) != len(at):
                raise UserError(
                    f"the Inception network gave {values.shape} for {len(at)} images, not a row "
                    "of features for each"
                )
            for i, row in zip(at, values, strict=True):
                features[i] = row
        return np.stack(features)


def _clean(image: UInt8[np.ndarray, "Hh Ww 3"]) -> Float[np.ndarray, "299 299 3"]:
    """Resizes as clean-fid does: each channel in float32, clipped but not rounded."""
    channels = [
        Image.fromarray(np.ascontiguousarray(image[..., c], np.float32)).resize(
            (_SIZE, _SIZE), Image.Resampling.BICUBIC
        )
        for c in range(3)
    ]
    return np.stack([np.asarray(c) for c in channels], -1).clip(0, 255)


def moments(
    images: Iterable[Path | UInt8[np.ndarray, "_ _ 3"]],
    network: Inception,
    *,
    what: str = "images",
    batch: int = 32,
) -> Moments:
    """Computes the mean and covariance of the features of images.

    The images are files, which are read one batch at a time, or uint8 arrays.

    Raises:
        UserError: there are no images, or one cannot be read.
    """
    seen: Moments | None = None
    pending: list[np.ndarray] = []

    def flush() -> None:
        nonlocal seen
        features = network(pending)
        seen = seen or Moments(features.shape[1])
        seen.add(features)
        pending.clear()

    total = len(images) if isinstance(images, Sized) else None
    for image in track(images, total, f"features of {what}", "image"):
        pending.append(_read(image) if isinstance(image, Path) else image)
        if len(pending) == batch:
            flush()
    if pending:
        flush()
    if seen is None:
        raise UserError(f"there are no {what} to take features of")
    return seen


def _read(path: Path) -> UInt8[np.ndarray, "Hh Ww 3"]:
    return np.array(open_image(path).convert("RGB"))


def score(generated: Gaussian, reference: Gaussian, notes: Sequence[str] = ()) -> Scores:
    """Returns `FID`, the distance of generated images from real ones.

    Args:
        notes: notes to add, such as `Inception.note`.

    Returns:
        The distance, with a note of the numbers of images. FID falls as they grow, so figures for
        different numbers of images are not comparable.

    Raises:
        UserError: the feature widths differ, or a figure is not finite.
    """
    counts = [f"{g.count:,}" if g.count else "an unknown number of" for g in (generated, reference)]
    said = [f"{counts[0]} images against {counts[1]} real ones", *notes]
    if generated.count and generated.count <= len(generated.mean):
        said.append(
            warned(
                f"FID of {generated.count:,} images over {len(generated.mean):,} features is of a "
                "singular covariance: it compares with no published figure"
            )
        )
    return Scores({"FID": distance(generated, reference)}, tuple(said))
