"""Captioning: COCO (Karpathy's test split), NoCaps, Flickr30k."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from emu_jax.errors import UserError
from emu_jax.evaluate.scorers import Scores, captions
from emu_jax.evaluate.tasks.base import (
    CAPTION,
    Example,
    Folder,
    Item,
    Mode,
    PreviousAnswers,
    ScoringContext,
    Stage,
    Task,
    TurnWording,
    by_id,
    clean_caption,
    continuing,
    layout,
    read_json,
    references,
)

DESCRIBE = continuing("{image} describing the image in detail. the image shows")
DESCRIBE_INSTRUCT = TurnWording(
    "{image} please provide an accurate and concise description of the given image.",
    "the image depicts a photo of",
)


class Captioning(Task):
    """One caption for each image. Result file: `[{"image_id", "caption"}]`, COCO's format."""

    metric = "CIDEr"

    def stages(self, mode: Mode, in_context: bool) -> tuple[Stage, ...]:
        wording = DESCRIBE if mode == "pretrain" else DESCRIBE_INSTRUCT.wording(mode)
        return (Stage("caption", wording.spell, CAPTION),)

    def answer(self, item: Item, answers: PreviousAnswers) -> str:
        return clean_caption(answers["caption"])

    def result(self, items: Sequence[Item], answers: Sequence[Any]) -> Any:
        return [
            {"image_id": item.fields["image_id"], "caption": answer}
            for item, answer in zip(items, answers, strict=True)
        ]

    def score(
        self, items: Sequence[Item], answers: Sequence[Any], context: ScoringContext
    ) -> Scores | None:
        by_item = references(items)
        return None if by_item is None else captions.score(by_item, by_id(items, answers))


class Karpathy(Captioning):
    """Karpathy's splits, read from his `dataset_*.json` or, for COCO, from LAVIS's files.

    Args:
        folders: directories that may hold the images.
        lavis: name of LAVIS's file of a split, or "".
    """

    splits = ("test", "val")
    split = "test"

    def __init__(
        self,
        name: str,
        title: str,
        file: str,
        folders: Sequence[str],
        paper: Mapping[str, float],
        source: str,
        lavis: str = "",
    ) -> None:
        self.name, self.title, self.paper, self.source = name, title, paper, source
        self._file, self._folders, self._lavis = file, folders, lavis

    def items(self, data: Folder, split: str, seed: int) -> list[Item]:
        return [
            Item(str(n), path, fields={"image_id": n, "answers": captions})
            for n, path, captions in self._read(data, split)
        ]

    def examples(self, data: Folder) -> list[Example]:
        return [
            Example(path, clean_caption(captions[0]))
            for _, path, captions in self._read(data, "train")
            if captions
        ]

    def _read(self, data: Folder, split: str) -> list[tuple[int, Path, list[str]]]:
        lavis = data.find(self._lavis.format(split=split)) if self._lavis else None
        if lavis is not None:
            return self._read_lavis(data, lavis)
        names = [self._file, *([self._lavis.format(split=split)] if self._lavis else [])]
        path = data.file(*names)
        wanted = {"train", "restval"} if split == "train" else {split}
        with layout(path):
            rows = [row for row in read_json(path)["images"] if row["split"] in wanted]
            return [
                (
                    row.get("cocoid", row["imgid"]),
                    self._image_file(data, row.get("filepath", ""), row["filename"]),
                    [sentence["raw"] for sentence in row["sentences"]],
                )
                for row in rows
            ]

    def _read_lavis(self, data: Folder, path: Path) -> list[tuple[int, Path, list[str]]]:
        # Test files have one row per image, training files one per caption.
        captions_of: dict[str, list[str]] = {}
        with layout(path):
            for row in read_json(path):
                captions = row["caption"]
                captions_of.setdefault(row["image"], []).extend(
                    [captions] if isinstance(captions, str) else captions
                )
            return [
                (
                    int(Path(name).stem.split("_")[-1]),
                    self._image_file(data, *_split(name)),
                    captions,
                )
                for name, captions in captions_of.items()
            ]

    def _image_file(self, data: Folder, folder: str, name: str) -> Path:
        return data.folder(*([folder] if folder else self._folders)) / name


def _split(name: str) -> tuple[str, str]:
    folder, _, file = name.rpartition("/")
    return folder, file


class NoCaps(Captioning):
    """NoCaps, also scored by domain. Only the captions of the validation split are public."""

    name, title = "nocaps", "NoCaps"
    paper = {"Emu": 96.5}
    split, splits = "val", ("val", "test")
    source = "nocaps.org"

    def items(self, data: Folder, split: str, seed: int) -> list[Item]:
        names = (f"nocaps_{split}_4500_captions.json", f"nocaps_{split}_image_info.json")
        path = data.file(*names)
        folder = data.folder(split, "nocaps_" + split, "images")
        with layout(path):
            content = read_json(path)
            captions: dict[str, list[str]] = {}
            for row in content.get("annotations", ()):
                captions.setdefault(str(row["image_id"]), []).append(row["caption"])
            return [
                Item(
                    str(row["id"]),
                    folder / row["file_name"],
                    fields={
                        "image_id": row["id"],
                        "domain": row.get("domain", ""),
                        "answers": captions.get(str(row["id"]), []),
                    },
                )
                for row in content["images"]
            ]

    def examples(self, data: Folder) -> list[Example]:
        """Returns COCO's training split, since NoCaps has none."""
        if data.find("dataset_coco.json", "coco_karpathy_train.json") is None:
            raise UserError(
                f"nocaps has no training split and {data.root} no COCO captions: give --support "
                "DIR, a folder in the layout of coco_caption"
            )
        return COCO.examples(data)

    def score(
        self, items: Sequence[Item], answers: Sequence[Any], context: ScoringContext
    ) -> Scores | None:
        whole = super().score(items, answers, context)
        if whole is None:
            return None
        values = dict(whole.values)
        for domain in ("in-domain", "near-domain", "out-domain"):
            some = [i for i, item in enumerate(items) if item.fields["domain"] == domain]
            if some:
                part = super().score([items[i] for i in some], [answers[i] for i in some], context)
                assert part is not None
                values[f"CIDEr_{domain}"] = part.values["CIDEr"]
        return Scores(values, whole.notes, whole.per_item)


COCO = Karpathy(
    "coco_caption",
    "COCO captions (Karpathy test)",
    "dataset_coco.json",
    ("val2014",),
    {"Emu": 112.4, "Emu*": 120.4, "Emu-I": 117.7},
    "cs.stanford.edu/people/karpathy/deepimagesent, images cocodataset.org",
    lavis="coco_karpathy_{split}.json",
)
FLICKR = Karpathy(
    "flickr30k",
    "Flickr30k (Karpathy test)",
    "dataset_flickr30k.json",
    ("flickr30k-images", "flickr30k_images", "images"),
    {"Emu": 72.0},
    "cs.stanford.edu/people/karpathy/deepimagesent, images shannon.cs.illinois.edu",
)
