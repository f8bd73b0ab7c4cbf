"""The chaos command on one process, and its verdict: it must see what it is there to see."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from benchmarks.chaos.attacks import ATTACKS
from benchmarks.chaos.folder import METRICS, WEIGHTS, inode
from benchmarks.chaos.rounds import Plan, Result, Round, plans, round_run
from benchmarks.chaos.starts import Ending
from benchmarks.chaos.table import markdown
from benchmarks.chaos.verdict import Damage, Failed, differences, require_named, require_reason, require_whole
from tests.conftest import ROOT

STEPS = 8


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """A short round, played as a user does it; its undisturbed run serves the other tests."""
    work = tmp_path_factory.mktemp("chaos")
    options = ["--rounds", 1, "--chain", 2, "--engines", "one", "--attacks", "kill", "flip", "--steps", STEPS]
    command = [sys.executable, "benchmarks/crash_test.py", *options, "--folder", work, "--json", work / "all.json"]
    done = subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True, check=False)
    return SimpleNamespace(done=done, work=work, undisturbed=work / "undisturbed-one" / "run")


@pytest.fixture
def run(played, tmp_path):
    """A copy of the undisturbed run."""
    return shutil.copytree(played.undisturbed, tmp_path / "run")


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(bytes(content))


def test_a_killed_run_with_a_damaged_checkpoint_ends_as_the_undisturbed_one(played):
    """Else a preempted week leaves another model than the same week undisturbed."""
    assert played.done.returncode == 0, played.done.stdout + played.done.stderr
    tree = json.loads((played.work / "all.json").read_text())
    (entry,) = tree["rounds"]
    assert entry["verdict"] == "equal" and sorted(entry["plan"]["attacks"]) == ["flip", "kill"]
    assert len(entry["said"]) == 2 and tree["tally"] == {"equal": 1}
    assert "| **rounds** | 1 / 0 / 0 | 1 / 0 / 0 |" in played.done.stdout


def test_one_byte_of_the_adapter_is_a_difference(played, run):
    """A verdict that looks at sizes or at losses would call a wrong adapter equal."""
    assert differences(played.undisturbed, run) == []
    for place in (0, 8 + 100, -1):
        flip(run / WEIGHTS, place)
        assert differences(played.undisturbed, run) == [f"{WEIGHTS} differs"]
        flip(run / WEIGHTS, place)
    lines = (run / METRICS).read_text().splitlines(keepends=True)
    (run / METRICS).write_text("".join(lines[1:]))
    assert differences(played.undisturbed, run) == [f"{METRICS} differs"]
    (run / METRICS).unlink()
    assert differences(played.undisturbed, run) == [f"{METRICS} is not there"]


@pytest.mark.parametrize("name", ["manifest.json", "pieces-00000-of-00001.safetensors", "trainer_state.json"])
def test_a_damaged_checkpoint_that_no_attack_touched_fails_a_round(played, run, name):
    """A refused run that also ruined its checkpoint must not count as refused."""
    require_whole(played.undisturbed, run, {})
    checkpoint = run / f"checkpoint-{STEPS}"
    flip(checkpoint / name, (checkpoint / name).stat().st_size // 2)
    with pytest.raises(Failed, match=f"checkpoint-{STEPS}.*{name}"):
        require_whole(played.undisturbed, run, {})
    require_whole(played.undisturbed, run, {inode(checkpoint): Damage(STEPS, name, "changed")})


def test_a_whole_checkpoint_of_something_else_fails_a_round(played, run):
    """Checksums say that a file is what was written, not that the right thing was."""
    shutil.rmtree(run / "checkpoint-2")
    (run / "checkpoint-4").rename(run / "checkpoint-2")
    with pytest.raises(Failed, match="not what the undisturbed run wrote"):
        require_whole(played.undisturbed, run, {})


SKIPPED = "skipped: out/checkpoint-4/{} is damaged\n"
WENT_ON = "AdaLoRA on 35 matrices\nresumed from out/checkpoint-{0} (step {0} of 8, ...)\n"
MANIFEST, PIECES = "manifest.json", "pieces-00000-of-00001.safetensors"


@pytest.mark.parametrize(("text", "damage", "fault"), [
    (SKIPPED.format(PIECES) + WENT_ON.format(2), Damage(4, PIECES, "changed"), None),
    (WENT_ON.format(4), Damage(4, PIECES, "changed"), "went on from checkpoint-4, whose pieces"),
    (WENT_ON.format(2), Damage(4, PIECES, "changed"), "went on from step 2 without a word on checkpoint-4"),
    (WENT_ON.format(2), Damage(4, MANIFEST, "changed"), "without a word"),
    (WENT_ON.format(2), Damage(4, MANIFEST, "removed"), None),
    ("error: a config\n", Damage(4, PIECES, "changed"), None),  # it did not come so far
])  # fmt: skip
def test_damage_is_named_and_not_used(tmp_path, text, damage, fault):
    """A toolkit that skips in silence, or reads what is damaged, must fail the round."""
    ending = Ending(0, (0,), False, text)
    present, damaged = {2: 12, 4: 14}, {14: damage}
    if fault is None:
        require_named(ending, damaged, present=present)
    else:
        with pytest.raises(Failed, match=fault):
            require_named(ending, damaged, present=present)


def test_a_start_anew_beside_damaged_checkpoints_fails():
    """Step 0 in silence, where there were checkpoints, is a lost week."""
    damage = Damage(2, MANIFEST, "removed")
    with pytest.raises(Failed, match="from step 0 without a word on checkpoint-2"):
        require_named(Ending(0, (0,), False, "AdaLoRA on 35 matrices\n"), {12: damage}, present={2: 12})


def test_a_refusal_must_be_for_what_was_done():
    """A toolkit that refuses every start would otherwise pass every round."""
    ending = Ending(2, (2,), False, "error: no checkpoint of out can be used: checkpoint-4/x is damaged\n")
    assert "checkpoint-4" in require_reason(ending, ["checkpoint-4"])
    with pytest.raises(Failed, match="for nothing"):
        require_reason(ending, ["checkpoint-6"])


TRACE = f'Traceback (most recent call last):\n  File "{ROOT}/launch/train.py", line 15, in <module>\n'


@pytest.mark.parametrize(("ending", "kind"), [
    (Ending(0, (0,), False, ""), "done"),
    (Ending(2, (2,), False, "error: x\n"), "refused"),
    (Ending(2, (2,), False, ""), "broken"),
    (Ending(2, (2,), False, TRACE + "error: x\n"), "broken"),
    (Ending(1, (2, 2), False, "error: x\nerror (rank 1): x\n"), "refused"),
    (Ending(1, (2, 85, 2), False, "error: x\n"), "refused"),
    (Ending(1, (1,), False, TRACE), "broken"),
    (Ending(85, (85,), True, ""), "checkpointed"),
    (Ending(85, (85,), False, ""), "stopped"),
    (Ending(1, (), False, "", passed_on=2), "interrupted"),
    (Ending(1, (), False, "", passed_on=15), "broken"),
    (Ending(1, (), False, "done: 2 triplets\n", passed_on=15), "done"),
    (Ending(1, (1,), False, "done: 2 triplets\n"), "broken"),
    (Ending(1, (), True, ""), "checkpointed"),
    (Ending(-15, (-15,), False, ""), "killed"),
    (Ending(130, (130,), False, ""), "interrupted"),
    (Ending(-2, (-2,), False, TRACE + "KeyboardInterrupt\n"), "broken"),
    (Ending(-9, (-9,), True, "", hung=True), "hung"),
])  # fmt: skip
def test_endings_have_one_word(ending, kind):
    """What is accepted after an attack is said in these words."""
    assert ending.kind == kind


def test_a_seed_draws_the_same_rounds_and_every_attack_comes_up():
    """Round 7 of a seed must be round 7 again, and no attack may be left out by chance."""
    drawn = plans(5, 12, ["one", "zero3"], list(ATTACKS), None)
    assert (
        drawn
        == plans(5, 12, ["one", "zero3"], list(ATTACKS), None)
        != plans(6, 12, ["one", "zero3"], list(ATTACKS), None)
    )
    assert [plan.engine for plan in drawn].count("one") == 6
    assert {name for plan in drawn for name in plan.attacks} == set(ATTACKS)
    assert {len(plan.attacks) for plan in drawn} <= {1, 2, 3}


def test_the_table_counts_a_round_in_every_attack_and_once_in_all():
    """Numbers that a reader adds up must add up."""
    results = [
        Result(Plan(1, "one", ("kill", "flip")), "equal"),
        Result(Plan(2, "zero3", ("flip", "flip")), "refused"),
        Result(Plan(3, "one", ("flip", "kill", "disk")), "failed", at=1),
        Result(Plan(4, "one", ("flip", "kill", "disk")), "refused", at=1),
    ]
    assert markdown(results).splitlines()[2:] == [
        "| disk | – | – | – |",
        "| flip | 1 / 1 / 0 | 0 / 1 / 0 | 1 / 2 / 0 |",
        "| kill | 1 / 1 / 1 | – | 1 / 1 / 1 |",
        "| **rounds** | 1 / 1 / 1 | 0 / 1 / 0 | 1 / 2 / 1 |",
    ]


@pytest.mark.full
def test_a_toolkit_that_reads_a_damaged_checkpoint_fails_the_round(played, tmp_path):
    """The same attack on a train.py that looks at no checksum."""
    plan = Plan(1, "one", ("flip",))
    script = "tests/benchmarks/workers/without_checksums.py"
    run = round_run(plan, tmp_path, steps=STEPS, timeout=240, script=script)
    undisturbed = SimpleNamespace(folder=played.undisturbed, seconds=30.0)
    seed = next(seed for seed in range(100) if _hits_pieces(run, undisturbed, plan, seed))
    result = Round(run, undisturbed, plan, seed).play(ATTACKS)
    assert result.verdict == "failed"
    assert "it went on from checkpoint-" in result.reason, result


def _hits_pieces(run, undisturbed, plan, seed):
    draw = Round(run, undisturbed, plan, seed).draw(0)
    draw.choices([1, 2, 3], [1, 4, 2])
    return draw.choice([MANIFEST, PIECES, "trainer_state.json"]) == PIECES
