"""Text tower: the part of a model for images and text that reads text, as a causal LM of its own.

transformers has such a model in a map of its own. Given text alone, its outer modules add nothing: they hand token
embeddings and positions to the decoder, whose states the head reads. That is shown of each model when it is loaded for
a capture (probe.py). What reads images, video or sound is left out before any weight is read. Prompts are text: one
with a token that stands for an image is refused by the lineup. Knows transformers models; knows no files, no tokens.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel

from actcache.errors import UnsupportedModelError
from actcache.models.blocks import class_without, find_anatomy, text_config

# What configs call the ids of tokens in whose place something else than text is put.
_PLACEHOLDER = re.compile(r"(\w+_)?(image|video|audio)_token_(id|index)")


def placeholders(config: PreTrainedConfig) -> dict[int, str]:
    """Ids of the tokens that stand for an image, a video or a sound, and what the config calls them; none of a model
    that reads text alone."""
    if text_config(config) is config:
        return {}
    named = ((key, value) for key, value in vars(config).items() if _PLACEHOLDER.fullmatch(key))
    return {value: key for key, value in named if type(value) is int}


def check_chooses_tokens(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> None:
    """Raise UnsupportedModelError where a model does not choose one token after the other, from those before it."""
    if not issubclass(model_class, GenerationMixin):
        raise UnsupportedModelError(f"{model_class.__name__} does not choose one token after the other")
    if text_config(config).__dict__.get("use_bidirectional_attention") in (True, "all"):
        raise UnsupportedModelError(
            f"{config.model_type!r} reads prompts both ways (use_bidirectional_attention): what it computes at a "
            "position depends on the tokens after it"
        )


@cache
def text_tower(whole: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class without the modules beside its decoder, on the way there, but for embeddings and head."""

    def cut(model: PreTrainedModel) -> list[str]:
        decoder = find_anatomy(model).decoder
        kept = [model.get_submodule(decoder), model.get_input_embeddings(), model.get_output_embeddings()]
        unread: list[str] = []
        module: Any = model
        for name in decoder.split("."):
            beside: dict[str, Any] = {**module._modules, **module._parameters}
            for other, value in beside.items():
                own = list(value.modules()) if isinstance(value, nn.Module) else []
                if other != name and not any(part is one for part in own for one in kept):
                    module._modules.pop(other, None)
                    module._parameters.pop(other, None)
                    unread.append(rf"(^|\.){re.escape(other)}(\.|$)")
            module = getattr(module, name)
        return unread

    return class_without(whole, cut)
