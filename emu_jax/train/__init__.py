"""Training: configuration, objectives, the step, the loop, and telemetry.

config.py       `TrainConfig`: one stage of training
config_file.py  configs/*.py, and overrides on the command line
loop.py         `train`: the loop over the steps of a run
run.py          `Run`: where a run starts, what it opens, and what it saves
run_data.py     the batches that the loop reads, and records of their documents
step.py         the state, the gradients and the update of a step
objectives.py   the module, the data and the loss of each stage
optimizer.py    AdamW with a learning rate per group of parameters
moments.py      Adam's moments in 8 bits
evaluation.py   held-out evaluations: the interface, when they run, their records
held_out.py     held-out losses by source
samples.py      what a model in training generates from held-out documents
sheets.py       contact sheets of such samples
report.py       report.html: curves, held-out figures, contact sheets
warm_start.py   initial weights from other runs
checkpoints.py  checkpoints during a run
lock.py         one job at a time in a run directory
distributed.py  jobs with several processes: their start, global batches
precompute.py   the decoder's conditions and latents, computed once
flops.py        model FLOPs of a step
device_memory.py  bytes per device of a step, without compiling it
dry_run.py      the figures of a run before it starts, and everything that would stop it
signals.py      requests that reach a run as signals
telemetry/      records, trackers, throughput, goodput, traces, watchdog
"""
