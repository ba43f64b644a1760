"""Work on whole sources before a run: `emu-jax data build` and `emu-jax data index`.

build.py     raw data to filtered ArrayRecord files: shards, resumption, and the manifest
clean.py     filters, and encoding of images
indexing.py  indexes and token counts, made in parallel
runners.py   independent tasks on processes of this machine, or on Apache Beam
"""
