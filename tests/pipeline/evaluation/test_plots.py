import dataclasses
import warnings

import numpy as np
import pytest
from PIL import Image

from pipeline.core.collages import ROW_GAP, KeptRow, kept_patches_picture, save_rows
from pipeline.core.plots import Curve, rate_distortion_plot, token_histogram

CURVE = Curve(
    "surprisal", [16, 32, 64], [160, 320, 640], [18, 20, 23], [40, 25, 12], [150, 290, 560], operating_point=1
)
JPEG = Curve("JPEG", [], [140, 300], [18.5, 21.5])
SINGLE = Curve("global_only", [57], [570], [19.5], [22])
ORIGINALS = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)


def picture(path) -> np.ndarray:
    with Image.open(path) as file:
        assert file.format == "PNG"
        return np.asarray(file.convert("RGB"))


def row(patches: int = 16, label: str = "residual 60 bits") -> KeptRow:
    mask = np.zeros((3, patches), dtype=bool)
    mask[:, : patches // 2] = True
    return KeptRow(label, mask, mask.sum(1), 255 - ORIGINALS)


def has_colour(pixels: np.ndarray) -> np.ndarray:
    return np.ptp(pixels.astype(int), axis=-1) > 0


@pytest.mark.parametrize(
    "curves",
    [[CURVE], [JPEG], [CURVE, JPEG, SINGLE], [dataclasses.replace(CURVE, name=str(i)) for i in range(20)]],
    ids=["one", "without tokens", "mixed", "more than colours"],
)
def test_curves_are_drawn_whole_and_alone_in_a_new_folder(tmp_path, curves):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rate_distortion_plot(tmp_path / "deep" / "curve.png", curves)
    pixels = picture(tmp_path / "deep" / "curve.png")
    assert pixels.shape[1] > 2 * pixels.shape[0] > 1000
    assert has_colour(pixels).any()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["curve.png"]


def test_values_far_apart_and_zeros_can_be_drawn(tmp_path):
    wide = Curve("wide", [8, 264], [80, 2640], [15, 30], [900, 3])
    nothing_kept = Curve("no global tokens", [0, 264], [0, 2640], [12, 30], [900, 3])
    rate_distortion_plot(tmp_path / "wide.png", [wide])
    rate_distortion_plot(tmp_path / "zero.png", [wide, nothing_kept])
    assert (tmp_path / "wide.png").read_bytes() != (tmp_path / "zero.png").read_bytes()


def test_the_order_of_a_curves_points_does_not_matter(tmp_path):
    back = Curve("surprisal", *(list(reversed(v)) for v in (CURVE.tokens, CURVE.bits_fixed, CURVE.psnr, CURVE.frechet)))
    rate_distortion_plot(tmp_path / "back.png", [back])
    forth = dataclasses.replace(CURVE, bits_coded=(), operating_point=None)
    rate_distortion_plot(tmp_path / "forth.png", [forth])
    assert (picture(tmp_path / "back.png") == picture(tmp_path / "forth.png")).all()


def test_drawing_leaves_matplotlib_as_it_was(tmp_path):
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    rate_distortion_plot(tmp_path / "curve.png", [CURVE])
    assert dict(mpl.rcParams) == before


@pytest.mark.parametrize("counts", [[40] * 9, [0], range(8, 265), [8, 264]], ids=["equal", "one", "all", "ends"])
def test_a_histogram_is_drawn_of_any_counts(tmp_path, counts):
    token_histogram(tmp_path / "tokens.png", np.array(counts), "validation")
    assert has_colour(picture(tmp_path / "tokens.png")).any()


def test_pictures_are_enlarged_without_smoothing_and_dropped_patches_lose_their_colour(tmp_path):
    kept_patches_picture(tmp_path / "kept.png", ORIGINALS, [row()])
    pixels = picture(tmp_path / "kept.png")
    large = ORIGINALS.repeat(4, axis=1).repeat(4, axis=2)
    tops = [at for at in range(len(pixels) - 128) if (pixels[at : at + 64, -144:-16] == large[2][:64]).all()]
    assert len(tops) == 2  # the original and the upper half of what was kept
    assert (pixels[tops[0] : tops[0] + 128, -144:-16] == large[2]).all()
    lower = pixels[tops[1] + 64 : tops[1] + 128, -144:-16]
    assert not has_colour(lower).any()
    assert lower.std() < large[2].std()
    below = pixels[tops[1] + 128 :, -144:-16]
    assert any((below[at : at + 128] == 255 - large[2]).all() for at in range(len(below) - 127))


@pytest.mark.parametrize("kept", [True, False])
def test_a_picture_with_all_or_nothing_kept_can_be_drawn(tmp_path, kept):
    mask = np.full((3, 64), kept)
    kept_patches_picture(tmp_path / "kept.png", ORIGINALS, [KeptRow("tau 1", mask, mask.sum(1), ORIGINALS)])
    assert (tmp_path / "kept.png").exists()


def test_every_threshold_has_its_place(tmp_path):
    heights = []
    for count in (1, 2, 3):
        kept_patches_picture(tmp_path / f"{count}.png", ORIGINALS, [row()] * count)
        heights.append(len(picture(tmp_path / f"{count}.png")))
    assert heights[2] - heights[1] == heights[1] - heights[0] > 2 * 128


def test_large_pictures_are_not_enlarged(tmp_path):
    large = np.zeros((1, 200, 200, 3), dtype=np.uint8)
    kept_patches_picture(tmp_path / "kept.png", large, [KeptRow("", np.ones((1, 4), bool), np.array([4]), large)])
    assert picture(tmp_path / "kept.png").shape[1] < 500


def test_rows_lie_below_one_another_enlarged_without_smoothing(tmp_path):
    dark, light = (np.full((3, 32, 32, 3), value, dtype=np.uint8) for value in (10, 200))
    save_rows(tmp_path / "deep" / "grid.png", [dark, light])
    picture = np.asarray(Image.open(tmp_path / "deep" / "grid.png"))
    assert picture.shape == (2 * 96 + ROW_GAP, 3 * 96 + 2 * ROW_GAP, 3)
    assert (picture[:96, :96] == 10).all()
    assert (picture[-96:, -96:] == 200).all()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["grid.png"]
