"""Writes held-out digits as a small benchmark of lmms-eval and of VLMEvalKit.

    python tools/digits_benchmark.py DIR [--count 50]

DIR/lmms_eval holds two tasks for `--include_path`: `digits` generates a caption, `digits_choice`
compares the likelihoods of the ten words. DIR/LMUData/Digits.tsv holds multiple-choice questions
for VLMEvalKit, which reads it if the variable LMUData names the folder.
"""

import argparse
import base64
import csv
import json
from pathlib import Path

from emu_jax.data.digits import WORDS, digit_images, encode_png

COMMON = """\
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}}}
test_split: test
doc_to_visual: !function digits.visual
doc_to_text: "the digit"
"""
GENERATE = """\
task: digits
output_type: generate_until
doc_to_target: "{{word}}"
generation_kwargs: {max_new_tokens: 4, num_beams: 1, do_sample: false, until: ["\\n"]}
process_results: !function digits.score
metric_list: [{metric: accuracy, aggregation: mean, higher_is_better: true}]
"""
CHOICE = """\
task: digits_choice
output_type: multiple_choice
doc_to_choice: [%s]
doc_to_target: "{{label}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
FUNCTIONS = """\
import base64
import io

from PIL import Image


def visual(doc):
    return [Image.open(io.BytesIO(base64.b64decode(doc["image"]))).convert("RGB")]


def score(doc, results):
    return {"accuracy": float(doc["word"] in results[0].split())}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--count", type=int, default=50, help="digits (default: %(default)s)")
    args = parser.parse_args()
    images, labels = digit_images("heldout")
    rows = [
        {"image": base64.b64encode(encode_png(image)).decode(), "label": int(label)}
        for image, label in zip(images[: args.count], labels[: args.count], strict=True)
    ]
    tasks, tables = args.directory / "lmms_eval", args.directory / "LMUData"
    tasks.mkdir(parents=True, exist_ok=True)
    tables.mkdir(exist_ok=True)
    listing = tasks.resolve() / "digits.jsonl"
    listing.write_text(
        "".join(json.dumps({**row, "word": WORDS[row["label"]]}) + "\n" for row in rows)
    )
    common = COMMON.format(file=listing)
    (tasks / "digits.yaml").write_text(GENERATE + common)
    (tasks / "digits_choice.yaml").write_text(CHOICE % ", ".join(WORDS) + common)
    (tasks / "digits.py").write_text(FUNCTIONS)
    letters = "ABCDEFGHIJ"
    with open(tables / "Digits.tsv", "w", newline="") as file:
        table = csv.writer(file, delimiter="\t")
        table.writerow(["index", "image", "question", *letters, "answer"])
        for number, row in enumerate(rows):
            question = "Which digit does the image show?"
            table.writerow([number, row["image"], question, *WORDS, letters[row["label"]]])


if __name__ == "__main__":
    main()
