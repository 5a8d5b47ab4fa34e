import io

import numpy as np
from PIL import Image

from pipeline.benchmarks import preprocess_speed
from pipeline.benchmarks.benchmark_inputs import make_photographs
from pipeline.core.config import DataConfig
from pipeline.data.pictures import prepare

DATA = DataConfig(image_size=16)


def test_the_bare_work_gives_the_pictures_of_our_stage_in_order(tmp_path):
    files = make_photographs(tmp_path / "new", 5)
    with preprocess_speed.threads(2) as pool:
        made = preprocess_speed.convert_all(pool, files, DATA)
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
