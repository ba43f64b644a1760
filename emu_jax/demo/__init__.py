"""`emu-jax demo`: trains a small Emu on handwritten digits and scores it.

demo.py    the stages, the scores, and the judge that recognizes digits
report.py  report.html, the page of a demo
"""
