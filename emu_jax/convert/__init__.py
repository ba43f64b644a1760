"""Conversion between run directories, the release's files, and those of other libraries.

engine.py   `emu-jax convert`: a release to a run directory, and back
tables.py   one invertible table per tower: parameters and the release's tensors
source.py   parameters read from a release or a run directory, adapters merged on request
sizes.py    the configuration of a release, inferred from its JSON files and shapes
files.py    tensor files, read and written one tensor at a time
arrays.py   arrays of a checkpoint, written and read one layer at a time
export.py   folders for transformers, diffusers and peft
parents.py  `emu-jax init`: a fresh Emu from LLaMA, EVA-CLIP and Stable Diffusion
"""
