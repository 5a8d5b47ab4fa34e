"""Tracking in MLflow: fed from a run's `metrics.jsonl` by a thread of its own, never fatal.

    with Tracker.start(run, {"data_fingerprint": fingerprint}) as tracker:
        run.log({"train/loss": loss}, step)
        tracker.commit()  # at every checkpoint: what metrics.jsonl holds so far may be sent
        tracker.picture(path, "reconstructions", step)

`mlflow_store.py` is the only module of the project that imports mlflow, and it does so when a tracker starts.
"""

from pipeline.tracking.address import check_model_name, check_tracking
from pipeline.tracking.tracker import Tracker, check_store

__all__ = ["Tracker", "check_model_name", "check_store", "check_tracking"]
