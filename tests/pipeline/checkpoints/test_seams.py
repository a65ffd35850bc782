"""The Trainer's methods that save and load: a change upstream fails here, by name. Read against transformers 5.17."""

import inspect

from transformers import Trainer
from trl import GRPOTrainer


def parameters(function):
    return list(inspect.signature(function).parameters)


def test_what_is_saved_is_saved_by_methods_that_take_a_folder():
    for name in ("_save_optimizer_and_scheduler", "_save_scaler", "_save_rng_state"):
        assert parameters(getattr(Trainer, name)) == ["self", "output_dir"], name


def test_what_is_loaded_is_loaded_by_methods_that_take_a_folder():
    assert parameters(Trainer._load_from_checkpoint) == ["self", "resume_from_checkpoint", "model"]
    for name in ("_load_optimizer_and_scheduler", "_load_scaler"):
        assert parameters(getattr(Trainer, name)) == ["self", "checkpoint"], name


def test_a_checkpoint_of_the_trainers_own_holds_no_more_than_ours():
    source = inspect.getsource(Trainer._save_checkpoint)
    saved = [line for line in source.splitlines() if "self._save_" in line or "save_to_json" in line]
    assert len(saved) == 4, saved  # optimizer and schedule, scaler, random numbers, state; save_model has the weights


def test_a_step_is_counted_and_logged_before_on_log():
    source = inspect.getsource(Trainer._maybe_log_save_evaluate)
    assert source.index("self._globalstep_last_logged = self.state.global_step") < source.index("self.log(")
    loop = inspect.getsource(Trainer._run_epoch)
    assert loop.index("self.state.global_step += 1") < loop.index("self._maybe_log_save_evaluate(")


def test_grpo_generates_once_in_so_many_micro_batches_and_first_when_it_begins():
    source = inspect.getsource(GRPOTrainer._prepare_inputs)
    assert "generate_every = self.args.steps_per_generation * self.num_iterations" in source
    assert "if self._step % generate_every == 0 or self._buffered_inputs is None:" in source
