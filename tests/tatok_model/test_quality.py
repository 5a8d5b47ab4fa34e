"""The line from what a cut leaves unsaid to dB: what it says, where it is kept, what it refuses."""

import dataclasses
import json
import math
import re

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from hypothesis import given
from hypothesis import strategies as st

from tatok_model import TaTok
from tatok_model.filtering_rules import QUALITY_FILE, QualityLine, line_of, lines_json, read_lines, with_line
from tatok_model.tokens import Ranking

LINE = QualityLine("distortion", 1, intercept=0.004, slope=0.02)
LINES = (LINE, QualityLine("error", 1, 0.005, 0.06), QualityLine("distortion", 4, 1 / 3, 1e-7))


def psnr(line, left):
    return -10 * math.log10(line.intercept + line.slope * left)


@given(st.floats(1e-5, 0.5), st.floats(1e-6, 10), st.floats(1e-3, 1))
def test_what_may_be_left_inverts_the_line(intercept, slope, share):
    line = QualityLine("error", 1, intercept, slope)
    decibels = share * line.most
    left = line.residual_at(decibels)
    assert left >= -1e-12  # rounding
    assert intercept + slope * left == pytest.approx(10 ** (-decibels / 10), rel=1e-9)


def test_what_may_be_left_is_computed_by_hand():
    line = QualityLine("distortion", 1, 0.01, 0.03)
    assert line.residual_at(10) == pytest.approx(3.0)  # 0.1 = 0.01 + 0.03 x 3
    assert line.residual_at(20) == 0.0
    assert line.residual_at(10 * math.log10(4)) == pytest.approx(8.0)  # 0.25


def test_the_most_is_the_error_of_everything_kept_in_decibels():
    assert QualityLine("error", 1, 0.01, 1.0).most == pytest.approx(20.0)
    assert LINE.most == pytest.approx(23.9794, abs=1e-4)
    assert psnr(LINE, 0.0) == LINE.most


@pytest.mark.parametrize(("decibels", "said"), [(24.0, "24"), (23.98, "23.98"), (99.5, "99.5")])
def test_more_than_the_most_is_refused_with_what_there_is(decibels, said):
    sentence = (
        f"threshold is {said} dB for the rule quality; "
        "expected at most 23.9 dB, which this tokenizer reaches with all tokens"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        LINE.residual_at(decibels)
    assert LINE.residual_at(23.9) > 0  # what the sentence names is there


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(
            ({name: value}, f"{name} is {value}; expected a number above 0")
            for name in ("intercept", "slope")
            for value in (0.0, -0.1, math.inf, math.nan)
        ),
        ({"score": "best"}, "score is 'best'; expected one of distortion, error"),
        ({"score": "surprisal"}, "score is 'surprisal'; expected one of distortion, error"),
        ({"rounds": 0}, "rounds is 0; expected a whole number"),
        ({"rounds": "1"}, "rounds is '1'; expected a whole number"),
        ({"kept_slope": -0.1}, "kept_slope is -0.1; expected 0 or more"),
        ({"kept_slope": 0.02}, "kept_slope is 0.02; expected 0 or more, and less than slope, 0.02"),
        ({"most": -1.0}, "most is -1.0; expected 0 or more dB"),
        ({"most": math.inf}, "most is inf; expected 0 or more dB"),
    ],
)
def test_a_line_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(LINE, **changes)


def test_a_new_line_replaces_that_of_the_same_score_and_rounds_and_no_other():
    new = QualityLine("distortion", 1, 0.5, 0.5)
    found = with_line(LINES, new)
    assert len(found) == 3
    assert {*found} == {LINES[1], LINES[2], new}
    assert with_line((), new) == (new,)
    assert with_line(LINES[1:], new) == (*LINES[1:], new)
    assert [line_of(LINES, line.score, line.rounds) for line in LINES] == list(LINES)
    assert line_of(LINES, "error", 4) is line_of(LINES, "surprisal", 1) is line_of((), "distortion", 1) is None


def test_lines_are_written_and_read_without_loss(tmp_path):
    path = tmp_path / QUALITY_FILE
    for lines in ((), LINES[:1], LINES):
        path.write_text(lines_json(lines))
        assert read_lines(path) == lines
    assert json.loads(path.read_text())["lines"][0] == {
        "score": "distortion",
        "rounds": 1,
        "intercept": 0.004,
        "slope": 0.02,
        "kept_slope": 0.0,
        "most": LINE.most,
    }


