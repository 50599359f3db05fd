"""Build a causal language model from a preset or a transformers configuration, with weights decided by the seed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist

from train.common.errors import ConfigError, first_line, require, shown, why_not_loaded
from train.distributed.ranks import Ranks
from train.run import ds_schema, initial_weights
from train.run.config import Model
from train.run.presets import PRESETS

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def configuration(settings: Model, vocabulary: int, sequence_length: int, rows: int | None = None) -> PretrainedConfig:
    """Return the model's configuration. Presets get the tokenizer's vocabulary.

    Args:
        settings: the model options.
        vocabulary: number of different tokens that the data may hold.
        sequence_length: tokens in one training sequence.
        rows: of a preset's embedding. Default: the vocabulary, rounded up to the preset's multiple.

    Raises:
        ConfigError: if there is no such model, or it is too small for the vocabulary or the sequence.
    """
    from transformers import AutoConfig, LlamaConfig

    attention: dict[str, Any] = {} if settings.attention == "auto" else {"attn_implementation": settings.attention}
    source = str(settings.init_from or settings.model)
    if source in PRESETS:
        shape = PRESETS[source]
        config: PretrainedConfig = LlamaConfig(
            vocab_size=rows or -(-vocabulary // shape.multiple) * shape.multiple,
            hidden_size=shape.width,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            intermediate_size=shape.inner,
            max_position_embeddings=shape.positions,
            tie_word_embeddings=shape.tied,
            bos_token_id=None,
            eos_token_id=None,
            **attention,
        )
    else:
        try:
            config = AutoConfig.from_pretrained(source, trust_remote_code=False, **attention)
        except Exception as error:  # of any class, depending on the configuration's files
            what = "init_from" if settings.init_from else "model"
            no_preset = "" if settings.init_from else f" is not a preset ({', '.join(PRESETS)}) and"
            raise ConfigError(
                f"{what} is {shown(source)}, which{no_preset} can't be loaded: {why_not_loaded(source, error)}."
            ) from None
    require(
        settings.init_from is None or getattr(config, "quantization_config", None) is None,
        f"init_from is {source}, whose weights are quantized; give them in float32 or 16 bits.",
    )
    config.use_cache = False
    embedded = getattr(config, "vocab_size", vocabulary)
    require(
        embedded >= vocabulary,
        f"model {source!r} embeds {embedded} tokens, but the tokenizer has {vocabulary}; take another of the two.",
    )
    longest = getattr(config, "max_position_embeddings", None) or sequence_length
    require(
        longest >= sequence_length,
        f"sequence_length is {sequence_length}, but model {source!r} has {longest} positions; "
        f"it can be {longest} at most.",
    )
    return config


def build(
    config: PretrainedConfig, settings: Model, seed: int, ds_config: dict[str, Any], ranks: Ranks, load: bool = False
) -> PreTrainedModel:
    """Build the model. Its initial weights are the same for every number of ranks and every ZeRO stage.

    At stage 3 transformers builds it under ``deepspeed.zero.Init``, so no rank ever holds all of the model. At other
    stages rank 0 draws the weights. The other ranks hold memory for them, on their device and in their type, and
    get them when DeepSpeed broadcasts the model.

    Args:
        config: of the model.
        settings: the model options.
        seed: of the initial weights.
        ds_config: resolved for these ranks.
        ranks: all ranks call this.
        load: whether the weights are those of ``settings.init_from`` instead.

    Raises:
        ConfigError: if transformers can't build a causal language model from the configuration.
    """
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    # This object must stay alive while the model is built; it tells transformers that this is stage 3.
    zero3 = HfDeepSpeedConfig(ds_config) if ds_config["zero_optimization"]["stage"] == 3 else None
    torch.manual_seed(seed)
    try:
        if zero3 is None and not ranks.is_main:
            model = initial_weights.allocate(config, DTYPES[ds_schema.dtype(ds_config)], ranks.device)
        elif load and settings.init_from:
            model = initial_weights.read(settings.init_from, config)
        else:
            model = initial_weights.draw(config, at_once=zero3 is None)
        if settings.activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
    except ConfigError:
        raise
    except Exception as error:  # of any class, depending on what is wrong with the configuration
        how = "" if settings.attention == "auto" else f" with --attention {settings.attention}"
        raise ConfigError(
            f"model is {shown(settings.model)}, which transformers can't build as a causal language model{how}: "
            f"{first_line(error)}"
        ) from None
    finally:
        del zero3
    model.train()
    return model


def empty(config: PretrainedConfig) -> PreTrainedModel:
    """Build the model. Under ``torch.device("meta")`` it has shapes and no weights."""
    from transformers import AutoModelForCausalLM

    network: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
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
