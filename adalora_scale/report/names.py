"""The files of a run's folder that its report is made of, and the report (of scores: `score_lines.py`)."""

RUN_NAME = "run.json"
METRICS_NAME = "metrics.jsonl"
RANKS_NAME = "ranks.jsonl"
REPORT_NAME = "report.html"
