"""Options of TRL's GRPO that are wrong with per-token advantages, checked where a trainer is built by hand.

A run's configuration refuses the same ones when it is parsed (`config_shaping.refuse_wrong_options`).
"""

from trl import GRPOConfig

from ballast.errors import ConfigError
from ballast.pipeline.config_shaping import KL_TWICE, WRONG_OPTIONS, ShapingConfig, refuse_wrong_options


def check_options(args: GRPOConfig, shaping: ShapingConfig | None = None) -> None:
    """Refuse options of TRL's that are wrong with per-token advantages.

    Raises:
        ConfigError: names the option, its value and the reason.
    """
    try:
        refuse_wrong_options("GRPOConfig", {name: getattr(args, name) for name in WRONG_OPTIONS})
    except ValueError as error:
        raise ConfigError(str(error)) from error
    truncated = args.top_p != 1.0 or args.top_k > 0 or bool(args.min_p)
    if args.use_vllm and args.vllm_importance_sampling_correction and truncated:
        raise ConfigError(
            f"GRPOConfig.top_p, top_k, min_p = {(args.top_p, args.top_k, args.min_p)} do not work with "
            "vllm_importance_sampling_correction: truncated sampling biases the importance ratio; set them to 1.0, 0, None"
        )
    if shaping is not None and shaping.kl.weight > 0 and args.beta > 0:
        raise ConfigError(f"shaping.kl.weight = {shaping.kl.weight} with GRPOConfig.beta = {args.beta}: {KL_TWICE}")
