"""Tokens: what TRL would prepare itself, made once among processes, and packed examples cannot see each other."""

import json
import logging
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from adalora_scale.config import DataConfig
from adalora_scale.data import preparing
from adalora_scale.data.chat_templates import resolve_chat_template
from adalora_scale.data.packing import check_packing_isolated
from adalora_scale.data.rows import load_raw
from adalora_scale.data.tokenization import prepare_classification, prepare_language_model
from adalora_scale.errors import Unsupported, UserError
from adalora_scale.tasks.registry import find_task, wanted_rows

SHARED = Path(__file__).parents[2].parent / "shared"
MODEL = SHARED / "models" / "stories260k"


def real(name):
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"no {name} beside the project (../shared)")
    return str(path)


@pytest.fixture(autouse=True)
def one_thread():
    # A model this small only loses by waiting for a second thread on a busy machine.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(real("models/stories260k"))


def chat(**options):
    return DataConfig(train=real("data/sgd_chat/train.jsonl"), max_train_samples=40, chat_template="plain", **options)


def maths(**options):
    names = {"prompt_column": "question", "completion_column": "answer"}
    return DataConfig(train=real("data/gsm8k/train.jsonl"), max_train_samples=60, **names, **options)


def prepare(config, tokenizer, tmp_path, seed=1):
    raw = load_raw(config, wanted_rows(find_task("causal_lm")), seed=seed)
    return prepare_language_model(raw, tokenizer, config, seed=seed, cache_dir=tmp_path / "tokens")


def from_rows(tmp_path, rows, **options):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(train=str(path), **options)


def trl_trainer(train, tokenizer, tmp_path, eval_dataset=None, **options):
    args = SFTConfig(output_dir=str(tmp_path / "trl"), use_cpu=True, bf16=False, report_to=[], max_steps=2, **options)
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    return SFTTrainer(model, args, train_dataset=train, eval_dataset=eval_dataset, processing_class=tokenizer)


@pytest.mark.parametrize("max_length", [200, 4000])
@pytest.mark.parametrize("kind", ["assistant", "all turns", "completion", "whole pairs", "text"])
def test_tokens_and_labels_are_trls(tokenizer, tmp_path, kind, max_length):
    make = {
        "assistant": lambda: chat(max_length=max_length),
        "all turns": lambda: chat(max_length=max_length, loss_on="all"),
        "completion": lambda: maths(max_length=max_length),
        "whole pairs": lambda: maths(max_length=max_length, loss_on="all"),
        "text": lambda: DataConfig(
            train=real("data/gsm8k/train.jsonl"), text_column="question", max_train_samples=60, max_length=max_length
        ),
    }
    config = make[kind]()
    ours = prepare(config, tokenizer, tmp_path).train
    raw = load_raw(config, wanted_rows(find_task("causal_lm")), seed=1)
    tokenizer.chat_template = resolve_chat_template(tokenizer, config, layout=raw.layout)
    theirs = trl_trainer(
        raw.train,
        tokenizer,
        tmp_path,
        max_length=max_length,
        assistant_only_loss=kind == "assistant",
        completion_only_loss={"completion": True, "whole pairs": False}.get(kind),
    ).train_dataset
    assert len(ours) > 30
    for column in ("input_ids", "labels"):
        assert ours[column][:] == theirs[column][:]


def test_packing_is_trls(tokenizer, tmp_path):
    config = maths(max_length=512, packing=True)
    ours = prepare(config, tokenizer, tmp_path).train
    raw = load_raw(config, wanted_rows(find_task("causal_lm")), seed=1)
    # TRL packs after its shuffle only when asked to, and shuffles again afterwards: do the first shuffle alone.
    theirs = trl_trainer(raw.train.shuffle(seed=1), tokenizer, tmp_path, max_length=512, packing=True).train_dataset
    assert ours.column_names == ["input_ids", "labels", "seq_lengths"]
    for column in ours.column_names:
        assert ours[column][:] == theirs[column][:]


def test_sft_trainer_takes_the_packed_data_as_it_is(tokenizer, tmp_path):
    config = maths(max_length=512, packing=True, eval=real("data/gsm8k/test.jsonl"), max_eval_samples=20)
    ready = prepare(config, tokenizer, tmp_path)
    trainer = trl_trainer(
        ready.train,
        tokenizer,
        tmp_path,
        eval_dataset=ready.eval,
        packing=True,
        max_length=512,
        dataset_kwargs={"skip_prepare_dataset": True},
        per_device_train_batch_size=2,
    )
    assert trainer.train().training_loss > 0
    assert trainer.evaluate()["eval_loss"] > 0


