"""The weights that a run begins with: drawn by the seed, read from a Hugging Face checkpoint, or sent by rank 0."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from train.common.errors import ConfigError, first_line, require
from train.common.files import checksum

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


TOKENIZERS = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
"""Files by which a folder shows that it has a tokenizer."""


def no_init_weights() -> Any:
    """Return transformers' context in which a model is built without drawing its weights."""
    try:
        from transformers.initialization import no_init_weights
    except ImportError:  # Transformers 4
        from transformers.modeling_utils import no_init_weights  # type: ignore[attr-defined, no-redef]
    return no_init_weights()


def draw(config: PretrainedConfig, at_once: bool) -> PreTrainedModel:
    """Build a model in float32 and draw its weights.

    Args:
        config: of the model.
        at_once: whether all of it is in memory; False under ``deepspeed.zero.Init``, where transformers draws it part
            by part.
    """
    from transformers import AutoModelForCausalLM

    # torch's own initialization of each module is skipped, as at stage 3, so that both draw the same numbers.
    with no_init_weights() if at_once else nullcontext():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    if at_once:
        model.initialize_weights()
        model.tie_weights()
    return model


def allocate(config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Build a model whose parameters have memory and no values yet, in ``dtype`` on ``device``."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    # Buffers are computed as usual: they are small, and nobody sends them.
    with no_init_weights(), init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    model.tie_weights()  # before there is memory, so that tied parameters share it
    memory: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if parameter not in memory:
                empty = torch.empty_like(parameter, dtype=dtype, device=device)
                memory[parameter] = torch.nn.Parameter(empty, parameter.requires_grad)
            module._parameters[name] = memory[parameter]
    return model


def check_names(folder: Path, config: PretrainedConfig) -> None:
    """Check that a Hugging Face checkpoint has all weights of the model, and no others. None is read.

    Raises:
        ConfigError: if it lacks one, has one too many or of another shape.
    """
    report = _loaded(folder, config, device_map="meta")[1]
    wrong = {
        "lacks {}": report["missing_keys"],
        "has {}, which the model hasn't": report["unexpected_keys"],
        "has {} in another shape": [name for name, *_ in report["mismatched_keys"]],
    }
    for words, names in wrong.items():
        first = min(names, default="")
        require(not names, f"init_from is {folder}, which {words.format(first)}; give weights of this configuration.")


def read(folder: Path, config: PretrainedConfig) -> PreTrainedModel:
    """Build a model in float32 with the weights of a Hugging Face checkpoint. At ZeRO stage 3 all ranks call this.

    Raises:
        ConfigError: if they can't be loaded.
    """
    model: PreTrainedModel = _loaded(folder, config)[0]
    return model


def _loaded(folder: Path, config: PretrainedConfig, **more: Any) -> Any:
    """Return the model and what transformers reports of names.

    Raises:
        ConfigError: if it can't be loaded.
    """
    from transformers import AutoModelForCausalLM

    options = {"config": config, "dtype": torch.float32, "trust_remote_code": False, **more}
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except Exception as error:  # of any class, depending on the files
        raise ConfigError(f"init_from is {folder}, whose weights can't be loaded: {first_line(error)}") from None


def check_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a run's tokenizer is that of the checkpoint it begins from, if the folder has one.

    Raises:
        ConfigError: if it isn't: the weights know other tokens by these numbers.
    """
    from train.data.tokenization import digest, load_tokenizer

    if any((folder / name).exists() for name in TOKENIZERS):
        require(
            digest(load_tokenizer(str(folder))) == digest(tokenizer),
            f"init_from is {folder}, whose tokenizer is another than the run's; give --tokenizer {folder}.",
        )


def sums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of weights in a Hugging Face checkpoint."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    return {path.name: checksum(path)[1] for path in files}
