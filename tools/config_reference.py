"""Writes docs/config.md: every key of a training config, from the dataclasses that define it.

    python tools/config_reference.py > docs/config.md

The meaning of a key is the comment beside or above its field, or its entry under `Attributes:`.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# (file, class, the key that holds it in a training config)
CLASSES = (
    ("train/config.py", "TrainConfig", ""),
    ("train/config.py", "OptimizerConfig", "optimizer"),
    ("train/config.py", "GroupConfig", "optimizer.groups.N"),
    ("train/config.py", "MeshConfig", "mesh"),
    ("train/config.py", "EvalConfig", "eval.N"),
    ("train/config.py", "WandbConfig", "wandb"),
    ("config.py", "RematConfig", "remat"),
    ("config.py", "MatmulDtypeConfig", "matmul_dtype"),
    ("data/config.py", "DataConfig", "data"),
    ("data/sources/open.py", "SourceConfig", "data.sources.N"),
    ("config.py", "EmuConfig", "model"),
    ("config.py", "VisionConfig", "model.vision"),
    ("config.py", "CFormerConfig", "model.cformer"),
    ("config.py", "PoolingConfig", "model.pooling"),
    ("config.py", "LlamaConfig", "model.llama"),
    ("config.py", "LoraConfig", "model.llama.lora"),
    ("config.py", "RopeScalingConfig", "model.llama.rope_scaling"),
    ("config.py", "TokenIds", "model.tokens"),
    ("config.py", "UNetConfig", "model.unet"),
    ("config.py", "VAEConfig", "model.vae"),
    ("config.py", "SchedulerConfig", "model.scheduler"),
)
INTRO = """# Config reference

Every key of a file in `configs/`, with its type, default and meaning. `tools/config_reference.py`
writes this page from the dataclasses. A key on the command line overrides the file:

```sh
source .venv/bin/activate
emu-jax train --config configs/digits.py --workdir runs/digits --config.data.batch_size=64
```

`N` counts the entries of a tuple from 0. [data.md](data.md) has examples of sources.
"""

Row = tuple[str, str, str, str]  # key, type, default, meaning


def comments(lines: list[str], node: ast.AnnAssign) -> str:
    """Returns the comment block above a field, then the comment beside it."""
    above = node.lineno - 1
    while lines[above - 1].strip().startswith("#"):
        above -= 1
    block = [line.strip().lstrip("# ") for line in lines[above : node.lineno - 1]]
    end = lines[node.end_lineno - 1][node.end_col_offset :]
    beside = end.partition("#")[2].strip()
    return " ".join(filter(None, [*block, beside]))


def attributes(docstring: str) -> dict[str, str]:
    """Returns the entries under `Attributes:`."""
    section = re.search(r"^Attributes:\n((?:[ ]+.*\n?|\n)+)", docstring, re.MULTILINE)
    found = re.findall(r"^    (\w+): ((?:.|\n(?=        ))*)", section[1] if section else "", re.M)
    return {name: " ".join(text.split()) for name, text in found}


def rows(file: str, name: str) -> tuple[str, list[Row]]:
    """Returns the summary of a dataclass and the rows of its fields."""
    text = (ROOT / "emu_jax" / file).read_text()
    (cls,) = (
        node
        for node in ast.parse(text).body
        if isinstance(node, ast.ClassDef) and node.name == name
    )
    docstring = ast.get_docstring(cls) or ""
    told = attributes(docstring)
    result = []
    for node in cls.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            if ast.unparse(node.annotation).startswith("ClassVar"):
                continue
            key = node.target.id
            default = ast.unparse(node.value) if node.value else ""
            default = re.sub(r"^dataclasses\.field\(default_factory=(lambda: )?", "", default)
            if default != (ast.unparse(node.value) if node.value else ""):
                default = default.removesuffix(")")
                default = "{}" if default == "dict" else default
            meaning = comments(text.splitlines(), node) or told.get(key, "")
            result.append((key, ast.unparse(node.annotation), default, meaning))
    return " ".join(docstring.split("\n\n")[0].split()), result


def page() -> str:
    parts = [INTRO]
    for file, name, place in CLASSES:
        summary, fields = rows(file, name)
        title = f"`{place}`" if place else "Top level"
        parts.append(f"## {title}\n\n`{name}` in `emu_jax/{file}`. {summary}\n")
        lines = ["| Key | Type | Default | Meaning |", "|---|---|---|---|"]
        for key, kind, default, meaning in fields:
            cells = [f"`{cell}`" if cell else "" for cell in (key, kind, default)] + [meaning]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    sys.stdout.write(page())
