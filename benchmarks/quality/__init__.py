"""Does adaptive rank beat a tuned LoRA at equal parameters? Tasks × methods × budgets × seeds, through real trainers.

    python -m benchmarks.quality run --shared ../shared     every cell that is missing, resumable
    python -m benchmarks.quality table                      the table, from the cells that are there
    python -m benchmarks.quality curve --budgets 8          one run's adapter cut to ten sizes, no training after
    python -m benchmarks.quality rates                      every trial of a learning rate

Rules: every method gets the same learning rates to try on the validation split, the same steps and tokens, and ends
within 1 % of the same number of adapter parameters. The setting that was best on validation runs on every seed and is
the only one that sees the test split. Losses are sums over tokens divided by their number.
"""
