"""Evaluation: the paper's benchmarks, the demo, and parity with the released code.

run.py           `emu-jax eval`: a task from its official files to its official result file
tasks/           one class per benchmark
scorers/         metrics: captions, answers, rankings, Fréchet distance
fewshot.py       selection of the examples before a question
results_page.py  the page of a task's results
verify.py        `emu-jax verify`: a checkpoint against recorded outputs of the released code
demo.py          `emu-jax demo`: training on handwritten digits, and scores
instruct.py      scores of an instruction-tuned model of the digits
report.py        report.html, the demo's page
"""
