"""What a run leaves behind in its log folder: a log and a status a rank, and the reason of a failure."""
