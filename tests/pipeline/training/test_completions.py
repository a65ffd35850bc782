"""The table of completions can be read as one, whatever was unscored in which step."""

import pyarrow.parquet as pq
import torch

from ballast.guardrails.types import RiskTrace
from ballast.pipeline.training.completions import CompletionsTable
from ballast.pipeline.training.grpo import StepRecord
from ballast.rewards.guard_reward import ScoredBatch
from ballast.rewards.star import segment_scores


def record(step, traces, refusal):
    """A batch of one-token completions "a"."""
    scores = segment_scores(traces)
    scored = ScoredBatch(("a",) * len(traces), tuple(traces), ((1,),) * len(traces), scores, scores.star_NK, 0.0)
    conversation = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    advantage_NT = torch.tensor([[0.5, 0.0]] * len(traces))  # the second column is padding
    ids = [[7]] * len(traces)
    kinds = ["harmful"] * len(traces)
    in_loss_NT = torch.tensor([[True, False]] * len(traces))
    conversations = [conversation] * len(traces)
    return StepRecord(step, conversations, kinds, scored, {"refusal": refusal}, advantage_NT, ids, in_loss_NT)


def test_steps_with_and_without_unscored_rows_are_one_table(tmp_path):
    table = CompletionsTable(tmp_path / "completions")
    fine, bad = RiskTrace((0, 1), (0.25, 0.5)), RiskTrace.unscored((0, 1), "planted")
    table.write(record(0, [fine, fine], refusal=[1.0, 0.0]))
    table.write(record(1, [bad, bad], refusal=[None, None]))
    table.write(record(2, [fine, bad], refusal=[None, 0.5]))
    rows = pq.read_table(tmp_path / "completions").to_pylist()
    assert (table.rows, table.tokens, len(rows)) == (6, 6, 6)
    assert [row["step"] for row in rows] == [0, 0, 1, 1, 2, 2]
    assert [row["unscored_reason"] for row in rows] == [None, None, "planted", "planted", None, "planted"]
    assert [row["reward_refusal"] for row in rows] == [1.0, 0.0, None, None, None, 0.5]
    assert [row["risk"] for row in rows[1:3]] == [[0.25, 0.5], [None, None]]
    assert {row["prompt"] for row in rows} == {"Hello"}
    assert {tuple(row["advantages"]) for row in rows} == {(0.5,)}  # a value a token, and none for padding
    assert {row["tokens_in_loss"] for row in rows} == {1}
