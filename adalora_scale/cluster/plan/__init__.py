"""Does a run fit, and how long does a step take, before any GPU is rented.

request.py    what is asked, the hardware's figures
shapes.py     a model's config.json, or a shipped shape of a hub id
model.py      the run's real model on the meta device, and what its tensors are for
trace.py      one step of it with two blocks under fake tensors: what stays, what peaks
weights.py    bytes a rank holds between steps, for each engine
memory.py     the parts of the peak, for each engine
speed.py      FLOPs, traffic, seconds
advice.py     what fits: micro-batch, number of GPUs
planner.py    the comparison of engines, and ways out
table.py      for people
command.py    the verb
"""
