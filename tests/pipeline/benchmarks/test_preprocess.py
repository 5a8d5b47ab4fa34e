"""Our stage against others: what a rate is made of, what is compared, and that all make the same pictures."""

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.benchmarks import preprocess_speed
from pipeline.benchmarks.harness import make_photographs
from pipeline.benchmarks.preprocess_speed import PictureFolder, PictureMaker
from pipeline.core.config import DataConfig
from pipeline.core.errors import BadInput, Stopped
from pipeline.data.pictures import prepare

FEW, MANY = (PictureFolder([Path(f"{number}.jpg") for number in range(count)], DataConfig()) for count in (4, 104))


def test_a_rate_is_of_the_pictures_between_few_and_many(monkeypatch):
    clock = iter([0.0, 9.0, 10.0, 13.0, 20.0, 21.0])
    monkeypatch.setattr(preprocess_speed.time, "perf_counter", lambda: next(clock))
    contender = PictureMaker(lambda sample: sample.files, lambda files: [str(path).encode() for path in files])
    assert contender.start(FEW) == [b"0.jpg", b"1.jpg", b"2.jpg", b"3.jpg"]
    assert contender.rate(FEW, MANY) == 100 / (3.0 - 1.0)
    assert (contender.first, contender.own) == (9.0, [pytest.approx(3.0 - 104 / 50)])


def test_a_machine_that_stumbles_gives_a_lower_bound(monkeypatch):
    clock = iter([0.0, 2.0, 10.0, 15.0])
    monkeypatch.setattr(preprocess_speed.time, "perf_counter", lambda: next(clock))
    assert PictureMaker(id).rate(FEW, MANY) == 104 / 2.0


def test_a_rate_of_ranges_is_counted_from_when_every_worker_has_finished_one(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    clock = iter([0.0, 12.0])
    monkeypatch.setattr(preprocess_speed.time, "perf_counter", lambda: next(clock))
    contender = PictureMaker(lambda sample: [(6.0, 26), (7.0, 26), (9.0, 26), (11.0, 26)], finished=list)
    assert contender.rate(FEW, MANY) == 52 / 4.0
    assert contender.own == [12.0 - 104 / 13.0]


def test_ratios_have_their_goals_and_start_up_stands_apart():
    names = (
        preprocess_speed.OURS,
        preprocess_speed.RANGES,
        preprocess_speed.THREADS,
        preprocess_speed.PROCESSES,
        preprocess_speed.RAY_DATA,
    )
    everyone = {name: PictureMaker(id, first=7.0, own=[1.0, 2.0, 3.0]) for name in names}
    rates = dict(zip(names, ([90.0, 99.0], [100.0, 100.0], [100.0, 110.0], [90.0, 90.0], [50.0, 50.0]), strict=True))
    found = preprocess_speed._findings(rates, everyone, {preprocess_speed.OURS: 0}, {})
    told = {ratio.name: ratio for ratio in found.ratios}
    assert told["tatok_to_threads"].spread.median == 0.9
    assert "goal: at least 0.9, met" in told["tatok_to_threads"].row().note
    assert told["tatok_to_ray_data"].spread.low == 1.8
    assert found.results()["startup_seconds"] == 5.0
    assert found.results()["largest_difference_tatok"] == 0
    assert [line[0] for line in found.table] == ["", *names]


def test_too_few_pictures_tell_no_rate(small, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    preprocess_speed.check(small("preprocess", "benchmark.pictures=32"))
    with pytest.raises(BadInput, match="benchmark.pictures is 31; expected at least 32"):
        preprocess_speed.check(small("preprocess", "benchmark.pictures=31"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")  # Ray Data reads its own old settings
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_everybody_makes_the_same_pictures_and_is_timed(small, measure, ray_session):
    config = small("preprocess", "benchmark.pictures=200")
    run = measure(config)
    for name in ("tatok", "its_ranges", "threads", "processes", "ray_data"):
        low, middle, high = (run.results[f"{name}_images_per_second{end}"] for end in ("_low", "", "_high"))
        assert 0 < low <= middle <= high
    assert {run.results[f"largest_difference_{name}"] for name in ("tatok", "processes", "ray_data")} == {0}
    assert "tatok_to_threads" in Path(run.outputs["report"]).read_text()
    assert not (run.folder / "work").exists()
    with pytest.raises(Stopped, match="measures anew"):
        measure(config, resume=True, stop=True)
    assert not (run.folder / "work").exists()


DATA = DataConfig(image_size=16)


def test_the_bare_work_gives_the_pictures_of_our_stage_in_order(tmp_path):
    files = make_photographs(tmp_path / "new", 5)
    with ThreadPoolExecutor(2) as pool:
        made = preprocess_speed._bare(pool).work(preprocess_speed.PictureFolder(files, DATA))
    assert made == [prepare(path.read_bytes(), DATA) for path in files]


def test_a_row_of_ray_data_becomes_the_same_picture(tmp_path):
    path = make_photographs(tmp_path / "new", 1)[0]
    row = preprocess_speed._transform({"image": np.asarray(Image.open(path)), "path": "a"}, DATA)
    assert row == {"image": preprocess_speed.convert(path, DATA), "path": "a"}


def test_pictures_differ_by_their_largest_difference_in_grey_levels():
    def png(value):
        pixels = np.full((2, 2, 3), 100, dtype=np.uint8)
        pixels[0, 1, 2] = value
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        return file.getvalue()

    assert preprocess_speed.largest_difference(png(100), png(100)) == 0
    assert preprocess_speed.largest_difference(png(90), png(255)) == 165
