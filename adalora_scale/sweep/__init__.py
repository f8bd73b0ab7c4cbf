"""`adalora-scale sweep`: many runs of one config with other values, and the best one.

A trial is an ordinary run in a folder of its own. What is known of a sweep is what stands in its folder, so that the
same command goes on after anything that stopped it.
"""
