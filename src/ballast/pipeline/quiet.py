"""The command line shows its own lines alone: progress bars and chatter of libraries off, errors on.

Everything is said through the environment, the standard loggers and warning filters, so that nothing heavy
is imported for it; call it before the libraries are imported, since they read the environment then. What the
user has set stays. `BALLAST_VERBOSE=1` leaves the libraries as they are.
"""

import logging
import os
import warnings

VERBOSE = "BALLAST_VERBOSE"

_ENVIRONMENT = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # transformers takes its own bars from this, too
    "HF_HUB_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "DATASETS_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}

# Libraries that have no such variable.
_LOGGERS = ("accelerate", "httpcore", "httpx", "peft", "torch", "trl", "vllm")

# Advice to whoever writes the training loop, which the reader of a run can do nothing about.
_MESSAGES = (
    r"'pin_memory' argument is set as true but",
    r"torch\.distributed process group is initialized, but parallel_mode",
    r"Ignoring clean_up_tokenization_spaces",
    r"Triton is installed, but",
)


def quiet_libraries() -> None:
    """Turn off progress bars, advice and warnings of the libraries below; their errors are still shown."""
    if os.environ.get(VERBOSE) == "1":
        return
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in _MESSAGES:
        warnings.filterwarnings("ignore", message=message)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(vllm|torch|transformers|trl|peft)(\.|$)")
