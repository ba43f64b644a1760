"""Generation: text, visual embeddings, images, and sequences of text and images.

api.py     `Emu` and `load`, the public API
prompt.py  prompts as token ids and pixels
text.py    text decoding: sampling and beam search
image.py   painting: N embeddings to an image
mixed.py   continuations in which the model itself may start an image
safety.py  the release's safety checker
files.py   prompts and results as the command line and its batch files spell them
"""
