"""The run folder: what is whole is kept, what is half-written is never taken for done."""

import errno
import json
import os
import resource

import pytest

from ballast.errors import BallastError, ConfigError, DataError
from ballast.pipeline.run_folder import RunFolder, file_digests, write_text


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "run")


def make(folder, name, settings=None, inputs=None, content="made"):
    with folder.writing(name, settings or {}, inputs or {}) as scratch:
        (scratch / "sub").mkdir()
        (scratch / "sub" / "out.txt").write_text(content)


def fail(folder, error):
    with folder.writing("train", {}, {}) as scratch:
        (scratch / "half.txt").write_text("half")
        raise error


def events(folder):
    return [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]


def test_a_stage_appears_whole_with_its_record(folder):
    make(folder, "train", {"seed": 3, "train": {"steps": 2}}, {"align": "abc"})
    record = folder.record("train")
    assert set(record) == {"stage", "id", "started", "seconds", "settings", "inputs", "outputs", "versions"}
    assert (record["stage"], record["inputs"], record["outputs"]) == ("train", {"align": "abc"}, ["sub/out.txt"])
    assert record["settings"] == {"seed": 3, "train": {"steps": 2}}
    assert record["seconds"] >= 0
    assert record["started"].endswith("Z")
    assert {"python", "torch", "transformers", "trl"} <= set(record["versions"])
    assert (folder.stage("train") / "sub" / "out.txt").read_text() == "made"
    assert not list(folder.path.glob("*.partial"))


def test_a_stage_that_fails_leaves_a_partial_folder_that_is_not_done(folder):
    with pytest.raises(RuntimeError, match="planted"):
        fail(folder, RuntimeError("planted"))
    assert not folder.has("train")
    assert not (folder.path / "train").exists()
    assert (folder.path / "train.partial" / "half.txt").exists()
    with pytest.raises(DataError, match=r"stage 'train' of run .* is not done; run `ballast train CONFIG` first"):
        folder.stage("train")


def test_a_stage_begun_again_holds_nothing_of_the_failed_one(folder):
    with pytest.raises(RuntimeError):
        fail(folder, RuntimeError())
    make(folder, "train")
    assert folder.record("train")["outputs"] == ["sub/out.txt"]
    assert not (folder.path / "train.partial").exists()


def test_what_happened_to_a_stage_is_a_json_line_each(folder):
    with pytest.raises(KeyboardInterrupt):
        fail(folder, KeyboardInterrupt())
    make(folder, "train")
    assert [(e["event"], e["stage"]) for e in events(folder)] == [
        ("stage_started", "train"),
        ("stage_failed", "train"),
        ("stage_started", "train"),
        ("stage_finished", "train"),
    ]
    assert events(folder)[1]["error"] == "KeyboardInterrupt"
    assert all(e["time"] > 0 for e in events(folder))


def test_a_stage_that_could_not_use_what_it_was_given_leaves_nothing_to_resume(folder):
    with pytest.raises(DataError):
        fail(folder, DataError("planted"))
    assert not (folder.path / "train.partial").exists()
    assert [e["event"] for e in events(folder)] == ["stage_started", "stage_failed"]


def test_a_stage_that_is_made_again_replaces_the_finished_one_when_it_is_whole(folder):
    make(folder, "train", content="first")
    with pytest.raises(RuntimeError):
        fail(folder, RuntimeError())
    assert (folder.stage("train") / "sub" / "out.txt").read_text() == "first"
    make(folder, "train", content="second")
    assert (folder.stage("train") / "sub" / "out.txt").read_text() == "second"


def test_numbers_that_json_lacks_become_null(folder):
    folder.log({"loss": float("nan"), "risk": {"low": float("-inf"), "n": 3}, "each": [1.5, float("inf")]})
    line = (folder.path / "metrics.jsonl").read_text()
    (event,) = [json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))]
    assert (event["loss"], event["risk"], event["each"]) == (None, {"low": None, "n": 3}, [1.5, None])


