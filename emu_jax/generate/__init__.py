"""Generation: text, visual embeddings, images, and sequences of text and images.

api.py       `Emu` and `load`, the public API
settings.py  settings of generation, static and dynamic
prompt.py    prompts as token ids and pixels
batching.py  batches of few shapes
text.py      text decoding: sampling, beam search and ranking
logits.py    logits processors and sampling filters
image.py     painting: N embeddings to an image
mixed.py     continuations in which the model itself may start an image
engine.py    continuous batching: requests join and leave a running batch
safety.py    the release's safety checker
cli_io.py    prompts and answers on the command line and in its batch files
"""
