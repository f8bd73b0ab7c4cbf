"""Each fault that a file from a stranger can have is one line that names the file, before anything is used of it."""

import json
import os
import re
import struct
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from adalora_scale.checkpoint import format as files
from adalora_scale.checkpoint.flat import Group, flat_tensors
from adalora_scale.checkpoint.format import Checkpoint, CheckpointError
from adalora_scale.errors import Unsupported, UserError
from adalora_scale.export.adapter_file import AdapterFile
from adalora_scale.export.continual import check_start
from adalora_scale.export.inspection import inspect_folder
from adalora_scale.export.output import copy_tokenizer
from adalora_scale.export.peft_adalora import load_adapter
from adalora_scale.placing.model import load_model
from adalora_scale.quantization.base_files import BaseFiles
from adalora_scale.reading.base_config import check_base, check_config
from adalora_scale.reading.folders import own_file
from adalora_scale.reading.headers import read_header
from adalora_scale.reading.json_text import parse_json, read_json
from adalora_scale.reading.patterns import Patterns
from adalora_scale.reading.written import check_written
from adalora_scale.training.run import check_model_path, load_tokenizer
from tests.adalora import tiny
from tests.export.adapters import copy, edit_json, options, trained
from tests.quantization.conftest import run_config  # noqa: F401

DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("strangers")
    tiny.gpt2().save_pretrained(folder / "base")
    trained(folder / "base", "gpt2", folder / "run")
    return folder


@pytest.fixture
def base(made, tmp_path):
    return copy(made / "base", tmp_path / "base")


@pytest.fixture
def run(made, tmp_path):
    return copy(made / "run", tmp_path / "run")


# ---- JSON and headers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (DEEP, "nested too deeply"),
        ("[" * 70 + "]" * 70, "nested too deeply"),
        ('{"a": 1, "a": 2}', "'a' twice"),
        ('{"a": NaN}', "no number"),
        ('{"a": 1e999}', "no number"),
        ('{"a": 1' + "0" * 5000 + "}", "not valid JSON"),
        ('{"a": 1' + "0" * 60 + "}", "128 bits"),
        ('{"\\ud800": 1}', "no text"),
        ("{", "not valid JSON"),
    ],
)
def test_json_beyond_the_limits_is_one_line(text, said):
    """RecursionError, or two readers that see two files."""
    with pytest.raises(UserError, match=said) as caught:
        parse_json(text, "file.json")
    assert "file.json" in str(caught.value) and len(str(caught.value)) < 300 and str(caught.value).isascii()


def test_pipes_devices_and_huge_files_are_not_opened(tmp_path):
    """A pipe never ends, /dev/zero fills the memory."""
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    with (tmp_path / "huge.json").open("wb") as file:
        file.truncate(2**40)
    for name in ("pipe.json", "zero.json", "huge.json"):
        with pytest.raises(UserError, match=re.escape(name)):
            read_json(tmp_path / name)


@pytest.mark.parametrize("length", [2**60, 2**64 - 1, 10**9])
def test_a_header_longer_than_its_file_is_refused(tmp_path, length):
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(UserError, match="damaged"):
        read_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [10**18], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F33", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]},
        [],
    ],
)
def test_offsets_and_shapes_that_do_not_fit_are_refused(tmp_path, entry):
    text = json.dumps({"w": entry}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(UserError, match=r"x\.safetensors.*damaged"):
        read_header(tmp_path / "x.safetensors")


def test_links_may_lead_to_the_hubs_own_blobs_alone(tmp_path):
    """The cache of the hub is made of links; a folder of a stranger may be named like it."""
    snapshot, blobs = tmp_path / "models--a" / "snapshots" / "abc", tmp_path / "models--a" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "123").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/123")
    assert own_file(snapshot / "config.json", snapshot).read_text() == "{}"
    (tmp_path / "secret").write_text("x")
    (snapshot / "vocab.json").symlink_to("../../../secret")
    with pytest.raises(UserError, match=r"vocab\.json leads out"):
        own_file(snapshot / "vocab.json", snapshot)
    (blobs / "out").symlink_to(tmp_path / "secret")
    (snapshot / "merges.txt").symlink_to("../../blobs/out")
    with pytest.raises(UserError, match="leads out"):
        own_file(snapshot / "merges.txt", snapshot)


