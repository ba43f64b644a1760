"""Raw data to filtered ArrayRecord files: `emu-jax data build`.

build.py  shards, worker processes, resumption, and the manifest
clean.py  filters, and encoding of images
"""
