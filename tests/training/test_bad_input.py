"""What a user gets wrong is one line that names the key or file and the fix: exit code 2, nothing written.

Most cases run inside this process, because importing transformers takes seconds in each new one; real command lines
and two ranks of torchrun prove that nothing else reaches standard error there.
"""

import json
import os
import shutil
import subprocess
import sys

import datasets
import pytest
import transformers
import yaml

from adalora_scale.cli import main, train_main
from adalora_scale.config import load_config
from adalora_scale.errors import run_reporting_errors
from adalora_scale.training.run import train
from tests.conftest import ROOT
from tests.distributed.launcher import RankFailure, run_ranks

ROWS = [{"prompt": f"Count to {n}.", "completion": f" The answer is {n}."} for n in range(8)]
MESSAGES = [{"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]}] * 8
LABELLED = [{"text": f"text {n}", "label": "ab"[n % 2]} for n in range(8)]


@pytest.fixture
def files(tmp_path, stories260k, monkeypatch):
    """A config that trains as it stands, the files it names, and broken ones; the working folder is theirs."""
    monkeypatch.chdir(tmp_path)
    # A process of its own switches them off before its imports, see cli._quiet_start.
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    for name, rows in (("rows", ROWS), ("messages", MESSAGES), ("labelled", LABELLED)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    (tmp_path / "broken.jsonl").write_text("\n".join([*lines[:2], '{"prompt": "a", "comp', *lines[2:]]) + "\n")
    shutil.copy(tmp_path / "broken.jsonl", tmp_path / "broken.jsonl.gz")
    (tmp_path / "null.jsonl").write_text("\n".join([*lines[:4], '{"prompt": "a", "completion": null}']) + "\n")
    (tmp_path / "no_loss.jsonl").write_text('{"prompt": "' + "word " * 100 + '", "completion": " x"}\n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "blank.jsonl").write_text("\n\n")
    (tmp_path / "header.csv").write_text("prompt,completion\n")
    (tmp_path / "rows.txt").write_text("text\n")
    (tmp_path / "a_file").write_text("not a folder")
    (tmp_path / "not.yaml").write_text("model: [\n")
    (tmp_path / "no_config").mkdir()
    shutil.copytree(stories260k, tmp_path / "bad_json")
    (tmp_path / "bad_json" / "config.json").write_text("{")
    config = {
        "model": {"model_name_or_path": str(stories260k)},
        "data": {"train": "rows.jsonl", "max_length": 64},
        "adalora": {"init_r": 6, "target_r": 4},
        "training": {"output_dir": "out", "per_device_train_batch_size": 2, "max_steps": 10},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def files_in(folder):
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()} if folder.is_dir() else {}


def refused(verb, capfd, *arguments):
    """Run the verb, check the contract of a refusal, and return its line."""
    capfd.readouterr()
    code = verb(["--config", "run.yaml", *arguments])
    errors = capfd.readouterr().err
    assert code == 2, errors
    lines = [line for line in errors.splitlines() if line.strip()]
    assert len(lines) == 1, errors
    assert lines[0].startswith("error: ")
    return lines[0]


SEEN_BEFORE_THE_MODEL = {
    "unknown key": (["adalora.inti_r=4"], ["'adalora.inti_r'", "'init_r'"]),
    "unknown section": (["modle.revision=x"], ["'modle'", "'model'"]),
    "unknown training key": (["training.learning_rte=1"], ["'training.learning_rte'", "'learning_rate'"]),
    "managed packing": (["training.packing=true"], ["training.packing", "data.packing"]),
    "managed max_length": (["training.max_length=8"], ["training.max_length", "data.max_length"]),
    "managed loss": (["training.assistant_only_loss=true"], ["training.assistant_only_loss", "data.loss_on"]),
    "managed deepspeed": (["training.deepspeed=ds.json"], ["training.deepspeed", "engine.config"]),
    "managed fsdp": (["training.fsdp=full_shard"], ["training.fsdp", "engine.name"]),
    "search for a batch": (
        ["training.auto_find_batch_size=true"],
        ["training.auto_find_batch_size", "training.per_device_train_batch_size"],
    ),
    "misspelt task": (["task=causal_ml"], ["task: ", "'causal_lm'?"]),
    "managed model options": (["training.model_init_kwargs={a: 1}"], ["training.model_init_kwargs", "model"]),
    "wrong type in a section": (["adalora.init_r=three"], ["adalora.init_r", "'three'"]),
    "wrong type in training": (["training.max_steps=many"], ["training.max_steps", "'many'"]),
    "wrong type of an own key": (["training.overwrite_output_dir=[1]"], ["training.overwrite_output_dir"]),
    "not an override": (["adalora.init_r"], ["adalora.init_r", "section.key=value"]),
    "missing config": (["--config", "absent.yaml"], ["absent.yaml", "--config"]),
    "config is not YAML": (["--config", "not.yaml"], ["not.yaml", "line 2"]),
    "missing data file": (["data.train=absent.jsonl"], ["absent.jsonl", "does not exist"]),
    "missing second data file": (["data.train=[rows.jsonl, absent.jsonl]"], ["absent.jsonl"]),
    "amounts for some sources": (
        ["data.train=[{path: rows.jsonl, weight: 2}, rows.jsonl]"],
        ["'rows.jsonl' has no weight", "data.train"],
    ),
    "missing mixed file": (["data.train=[{path: absent.jsonl, weight: 2}]"], ["absent.jsonl", "does not exist"]),
    "mixed source that is used up": (
        ["data.train=[{path: rows.jsonl, weight: 2}]", "data.eval_fraction=0.999"],
        ["data.eval_fraction", "'rows.jsonl'"],
    ),
    "two orders": (
        ["data.train=[{path: rows.jsonl, weight: 2}]", "training.train_sampling_strategy=sequential"],
        ["training.train_sampling_strategy=sequential", "data.train"],
    ),
    "two orders, streaming": (
        ["data.streaming=true", "training.train_sampling_strategy=group_by_length"],
        ["training.train_sampling_strategy=group_by_length", "data.streaming"],
    ),
    "streaming without an end": (
        ["data.streaming=true", "training.max_steps=-1", "training.num_train_epochs=2"],
        ["data.streaming=true", "training.max_steps"],
    ),
    "streaming in several processes": (
        ["data.streaming=true", "training.dataloader_num_workers=2"],
        ["training.dataloader_num_workers=2", "data.streaming"],
    ),
    "streaming and packing": (["data.streaming=true", "data.packing=true"], ["data.packing", "data.streaming"]),
    "streaming rows without a loss": (["data.streaming=true", "data.train=no_loss.jsonl"], ["data.max_length"]),
    "missing evaluation file": (["data.eval=absent.csv"], ["absent.csv", "does not exist"]),
    "folder as data": (["data.train=./no_config"], ["no_config", "folder without files of rows"]),
    "pattern as data": (["data.train=absent/*.jsonl"], ["absent/*.jsonl", "matches no file"]),
    "damaged packed file": (["data.train=broken.jsonl.gz"], ["broken.jsonl.gz", "Not a gzipped file"]),
    "unknown extension": (["data.train=rows.txt", "data.format=text"], ["rows.txt", ".jsonl"]),
    "unreadable row": (["data.train=broken.jsonl"], ["broken.jsonl:3"]),
    "null in a row": (["data.train=null.jsonl"], ["null.jsonl:5", "'completion'"]),
    "empty file": (["data.train=empty.jsonl"], ["empty.jsonl", "empty"]),
    "file of blank lines": (["data.train=blank.jsonl"], ["blank.jsonl", "no rows"]),
    "header only": (["data.train=header.csv"], ["header.csv", "no rows"]),
    "no column that fits": (["data.prompt_column=question"], ["rows.jsonl", "data.prompt_column"]),
    "named format does not fit": (["data.format=messages"], ["rows.jsonl", "'messages'", "data.messages_column"]),
    "every loss masked": (["data.train=no_loss.jsonl"], ["none of the 1 train", "data.max_length"]),
    "no chat template": (["data.train=messages.jsonl"], ["chat template", "data.chat_template=plain"]),
    "unknown chat template": (
        ["data.train=messages.jsonl", "data.chat_template=chatlm"],
        ["data.chat_template=chatlm", "'chatml'"],
    ),
    "chat template for other rows": (["data.chat_template=plain"], ["data.chat_template=plain", "prompt_completion"]),
    "init_r below target_r": (["adalora.init_r=3"], ["adalora.init_r (3)", "adalora.target_r (4)"]),
    "no step to prune, max_steps": (["adalora.tinit=5", "adalora.tfinal=5"], ["adalora.tinit", "10 steps"]),
    "no step to prune, epochs": (
        ["training.max_steps=-1", "training.num_train_epochs=2", "adalora.tinit=4", "adalora.tfinal=4"],
        ["adalora.tinit", "adalora.tfinal", "8 steps"],
    ),
    "no step at all": (["training.max_steps=-1", "training.num_train_epochs=0"], ["training.num_train_epochs"]),
    "fraction of 1.5": (["adalora.tinit=1.5"], ["adalora.tinit", "[0, 1)"]),
    "fractions that meet": (["adalora.tinit=0.6", "adalora.tfinal=0.4"], ["adalora.tinit", "adalora.tfinal"]),
    "eval_fraction of 1": (["data.eval_fraction=1.0"], ["data.eval_fraction"]),
    "eval_fraction that leaves nothing": (["data.eval_fraction=0.999"], ["data.eval_fraction"]),
    "evaluation without data": (["training.eval_strategy=epoch"], ["training.eval_strategy", "data.eval"]),
    "eval_steps without data": (["training.eval_steps=5"], ["data.eval"]),
    "output_dir is a file": (["training.output_dir=a_file"], ["training.output_dir=a_file", "name a folder"]),
    "output_dir below a file": (["training.output_dir=a_file/run"], ["training.output_dir=a_file/run"]),
    "output_dir that cannot be made": (["training.output_dir=/proc/nowhere/run"], ["/proc/nowhere/run"]),
    "no output_dir": (["training.output_dir="], ["training.output_dir"]),
    "engine fsdp2": (["engine.name=fsdp2"], ["engine.name=fsdp2", "torchrun"]),
    "engine deepspeed": (["engine.name=deepspeed"], ["engine.name=deepspeed", "deepspeed --num_gpus"]),
    "--deepspeed": (["--deepspeed", "zero2.json"], ["engine.config=zero2.json", "cannot be read"]),
    "unknown engine": (["engine.name=horovod"], ["engine.name=horovod", "auto, ddp, fsdp2, deepspeed"]),
    "block size": (["model.load_in_4bit=true", "model.bnb_4bit_blocksize=100"], ["model.bnb_4bit_blocksize is 100"]),
    "no model folder": (["model.model_name_or_path=./absent"], ["model.model_name_or_path=./absent"]),
    "no model folder, hub-like": (["model.model_name_or_path=models/absent/here"], ["models/absent/here"]),
    "model folder without config": (["model.model_name_or_path=./no_config"], ["./no_config"]),
    "broken config.json": (["model.model_name_or_path=./bad_json"], ["./bad_json"]),
    "tokenizer missing": (["model.tokenizer_name_or_path=./no_config"], ["model.tokenizer_name_or_path=./no_config"]),
    "labels for a language model": (["data.train=labelled.jsonl"], ["labelled.jsonl", "sequence_classification"]),
    "classification without labels": (["task=sequence_classification"], ["rows.jsonl", "data.text_column"]),
    "unknown task": (["task=regression"], ["task", "'regression'"]),
    "batch of nothing": (["training.per_device_train_batch_size=0", "training.max_steps=-1"], ["batch_size"]),
    "no accumulation": (["training.gradient_accumulation_steps=0", "training.max_steps=-1"], ["accumulation"]),
    "two precisions": (["training.bf16=true", "training.fp16=true"], ["training", "fp16"]),
    "unknown scheduler": (["training.lr_scheduler_type=sine"], ["training", "sine"]),
    "unknown optimizer": (["training.optim=adamm"], ["training", "adamm"]),
    "no evaluation": (["training.load_best_model_at_end=true"], ["training", "load_best_model_at_end"]),
    "nothing to resume": (["training.resume_from_checkpoint=true"], ["resume_from_checkpoint", "no complete"]),
    "no such checkpoint": (["training.resume_from_checkpoint=out/checkpoint-9"], ["out/checkpoint-9", "not a folder"]),
}


@pytest.mark.usefixtures("model_stays_on_disk")
@pytest.mark.parametrize("door", ["model.load_in_4bit=false", "model.load_in_4bit=true"])
def test_the_wire_is_across_the_door(files, door):
    """Else the tests below cannot fail: the run took another door than the one that was watched, for months."""
    with pytest.raises(pytest.fail.Exception, match="the model was loaded"):
        train(load_config("run.yaml", [door]))


@pytest.mark.usefixtures("model_stays_on_disk")
@pytest.mark.parametrize("case", SEEN_BEFORE_THE_MODEL)
def test_mistake_is_one_line_before_the_model_is_loaded(files, capfd, case):
    """A user would wait for a 70 B model to load, or read a traceback, or lose files, over a typing error."""
    overrides, expected = SEEN_BEFORE_THE_MODEL[case]
    before = files_in(files)
    line = refused(train_main, capfd, *overrides)
    assert all(part in line for part in expected), line
    assert files_in(files) == before


@pytest.mark.usefixtures("model_stays_on_disk")
@pytest.mark.parametrize(
    "found", ["run.json", "metrics.jsonl", "ranks.jsonl", "adapter_config.json", "adapter_model.safetensors", "c"]
)
def test_folder_of_another_run_is_left_as_it_was(files, capfd, found):
    """A second run would overwrite hours of training without asking."""
    run = files / "out" if found != "c" else files / "out" / "checkpoint-5"
    run.mkdir(parents=True)
    (run / found).write_text("precious")
    before = files_in(files)
    line = refused(train_main, capfd)
    assert "training.output_dir=out" in line
    assert "training.overwrite_output_dir=true" in line
    assert ("checkpoint-5" if found == "c" else found) in line
    assert files_in(files) == before


NEEDS_THE_MODEL = {
    "pattern that matches nothing": (["adalora.target_modules=[q_prj]"], ["adalora.target_modules", "'q_proj'"]),
    "regex that matches nothing": (["adalora.target_modules=.*qkv"], ["adalora.target_modules", ".*qkv"]),
    "exclusion that matches nothing": (["adalora.exclude_modules=[qkv]"], ["adalora.exclude_modules", "'qkv'"]),
    "layer that is not there": (["adalora.layers_to_transform=[9]"], ["adalora.layers_to_transform", "9"]),
    "module that nothing adapts": (["adalora.target_modules=[norm]"], ["RMSNorm", "exclude_modules"]),
    "adapter on the output head": (["adalora.target_modules=[lm_head]"], ["lm_head", "adalora.exclude_modules"]),
    "attention that is not there": (["model.attn_implementation=fast"], ["fast"]),
    "truncated weights": (["model.model_name_or_path=./truncated"], ["./truncated"]),
    "weights of another shape": (["model.model_name_or_path=./reshaped"], ["./reshaped"]),
    "weights missing": (["model.model_name_or_path=./weightless"], ["./weightless"]),
}


@pytest.mark.parametrize("case", NEEDS_THE_MODEL)
def test_mistake_that_only_the_model_shows_is_one_line_too(files, stories260k, capfd, case):
    """A damaged download or a mistyped pattern would end in a traceback of a library."""
    overrides, expected = NEEDS_THE_MODEL[case]
    for name in ("truncated", "reshaped", "weightless"):
        if name in overrides[0]:
            shutil.copytree(stories260k, files / name)
            weights, config = files / name / "model.safetensors", files / name / "config.json"
            if name == "truncated":
                weights.write_bytes(weights.read_bytes()[:100_000])
            elif name == "reshaped":
                config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_size": 128}))
            else:
                weights.unlink()
    before = files_in(files)
    line = refused(train_main, capfd, *overrides)
    assert all(part in line for part in expected), line
    assert files_in(files) == before


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ["data.eval"]),
        (["data.eval=rows.jsonl", "--adapter", "absent"], ["absent", "adapter_config.json"]),
        (["data.eval=rows.jsonl", "--extract", "("], ["--extract"]),
        (["data.eval=rows.jsonl", "task=sequence_classification"], ["task=causal_lm"]),
        (["data.eval=rows.jsonl", "model.model_name_or_path=./absent"], ["./absent"]),
        (["data.eval=absent.jsonl"], ["absent.jsonl"]),
    ],
    ids=lambda value: " ".join(value[-1:]) if isinstance(value, list) else None,
)
def test_evaluate_refuses_in_one_line(files, capfd, arguments, expected):
    """The second verb would show tracebacks where the first does not."""
    line = refused(lambda argv: main(["evaluate", *argv]), capfd, *arguments)
    assert all(part in line for part in expected), line


def shell(files, *command, **environment):
    """Run a real command in the folder of `files`."""
    return subprocess.run(
        command,
        cwd=files,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


TRAIN = (sys.executable, str(ROOT / "launch" / "train.py"), "--config", "run.yaml")


def test_command_line_says_one_line_and_nothing_else(files):
    """Warnings of imported libraries would bury the one line that helps."""
    result = shell(files, *TRAIN, "data.train=broken.jsonl")
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith("error: broken.jsonl:3")
    assert not files_in(files / "out")


def test_console_script_refuses_alike_and_fast(files):
    """The installed command must not differ from launch/train.py, and a mistyped key must not cost importing torch."""
    script = str(ROOT / ".venv" / "bin" / "adalora-scale")
    if not os.path.exists(script):
        script = shutil.which("adalora-scale") or pytest.skip("the package is not installed")
    result = shell(files, script, "train", "--config", "run.yaml", "adalora.inti_r=4", PYTHONPROFILEIMPORTTIME="1")
    assert result.returncode == 2
    imports = [line for line in result.stderr.splitlines() if line.startswith("import time:")]
    rest = [line for line in result.stderr.splitlines() if not line.startswith("import time:")]
    assert len(rest) == 1 and rest[0].startswith("error: unknown key 'adalora.inti_r'"), rest
    assert not any(line.split("|")[-1].strip() in ("torch", "transformers") for line in imports)


def test_traceback_is_there_for_those_who_ask(files):
    """Without it nobody could report where an unexpected refusal comes from."""
    result = shell(files, *TRAIN, "adalora.init_r=3", ADALORA_TRACEBACK="1")
    assert result.returncode != 0
    assert "Traceback (most recent call last)" in result.stderr
    assert "adalora.init_r (3)" in result.stderr


def test_two_ranks_say_it_once(files):
    """With 512 ranks the same line 512 times hides everything else."""
    with pytest.raises(RankFailure) as failure:
        run_ranks(
            ROOT / "launch" / "train.py", 2,
            ["--config", files / "run.yaml", f"data.train={files}/broken.jsonl", f"training.output_dir={files}/out"],
        )  # fmt: skip
    printed = "".join(rank.output for rank in failure.value.ranks)
    assert printed.count("error") == 1, printed
    assert printed.count("broken.jsonl:3") == 1
    assert failure.value.ranks[0].output.startswith("error: ")
    assert "Traceback" not in printed
    assert not files_in(files / "out")


@pytest.mark.usefixtures("model_stays_on_disk")
def test_rank_that_would_train_alone_is_refused(files, capfd, monkeypatch):
    """On CPU without use_cpu every rank would train alone, and two runs would write into one folder.

    By `train`, as a program of the user's calls it; the command asks for RANK first (tests/cluster/test_place.py).
    """
    monkeypatch.setenv("WORLD_SIZE", "2")

    def program(arguments):
        return run_reporting_errors(lambda: train(load_config(arguments[1], arguments[2:])) and 0)

    line = refused(program, capfd, "training.use_cpu=false")
    assert "2 processes" in line and "training.use_cpu=true" in line
    assert not files_in(files / "out")


@pytest.mark.full
def test_real_ranks_that_would_train_alone_are_refused(files):
    """The same under torchrun, where transformers and accelerate have read the launcher's variables."""
    with pytest.raises(RankFailure) as failure:
        run_ranks(
            ROOT / "launch" / "train.py", 2,
            ["--config", files / "run.yaml", "training.use_cpu=false", f"data.train={files}/rows.jsonl",
             f"training.output_dir={files}/out"],
        )  # fmt: skip
    line = failure.value.ranks[0].output.strip()
    assert line.startswith("error: ") and "\n" not in line, line
    assert "training.use_cpu=true" in line
    assert not files_in(files / "out")
