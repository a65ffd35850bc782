"""Every configuration that is shipped makes a run."""

from pathlib import Path

import pytest

from ballast.pipeline.config_loading import load_config, shipped_configs

CONFIGS = Path(__file__).parents[2] / "src" / "ballast" / "configs"
FILES = sorted(path for path in CONFIGS.iterdir() if path.is_file())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_shipped_file_makes_a_run_of_its_own_name(path):
    assert path.suffix == ".yaml", f"{path.name}: configs/ holds run configurations alone"
    assert load_config(path, []).name == path.stem


def test_every_shipped_file_is_found_by_its_bare_name():
    assert shipped_configs() == [path.stem for path in FILES]
    assert load_config("demo", []) == load_config(CONFIGS / "demo.yaml", [])


def test_the_demo_needs_no_network():
    config = load_config("demo", [])
    assert config.model.name.startswith("embedded:")
    assert all(source.startswith("shipped") for source in (*config.data.train, *config.data.test, *config.align.data))


def test_the_task_run_is_the_demo_with_a_task_so_that_they_can_be_compared():
    demo, task = load_config("demo", []), load_config("task", [])
    (term,) = task.rewards.task
    assert set(term.kinds) == {"ordinary", "scary"}
    rewards = task.rewards.model_copy(update={"task": ()})
    train = task.train.model_copy(update={"steps": demo.train.steps})
    assert task.model_copy(update={"name": demo.name, "rewards": rewards, "train": train}) == demo
