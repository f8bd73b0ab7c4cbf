"""Is this cluster healthy: versions, GPUs, links, disks, limits, before a run finds out.

findings.py    one line of the verdict, and the table
thresholds.py  the limits, read from thresholds.yaml beside it
facts.py       what a rank says of itself, and comparing what all say
gpu.py         ECC, temperature, throttling through NVML
storage.py     disk throughput, a folder seen by all ranks
fabric.py      measuring links and collectives
links.py       which link or host is slow
quick.py       the part that launch/train.py runs first
command.py     the verb
"""
