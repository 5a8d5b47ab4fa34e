import dataclasses
import json
import subprocess
import sys

import pytest
import torch

from tatok_model import TaTok, TokenizerConfig, Tokens
from tatok_model.tokenizer import TaTok as Direct

TINY = TokenizerConfig(image_size=32, patch_size=8, global_tokens=4, codebook_size=16, codebook_dim=8)


def variant(**changes):
    torch.manual_seed(0)
    return TaTok(dataclasses.replace(TINY, **changes)).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return variant()


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def with_trained_codebook(model, images):
    """The VQ codebook is made from the first batch in training mode."""
    model.train()
    model(images)
    return model.eval()


@pytest.mark.parametrize(
    ("changes", "m", "kept"),
    [
        ({}, 4, 16),
        ({"global_tokens": 0}, 0, 16),
        ({"patch_tokens": False}, 4, 0),
        ({"quantizer": "fsq", "codebook_size": 15, "fsq_levels": (5, 3)}, 4, 16),
        ({"shared_codebook": True}, 4, 16),
    ],
    ids=["both", "patch_only", "global_only", "fsq", "shared_codebook"],
)
def test_every_kind_of_tokenizer_encodes_and_decodes(changes, m, kept, images):
    model = with_trained_codebook(variant(**changes), images)
    tokens = model.encode(images)
    assert tokens.global_indices.shape == (3, m)
    assert tokens.counts().tolist() == [m + kept] * 3
    pictures = model.decode(tokens)
    assert pictures.shape == images.shape
    assert 0 <= pictures.min() <= pictures.max() <= 1
    assert torch.equal(pictures, model.reconstruct(images))


@pytest.mark.parametrize("changes", [{}, {"quantizer": "fsq", "codebook_size": 15, "fsq_levels": (5, 3)}])
def test_the_training_forward_gives_the_pictures_of_encode_and_decode(changes, images):
    model = with_trained_codebook(variant(**changes), images)
    output = model(images)
    torch.testing.assert_close(output.images.clamp(0, 1), model.reconstruct(images), atol=1e-5, rtol=0)
    assert torch.equal(output.tokens.patch_indices, model.encode(images).patch_indices)


def test_uint8_and_float_images_give_the_same_tokens(tokenizer, images):
    levels = (images * 255).round()
    from_bytes, from_floats = tokenizer.encode(levels.to(torch.uint8)), tokenizer.encode(levels / 255)
    assert torch.equal(from_bytes.patch_indices, from_floats.patch_indices)


def test_dropping_everything_decodes_from_global_tokens_alone(tokenizer, images):
    nothing = torch.zeros(3, 16, dtype=torch.bool)
    assert tokenizer.encode(images, nothing).counts().tolist() == [4, 4, 4]
    assert tokenizer.reconstruct(images, nothing).shape == images.shape


def test_gradients_reach_every_parameter(images):
    model = variant().train()
    kept = torch.arange(16).expand(3, 16) % 2 == 0
    output = model(images, kept)
    ((output.images - images).square().mean() + output.commitment_loss).backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    # The entropy model learns from its own loss (test_ranking.py); a gate of 0 lets nothing through at first.
    assert {name for name in without if not name.startswith("entropy_model.")} == {"from_expected.weight"}


def test_saving_and_loading_changes_nothing(tokenizer, images, tmp_path):
    tokenizer.save_pretrained(tmp_path / "saved")
    loaded = TaTok.from_pretrained(tmp_path / "saved")
    assert loaded.config == tokenizer.config
    assert not loaded.training
    assert torch.equal(loaded.reconstruct(images), tokenizer.reconstruct(images))


@pytest.mark.parametrize("path", ["nowhere", "a/b/c", "/no/such/folder", "./nowhere", "~/nowhere", "tests/nowhere"])
def test_a_path_that_does_not_exist_fails_without_asking_the_network(path, monkeypatch):
    monkeypatch.setattr(
        "huggingface_hub.hub_mixin.hf_hub_download", lambda *a, **k: pytest.fail("the network was asked")
    )
    with pytest.raises(
        FileNotFoundError, match="does not exist; expected a folder, a hub id owner/name or a name in the box: tatok64"
    ):
        TaTok.from_pretrained(path)


def test_a_folder_without_weights_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        TaTok.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ['{"width": 3}', "[]", "not json", '{"size": "huge"}'])
def test_a_folder_of_another_model_is_refused(tokenizer, tmp_path, text):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="is not a tokenizer's"):
        TaTok.from_pretrained(tmp_path)


def test_the_saved_configuration_is_plain_json(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["codebook_size"] == 16


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(1, 3, 16, 16), r"expected \(B, 3, 32, 32\)"),
        (torch.rand(3, 32, 32), r"expected \(B, 3, 32, 32\)"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.int64), "expected uint8 or floats"),
    ],
)
def test_images_of_another_kind_are_refused(tokenizer, images, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.encode(images)


def test_a_kept_mask_of_another_shape_is_refused(tokenizer, images):
    with pytest.raises(ValueError, match=r"kept_mask is torch\.bool \(3, 4\); expected bool \(3, 16\)"):
        tokenizer.encode(images, torch.ones(3, 4, dtype=torch.bool))


def test_keeping_patches_that_a_global_only_tokenizer_lacks_is_refused(images):
    model = variant(patch_tokens=False)
    with pytest.raises(ValueError, match="has only global tokens"):
        model.encode(images, torch.ones(3, 16, dtype=torch.bool))
    tokens = model.encode(images)
    with pytest.raises(ValueError, match="has only global tokens"):
        model.decode(Tokens(tokens.global_indices, tokens.patch_indices, ~tokens.kept_mask))


def test_tokens_of_another_length_are_refused(tokenizer, images):
    tokens = variant(global_tokens=2).encode(images)
    with pytest.raises(ValueError, match="hold 2 global tokens and 16 patch positions; expected 4 and 16"):
        tokenizer.decode(tokens)


@pytest.mark.parametrize("which", ["global", "patch"])
@pytest.mark.parametrize("entry", [16, -1])
def test_entries_beyond_the_codebook_are_refused(tokenizer, images, which, entry):
    tokens = tokenizer.encode(images)
    indices = tokens.global_indices if which == "global" else tokens.patch_indices
    indices[0, 0] = entry
    with pytest.raises(ValueError, match="expected 0 to 15"):
        tokenizer.decode(tokens)


def test_the_package_works_without_ray_mlflow_and_pyarrow():
    blocked = "import sys\nfor name in ('ray', 'mlflow', 'pyarrow'): sys.modules[name] = None\n"
    code = blocked + "import torch\nfrom tatok_model import TaTok, TokenizerConfig\n"
    code += "print(TaTok(TokenizerConfig()).eval().reconstruct(torch.rand(1, 3, 32, 32)).shape)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.strip() == "torch.Size([1, 3, 32, 32])", found.stderr


def test_configuration_and_rules_are_read_without_torch():
    code = "import sys, tatok_model, tatok_model.filtering_rules\ntatok_model.TokenizerConfig()\n"
    found = subprocess.run(
        [sys.executable, "-c", code + "print('torch' in sys.modules)"], capture_output=True, text=True
    )
    assert found.stdout.strip() == "False", found.stderr


def test_the_package_names_what_it_offers():
    import tatok_model

    assert tatok_model.TaTok is Direct
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        tatok_model.Nothing  # noqa: B018
