import io

from PIL import Image

from pipeline.benchmarks import benchmark_inputs


def test_a_photograph_is_a_jpeg_of_the_usual_size_and_depends_on_its_number_alone():
    first, again, other = (benchmark_inputs.photograph(number) for number in (3, 3, 11))  # both of one photograph
    assert first == again != other
    with Image.open(io.BytesIO(first)) as picture:
        assert (picture.format, picture.size) == ("JPEG", (500, 375))


def test_files_beyond_the_distinct_ones_are_links(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_inputs, "DISTINCT", 2)
    files = benchmark_inputs.make_photographs(tmp_path / "new", 5)
    assert [path.name for path in files] == [f"{number:06d}.jpg" for number in range(5)]
    assert files == sorted((tmp_path / "new").iterdir())
    assert files[0].samefile(files[2])
    assert files[0].samefile(files[4])
    assert files[1].samefile(files[3])
    assert not files[0].samefile(files[1])
