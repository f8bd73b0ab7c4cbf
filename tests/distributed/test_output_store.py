"""A run of several ranks and its store: rank 0 uploads what all have written, and all learn how it went."""

from pathlib import Path

from tests.distributed.launcher import run_ranks
from tests.distributed.workers import stored_run as worker
from tests.stores import BUCKET, s3  # noqa: F401
from tests.training.short_run import records


def test_two_ranks_upload_go_on_from_an_empty_disk_and_hear_of_a_failure_alike(s3, tmp_path):  # noqa: F811
    url = f"s3://{BUCKET}/run"
    ranks = run_ranks(Path(worker.__file__), 2, [tmp_path, url], timeout=400, env=s3.environment)
    kept, out = tmp_path / "kept", tmp_path / "out"
    adapter = "adapter_model.safetensors"
    assert (out / adapter).read_bytes() == (kept / adapter).read_bytes()
    for name in ("metrics.jsonl", "ranks.jsonl", "scores.jsonl"):
        assert records(out / name) == records(kept / name)
    there = {name: content for name, content in s3.objects("run").items() if name != ".run"}
    here = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    first = {name for name in there if name.startswith("checkpoint-2/")}  # not downloaded: it is not the newest
    assert len(first) == 4 and all((kept / name).read_bytes() == there.pop(name) for name in first)
    assert there == here and "checkpoint-6/pieces-00001-of-00002.safetensors" in here
    assert ranks[0]["raised"] == ranks[1]["raised"] and "no more room. All of it is in" in ranks[0]["raised"]
    assert {"run.json", adapter, "checkpoint-2"} <= set(ranks[0]["left"])
