"""What people type by mistake: one sentence with the value and the expected form, exit code 2, nothing written."""

import pytest

MISTAKES = [
    ("train cifar1O", "unknown preset 'cifar1O' (did you mean 'cifar10'?); expected one of cifar10, demo"),
    ("train my.yaml", "preset 'my.yaml' does not exist; expected the path of a YAML file or a name: cifar10"),
    ("train smoke train.lr=1e-3", "unknown key 'train.lr' (did you mean 'train.learning_rate'?)"),
    ("train smoke train.batch_size=8", "unknown key 'train.batch_size' (did you mean 'train.global_batch_size'?)"),
    ("train smoke --train.max_steps=5", "unrecognized arguments: --train.max_steps=5; expected PRESET, section.key="),
    ("train smoke train.max_steps 5", "override 'train.max_steps' is not understood; expected section.key=value"),
    ("train smoke train.max_steps=many", "train.max_steps is 'many'; expected a whole number"),
    ("train smoke train.max_steps=-5", "train.max_steps is -5; expected at least 1"),
    ("train smoke train.seed=1.5", "train.seed is 1.5; expected a whole number"),
    ("train smoke data.image_size=32px", "data.image_size is '32px'; expected a whole number"),
    ("train smoke data.image_size=30", "tokenizer.image_size is 30; expected a multiple of patch_size, 8"),
    ("train smoke data.source=nowhere", "nowhere' does not exist; expected a folder with pictures, a .parquet or .tar"),
    ("train smoke data.source=notes.txt", "notes.txt' holds no picture; expected a folder with pictures"),
    ("train smoke data.source=empty", "empty' holds no picture; expected a folder with pictures"),
    ("train smoke data.shards=empty", "empty' holds no manifest.json; expected a folder written by jobs/preprocess"),
    ("train smoke data.heldout_fraction=2", "data.heldout_fraction is 2; expected below 1"),
    ("train smoke train.learning_rate=0", "train.learning_rate is 0; expected more than 0"),
    ("train smoke train.num_workers=two", "train.num_workers is 'two'; expected a whole number"),
    ("train smoke train.num_workers=100", "train.global_batch_size is 16; expected a multiple of num_workers"),
    ("train smoke train.device=gpu", "train.device is 'gpu'; expected auto, cpu or cuda"),
    ("train smoke train.precision=fp8", "train.precision is 'fp8'; expected auto, float32 or bf16"),
    ("train smoke train.compile=perhaps", "train.compile is 'perhaps'; expected true or false"),
    ("train smoke evaluate.thresholds=0.5", "evaluate.thresholds is 0.5; expected a list, e.g. [1, 2]"),
    ("train smoke filter.rule=margin", "filter.rule is 'margin'; expected one of relative, residual, marginal, count"),
    ("train smoke filter.score=psnr", "filter.score is 'psnr'; expected one of distortion, error, surprisal"),
    ("train smoke filter.threshold=high", "filter.threshold is 'high'; expected a number"),
    ("train smoke filter.threshold=3", "filter.threshold is 3.0; expected a share from 0 to 1 for the rule relative"),
    ("train smoke run.name=..", "run.name is '..'; expected the name of a folder inside run.output"),
    ("train smoke --resume", "smoke-train' does not exist, so that --resume has nothing to go on with; expected"),
    (
        "train smoke tracking.uri=localhost:5000",
        "tracking.uri is 'localhost:5000'; expected sqlite:///file.db, http(s)",
    ),
    ("evaluate smoke", "tokenizer.checkpoint is empty and "),
    ("evaluate smoke tokenizer.checkpoint=nowhere", "nowhere' does not exist; expected a checkpoint folder, a hub id"),
    ("evaluate smoke tokenizer.checkpoint=notes.txt", "notes.txt' is a file; expected a checkpoint folder, a hub id"),
    ("evaluate smoke tokenizer.checkpoint=empty", "empty' holds no config.json; expected a folder that training"),
    ("evaluate smoke tokenizer.checkpoint=tatok46", "tatok46' does not exist (did you mean 'tatok64'?); expected"),
    (
        "evaluate smoke tokenizer.checkpoint=tatok64 tokenizer.codebook_size=64 tokenizer.patch_size=8",
        "tokenizer.checkpoint 'tatok64' has patch_size 4, codebook_size 1024; expected tokenizer.patch_size, 8, tok",
    ),
    ("evaluate smoke evaluate.extractor=inception", "evaluate.extractor is 'inception'; expected one of auto, compact"),
    ("detokenize smoke tokens.path=empty", "empty' holds no tokens.json; expected a folder written by jobs/tokenize"),
    ("calibrate smoke filter.mean_tokens=5000", "filter.mean_tokens is 5000; expected 4 to 20, the tokens of an image"),
    ("sweep smoke sweep.cuts={marginal:high}", "sweep.cuts "),
    ("benchmark smoke benchmark.kind=speed", "benchmark.kind is 'speed'; expected one of preprocess, ingest"),
    ("preprocess smoke data.source=https://x.org/cat.jpg", "https://x.org/cat.jpg' is not understood"),
    ("preprocess smoke data.quality=200", "data.quality is 200; expected at most 100"),
]


@pytest.mark.parametrize(("typed", "sentence"), MISTAKES, ids=[typed for typed, _ in MISTAKES])
def test_one_sentence_says_what_is_wrong(run_job, tmp_path, typed, sentence):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    job, *arguments = typed.split()
    finished = run_job(job, *arguments)
    assert finished.returncode == 2, finished.stderr
    (line,) = finished.stderr.splitlines()
    assert line.startswith("error: ")
    assert sentence in line
    assert finished.stdout == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "notes.txt"]
