import dataclasses

import pytest

from pipeline.core.config import TrackingConfig
from pipeline.core.errors import BadInput
from pipeline.core.files import masked, resolve_paths
from pipeline.core.presets import load_config
from pipeline.tracking import check_tracking
from pipeline.tracking.address import artifact_folder, without_credentials


def check(**keys):
    check_tracking(dataclasses.replace(load_config("smoke"), tracking=TrackingConfig(**keys)))


@pytest.mark.parametrize(
    "uri",
    ["", "sqlite:///mlflow.db", "sqlite:////data/mlflow.db", "http://127.0.0.1:5000", "https://user:word@host/mlflow",
     "databricks", "databricks://profile"],
)  # fmt: skip
def test_an_address_that_mlflow_can_use_is_accepted(uri):
    check(uri=uri)


@pytest.mark.parametrize(
    "uri",
    ["mlruns", "/data/mlruns", "file:///data/mlruns", "sqlite://", "sqlite:///", "sqlite:mlflow.db", "http://", "http://:5000",
     "http://host:port", "http://[::1", "postgresql://host/mlflow"],
)  # fmt: skip
def test_an_address_of_another_form_is_bad_input_that_quotes_it(uri):
    with pytest.raises(BadInput) as error:
        check(uri=uri)
    assert repr(uri) in str(error.value)
    assert "expected" in str(error.value)


def test_the_databricks_keyword_is_not_taken_for_a_path():
    config = load_config("smoke", ["tracking.uri=databricks"])
    assert resolve_paths(config).tracking.uri == "databricks"


def test_a_database_that_is_a_folder_is_bad_input(tmp_path):
    with pytest.raises(BadInput, match="is a folder"):
        check(uri=f"sqlite:///{tmp_path}")


@pytest.mark.parametrize(("key", "value", "shown"), [("experiment", " ", "' '"), ("flush_seconds", 0.0, "0;")])
def test_no_experiment_and_no_pause_are_bad_input(key, value, shown):
    with pytest.raises(BadInput, match=rf"tracking\.{key} is {shown}"):
        check(**{key: value})


def test_bad_input_does_not_show_the_password():
    with pytest.raises(BadInput) as error:
        check(uri="postgresql://anna:secret@host/mlflow")
    assert "secret" not in str(error.value)
    assert "***@host" in str(error.value)


def test_credentials_are_masked_wherever_they_stand_in_a_text():
    text = "cannot reach 'http://anna:secret@host:1' nor https://token@other/path?x=a@b"
    assert masked(text) == "cannot reach 'http://***@host:1' nor https://***@other/path?x=a@b"


def test_an_address_without_credentials_is_shown_as_it_is():
    for text in ("s3://bucket/images@2x/a.png", "sqlite:////data/mlflow.db", "anna@example.org"):
        assert masked(text) == text


@pytest.mark.parametrize(
    ("uri", "experiment", "folder"),
    [
        ("sqlite:////data/mlflow.db", "my runs", "/data/mlartifacts/my runs"),
        ("sqlite:////data/mlflow.db", "../a/b", "/data/mlartifacts/..%252Fa%252Fb"),  # MLflow reads %25 as %
        ("sqlite:////my%20data/mlflow.db", "a", "/my%2520data/mlartifacts/a"),
        ("http://host:5000", "tatok", None),  # the server decides
    ],
)
def test_pictures_of_a_sqlite_store_lie_beside_the_database(uri, experiment, folder):
    assert artifact_folder(uri, experiment) == folder


def test_an_experiment_with_a_name_that_is_too_long_is_bad_input():
    check(uri="sqlite:///mlflow.db", experiment="x" * 500)
    with pytest.raises(BadInput, match="tracking.experiment has 501 characters; expected at most 500"):
        check(uri="sqlite:///mlflow.db", experiment="x" * 501)


def test_a_server_is_asked_without_the_password_in_its_address():
    assert without_credentials("http://anna:secret@host:5000/ml/") == "http://host:5000/ml"
