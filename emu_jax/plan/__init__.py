"""Planning: memory, FLOPs and step time on TPUs that are not attached.

plan.py         compiles a program for a topology and reports its memory and time
hlo.py          FLOPs, HBM bytes and collective bytes of a compiled module
roofline.py     lower bounds on the time of a compiled module
sweep.py        compares settings over topologies
calibration.py  compares predictions with published MFU
"""
