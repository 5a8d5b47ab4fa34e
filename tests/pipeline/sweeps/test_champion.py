import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.core.config import FilterConfig
from pipeline.sweeps import champion
from tatok_model.config import TokenizerConfig
from tatok_model.tokenizer import TaTok


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    config = TokenizerConfig(16, 4, "nano", 2, quantizer="fsq", codebook_size=16, fsq_levels=(4, 4))
    return TaTok(config).eval()


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(0).integers(0, 256, (70, 16, 16, 3), dtype=np.uint8)  # more than a batch


@pytest.fixture
def load(tokenizer, tmp_path):
    def make(**cut):
        champion.write_data(tmp_path / "data", tokenizer, FilterConfig(**cut))
        return champion.load(tmp_path / "data")

    return make


def test_pictures_become_tokens_and_reconstructions(load, pictures):
    found = load(rule="count", threshold=5).predict(pictures)
    assert found["tokens"].tolist() == [2 + 5] * 70
    assert found["global_indices"].shape == (70, 2)
    assert ((found["patch_indices"] >= 0).sum(1) == 5).all()
    assert found["reconstructions"].shape == pictures.shape
    assert found["reconstructions"].dtype == np.uint8
    assert (found["bits"] > 7 * 4).all()


def test_what_it_says_is_what_the_tokenizer_says(load, tokenizer, pictures):
    images = torch.from_numpy(pictures[:3]).permute(0, 3, 1, 2)
    with torch.inference_mode():
        tokens = tokenizer.rank(tokenizer.encode(images)).cut("relative", 0.5)
        decoded = tokenizer.decode(tokens)
    found = load(rule="relative", threshold=0.5).predict(pictures[:3])
    assert found["tokens"].tolist() == tokens.counts().tolist()
    assert np.abs(found["reconstructions"] / 255 - decoded.permute(0, 2, 3, 1).numpy()).max() < 0.6 / 255


def test_without_a_filter_every_token_is_kept(load, pictures):
    assert (load().predict(pictures[:2])["patch_indices"] >= 0).all()


def test_leading_global_tokens_alone_are_counted(tmp_path, pictures):
    torch.manual_seed(0)
    config = TokenizerConfig(16, 4, "nano", 6, False, quantizer="fsq", codebook_size=16, fsq_levels=(4, 4))
    champion.write_data(
        tmp_path / "data", TaTok(config).eval(), FilterConfig(rule="count", threshold=2, score="random")
    )
    found = champion.load(tmp_path / "data").predict(pictures[:2])
    assert (found["global_indices"][:, :2] >= 0).all()
    assert (found["global_indices"][:, 2:] == -1).all()
    assert (found["patch_indices"] == -1).all()


@pytest.mark.parametrize(
    "wrong", [np.zeros((1, 8, 8, 3), np.uint8), np.zeros((1, 16, 16, 3)), np.zeros((0, 16, 16, 3), np.uint8)]
)
def test_other_pictures_are_refused(load, wrong):
    with pytest.raises(ValueError, match=r"pictures are .*; expected uint8 \(B, 16, 16, 3\)"):
        load().predict(wrong)


def test_mlflow_loads_the_registered_champion_in_a_process_of_its_own(load, pictures, tmp_path, database, run_python):
    from mlflow import MlflowClient

    from pipeline.tracking.mlflow_store import MlflowStore, Refused, save_pyfunc

    model = load(rule="count", threshold=5)
    save_pyfunc(tmp_path / "model", champion.__name__, tmp_path / "data", pictures[:2], model.predict(pictures[:2]))
    store = MlflowStore(database, "champions", None, system_metrics=False)
    store.open("sweep", 0.0, {}, {})
    store.register(str(tmp_path / "model"), "tatok", "champion")
    store.register(str(tmp_path / "model"), "tatok", "champion")  # after a doubt
    with pytest.raises(Refused, match="holds no model"):
        store.register(str(tmp_path), "tatok", "champion")
    with pytest.raises(Refused, match="name"):
        store.register(str(tmp_path / "model"), "a/b", "champion")
    store.end("FINISHED")
    assert [version.version for version in MlflowClient(database).search_model_versions("name='tatok'")] == [1]
    said = run_python(
        f"""
import mlflow, numpy as np
mlflow.set_tracking_uri("{database}")
model = mlflow.pyfunc.load_model("models:/tatok@champion")
found = model.predict(model.input_example)
print(found["tokens"].tolist(), found["reconstructions"].shape, int(found["reconstructions"].sum()))
"""
    )
    expected = model.predict(pictures[:2])
    total = int(expected["reconstructions"].sum())
    assert said.stdout.splitlines()[-1:] == [f"[7, 7] (2, 16, 16, 3) {total}"], said.stderr


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_mlflow_serves_the_champion_over_http(load, pictures, tmp_path):
    from pipeline.tracking.mlflow_store import save_pyfunc

    expected = load(rule="count", threshold=5).predict(pictures[:2])
    save_pyfunc(tmp_path / "model", champion.__name__, tmp_path / "data", pictures[:2], expected)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", str(tmp_path / "model"),
               "--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]  # fmt: skip
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # MLflow starts uvicorn by its name
    with (tmp_path / "said").open("w") as said:
        server = subprocess.Popen(
            command, cwd=tmp_path, env={**os.environ, "PATH": path}, stdout=said, stderr=said, start_new_session=True
        )
    try:
        wait_until_it_answers(f"http://127.0.0.1:{port}/ping", server, tmp_path / "said")
        body = json.dumps({"inputs": pictures[:2].tolist()}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            made = json.load(answer)["predictions"]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=60)
    assert made["tokens"] == [7, 7]
    assert np.array_equal(np.array(made["reconstructions"], dtype=np.uint8), expected["reconstructions"])


def wait_until_it_answers(address, process, said):
    limit = time.monotonic() + 200
    while True:
        assert process.poll() is None, said.read_text()
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            assert time.monotonic() < limit, said.read_text()
            time.sleep(0.5)
