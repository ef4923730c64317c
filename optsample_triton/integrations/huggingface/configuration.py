"""What a generation configuration brings along: filters that are left out, penalties that are named."""

from __future__ import annotations

import math
import warnings
from typing import Any

# The filters that transformers puts after all other processors when do_sample is set: the name in the configuration,
# the one in the processor, and the default.
_FILTERS = {
    "TemperatureLogitsWarper": ("temperature", "temperature", 1.0),
    "TopHLogitsWarper": ("top_h", "top_h", None),
    "TopKLogitsWarper": ("top_k", "top_k", 50),
    "TopPLogitsWarper": ("top_p", "top_p", 1.0),
    "MinPLogitsWarper": ("min_p", "min_p", None),
    "TypicalLogitsWarper": ("typical_p", "mass", 1.0),
    "EpsilonLogitsWarper": ("epsilon_cutoff", "epsilon", 0.0),
    "EtaLogitsWarper": ("eta_cutoff", "epsilon", 0.0),
}
# What bends pi_theta without banning anything, and the value that does nothing.
PENALTIES = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "exponential_decay_length_penalty": None,
    "guidance_scale": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "sequence_bias": None,
    "watermarking_config": None,
}


def without_filters(processors: Any, config: Any) -> list[Any]:
    """The processors without the filters of the configuration, which follow the caller's own."""
    kept = list(processors)
    for kind, (name, attribute, default) in _FILTERS.items() if config.do_sample else ():
        value = getattr(config, name, None)
        places = [k for k, x in enumerate(kept) if type(x).__name__ == kind]
        if value is None or not places or not math.isclose(getattr(kept[places[-1]], attribute), value, rel_tol=1e-6):
            continue
        del kept[places[-1]]
        if value != default:
            warnings.warn(f"{name} of the generation configuration is left out: name it in the call", stacklevel=2)
    return kept


def penalties_of(config: Any) -> dict[str, Any]:
    """Those of the configuration that do something."""
    values = {name: getattr(config, name, None) for name in PENALTIES}
    return {name: value for name, value in values.items() if value is not None and value != PENALTIES[name]}
