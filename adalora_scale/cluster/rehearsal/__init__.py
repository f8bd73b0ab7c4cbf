"""`adalora-scale rehearse`: the real attach, step, allocation and checkpoint layout of one rank of many, without them.

| file | what |
|---|---|
| `arguments.py`, `command.py`, `table.py` | the command line; the question; what is printed |
| `pretended.py` | being one rank of a group that is not there, on the meta device |
| `counted.py` | counts operations, collectives, bytes and seconds, and answers reads of values that do not exist |
| `rank.py` | one rank: attach, a step, an allocation, the final one |
| `saving.py` | which files it writes, and opens when it resumes |
| `zero.py` | DeepSpeed's optimizers by their partition rules |
"""
