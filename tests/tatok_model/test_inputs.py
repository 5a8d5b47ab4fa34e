"""Pictures and weights of other kinds than the usual ones: refused in a sentence, or cast."""

import copy
import math

import pytest
import torch

from tatok_model import Codec

SCORES = ("distortion", "error", "surprisal", "entropy", "pixel_entropy")


@pytest.mark.parametrize("verb", ["encode", "reconstruct"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda images: images * 255, "images have values from 0 to 255; expected uint8 or floats in"),
        (lambda images: images * 2 - 1, "images have values from -1 to 1"),
        (lambda images: (images - 0.45) / 0.225, "images have values from -2 to 2.44444"),
        (lambda images: images * math.nan, "images have values from nan to nan"),
        (lambda images: (images * 255).long(), "images are torch.int64; expected uint8 or floats in"),
    ],
)
def test_pictures_outside_the_range_are_refused(opinionated, verb, change, message):
    images = torch.linspace(0, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
    with pytest.raises(ValueError, match=message + (r" \[0, 1\]" if message.endswith("in") else "")):
        getattr(opinionated(), verb)(change(images))


def test_pictures_that_a_resize_put_a_little_outside_are_taken(opinionated, images):
    model, widened = opinionated(), images.clone()
    widened[0, 0, 0, 0], widened[0, 0, 0, 1] = -5e-4, 1 + 5e-4
    assert model.encode(widened).patch_indices.shape == (6, 16)
    assert len(model.encode(images[:0])) == 0


@pytest.mark.parametrize("quantizer", ["vq", "fsq"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_weights_and_pictures_of_any_precision_give_nearly_the_same_codes(opinionated, images, dtype, quantizer):
    changes = {} if quantizer == "vq" else {"quantizer": "fsq", "fsq_levels": (4, 4), "codebook_size": 16}
    model = opinionated(**changes)
    expected = model.encode(images)
    for cast, given in (
        (model, images.to(dtype)),
        (copy.deepcopy(model).to(dtype), images.to(dtype)),
        (copy.deepcopy(model).to(dtype), (images * 255).round().byte()),
    ):
        tokens = cast.encode(given)
        assert (tokens.patch_indices == expected.patch_indices).float().mean() > 0.8
        for score in SCORES:
            short = cast.rank(tokens, score, 1, given).cut("count", 5)
            assert torch.isfinite(cast.decode(short)).all()
        codec = Codec(cast)
        short = cast.rank(tokens, "distortion").cut("count", 5)
        assert torch.equal(codec.from_bytes(codec.to_bytes(short, entropy_coded=True)).kept_mask, short.kept_mask)


def test_a_model_says_where_and_in_what_it_is(opinionated):
    model = opinionated()
    assert (model.dtype, model.device) == (torch.float32, torch.device("cpu"))
    assert copy.deepcopy(model).double().dtype == torch.float64
