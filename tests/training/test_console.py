"""What a run prints at each log: without time left, speed and memory a log file does not say whether to wait."""

import re

from transformers import TrainerControl, TrainerState, TrainingArguments

from adalora_scale.training.console import ConsoleCallback


def lines(tmp_path, capsys, steps, speed):
    callback = ConsoleCallback(bar=False, speed=lambda: speed)
    arguments, control = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none"), TrainerControl()
    state = TrainerState(max_steps=10)
    callback.on_train_begin(arguments, state, control)
    for state.global_step in range(1, steps + 1):
        callback.on_step_end(arguments, state, control)
        callback.on_log(arguments, state, control, {"loss": 1.0})
    callback.on_log(arguments, state, control, {"eval_loss": 2.0})
    return capsys.readouterr().out.splitlines()


def test_each_line_of_a_log_says_how_fast_how_large_and_how_long(tmp_path, capsys):
    said = lines(tmp_path, capsys, 10, 1234.4)
    assert re.fullmatch(r"step 1/10  loss 1\.0000  1,234 tokens/s  memory \d+\.\d GiB", said[0])  # nothing to go by yet
    for line in said[1:9]:
        assert re.search(r"  1,234 tokens/s  memory \d+\.\d GiB  \d+:\d\d:\d\d left$", line)
    assert said[9].endswith("GiB") and said[10] == "step 10/10  eval_loss 2.0000"


def test_a_speed_that_is_not_known_is_not_shown(tmp_path, capsys):
    assert "tokens/s" not in "".join(lines(tmp_path, capsys, 2, None))
