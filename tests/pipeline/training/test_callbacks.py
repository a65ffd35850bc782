"""What the reader sees of a step."""

from types import SimpleNamespace
from typing import Any

from ballast.pipeline.training import callbacks
from ballast.pipeline.training.callbacks import MetricsCallback


def test_the_reward_shown_is_ours_and_a_figure_without_a_value_is_left_out() -> None:
    said: list[str] = []
    written: list[dict[str, Any]] = []
    context = SimpleNamespace(folder=SimpleNamespace(log=written.append), say=said.append, shows_table=False)
    state = SimpleNamespace(global_step=1, max_steps=4)
    # TRL's own sum counts an unscored row's STAR as 0; and its average of nothing is None.
    logs = {"loss": 0.5, "reward": 9.0, "reward/total": 0.25, "risk/mean": None}
    MetricsCallback(context, "train").on_log(None, state, None, logs=logs)  # type: ignore[arg-type]
    assert "reward 0.25" in said[0]
    assert "risk" not in said[0]
    assert "9" not in said[0].split("(")[0]
    assert written[0]["risk/mean"] is None


def test_the_time_left_of_a_resumed_training_is_by_its_own_steps(monkeypatch: Any) -> None:
    said: list[str] = []
    context = SimpleNamespace(folder=SimpleNamespace(log=lambda line: None), say=said.append, shows_table=False)
    callback = MetricsCallback(context, "train")  # type: ignore[arg-type]
    seconds = iter((100.0, 104.0))
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    callback.on_train_begin(None, SimpleNamespace(global_step=6, max_steps=10), None)  # type: ignore[arg-type]
    # 2 steps in 4 s, and 2 are left
    callback.on_log(None, SimpleNamespace(global_step=8, max_steps=10), None, logs={"loss": 0.5})  # type: ignore[arg-type]
    assert "(4 s, about 4 s left)" in said[0]
