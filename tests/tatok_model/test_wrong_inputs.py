"""What people hand to the library by mistake: always one sentence that names the value and the expected form."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tatok_model import (
    Codec,
    Generator,
    GeneratorConfig,
    SamplingConfig,
    TaTok,
    TokenizerConfig,
    decode_picture,
    encode_picture,
    load_picture,
    sample,
    save_picture,
)

CONFIG = {"image_size": 16, "global_tokens": 3, "codebook_size": 16, "size": "nano"}


class Things:
    """A small tokenizer, another one, a generator, and what they make of two pictures; files in `folder`."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.folder = folder
        self.tokenizer = TaTok(TokenizerConfig(**CONFIG)).eval()
        self.other = TaTok(TokenizerConfig(**{**CONFIG, "image_size": 32})).eval()
        self.twin = TaTok(TokenizerConfig(**CONFIG)).eval()  # of the same sizes, with other weights
        sizes = {"global_tokens": 3, "grid_size": 4, "max_patch_tokens": 16, "codebook_size": 16}
        self.generator = Generator(GeneratorConfig(size="nano", **sizes)).eval()
        self.images = torch.rand(2, 3, 16, 16)
        self.tokens = self.tokenizer.encode(self.images)
        self.ranked = self.tokenizer.rank(self.tokens)
        self.photo = encode_picture(self.tokenizer, self.images[:1])
        (folder / "empty").mkdir()
        (folder / "notes.txt").write_text("hello")
        Image.new("RGB", (20, 20)).save(folder / "picture.png")
        save_picture(self.tokenizer, self.photo.keep(0.5), folder / "whole.tatok")
        (folder / "torn.tatok").write_bytes((folder / "whole.tatok").read_bytes()[:-3])


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    return Things(tmp_path_factory.mktemp("things"))


