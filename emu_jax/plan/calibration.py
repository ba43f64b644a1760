"""Predicted MFU of runs whose MFU was published, with the settings that they state.

MaxText (AI-Hypercomputer/maxtext, src/maxtext/configs/tpu) publishes the MFU of dense language
models that it calls 16B and 32B. They ran on a v5e pod of 256 chips (v5e/README.md, 16b.sh, 32b.sh)
and on "v5p-128" (v5p/README.md, 32b.sh). v5p slices are named by cores, so v5p-128 has 64 chips.
The model sizes follow from MaxText's `global_parameter_scale`.

Since July 2025 MaxText counts only half of the attention FLOPs under a causal mask. The published
tables are older, so they are taken to count attention in full.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from emu_jax.config import EmuConfig, LlamaConfig, RematConfig
from emu_jax.data.pipeline import DataConfig
from emu_jax.hardware import Topology
from emu_jax.plan.plan import CompiledReport, Report, compiler_flags, plan_in_subprocess
from emu_jax.train.config import MeshConfig, TrainConfig


@dataclasses.dataclass(frozen=True)
class Published:
    """One published run."""

    name: str
    topology: str
    mfu: float
    rows_per_chip: int
    remat: str
    llama: LlamaConfig
    tensor: int = 1

    @property
    def config(self) -> TrainConfig:
        topology = Topology.parse(self.topology)
        return TrainConfig(
            name=self.name,
            objective="text",
            model=EmuConfig(llama=self.llama, unet=None, vae=None),
            data=DataConfig(
                batch_size=self.rows_per_chip * topology.chips, row_tokens=2048, row_images=1
            ),
            mesh=MeshConfig(data=1, tensor=self.tensor),
            remat=RematConfig(llama=self.remat),
        )


_16B = LlamaConfig(
    vocab_size=32000, width=4096, layers=32, heads=64, attention_width=8192, mlp_width=28672
)
_32B = dataclasses.replace(_16B, width=8192)
PUBLISHED = (
    Published("MaxText 16B", "v5e:16x16", 0.6110, 6, "full", _16B),
    Published("MaxText 32B", "v5e:16x16", 0.6686, 4, "full", _32B),
    # MaxText's "minimal" saves more matmul outputs, with the residual stream sharded over `tensor`.
    # Here the residual stream is replicated, which leaves no room for the MLP's outputs.
    Published("MaxText 32B", "v5p:4x4x4", 0.7147, 6, "minimal", _32B, tensor=4),
)


@dataclasses.dataclass(frozen=True)
class Calibration:
    """A published run and its plan.

    Attributes:
        attention: factor of the model FLOPs if causal attention is counted in full.
    """

    run: Published
    report: Report
    attention: float

    def mfu(self) -> dict[str, float]:
        """Returns the predicted MFU at each bound, {} if the program was not compiled."""
        if not isinstance(self.report, CompiledReport):
            return {}
        report = self.report
        assert report.mfu_scheduled is not None  # it was compiled now
        bounds = {
            "serial": report.mfu_serial,
            "scheduled": report.mfu_scheduled,
            "overlap": report.mfu_overlap,
        }
        return {bound: self.attention * mfu for bound, mfu in bounds.items()}

    def to_json(self) -> dict[str, Any]:
        row = {
            "run": self.run.name,
            "topology": self.run.topology,
            "published": self.run.mfu,
            "report": self.report.to_json(),
        }
        row |= {f"mfu_{bound}": mfu for bound, mfu in self.mfu().items()}
        return row | {f"error_{bound}": mfu / self.run.mfu - 1 for bound, mfu in self.mfu().items()}


def calibrate(flags: Path | None = None) -> list[Calibration]:
    """Plans each published run, with attention counted in full.

    Args:
        flags: the script with the compiler's flags (`compiler_flags`).

    Raises:
        UserError: the script fails.
    """
    rows = []
    for run in PUBLISHED:
        cfg = run.config
        topology = Topology.parse(run.topology)
        report = plan_in_subprocess(cfg, topology, flags=compiler_flags(flags, topology))
        llama, tokens = run.llama, cfg.data.row_tokens
        inner = llama.heads * llama.head_width
        half = 6.0 * cfg.data.batch_size * llama.layers * inner * tokens**2
        rows.append(Calibration(run, report, (report.model_flops + half) / report.model_flops))
    return rows


def calibration_table(rows: list[Calibration]) -> str:
    """Formats the rows of `calibrate` as a text table."""
    lines = [
        "run          topology   published  no overlap (error)  scheduled (error)  overlap (error)"
    ]
    for row in rows:
        run, mfu = row.run, row.mfu()
        line = f"{run.name:12} {run.topology:10} {run.mfu:9.3f}"
        if not mfu:
            lines.append(f"{line}  does not fit")
            continue
        for bound in mfu:
            line += f"  {mfu[bound]:10.3f} ({mfu[bound] / run.mfu - 1:+.1%})"
        lines.append(line + ("" if row.report.fits else "  does not fit"))
    return "\n".join(lines)
