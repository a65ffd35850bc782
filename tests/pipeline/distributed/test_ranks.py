"""What processes that train together tell each other; here three of them, over gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ballast.pipeline import ranks
from ballast.pipeline.training.logged_means import means_over_processes

# Forked, so that torch is imported once.
SCRIPT = """
import json, os, sys
import torch
from ballast.errors import ConfigError
from ballast.pipeline import ranks
from ballast.pipeline.training.logged_means import means_over_processes

def process(rank, folder):
    store = torch.distributed.FileStore(folder + "/store", 3)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=3, store=store)
    seen = {"rank": ranks.rank(), "world": ranks.world(), "main": ranks.is_main(), "share": list(ranks.own_share(range(7)))}
    seen["collected"] = ranks.collected([float("nan"), "ü", {"a": [1, None]}][:rank])
    seen["summed"] = ranks.summed([float(rank), 0.5])
    calls = []
    seen["told"] = ranks.on_main(lambda: calls.append(1) or {"step": 3})
    seen["calls"] = len(calls)
    def fail():
        raise ConfigError("the reason")
    try:
        ranks.on_main(fail)
    except Exception as error:
        seen["error"] = [type(error).__name__, error.exit_code, str(error)]
    # The second figure is that of the last process alone.
    sums = {"risk": (float(rank), 1.0), "none": (0.0, 0.0)} | ({"late": (6.0, 2.0)} if rank == 2 else {})
    seen["means"] = means_over_processes(sums)
    open(f"{folder}/{rank}.json", "w").write(json.dumps(seen))
    ranks.barrier()

folder = sys.argv[1]
children = []
for rank in range(3):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            process(rank, folder)
            code = 0
        finally:
            os._exit(code)
    children.append(child)
sys.exit(any(os.waitpid(child, 0)[1] for child in children))
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """What each of three processes saw."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder)], env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(Path(folder / f"{rank}.json").read_text()) for rank in range(3)]


def test_one_of_them_is_the_main_process(seen):
    assert [s["rank"] for s in seen] == [0, 1, 2]
    assert [s["main"] for s in seen] == [True, False, False]
    assert [s["world"] for s in seen] == [3, 3, 3]


def test_all_get_the_values_of_all_in_the_order_of_the_ranks(seen):
    for s in seen:
        # rank 0 gave none, rank 1 one, rank 2 two
        assert len(s["collected"]) == 3
        assert s["collected"][2] == "ü"
        assert all(value != value for value in s["collected"][:2])
        assert s["summed"] == [3.0, 1.5]  # 0 + 1 + 2


def test_what_the_main_process_gives_is_what_all_get_and_it_works_alone(seen):
    assert [s["told"] for s in seen] == [{"step": 3}] * 3
    assert [s["calls"] for s in seen] == [1, 0, 0]


def test_a_failure_of_the_main_process_ends_all_and_only_it_says_why(seen):
    assert seen[0]["error"] == ["ConfigError", 2, "the reason"]
    for s in seen[1:]:
        name, code, message = s["error"]
        assert (name, code) == ("MainProcessError", 2)
        assert "ConfigError" in message


def test_means_are_weighted_over_all_and_a_figure_without_weight_is_none(seen):
    for s in seen:
        assert s["means"] == {"risk": 1.0, "late": 3.0}  # (0 + 1 + 2) / 3; 6 / 2 of the one process that had it


@given(items=st.lists(st.integers(), max_size=40), world=st.integers(1, 9))
def test_shares_in_order_of_the_ranks_are_all_items_and_differ_by_one_at_most(items, world):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "world", lambda: world)
        shares = []
        for rank in range(world):
            patch.setattr(ranks, "rank", lambda rank=rank: rank)
            shares.append(list(ranks.own_share(items)))
    assert [item for share in shares for item in share] == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_alone_nothing_is_changed_and_errors_are_as_they_were():
    value = {"tuple": (1, 2)}
    assert ranks.on_main(lambda: value) is value
    assert ranks.collected([value])[0] is value
    assert means_over_processes({"a": (1.0, 4.0)}) == {"a": 0.25}
    with pytest.raises(KeyError):
        ranks.on_main(lambda: {}["missing"])
