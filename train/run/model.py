"""Build a causal language model from a preset or a transformers configuration, with weights decided by the seed."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist

from train.common.errors import ConfigError, first_line, require, shown, why_not_loaded
from train.run.config import Model

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Llama shapes: width, layers, heads, feed-forward width, positions, tied embeddings.
PRESETS = {
    "tiny": (128, 2, 4, 352, 1024, True),  # 0.45 M parameters with the byte tokenizer
    "small": (384, 6, 6, 1024, 2048, True),  # 10.8 M
    "124m": (768, 12, 12, 2048, 2048, True),  # this and the following: sizes with a vocabulary of 50 000
    "350m": (1024, 24, 16, 2736, 2048, True),
    "1.3b": (2048, 24, 32, 5504, 4096, False),
}


def configuration(settings: Model, vocabulary: int, sequence_length: int) -> PretrainedConfig:
    """Return the model's configuration. Presets get the tokenizer's vocabulary.

    Args:
        settings: the model options.
        vocabulary: number of different tokens that the data may hold.
        sequence_length: tokens in one training sequence.

    Raises:
        ConfigError: if there is no such model, or it is too small for the vocabulary or the sequence.
    """
    from transformers import AutoConfig, LlamaConfig

    if settings.model in PRESETS:
        width, layers, heads, inner, positions, tied = PRESETS[settings.model]
        config: PretrainedConfig = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            intermediate_size=inner,
            max_position_embeddings=positions,
            tie_word_embeddings=tied,
            bos_token_id=None,
            eos_token_id=None,
        )
    else:
        try:
            config = AutoConfig.from_pretrained(settings.model)
        except Exception as error:  # of any class, depending on the configuration's files
            raise ConfigError(
                f"model is {shown(settings.model)}, which is not a preset ({', '.join(PRESETS)}) and can't be loaded: "
                f"{why_not_loaded(settings.model, error)}."
            ) from None
    config.use_cache = False
    rows = getattr(config, "vocab_size", vocabulary)
    require(
        rows >= vocabulary,
        f"model {settings.model!r} embeds {rows} tokens, but the tokenizer has {vocabulary}; take another of the two.",
    )
    longest = getattr(config, "max_position_embeddings", None) or sequence_length
    require(
        longest >= sequence_length,
        f"sequence_length is {sequence_length}, but model {settings.model!r} has {longest} positions; "
        f"it can be {longest} at most.",
    )
    return config


def build(config: PretrainedConfig, settings: Model, seed: int, ds_config: dict[str, Any]) -> PreTrainedModel:
    """Build the model. Its initial weights are the same for every number of ranks and every ZeRO stage.

    At stage 3 transformers builds it under ``deepspeed.zero.Init``, so no rank ever holds all of the model.

    Raises:
        ConfigError: if transformers can't build a causal language model from the configuration.
    """
    from transformers import AutoModelForCausalLM
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    try:
        from transformers.initialization import no_init_weights
    except ImportError:  # Transformers 4
        from transformers.modeling_utils import no_init_weights  # type: ignore[attr-defined, no-redef]

    # This object must stay alive while the model is built; it tells transformers that this is stage 3.
    zero3 = HfDeepSpeedConfig(ds_config) if ds_config["zero_optimization"]["stage"] == 3 else None
    torch.manual_seed(seed)
    try:
        # torch's own initialization of each module is skipped, as at stage 3, so that both draw the same numbers.
        with nullcontext() if zero3 else no_init_weights():
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        if zero3 is None:
            model.initialize_weights()
            model.tie_weights()
        if settings.activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
    except Exception as error:  # of any class, depending on what is wrong with the configuration
        raise ConfigError(
            f"model is {shown(settings.model)}, which transformers can't build as a causal language model: "
            f"{first_line(error)}"
        ) from None
    finally:
        del zero3
    model.train()
    return model


def empty(config: PretrainedConfig) -> PreTrainedModel:
    """Build the model. Under ``torch.device("meta")`` it has shapes and no weights."""
    from transformers import AutoModelForCausalLM

    network: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return network


def parameter_count(model: PreTrainedModel) -> int:
    """Return the number of weights in the model, including those that ZeRO-3 has partitioned to other ranks."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())


def looked_up(model: PreTrainedModel) -> int:
    """Return the number of weights of the input embedding; 0 if it is the output embedding, too."""
    given: Any = model.get_input_embeddings()
    made: Any = model.get_output_embeddings()
    if given is None or (made is not None and made.weight is given.weight):
        return 0
    return int(getattr(given.weight, "ds_numel", given.weight.numel()))


def own_part(parameter: Any) -> torch.Tensor:
    """Return the elements of a parameter that this rank holds.

    Under ZeRO-3 this leaves out the padding of the last ranks' partitions, which is never initialized.
    """
    if not hasattr(parameter, "ds_tensor"):
        return cast(torch.Tensor, parameter.detach())
    part: torch.Tensor = parameter.ds_tensor
    rank = dist.get_rank(parameter.ds_process_group)
    return part.flatten()[: max(0, parameter.ds_numel - rank * part.numel())]
