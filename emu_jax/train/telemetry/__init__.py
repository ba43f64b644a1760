"""Telemetry of a run: its records, its trackers, its steps in flight, and where its time goes.

tracker.py        `Tracker`: where metrics, images and tables go
files.py          metrics.jsonl, evaluations.jsonl and TensorBoard's event files
wandb_tracker.py  Weights & Biases
trackers.py       opens the trackers of a run
metrics.py        the metrics of training, progress, documents of steps, and readers of these
rows.py           files of JSON lines that a resumed run continues
monitor.py        steps in flight: completion times, metrics, throughput
goodput.py        where a run's time goes: steps, data, checkpoints, compilation
tracing.py        profiler traces of chosen steps
watchdog.py       stack traces when a step takes too long
"""
