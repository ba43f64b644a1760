"""Planning: memory, FLOPs and step time on TPUs that are not attached.

plan.py         compiles a program for a topology, and reports what it needs
hlo.py          FLOPs, HBM bytes and collective bytes of a compiled module
roofline.py     lower bounds on the time of a compiled module
sweep.py        settings compared over topologies
calibration.py  predictions beside published throughput
"""