def test_weights_may_lie_on_another_disk_and_downloads_in_the_cache(tmp_path):
    """Copying 140 GB is no way out; what is read through such a link can be tensors alone."""
    store, blobs, base = tmp_path / "store", tmp_path / "models--a--b" / "blobs", tmp_path / "base"
    for folder in (store, blobs, base):
        folder.mkdir(parents=True)
    (store / "w.safetensors").write_bytes(b"")
    (store / "secret.json").write_text("{}")
    (blobs / "5f").write_text("{}")
    (base / "model.safetensors").symlink_to(store / "w.safetensors")
    (base / "config.json").symlink_to(blobs / "5f")
    (base / "generation_config.json").symlink_to(store / "secret.json")
    (base / "other.safetensors").symlink_to(store / "secret.json")
    assert own_file(base / "model.safetensors", base) and own_file(base / "config.json", base)
    for name in ("generation_config.json", "other.safetensors"):
        with pytest.raises(UserError, match="leads out"):
            own_file(base / name, base)


# ---- adapters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"task_type": []}, "task_type"),
        ({"init_r": "4"}, "init_r"),
        ({"init_r": 10**30}, "init_r"),
        ({"lora_alpha": True}, "lora_alpha"),
        ({"rank_pattern": []}, "rank_pattern"),
        ({"rank_pattern": {"x": [1, 2]}}, "rank_pattern"),
        ({"target_modules": [1]}, "target_modules"),
        ({"base_model_name_or_path": {}}, "base_model_name_or_path"),
        ({"total_step": -1}, "total_step"),
    ],
)
def test_wrong_types_in_an_adapters_config_are_named(run, changes, said):
    edit_json(run / "adapter_config.json", **changes)
    with pytest.raises(UserError, match=rf"adapter_config\.json.*{said}"):
        inspect_folder(run)


def test_a_pattern_that_never_ends_is_matched_in_no_time(run):
    """`re` would take days, holding the interpreter."""
    name = "model.layers.0." + "a" * 60
    began = time.monotonic()
    for key in ("(a+)+b", "(a|a)*b", "(.*)*x", ".*.*.*.*.*.*x"):
        assert Patterns({key: 3}, "rank_pattern").value(name, 8) == 8
    assert time.monotonic() - began < 5
    assert Patterns({"(a{1,9}){60}": 3}, "rank_pattern").value(name, 8) == 3
    for key in ("(?=a)a", r"(a)\1", "(a{9999}){9999}", "[", "(" * 80 + "a" + ")" * 80):
        with pytest.raises(UserError, match="rank_pattern"):
            Patterns({key: 3}, "rank_pattern").value(name, 8)


@pytest.mark.parametrize(
    "keys",
    [
        ["q_proj"],
        ["layers.1.q_proj", "q_proj"],
        ["q_proj", "layers.1.q_proj"],
        [r"layers\.(0|2)\.q_proj", "q_proj"],
        [r".*\.\d+\.q_.*", "k_proj"],
        ["^model.layers.1.q_proj"],
        ["^q_proj"],
        ["layers.1.[qk]_proj", "model.layers.2.k_proj"],
        [r"layers\.[^1]\.(?:q|k)_proj"],
        ["k_proj|layers.0.q_proj"],
        ["(a)?.*q_pr{0,2}oj"],
    ],
)
def test_patterns_mean_what_they_mean_to_peft(keys):
    get_pattern_key = pytest.importorskip("peft.utils.other").get_pattern_key
    patterns = Patterns({key: number for number, key in enumerate(keys)}, "rank_pattern")
    for layer in range(4):
        for leaf in ("q_proj", "k_proj", "myq_proj"):
            module = f"model.layers.{layer}.{leaf}"
            found = get_pattern_key(keys, module)
            assert patterns.value(module, None) == (keys.index(found) if found in keys else None), module


def test_an_adapters_checksum_is_checked_by_all_who_read_it(run, base):
    """A flipped mantissa bit is a finite number of the right shape."""
    path = run / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)
    for read in (
        AdapterFile,
        inspect_folder,
        lambda folder: check_start(folder, options("gpt2")),
        lambda folder: load_adapter(tiny.gpt2(), folder),
    ):
        with pytest.raises(UserError, match=r"adapter_model\.safetensors.*checksum"):
            read(run)


def test_adapters_without_a_checksum_are_read(run):
    """PEFT's have none, nor have ours from before."""
    path = run / "adapter_model.safetensors"
    with safe_open(path, framework="pt") as file:
        record = json.loads(file.metadata()["adalora_scale"])
    record.pop("checksum")
    for metadata in ({"adalora_scale": json.dumps(record)}, None):
        save_file(load_file(path), path, metadata)
        assert AdapterFile(run).modules


