"""The error tree. Every message names the fact, the value, the reason and the remedy.

BallastError              exit code 1
├── UserError             exit code 2: what the user gave cannot be used (also a ValueError)
│   ├── ConfigError       a key, a value or a combination of a run's configuration
│   ├── DataError         a file, a column or a row of a data set
│   └── ModelError        a model folder, its weights or its tokenizer
├── GuardError            a guardrail broke its contract or failed its self-check (also a RuntimeError)
├── RewardError           a reward function returned what cannot be trained on (also a RuntimeError)
└── EngineError           a generator could not start, answer or take new weights (also a RuntimeError)
"""


class BallastError(Exception):
    """Base of every error that Ballast raises on purpose."""

    exit_code = 1


class UserError(BallastError, ValueError):
    """What the user gave cannot be used; the message says what to write instead."""

    exit_code = 2


class ConfigError(UserError):
    """A key, a value or a combination in a run's configuration."""


class DataError(UserError):
    """A file, a column or a row of a data set."""


class ModelError(UserError):
    """A model folder, its weights or its tokenizer."""


class GuardError(BallastError, RuntimeError):
    """A guardrail broke its contract, failed its self-check, or left too much unscored."""


class RewardError(BallastError, RuntimeError):
    """A reward function returned what cannot be trained on."""


class EngineError(BallastError, RuntimeError):
    """A generator could not start, answer or take new weights."""