def test_where_there_is_no_file_there_are_no_lines(tmp_path):
    assert read_lines(tmp_path / QUALITY_FILE) == ()
    assert read_lines(tmp_path) == ()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "not json",
        "[]",
        "{}",
        "null",
        '{"lines": 3}',
        '{"lines": [3]}',
        '{"lines": [{"score": "distortion", "rounds": 1, "intercept": 0.1}]}',
        '{"lines": [{"score": "distortion", "rounds": 1, "intercept": 0.1, "slope": 1, "colour": "red"}]}',
        '{"lines": [{"score": "distortion", "rounds": 1, "intercept": 0, "slope": 1}]}',
        '{"lines": [{"score": "distortion", "rounds": 1, "intercept": NaN, "slope": 1}]}',
        '{"lines": [{"score": "distortion", "rounds": 1, "intercept": "a", "slope": 1}]}',
        lines_json(LINES)[:-20],
        b"\xff\xfe\x00{",
    ],
)
def test_a_damaged_file_is_refused_in_one_sentence(tmp_path, text):
    (tmp_path / QUALITY_FILE).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match="is not what calibration writes: ") as caught:
        read_lines(tmp_path / QUALITY_FILE)
    assert str(caught.value).startswith(repr(str(tmp_path / QUALITY_FILE)))
    assert "\n" not in str(caught.value)


def test_a_tokenizer_keeps_its_lines_beside_its_weights(opinionated, images, tmp_path):
    model = opinionated()
    assert model.quality_lines == ()
    model.quality_lines = LINES
    model.save_pretrained(tmp_path)
    assert read_lines(tmp_path / QUALITY_FILE) == LINES
    loaded = TaTok.from_pretrained(tmp_path)
    assert loaded.quality_lines == LINES
    cut, again = (each.rank(each.encode(images)).cut("quality", 10.0) for each in (model, loaded))
    assert torch.equal(cut.kept_mask, again.kept_mask)
    assert torch.equal(cut.kept_mask, model.rank(model.encode(images)).cut("residual", LINE.residual_at(10)).kept_mask)
    assert len(set(cut.patch_counts.tolist())) > 1


def test_a_tokenizer_without_lines_writes_no_file(opinionated, tmp_path):
    opinionated().save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix == ".json") == ["config.json"]
    assert TaTok.from_pretrained(tmp_path).quality_lines == ()


def test_a_tokenizer_without_lines_leaves_none_of_the_weights_it_replaces(opinionated, tmp_path):
    model = opinionated()
    model.quality_lines = LINES
    model.save_pretrained(tmp_path)
    opinionated(trunk_layers=2).save_pretrained(tmp_path)
    assert TaTok.from_pretrained(tmp_path).quality_lines == ()
    (tmp_path / QUALITY_FILE).write_text("{}")
    with pytest.raises(ValueError, match="is not what calibration writes"):
        TaTok.from_pretrained(tmp_path)


@pytest.mark.parametrize("lines", [(), LINES], ids=["without lines", "with lines"])
def test_a_model_of_the_hub_brings_its_lines(opinionated, tmp_path, monkeypatch, lines):
    model = opinionated()
    model.quality_lines = lines
    model.save_pretrained(tmp_path)
    asked = []

    def download(repo_id=None, filename=None, **options):
        asked.append((repo_id, filename, options.get("revision")))
        if not (tmp_path / filename).is_file():
            raise EntryNotFoundError(f"{filename} is not there")
        return str(tmp_path / filename)

    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", download)
    monkeypatch.setattr("tatok_model.tokenizer.hf_hub_download", download)
    assert TaTok.from_pretrained("somebody/model", revision="v1").quality_lines == lines
    assert ("somebody/model", QUALITY_FILE, "v1") in asked


def test_what_is_kept_still_costs_a_little_so_that_each_picture_has_a_bound_of_its_own():
    line = QualityLine("error", 1, 0.01, 0.03, kept_slope=0.01, most=19.0)
    left = line.residual_at(10, torch.tensor([0.0, 2.0, 9.0, 12.0]))
    torch.testing.assert_close(
        left, torch.tensor([4.5, 3.5, 0.0, -1.5])
    )  # 0.1 = 0.01 + 0.03 x left + 0.01 x (total - left)
    with pytest.raises(ValueError, match="threshold is 19.5 dB for the rule quality; expected at most 19 dB"):
        line.residual_at(19.5, 1.0)


def test_a_cut_keeps_what_its_pictures_own_bound_says():
    units = torch.tensor([[4, 3, 2, 1], [8, 6, 4, 2], [1, 1, 1, 1]]) * 2**20
    line = QualityLine("error", 1, 0.01, 0.03, kept_slope=0.01, most=19.0)
    ranking = Ranking(torch.arange(4).expand(3, -1), units, "error", 1, line)
    # totals 10, 20 and 4: what may be left at 10 dB is -0.5, -5.5 and 2.5
    assert ranking.counts("quality", 10).tolist() == [4, 4, 2]
    # at 6 dB 0.2512 leaves 0.2412 - 0.01 x total over 0.02: 7.06, 2.06 and 10.06
    assert ranking.counts("quality", 6).tolist() == [1, 3, 0]