def test_links_of_an_adapter_are_not_followed_out(run, tmp_path):
    (tmp_path / "secret.json").write_text('{"secret": 1}')
    (run / "tokenizer.json").symlink_to(tmp_path / "secret.json")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"tokenizer\.json leads out"):
        copy_tokenizer(run, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def checkpoint(folder, table, elements=None, shape=(6,), **changes):
    """One rank's checkpoint of one tensor, with this table; everything fits its checksums."""
    folder.mkdir()
    name = files.pieces_name(0, 1)
    total = sum(max(length, 0) for _, _, length in table) if elements is None else elements
    save_file(
        {"adapter.intervals": torch.tensor(table).view(-1, 3), "adapter.weight": torch.ones(total)}, folder / name
    )
    content = {"step": 1, "world_size": 1, "files": {name: files.file_entry(folder / name)}}
    files.write_manifest(folder, content | {"tensors": {"adapter": {"w": list(shape)}}} | changes)
    return folder


@pytest.mark.parametrize(
    ("table", "elements"),
    [
        ([(0, 0, 4), (0, 2, 2)], None),  # 4 and 5 are missing, 2 and 3 there twice: the count is right
        ([(0, 0, 4)], None),
        ([(0, -2, 6)], None),
        ([(0, 0, 6), (0, 6, -2)], None),
        ([(0, 3, 6)], None),
        ([(1, 0, 6)], None),
        ([(-1, 0, 6)], None),
        ([(0, 0, 6)], 5),
        ([(0, 0, 6)], 7),
    ],
)
def test_intervals_that_do_not_tile_a_tensor_are_refused(tmp_path, table, elements):
    """Else a run goes on from whatever was in memory."""
    assert (
        Checkpoint(checkpoint(tmp_path / "good", [(0, 2, 4), (0, 0, 2)])).read_whole("adapter", "weight", "w").sum()
        == 6
    )
    broken = Checkpoint(checkpoint(tmp_path / "bad", table, elements))
    broken.verify()
    with pytest.raises(CheckpointError, match="bad"):
        broken.read_whole("adapter", "weight", "w")


@pytest.mark.parametrize(
    "changes",
    [
        {"world_size": 10**12},
        {"world_size": 2},
        {"tensors": {"adapter": {"w": [10**9, 10**9]}}},
        {"tensors": {"adapter": {"w": [-6]}}},
        {"tensors": []},
        {"files": {"../../etc/passwd": {"bytes": 1, "sha256": "0" * 64}}},
        {"files": {}},
        {"allocator": {"mask": {"w": [1]}, "frozen": 1}},
        {"allocator": {"mask": {"v": "1"}, "frozen": True, "step": 1, "total_step": 2, "budget": 1}},
        {"step": "1"},
        {"optimizer": {"scalars": {"": 3}}},
    ],
)
def test_a_manifest_with_a_fitting_checksum_is_checked_all_the_same(tmp_path, changes):
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        Checkpoint(checkpoint(tmp_path / "c", [(0, 0, 6)], **changes))


def test_a_checkpoints_links_and_state_are_checked(tmp_path):
    folder = checkpoint(tmp_path / "c", [(0, 0, 6)])
    piece = folder / files.pieces_name(0, 1)
    piece.rename(tmp_path / "elsewhere")
    piece.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="leads out"):
        Checkpoint(folder).verify()
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "trainer_state.json").write_text('{"global_step": ' + DEEP + "}")
    entry = {"trainer_state.json": files.file_entry(folder / "trainer_state.json")}
    group = {"adapter": Group([("w", 0, 6)], {"weight": [torch.ones(6)]})}
    piece = files.pieces_name(0, 1)
    entry[piece] = files.write_tensors(folder / piece, flat_tensors(group, {"adapter": ["w"]}, {}))
    files.write_manifest(folder, {"step": 1, "world_size": 1, "files": entry, "tensors": {"adapter": {"w": [6]}}})
    with pytest.raises(CheckpointError, match=r"trainer_state\.json.*deeply"):
        Checkpoint(folder).verify()


# ---- bases ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attn_implementation": "kernels-community/flash-attn"}, "not installed here"),
        ({"_attn_implementation": "someone/else"}, "not installed here"),
        ({"text_config": {"_attn_implementation_internal": "a/b:c"}}, "not installed here"),
        ({"attn_implementation": {"": "sdpa", "text": "a/b"}}, "not installed here"),
        ({"experts_implementation": "sonicmoe"}, "not installed here"),
        ({"n_layer": 10**9}, "n_layer"),
        ({"num_labels": 10**12}, "num_labels"),
        ({"vocab_size": 2**62}, "vocab_size"),
        ({"architectures": "GPT2LMHeadModel"}, "architectures"),
        ({"n_layer": "2"}, "n_layer"),
    ],
)
def test_a_config_that_asks_for_code_or_for_too_much_is_refused(base, run_config, changes, said):  # noqa: F811
    edit_json(base / "config.json", **changes)
    with pytest.raises(UserError, match=said):
        check_model_path(run_config(base))


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_nesting_and_pipes_in_a_base_are_one_line(base, run_config, name):  # noqa: F811
    (base / name).unlink(missing_ok=True)
    (base / name).write_text('{"a": ' + DEEP + "}")
    for read in (check_model_path, load_tokenizer, load_model):
        with pytest.raises(UserError, match=rf"{name}.*deeply"):
            read(run_config(base))
    (base / name).unlink()
    os.mkfifo(base / name)
    with pytest.raises(UserError, match=rf"{name}.*regular"):
        check_model_path(run_config(base))


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/../../x", "", "a\0b"])
def test_an_index_names_files_of_its_folder_alone(base, run_config, name):  # noqa: F811
    keys = list(load_file(base / "model.safetensors"))
    index = {"metadata": {}, "weight_map": dict.fromkeys(keys, name)}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    for read in (lambda: BaseFiles.open(str(base)), lambda: load_model(run_config(base))):
        with pytest.raises(UserError, match=r"index\.json"):
            read()


