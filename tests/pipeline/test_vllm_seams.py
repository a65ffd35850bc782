"""vLLM's parts that `vllm_engine` leans on: a change upstream fails here, by name."""

import inspect

import pytest


@pytest.mark.vllm
def test_the_model_runner_reloads_weights_from_an_iterator() -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    assert "weights_iterator" in inspect.signature(GPUModelRunner.reload_weights).parameters


@pytest.mark.vllm
def test_the_tied_head_can_be_packed_again() -> None:
    from vllm.model_executor.layers import utils

    assert list(inspect.signature(utils.dispatch_cpu_unquantized_gemm).parameters) == ["layer", "remove_weight"]


@pytest.mark.vllm
def test_sampling_parameters_have_the_fields_that_requests_set() -> None:
    from vllm import SamplingParams

    assert {"max_tokens", "temperature", "logprobs", "seed"} <= set(inspect.signature(SamplingParams).parameters)


@pytest.mark.vllm
def test_dropping_cached_prefixes_answers_whether_it_did() -> None:
    from vllm import LLM

    assert inspect.signature(LLM.reset_prefix_cache).return_annotation in (bool, "bool")
