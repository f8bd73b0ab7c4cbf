"""The files of a run's folder that its report is made of, and the report."""

RUN_NAME = "run.json"
METRICS_NAME = "metrics.jsonl"
RANKS_NAME = "ranks.jsonl"
SCORES_NAME = "scores.jsonl"
REPORT_NAME = "report.html"
LINE_FILES = (METRICS_NAME, RANKS_NAME, SCORES_NAME)
"""One object a line, appended to while training goes on."""
