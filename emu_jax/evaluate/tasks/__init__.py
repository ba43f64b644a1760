"""The benchmarks, by the names that `--task` takes: those of the Emu paper, and text to image."""

from __future__ import annotations

from emu_jax.evaluate.tasks.base import Task
from emu_jax.evaluate.tasks.captions import COCO, FLICKR, NoCaps
from emu_jax.evaluate.tasks.drawing import CocoDrawing
from emu_jax.evaluate.tasks.mmvet import MMVet
from emu_jax.evaluate.tasks.text_to_image import WISE, DPGBench, GenEval
from emu_jax.evaluate.tasks.videos import MSRVTTQA, MSVDQA, NExTQA
from emu_jax.evaluate.tasks.visdial import VisDial
from emu_jax.evaluate.tasks.vqa import OKVQA, VQAV2, VizWiz

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        COCO,
        VQAV2,
        OKVQA,
        VizWiz(),
        VisDial(),
        CocoDrawing(),
        MMVet(),
        MSVDQA,
        MSRVTTQA,
        NExTQA(),
        NoCaps(),
        FLICKR,
        GenEval(),
        DPGBench(),
        WISE(),
    )
}