def test_links_and_adapters_in_a_base_are_refused(base, tmp_path):
    (tmp_path / "secret.txt").write_text("x")
    (base / "vocab.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(UserError, match="leads out"):
        check_base(str(base))
    (base / "vocab.txt").unlink()
    (base / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="holds an adapter"):
        check_base(str(base))


def test_ordinary_things_beside_a_model_are_in_nobodys_way(base, tmp_path):
    for name in ("LICENSES", "notice_files", "my.model"):
        (base / name).mkdir()
    check_base(str(base))


def test_the_defaults_of_every_architecture_pass(tmp_path):
    """Limits on counts of modules must not meet sizes: Gemma has a vocabulary a layer."""
    refused, seen = {}, 0
    for name, kind in CONFIG_MAPPING.items():
        path = tmp_path / "config.json"
        try:
            path.write_text(kind().to_json_string(use_diff=False))
        except Exception:  # configs that cannot be made without arguments
            continue
        seen += 1
        try:
            check_config(path, attention="sdpa")
        except UserError as error:
            refused[name] = str(error)
    assert seen > 300 and refused == {}


def test_a_run_that_chooses_its_attention_does_not_ask_for_the_bases(base):
    tree = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(tree | {"_attn_implementation": "kernels-community/x"}))
    with pytest.raises(UserError, match=r"model\.attn_implementation"):
        check_base(str(base))
    check_base(str(base), attention="sdpa")


def test_pickled_weights_are_refused_before_they_are_opened(base, run, run_config, tmp_path):  # noqa: F811
    """torch.load is never called, whatever it would allow."""
    (base / "model.safetensors").unlink()
    torch.save({"w": torch.ones(1)}, base / "pytorch_model.bin")
    with pytest.raises(Unsupported, match="can run code"):
        load_model(run_config(base))
    (run / "adapter_model.safetensors").rename(run / "adapter_model.bin")
    for read in (AdapterFile, lambda folder: load_adapter(tiny.gpt2(), folder)):
        with pytest.raises(UserError, match=r"adapter_model\.bin is a pickle"):
            read(run)


def test_a_quantised_base_is_compared_with_its_record(base, tmp_path, capsys):
    from adalora_scale.cli import main

    assert main(["quantize", str(base), str(tmp_path / "q"), "--blocksize", "32"]) == 0
    check_written(str(tmp_path / "q"))
    path = tmp_path / "q" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors is not as it was written"):
        check_written(str(tmp_path / "q"))
    path.unlink()
    with pytest.raises(UserError, match=r"model\.safetensors is missing"):
        check_written(str(tmp_path / "q"))


@pytest.mark.parametrize("scaler", ["LossScaler(1.0)", "DynamicLossScaler()"])
def test_the_loss_scalers_of_deepspeed_are_read_back(scaler):
    """Its flags are no numbers to the schema; every checkpoint of ZeRO was refused by its reader."""
    fp16 = pytest.importorskip("deepspeed.runtime.fp16.loss_scaler")
    kind = getattr(fp16, scaler.split("(")[0])
    made = kind(1.0) if scaler.startswith("Loss") else kind(2.0**16, 2.0, 1000, 1.0, 2)
    held = {key: value for key, value in vars(made).items() if isinstance(value, int | float)}
    loop = {"loss_sum": 0.0, "last_logged": 0, "scheduler": {}, "param_groups": [{"lr": 1.0}], "scaler": None}
    content = {"step": 1, "world_size": 1, "files": {}, "tensors": {}, "loop": loop | {"loss_scaler": held}}
    files.require_readable(Path("checkpoint-1"), content)
    with pytest.raises(RuntimeError, match="nobody can read"):
        files.require_readable(Path("checkpoint-1"), content | {"step": "1"})