CASES = {
    "a name that is not in the box": (
        lambda t: TaTok.from_pretrained("tatok65"),
        "checkpoint 'tatok65' does not exist; expected a folder, a hub id owner/name or a name in the box: tatok64",
    ),
    "no name": (
        lambda t: TaTok.from_pretrained(""),
        "checkpoint is ''; expected a folder, a hub id or a name: tatok64",
    ),
    "None": (
        lambda t: TaTok.from_pretrained(None),
        "checkpoint is None; expected a folder, a hub id or a name: tatok64",
    ),
    "an empty folder": (
        lambda t: TaTok.from_pretrained(t.folder / "empty"),
        "has no config.json; expected a folder that TaTok saved",
    ),
    "a file for a folder": (
        lambda t: TaTok.from_pretrained(t.folder / "notes.txt"),
        "notes.txt' does not exist; expected a folder",
    ),
    "one picture for a batch": (
        lambda t: t.tokenizer.encode(t.images[0]),
        "images are (3, 16, 16); expected (B, 3, 16, 16)",
    ),
    "an array": (
        lambda t: t.tokenizer.encode(t.images.numpy()),
        "images are a ndarray; expected a tensor (B, 3, 16, 16); encode_picture takes paths, arrays",
    ),
    "a path": (
        lambda t: t.tokenizer.encode("photo.jpg"),
        "images are a str; expected a tensor (B, 3, 16, 16); encode_picture takes paths",
    ),
    "channels last": (
        lambda t: t.tokenizer.encode(t.images.permute(0, 2, 3, 1)),
        "images are (2, 16, 16, 3); expected (B, 3, 16, 16)",
    ),
    "grey pictures": (
        lambda t: t.tokenizer.encode(t.images[:, :1]),
        "images are (2, 1, 16, 16); expected (B, 3, 16, 16)",
    ),
    "another size": (
        lambda t: t.tokenizer.encode(torch.rand(2, 3, 32, 32)),
        "images are (2, 3, 32, 32); expected (B, 3, 16, 16)",
    ),
    "[0, 255] in floats": (
        lambda t: t.tokenizer.encode(t.images.round() * 255),
        "images have values from 0 to 255; expected uint8 or floats in [0, 1]",
    ),
    "[-1, 1]": (
        lambda t: t.tokenizer.encode(t.images.round() * 2 - 1),
        "images have values from -1 to 1; expected uint8 or floats in [0, 1]",
    ),
    "NaN": (
        lambda t: t.tokenizer.encode(t.images * float("nan")),
        "images have values from nan to nan; expected uint8 or floats in [0, 1]",
    ),
    "int64": (
        lambda t: t.tokenizer.encode(t.images.long()),
        "images are torch.int64; expected uint8 or floats in [0, 1]",
    ),
    "an unknown score": (
        lambda t: t.tokenizer.rank(t.tokens, "loss"),
        "score is 'loss'; expected one of distortion, error, surprisal",
    ),
    "error without pictures": (
        lambda t: t.tokenizer.rank(t.tokens, "error"),
        "score is 'error'; expected the images too",
    ),
    "no rounds": (
        lambda t: t.tokenizer.rank(t.tokens, rounds=0),
        "rounds is 0; expected 1 to 16, the number of patch positions",
    ),
    "fewer pictures than tokens": (
        lambda t: t.tokenizer.rank(t.tokens, "error", images=t.images[:1]),
        "images are 1 and tokens of 2 images; expected as many",
    ),
    "a cut before a ranking": (
        lambda t: t.tokens.cut("count", 5),
        "these tokens hold one cut and no ranking; expected tokens that TaTok.rank made",
    ),
    "an unknown rule": (
        lambda t: t.ranked.cut("top", 5),
        "rule is 'top'; expected one of relative, residual, marginal, count, quality",
    ),
    "fewer tokens than none": (
        lambda t: t.ranked.cut("count", -1),
        "threshold is -1; expected 0 to 16 whole tokens for the rule count",
    ),
    "half a token": (
        lambda t: t.ranked.cut("count", 2.5),
        "threshold is 2.5; expected 0 to 16 whole tokens for the rule count",
    ),
    "more tokens than there are": (
        lambda t: t.ranked.cut("count", 17),
        "threshold is 17; expected 0 to 16 whole tokens for the rule count",
    ),
    "a threshold of NaN": (
        lambda t: t.ranked.cut("marginal", float("nan")),
        "threshold is nan; expected at least 0, in the score's unit, for the rule marginal",
    ),
    "a threshold in words": (lambda t: t.ranked.cut("marginal", "high"), "threshold is 'high'; expected a number"),
    "dB without a line": (
        lambda t: t.ranked.cut("quality", 20),
        "rule is 'quality' and this tokenizer has no line from distortion in 1 rounds to dB",
    ),
    "pictures for tokens": (
        lambda t: t.tokenizer.decode(t.images),
        "tokens are a Tensor; expected Tokens, as encode makes them",
    ),
    "tokens of another tokenizer": (
        lambda t: t.other.decode(t.tokens),
        "tokens hold 3 global tokens and 16 patch positions; expected 3 and 64",
    ),
    "200 percent": (lambda t: t.photo.keep(2), "share is 2; expected 0.158 (global tokens alone) to 1"),
    "percent": (lambda t: t.photo.keep("25%"), "share is '25%'; expected 0.158 (global tokens alone) to 1"),
    "tiles of another tokenizer": (
        lambda t: decode_picture(t.other, t.photo),
        "tiles have 16 pixels a side; expected 32",
    ),
    "a picture that is not there": (
        lambda t: encode_picture(t.tokenizer, "none.jpg"),
        "No such file or directory: 'none.jpg'",
    ),
    "a text file": (
        lambda t: encode_picture(t.tokenizer, t.folder / "notes.txt"),
        "notes.txt' is not a picture that Pillow reads whole",
    ),
    "a folder of pictures": (lambda t: encode_picture(t.tokenizer, t.folder), "is a folder; expected one picture"),
    "bytes of a file": (
        lambda t: encode_picture(t.tokenizer, b"abc"),
        "picture is a bytes; expected a path, a PIL image, an array or a tensor",
    ),
    "several pictures": (
        lambda t: encode_picture(t.tokenizer, t.images),
        "picture is (2, 3, 16, 16); expected (H, W), (H, W, 3), (3, H, W) or (1, 3, H, W)",
    ),
    "floats of 200": (
        lambda t: encode_picture(t.tokenizer, np.full((20, 20, 3), 200.0)),
        "picture has values from 200 to 200; expected uint8 or floats in [0, 1]",
    ),
    "arguments the wrong way round": (
        lambda t: encode_picture("photo.jpg", t.tokenizer),
        "tokenizer is a str; expected a TaTok, then the picture",
    ),
    "another file": (
        lambda t: load_picture(t.tokenizer, t.folder / "notes.txt"),
        "notes.txt' begins with b'hell'; expected b'TaTP', a .tatok file",
    ),
    "a torn file": (
        lambda t: load_picture(t.tokenizer, t.folder / "torn.tatok"),
        "torn.tatok' is damaged: its checksum differs; expected a whole .tatok file",
    ),
    "a file of other weights": (lambda t: load_picture(t.twin, t.folder / "whole.tatok"), "stream is of the model "),
    "a stream for a list of them": (
        lambda t: Codec(t.tokenizer).from_bytes(b"abc"),
        "streams are a bytes; expected a list with the bytes of each image",
    ),
    "other bytes": (lambda t: Codec(t.tokenizer).from_bytes([b"abc"]), "stream begins with b'abc'; expected b'TaTk'"),
    "an unknown size": (
        lambda t: TokenizerConfig(size="huge"),
        "size is 'huge'; expected one of nano, tiny, small, base, large",
    ),
    "patches that do not tile": (
        lambda t: TokenizerConfig(image_size=30, patch_size=4),
        "image_size is 30; expected a multiple of patch_size, 4",
    ),
    "a class that is not known": (
        lambda t: sample(t.generator, [3]),
        "labels hold 3 to 3; expected -1: this generator knows no classes",
    ),
    "a number of samples": (
        lambda t: sample(t.generator, 4),
        "labels are (); expected one for each sample, -1 for no class",
    ),
    "a temperature below zero": (lambda t: SamplingConfig(temperature=-1), "temperature is -1; expected 0 or more"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_sentence_says_what_is_wrong(things, case):
    mistake, sentence = CASES[case]
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(sentence)) as raised:
        mistake(things)
    assert "\n" not in str(raised.value)
