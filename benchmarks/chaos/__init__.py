"""Attack a run again and again, start it each time with `auto`, and compare with a run that nobody disturbed.

    python benchmarks/crash_test.py --rounds 12 --seed 1           drawn over one process and 2 ranks of three engines
    python benchmarks/crash_test.py --seed 1 --rounds 12 --only 7  the seventh of these rounds again
    python benchmarks/crash_test.py --rounds 1 --chain 20 --steps 120 --engines ddp --attacks kill     one run, 20 kills

Every round draws an engine and a chain of 1 to 3 attacks from the seed. The attacks hit successive starts of one run
(launch/train.py, training.resume_from_checkpoint=auto), at moments drawn from the same seed; then the run may end.

    kill      SIGKILL to all processes or one rank: at any time, after some checkpoints, inside saving, at the run's end
    signal    SIGTERM, SIGUSR1 or SIGINT from the first line on: to every rank, one rank, or the launcher. Expected is
              exit code 85 with the note `requeue` (SIGINT: 130), or 0 if the run was through
    flip      one byte of a random file of the newest checkpoint; the next start must name it and not use it
    truncate  such a file cut short
    delete    such a file removed, the manifest too
    metrics   metrics.jsonl removed; what is missing afterwards must have been named
    base      one byte of the base model's weights: refused, or of no effect on what is trained
    disk      the run's disk is full after some more bytes: one line, exit code 2, checkpoints whole; then there is room
    second    a second start while the first runs: one of them is refused in one line that says who holds the folder

A round ends *equal*: adapter, metrics and allocations of the undisturbed run bit for bit, clocks aside; or *refused*:
exit code 2 and one line that names what the attacks damaged, with every checkpoint they left alone still whole; or
*failed*, with the reason and the log. Checkpoints are verified here with hashlib, and against those that the
undisturbed run wrote at the same steps; the toolkit's own reader is not asked. A start that does not end in time is a
failure, with the stacks of its ranks in the log. The exit code is 1 when a round failed, or an engine could not run
undisturbed.

The seed decides engines, attacks, files, bytes and moments; what a moment meets depends on the machine's speed.
"""
