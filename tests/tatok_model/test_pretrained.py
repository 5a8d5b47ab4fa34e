"""What people who know PyTorch and the hub expect of a saved model."""

import os
import pydoc
import stat

import pytest
import torch

import tatok_model
from tatok_model import Generator, GeneratorConfig, TaTok, TokenizerConfig, sample

TOKENIZER = TokenizerConfig(image_size=16, global_tokens=3, codebook_size=16, size="nano")
GENERATOR = GeneratorConfig(global_tokens=3, grid_size=4, max_patch_tokens=16, codebook_size=16, size="nano")


@pytest.fixture(scope="module", params=[(TaTok, TOKENIZER), (Generator, GENERATOR)], ids=["tokenizer", "generator"])
def saved(request, tmp_path_factory):
    kind, config = request.param
    torch.manual_seed(0)
    model, folder = kind(config).eval(), tmp_path_factory.mktemp("saved")
    mask = os.umask(0o027)
    try:
        model.save_pretrained(folder)
    finally:
        os.umask(mask)
    return model, folder


@pytest.mark.parametrize("option", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", ["bfloat16", torch.bfloat16])
def test_weights_come_in_the_precision_that_is_asked_for(saved, option, value):
    model, folder = saved
    loaded = type(model).from_pretrained(folder, **{option: value})
    assert loaded.dtype == torch.bfloat16
    for name, weight in loaded.named_parameters():
        assert torch.equal(weight, model.get_parameter(name).to(torch.bfloat16)), name
    assert type(model).from_pretrained(folder).dtype == torch.float32
    assert model.device == torch.device("cpu")


def test_another_precision_is_refused(saved):
    model, folder = saved
    for value in ("int8", torch.int64):
        with pytest.raises(ValueError, match=f"dtype is {value!r}; expected one of float32, float16, bf"):
            type(model).from_pretrained(folder, dtype=value)


def test_the_group_may_read_weights_where_the_umask_lets_it(saved):
    assert stat.S_IMODE((saved[1] / "model.safetensors").stat().st_mode) == 0o640


def test_the_card_says_what_the_model_is_and_its_lines_of_python_are_true(saved):
    card = (saved[1] / "README.md").read_text()
    assert "More Information Needed" not in card
    assert "library_name: tatok" in card
    assert "3 global" in card
    assert "16 patch tokens" in card
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")


def test_samples_have_defaults():
    torch.manual_seed(0)
    generator = Generator(GENERATOR).eval()
    made = sample(generator, [-1, -1, -1])
    again = sample(generator, torch.full((3,), -1), torch.arange(3), 0, tatok_model.SamplingConfig())
    assert torch.equal(made.codes, again.codes)
    assert torch.equal(made.global_indices, again.global_indices)
    assert not torch.equal(made.global_indices[0], made.global_indices[1])


def test_tokens_of_one_image_are_a_batch_of_one_and_print_as_a_line():
    torch.manual_seed(0)
    tokenizer = TaTok(TOKENIZER).eval()
    images = torch.rand(3, 3, 16, 16)
    tokens = tokenizer.rank(tokenizer.encode(images), "error", 1, images).cut("count", 5)
    assert repr(tokens) == "Tokens(3 images, 3 global and 5.0 of 16 patch tokens on average, ranked by error)"
    assert repr(tokens[1]) == "Tokens(1 images, 3 global and 5.0 of 16 patch tokens on average, ranked by error)"
    for number in (1, -2):
        assert torch.equal(tokens[number].patch_indices, tokens.patch_indices[1:2])
        assert torch.equal(tokens[number].kept_mask, tokens.kept_mask[1:2])
    assert len(list(tokens)) == 3
    with pytest.raises(IndexError):
        tokens[3]


def test_help_lists_the_classes():
    text = pydoc.plain(pydoc.render_doc(tatok_model))
    for name in ("class TaTok", "class Tokens", "class Generator", "encode_picture(", "sample("):
        assert name in text