def test_the_report_counts_what_training_sees(tokenizer, tmp_path, caplog):
    rows = [
        {"prompt": "Once upon a time", "completion": " there was a cat."},
        {"prompt": "word " * 50, "completion": " lost"},  # the prompt alone fills max_length
        {"prompt": "Lily", "completion": " word" * 50},  # cut, but with a loss left
    ]
    ready = prepare(from_rows(tmp_path, rows, max_length=40), tokenizer, tmp_path)
    labels = ready.train["labels"][:]
    assert ready.report == {
        "train_examples": 2,
        "dropped_empty_loss": 1,
        "truncated": 1,
        "train_tokens": sum(map(len, labels)),
        "loss_tokens": sum(label != -100 for row in labels for label in row),
        "packed_sequences": 0,
    }
    assert max(map(len, labels)) == 40
    assert [r.levelno for r in caplog.records if "dropped_empty_loss 1" in r.message] == [logging.WARNING]


def test_conversations_without_an_assistant_are_dropped(tokenizer, tmp_path):
    turns = [{"role": "user", "content": "hello"}]
    rows = [{"messages": turns}, {"messages": [*turns, {"role": "assistant", "content": "hi"}]}]
    ready = prepare(from_rows(tmp_path, rows, chat_template="plain"), tokenizer, tmp_path)
    assert (ready.report["train_examples"], ready.report["dropped_empty_loss"]) == (1, 1)


@pytest.mark.parametrize(
    ("row", "options", "expected"),
    [
        ({"prompt": "word " * 50, "completion": " x"}, {"max_length": 8}, "raise data.max_length"),
        ({"messages": [{"role": "user", "content": "hello"}]}, {"chat_template": "plain"}, "{% generation %}"),
    ],
)
def test_a_mask_that_hides_everything_is_refused(tokenizer, tmp_path, row, options, expected):
    with pytest.raises(UserError) as error:
        prepare(from_rows(tmp_path, [row], **options), tokenizer, tmp_path)
    assert "none of the 1 train examples" in str(error.value) and expected in str(error.value)
    assert not list((tmp_path / "tokens").glob("*tmp*")), "a failed preparation leaves nothing to be taken"


def test_a_conversation_its_template_refuses_is_named(tokenizer, tmp_path):
    template = tmp_path / "strict.jinja"
    template.write_text(
        "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
        "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}{% endfor %}"
    )
    rows = [{"messages": [{"role": role, "content": "hello"}]} for role in ("user", "tool")]
    with pytest.raises(UserError, match="refuses row 2: no tools here"):
        prepare(from_rows(tmp_path, rows, chat_template=str(template)), tokenizer, tmp_path)


def test_the_number_of_workers_changes_nothing(tokenizer, tmp_path):
    one, two = (
        prepare(maths(max_length=300, packing=True, preprocessing_num_workers=n), tokenizer, tmp_path / str(n))
        for n in (1, 2)
    )
    assert one.train.to_list() == two.train.to_list()


def test_the_cache_is_taken_only_for_the_same_inputs(tokenizer, tmp_path, monkeypatch):
    builds = []
    original = preparing._prepare_part
    monkeypatch.setattr(preparing, "_prepare_part", lambda *a: builds.append(1) or original(*a))
    config = maths(max_length=300)
    first = prepare(config, tokenizer, tmp_path)
    tokenizer(["leaves padding and truncation set", "in"], padding=True, truncation=True, max_length=3)
    again = prepare(config, tokenizer, tmp_path)
    assert len(builds) == 1 and again.report == first.report
    assert again.train.to_list() == first.train.to_list()
    prepare(maths(max_length=200), tokenizer, tmp_path)
    prepare(maths(max_length=300, loss_on="all"), tokenizer, tmp_path)
    prepare(config, tokenizer, tmp_path, seed=2)
    tokenizer.add_tokens(["Natalia"])
    prepare(config, tokenizer, tmp_path)
    assert len(builds) == 5


def test_what_a_dead_process_left_is_not_taken(tokenizer, tmp_path):
    config = maths(max_length=300)
    done = prepare(config, tokenizer, tmp_path)
    (final,) = (path for path in (tmp_path / "tokens").iterdir() if path.is_dir())
    half = final.rename(final.with_name(f"{final.name}.tmp-dead"))
    (half / "train" / "state.json").unlink()
    again = prepare(config, tokenizer, tmp_path)
    assert again.report == done.report and not half.exists()


