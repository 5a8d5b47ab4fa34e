"""Inference chooses the entries that training chooses, and moves none of them."""

import copy
import dataclasses
import pickle

import pytest
import torch

from tatok_model import Codec, TaTok, TokenizerConfig, vit
from tatok_model.config import QUANTIZERS
from tatok_model.quantizer import CLASSES, build_quantizer

FSQ = {"quantizer": "fsq", "codebook_size": 15, "fsq_levels": (5, 3)}


@pytest.mark.parametrize("changes", [{}, {"codebook_dim": 24}, FSQ], ids=["vq", "vq without projection", "fsq"])
@pytest.mark.parametrize("size", [16, 1000])
@pytest.mark.parametrize("rows", [50, 199, 1000])
def test_nearest_entries_are_those_that_training_chooses(changes, size, rows, monkeypatch):
    monkeypatch.setattr(vit, "CPU_PRODUCT", rows * size)
    torch.manual_seed(0)
    config = TokenizerConfig(**{"codebook_size": size, "codebook_dim": 8, **changes})
    for seed in range(3):
        quantizer = build_quantizer(24, config)
        x = torch.randn(5, 40, 24, generator=torch.Generator().manual_seed(seed))
        found = quantizer.nearest(x)
        assert (found.dtype, found.shape) == (torch.int64, (5, 40))
        assert torch.equal(found, quantizer.eval()(x)[1])
        assert torch.equal(found, quantizer.train()(x)[1])


@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_quantizer_has_a_class_and_the_code_width_that_the_configuration_says(name):
    config = TokenizerConfig(quantizer=name)
    quantizer = build_quantizer(24, config)
    assert type(quantizer) is CLASSES[name]
    assert quantizer.code_dim == config.code_dim
    assert quantizer.codes().shape == (config.codebook_size, config.code_dim)
    assert CLASSES.keys() == QUANTIZERS.keys()


def test_ties_go_to_the_lowest_entry_as_in_training():
    torch.manual_seed(0)
    quantizer = build_quantizer(8, TokenizerConfig(codebook_size=64, codebook_dim=8))
    codes = quantizer.codes()[:16].repeat(4, 1)  # every entry four times
    quantizer.quantize.codebook = codes
    x = torch.cat([torch.zeros(3, 8), codes * 2.5, torch.randn(50, 8)])[None]  # zeros are as far from every entry
    found = quantizer.nearest(x)
    assert found.max() < 16
    assert found[0, :3].tolist() == [0, 0, 0]
    assert torch.equal(found, quantizer.train()(x)[1])


def test_nearest_entries_are_compared_in_float32_under_autocast():
    torch.manual_seed(0)
    quantizer, x = build_quantizer(24, TokenizerConfig(codebook_size=500)), torch.randn(4, 50, 24)
    with torch.autocast("cpu", torch.bfloat16):
        found = quantizer.nearest(x.bfloat16())
    assert torch.equal(found, quantizer.nearest(x.bfloat16().float()))


@pytest.mark.parametrize("changes", [{}, {"global_tokens": 0}, {"shared_codebook": True}, FSQ, {"patch_tokens": False}])
def test_inference_in_training_mode_moves_nothing_and_gives_what_evaluation_mode_gives(opinionated, images, changes):
    model = opinionated(**changes)
    expected = everything(model, images)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = everything(model.train(), images)
    assert model.training
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def everything(model, images):
    """What inference gives: codes, an order, streams and pictures."""
    tokens, codec = model.encode(images), Codec(model)
    found = [tokens.global_indices, tokens.patch_indices, model.reconstruct(images)]
    if model.patch_quantizer is not None:
        tokens = model.rank(tokens, "entropy", 2).cut("count", 7, replay=True)
        found += [tokens.ranking.order, tokens.kept_mask]
    found += codec.to_bytes(tokens, entropy_coded=model.entropy_model is not None)
    return [*found, codec.from_bytes(found[-len(tokens) :]).kept_mask, model.decode(tokens)]


def test_a_training_step_still_moves_the_codebook(opinionated, images):
    model = opinionated().train()
    before = {name: value.clone() for name, value in model.state_dict().items() if "codebook" in name}
    model(images)
    after = model.state_dict()
    assert before
    assert all(not torch.equal(after[name], value) for name, value in before.items() if "embed" in name)


def test_a_tokenizer_of_one_image_chooses_what_a_batch_chooses(opinionated, images):
    model = TaTok(dataclasses.replace(opinionated().config)).eval()
    whole = model.encode(images)
    assert model.encode(images[:0]).patch_indices.shape == (0, 16)
    for number in range(len(images)):
        assert torch.equal(model.encode(images[number : number + 1]).patch_indices[0], whole.patch_indices[number])


def test_a_tokenizer_survives_pickle_and_copy(opinionated, images):
    model = opinionated()
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(other.encode(images).patch_indices, model.encode(images).patch_indices)
        other.train()(images)  # also re-draws entries
        assert other.patch_quantizer.quantize._codebook.replace.args[0] is other.patch_quantizer.quantize._codebook
