"""`emu-jax eval`: the benchmarks of the paper.

run.py           runs a task from its official files to its official result file
answering.py     asks a model the items of a task
in_training.py   tasks as evaluations of a model in training
tasks/           one class per benchmark
scorers/         metrics: captions, answers, rankings, Fréchet distance
fewshot.py       selection of the examples before a question
harnesses/       adapters for lmms-eval and VLMEvalKit
results_page.py  the page of a task's results
"""