def test_metrics_on_a_full_disk_are_an_error_with_the_reason_and_the_remedy(folder):
    folder.path.mkdir()
    (folder.path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(BallastError, match=r"metrics\.jsonl' cannot be written \(No space left on device\); make room"):
        folder.log({"event": "step"})


def test_a_line_of_metrics_that_found_no_room_is_gone_and_the_next_one_is_whole(folder):
    """A limit on the size of files ends the write half-way."""
    folder.log({"event": "step", "step": 1})
    before = (folder.path / "metrics.jsonl").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, hard))
    try:
        with pytest.raises(BallastError, match=r"metrics\.jsonl' cannot be written"):
            folder.log({"event": "step", "step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (folder.path / "metrics.jsonl").read_bytes() == before
    folder.log({"event": "step", "step": 2})
    assert [event["step"] for event in events(folder)] == [1, 2]


def test_metrics_on_a_disk_that_is_full_are_a_clear_error_and_stay_whole(small_disk):
    folder = RunFolder(small_disk.path / "run")
    folder.log({"event": "step", "step": 1})
    small_disk.fill(leave=4096)  # the line takes three pages more
    with pytest.raises(BallastError, match=r"metrics\.jsonl' cannot be written \(No space left on device\); make room"):
        folder.log({"event": "step", "step": 2, "figures": "9" * 12_000})
    small_disk.make_room()
    folder.log({"event": "step", "step": 3})
    assert [event["step"] for event in events(folder)] == [1, 3]


def test_a_stage_whose_disk_is_full_says_so_keeps_what_it_has_and_is_done_with_room(small_disk):
    folder = RunFolder(small_disk.path / "run")
    make(folder, "align")
    small_disk.fill(leave=3 * 4096)  # enough to begin
    with pytest.raises(BallastError, match=r"cannot be written \(No space left on device\); make room"):
        make(folder, "train", content="9" * 100_000)
    assert folder.has("align")
    assert not folder.has("train")
    small_disk.make_room()
    make(folder, "train")
    assert folder.has("train")


def test_a_run_folder_that_may_not_be_written_is_a_clear_error_and_stays_as_it_is(small_disk):
    folder = RunFolder(small_disk.path / "run")
    make(folder, "align")
    small_disk.make_read_only()
    reason = r"cannot be written \(Read-only file system\); make room on the disk or give write permission"
    with pytest.raises(BallastError, match=r"metrics\.jsonl' " + reason):
        folder.log({"event": "step"})
    with pytest.raises(BallastError, match=r"train\.partial' " + reason):
        make(folder, "train")
    assert folder.has("align")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_what_the_disk_says_to_a_stage_names_the_file_and_the_remedy(folder, number):
    with pytest.raises(BallastError, match=r"'model\.bin' cannot be written \(.*\); make room .* --resume"):
        fail(folder, OSError(number, os.strerror(number), "model.bin"))
    assert events(folder)[-1]["event"] == "stage_failed"


def test_an_error_of_the_system_that_is_not_the_disks_keeps_its_name(folder):
    with pytest.raises(ConnectionRefusedError):
        fail(folder, ConnectionRefusedError(errno.ECONNREFUSED, "refused"))


def test_an_edited_data_file_is_named(folder, tmp_path):
    data = tmp_path / "prompts.jsonl"
    data.write_text("one")
    sources = ["shipped", "owner/name:train", str(data), str(tmp_path / "absent.jsonl")]
    before = file_digests(sources)
    assert len(before) == 1  # what is no file here has no digest
    make(folder, "baseline", {}, before)
    data.write_text("another")
    with pytest.raises(ConfigError, match=r"data file '.*prompts\.jsonl' has changed since stage 'baseline'"):
        folder.check_unchanged("baseline", {}, file_digests(sources))
    data.write_text("one")
    folder.check_unchanged("baseline", {}, file_digests(sources))
    data.unlink()  # gone is not changed: a report needs it no longer
    folder.check_unchanged("baseline", {}, file_digests(sources))


def test_a_foreign_folder_of_a_stages_name_is_left_alone(folder):
    (folder.path / "train").mkdir(parents=True)
    (folder.path / "train" / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="is in the way"):
        make(folder, "train")
    assert (folder.path / "train" / "mine.txt").read_text() == "keep"


def test_changed_settings_are_named_by_key_with_both_values(folder):
    make(folder, "train", {"seed": 0, "train": {"steps": 2, "beta": 0.0}})
    folder.check_unchanged("train", {"seed": 0, "train": {"steps": 2, "beta": 0.0}}, {})
    with pytest.raises(ConfigError, match=r"\(seed was 0, is 1; train\.steps was 2, is 5\)"):
        folder.check_unchanged("train", {"seed": 1, "train": {"steps": 5, "beta": 0.0}}, {})


def test_an_input_that_was_made_again_is_named(folder):
    make(folder, "align", {"seed": 0})
    inputs = {"align": folder.digest("align")}
    make(folder, "train", {}, inputs)
    folder.check_unchanged("train", {}, inputs)
    with pytest.raises(ConfigError, match="stage 'align' was run again after 'train'"):
        folder.check_unchanged("train", {}, {"align": "another digest"})


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "first")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "second, then a lone surrogate \ud800")
    assert path.read_text() == "first"
