"""modules_to_save of a language model under TRL's trainer, which multiplies by the head's weight without calling it."""

import pytest
import torch

from adalora_scale.training.run import make_trainer, prepare
from tests.distributed.workers.trainer_worker import config_of


@pytest.mark.shows("training", task="causal_lm", engine="one process", base="bfloat16")
@pytest.mark.shows("features", feature="trained output head or embedding, new tokens", engine="one process")
@pytest.mark.parametrize("saved", ["lm_head", pytest.param("embed_tokens", marks=pytest.mark.full)])
def test_a_tied_head_of_a_16_bit_model_trains_in_float32(saved, stories260k, data_dir, tmp_path):
    """Else it stays in bfloat16 and does not move, or a product of bfloat16 with float32 ends the first step."""
    few = ["training.max_steps=2", "training.learning_rate=2e-5", "adalora.tinit=0", "adalora.tfinal=1"]
    options = [*few, "adalora.deltaT=1", f"adalora.modules_to_save=[{saved}]", "model.torch_dtype=bfloat16"]
    config = config_of("ddp", "sft", stories260k, data_dir, tmp_path, 1, options)
    trainer = make_trainer(config, prepare(config))
    weight = trainer.model.lm_head.weight
    assert weight is trainer.model.model.embed_tokens.weight and weight.dtype == torch.float32
    before = weight.detach().clone()
    trainer.train()
    assert (weight != before).float().mean() > 0.9
