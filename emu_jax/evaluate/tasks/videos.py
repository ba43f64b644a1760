"""Questions about a video: MSVD-QA, MSRVTT-QA, NExT-QA (open-ended).

As in the release, a video is shown as 8 frames spread over it, each as an image
(`Emu1/utils.py: process_video`).
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from emu_jax.data.sources.dialogues import VIDEO_SYSTEM
from emu_jax.data.sources.video import VIDEO_SUFFIXES
from emu_jax.errors import UserError
from emu_jax.evaluate.scorers import Scores, vqa
from emu_jax.evaluate.tasks.base import (
    ANSWER,
    Folder,
    Item,
    Mode,
    ScoringContext,
    Stage,
    TurnWording,
    by_id,
    field,
    layout,
    read_json,
)
from emu_jax.evaluate.tasks.vqa import ASK, QuestionAnswering

# The release has a system message for videos and a prompt for questions, but no task with both.
_INSTRUCT = TurnWording(
    ASK.replace("of the image", "of the video") + "{question}", "the answer is:", VIDEO_SYSTEM
)


class VideoAnswering(QuestionAnswering):
    """`QuestionAnswering` with the frames of a video in place of an image."""

    def stages(self, mode: Mode, in_context: bool) -> tuple[Stage, ...]:
        if mode != "pretrain":
            return (Stage("answer", _INSTRUCT.wording(mode).spell, ANSWER),)
        return super().stages(mode, in_context)


class XuVideoQA(VideoAnswering):
    """MSVD-QA and MSRVTT-QA in their authors' layout (Xu et al. 2017)."""

    split, splits = "test", ("test", "val")
    source = "github.com/xudejing/video-question-answering"

    def __init__(self, name: str, title: str, paper: Mapping[str, float]) -> None:
        self.name, self.title, self.paper = name, title, paper

    def items(self, data: Folder, split: str, seed: int) -> list[Item]:
        path = data.file(f"{split}_qa.json")
        videos = VideoFiles(data)
        with layout(path):
            return [
                Item(
                    str(row["id"]),
                    videos(row["video_id"]),
                    row["question"],
                    fields={"question_id": row["id"], "answers": [row["answer"]]},
                )
                for row in read_json(path)
            ]

    def score(
        self, items: Sequence[Item], answers: Sequence[Any], context: ScoringContext
    ) -> Scores | None:
        right = by_id(items, (item.fields["answers"][0] for item in items))
        return vqa.exact(right, by_id(items, answers))


class VideoFiles:
    """Maps video numbers to files: `video7010.mp4`, `vid1234.avi`, or the name that
    `youtube_mapping.txt` gives a number."""

    def __init__(self, data: Folder) -> None:
        self.folder = data.folder("video", "videos", "TestVideo")
        self.names: dict[str, str] = {}
        mapping = data.find("youtube_mapping.txt")
        if mapping is not None:
            with layout(mapping):
                lines = mapping.read_text(encoding="utf-8").splitlines()
                pairs = [line.split() for line in lines if line.strip()]
                self.names = {pair[1].removeprefix("vid"): pair[0] for pair in pairs}
        # List the directory once: it may hold ten thousand videos.
        self.files = {
            p.stem: p for p in self.folder.iterdir() if p.suffix.lower() in VIDEO_SUFFIXES
        }

    def __call__(self, number: Any) -> Path:
        names = (self.names.get(str(number)), f"video{number}", f"vid{number}", str(number))
        for name in names:
            if name in self.files:
                return self.files[name]
        wanted = next(name for name in names if name)
        raise UserError(f"{self.folder} has no video {wanted} ({', '.join(VIDEO_SUFFIXES)})")


class NExTQA(VideoAnswering):
    """Open-ended answers, scored by WUPS.

    Result file: `{video: {qid: answer}}`, the format of the authors' `eval_oe.py`.
    """

    name, title, metric = "nextqa", "NExT-QA (open-ended)", "WUPS"
    paper = {"Emu": 19.6, "Emu*": 23.4, "Emu-I": 5.8, "Emu-I*": 19.9}
    split, splits = "test", ("test", "val")
    source = "github.com/doc-doc/NExT-OE, videos github.com/doc-doc/NExT-QA"

    def items(self, data: Folder, split: str, seed: int) -> list[Item]:
        path = data.file(f"{split}.csv")
        folders = _table(data, "map_vid_vidorID.json")
        folder = data.folder("videos", "NExTVideo", "video")
        added = _table(data, f"add_reference_answer_{split}.json")
        items = []
        with layout(path), path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                video, qid = row["video"], row["qid"]
                answers = [row["answer"]]
                if qid in added.get(video, {}):
                    answers.append(added[video][qid])
                items.append(
                    Item(
                        f"{video}_{qid}",
                        folder / f"{folders.get(video, video)}.mp4",
                        # The file has neither capitals nor question marks.
                        row["question"].removesuffix("?") + "?",
                        fields={
                            "video": video,
                            "qid": qid,
                            "answers": answers,
                            "type": row["type"],
                        },
                    )
                )
        return items

    def result(self, items: Sequence[Item], answers: Sequence[Any]) -> Any:
        result: dict[str, dict[str, str]] = {}
        for item, answer in zip(items, answers, strict=True):
            result.setdefault(item.fields["video"], {})[item.fields["qid"]] = answer
        return result

    def score(
        self, items: Sequence[Item], answers: Sequence[Any], context: ScoringContext
    ) -> Scores | None:
        right, types = field(items, "answers"), field(items, "type")
        return vqa.wups(right, by_id(items, answers), question_types=types)


def _table(data: Folder, name: str) -> dict[str, Any]:
    """Returns a JSON object, or an empty one if the file does not exist."""
    path = data.find(name)
    if path is None:
        return {}
    with layout(path):
        return dict(read_json(path).items())


MSVDQA = XuVideoQA(
    "msvdqa",
    "MSVD-QA",
    {"Emu": 18.8, "Emu*": 34.3, "Emu-I": 34.6, "Emu-I*": 37.0, "Emu2-Chat": 49.0},
)
MSRVTTQA = XuVideoQA(
    "msrvttqa",
    "MSRVTT-QA",
    {
        "Emu": 8.3,
        "Emu*": 17.8,
        "Emu-I": 16.8,
        "Emu-I*": 21.2,
        "Emu 4-shot": 21.8,
        "Emu2-Chat": 31.4,
    },
)
