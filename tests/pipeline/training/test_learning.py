import pytest
import torch

from pipeline.data.shards import ShardDataset
from tatok_model import TaTok
from tatok_model.metrics.images import psnr, to_uint8

OVERFIT = {
    "max_steps": 2000, "global_batch_size": 4, "warmup_steps": 50, "ema_decay": 0.98, "horizontal_flip": False,
    "learning_rate": 1e-3, "validate_every": 0, "checkpoint_every": 0, "log_every": 100,
}  # fmt: skip


@pytest.mark.slow
def test_four_photographs_are_learnt_to_35_db_and_swapping_tokens_swaps_pictures(
    four_photographs, configure, run_training
):
    config = configure(
        data={"shards": str(four_photographs)},
        tokenizer={"patch_size": 4, "global_tokens": 8, "codebook_size": 256, "codebook_dim": 16},
        train=OVERFIT,
    )
    run = run_training(config, "overfit")
    images = torch.from_numpy(ShardDataset(four_photographs, "train").images(range(4))).permute(0, 3, 1, 2)
    tokenizer = TaTok.from_pretrained(run.folder / "checkpoint")
    tokens = tokenizer.encode(images)
    values = psnr(images, to_uint8(tokenizer.decode(tokens)))
    assert values.min() >= 35, values
    swapped = [1, 0, 3, 2]
    assert psnr(images[swapped], to_uint8(tokenizer.decode(tokens[swapped]))).min() >= 35
    assert psnr(images, to_uint8(tokenizer.decode(tokens[swapped]))).max() < 25