def test_three_processes_tokenise_once(tokenizer, tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(
        textwrap.dedent("""
        import os, sys, time
        from pathlib import Path
        from transformers import AutoTokenizer
        from adalora_scale.config import DataConfig
        from adalora_scale.data import preparing
        from adalora_scale.data.rows import load_raw
        from adalora_scale.data.tokenization import prepare_language_model
        from adalora_scale.tasks.registry import find_task, wanted_rows

        model, data, base, me = sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4]
        original = preparing._prepare_part

        def counted(*args):
            with open(base / "builds", "a") as file:
                file.write(me + "\\n")
            time.sleep(1)  # long enough for the others to arrive at the lock
            return original(*args)

        preparing._prepare_part = counted
        config = DataConfig(train=data, prompt_column="question", completion_column="answer", packing=True,
                            max_length=512, max_train_samples=200)
        tokenizer = AutoTokenizer.from_pretrained(model)
        (base / f"ready{me}").touch()
        while len(list(base.glob("ready*"))) < 3:
            time.sleep(0.01)
        raw = load_raw(config, wanted_rows(find_task("causal_lm")), seed=1)
        ready = prepare_language_model(raw, tokenizer, config, seed=1, cache_dir=base / "tokens")
        print(preparing.dataset_digest(ready.train), ready.report)
        """)
    )
    arguments = [real("models/stories260k"), real("data/gsm8k/train.jsonl"), str(tmp_path)]
    environment = os.environ | {
        "HF_DATASETS_CACHE": str(tmp_path / "hf"),
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), *arguments, str(rank)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    outputs = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 0], outputs
    assert len({out for out, _ in outputs}) == 1
    assert len((tmp_path / "builds").read_text().split()) == 1


def packed_batch(tokenizer, tmp_path):
    config = maths(max_length=400, packing=True)
    row = next(row for row in prepare(config, tokenizer, tmp_path).train if len(row["seq_lengths"]) >= 2)
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([row])
    batch.pop("labels")
    return row, batch


def worst_difference(model, row, batch):
    """Largest difference between an example's logits in the packed row and alone."""
    alone = torch.tensor(row["input_ids"]).split(row["seq_lengths"])
    with torch.no_grad():
        packed = model(**batch, use_cache=False).logits[0].split(row["seq_lengths"])
        expected = [model(input_ids=ids[None], use_cache=False).logits[0] for ids in alone]
    return max((p - e).abs().max().item() for p, e in zip(packed, expected, strict=True))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_examples_do_not_see_each_other(tokenizer, tmp_path, attention):
    # In fp32 the two shapes round differently by 1e-5 on logits of 20; in fp64 only a leak can be that large.
    model = AutoModelForCausalLM.from_pretrained(MODEL, attn_implementation=attention, dtype=torch.float64).eval()
    row, batch = packed_batch(tokenizer, tmp_path)
    assert worst_difference(model, row, batch) <= 1e-10
    del batch["position_ids"]
    assert worst_difference(model, row, batch) > 0.1, "the test must notice examples that are not kept apart"
    check_packing_isolated(model)


def test_a_key_value_cache_mixes_packed_examples(tokenizer, tmp_path):
    # Why check_packing_isolated and TRL pass use_cache=False; if this fails, transformers has lifted the limitation.
    model = AutoModelForCausalLM.from_pretrained(MODEL).eval()
    _, batch = packed_batch(tokenizer, tmp_path)
    with torch.no_grad():
        apart = model(**batch, use_cache=False).logits
        mixed = model(**batch, use_cache=True).logits
    assert (apart - mixed).abs().max() > 0.1


class ForgetsPositions(torch.nn.Module):
    """A model that drops what keeps packed examples apart."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, input_ids, use_cache, **dropped):
        return self.model(input_ids=input_ids, use_cache=use_cache)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_mixes_packed_examples_is_refused(dtype):
    model = AutoModelForCausalLM.from_pretrained(real("models/stories260k"), dtype=dtype).train()
    state = torch.get_rng_state()
    check_packing_isolated(model)
    assert model.training and torch.equal(state, torch.get_rng_state())
    with pytest.raises(Unsupported, match=r"data\.packing=false"):
        check_packing_isolated(ForgetsPositions(model))


def test_a_recurrent_model_is_refused():
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=2, time_step_rank=4)
    with pytest.raises(Unsupported, match="MambaForCausalLM"):
        check_packing_isolated(MambaForCausalLM(config))


def test_texts_to_classify_carry_their_label_and_fit_the_encoder(tokenizer, tmp_path):
    config = DataConfig(
        train=real("data/banking77/train.csv"),
        eval=real("data/banking77/test.csv"),
        label_column="category",
        max_train_samples=100,
        max_eval_samples=50,
        max_length=64,
    )
    raw = load_raw(config, wanted_rows(find_task("sequence_classification")), seed=1)
    tokenizer.model_max_length = 32
    ready = prepare_classification(raw, tokenizer, config, seed=1, cache_dir=tmp_path / "tokens")
    assert ready.train["labels"][:] == raw.train["label"][:]
    whole = [tokenizer(text, verbose=False)["input_ids"] for text in raw.train["text"]]
    assert ready.train["input_ids"][:] == [ids[:32] for ids in whole]
    assert ready.report["truncated"] == sum(len(ids) > 32 for ids in whole) > 0
    assert (ready.report["train_examples"], ready.report["eval_examples"]) == (100, 50)
    with pytest.raises(UserError, match=r"data\.packing"):
        prepare_classification(raw, tokenizer, DataConfig(train="x", packing=True), seed=1)
