"""The rows that a person looks at after a trip."""

import json

from ballast.pipeline.monitoring.review import SeenRows


def test_the_batch_that_was_fetched_before_a_good_point_is_among_the_rows_trained_on_after_it(tmp_path):
    seen = SeenRows(lambda features: features, tokenizer=None)
    for prompts in ("ab", "cd"):  # the loader has fetched c and d when the step with a and b is done
        seen([{"prompt": prompt, "kind": "harmful"} for prompt in prompts])
    seen.forget()
    seen([{"prompt": prompt, "kind": "harmful"} for prompt in "cef"])
    assert seen.write(tmp_path / "rows.jsonl") == 4
    rows = [json.loads(line)["prompt"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert rows == ["c", "d", "e", "f"]
