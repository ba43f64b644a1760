"""Conversion between run directories, the release's files, and those of other libraries.

convert.py            `emu-jax convert`: a release to a run directory, and back
init.py               `emu-jax init`: a fresh Emu from LLaMA, EVA-CLIP and Stable Diffusion
source.py             parameters read from a release or a run directory, adapters merged on request
export.py             the release's own files, and folders for transformers, diffusers and peft
layouts.py            the layouts of Emu2's releases: native files, and folders as on the Hub
release_config.py     the configuration of a release, inferred from its JSON files and shapes
tables.py             one invertible table per tower: parameters and the release's tensors
checkpoint_arrays.py  arrays of a checkpoint, written and read one layer at a time
tensor_files.py       files of tensors, read and written one tensor at a time
torch_format.py       torch's files, read and written without torch
tensors.py            dtypes, mapped files, copies in blocks
"""
