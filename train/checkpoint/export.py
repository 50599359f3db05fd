"""Export a checkpoint in the form of Hugging Face: safetensors, configuration and tokenizer."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from filelock import FileLock, Timeout
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file

from train.checkpoint.load import check_text
from train.checkpoint.manifest import MANIFEST, checkpoint_info, complete_checkpoints, files_in, why_incomplete
from train.checkpoint.weights import Weights, names_in, trained_in
from train.common.errors import ConfigError, RetryError, first_line, require, shown
from train.common.files import checksum, load_file, make_folder, sync, write_json
from train.common.progress import Progress
from train.common.schemas import CheckpointFile, TrainedOptions, TrainedRun
from train.data.tokenization import load_tokenizer
from train.run import model, run_dir
from train.run.config import Model
from train.run.model import DTYPES

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

SHARD = "5GB"
"""Size of a file of weights at most. Not much more is held in memory."""


def export(source: Path, out: Path, dtype: str, max_shard_size: int | str = SHARD) -> str:
    """Write a checkpoint to ``out``, from where ``AutoModelForCausalLM`` and ``AutoTokenizer`` load it.

    Args:
        source: a run's folder, whose newest complete checkpoint is taken, or one of its checkpoints. It is only read.
        out: a folder that does not exist or is empty. It appears once everything is written.
        dtype: one of DTYPES, for all weights and buffers of floating point.
        max_shard_size: of a file of weights, in bytes or as "5GB". A larger weight has its own file.

    Returns:
        A sentence on what was written.

    Raises:
        ConfigError: if there is no such checkpoint, it is damaged, a weight is not finite, the model's configuration or
            tokenizer can't be loaded any more, or ``out`` can't be written.
    """
    checkpoint, options = _found(source.absolute())
    out = out.resolve()
    _check_empty(out)
    tokenizer = load_tokenizer(options.data.tokenizer)
    network = _network(_configuration(options, tokenizer), options)
    _check_sums(checkpoint)
    network = _fitted(network, checkpoint, options, len(tokenizer))
    network.config.architectures, network.config.dtype = [type(network).__name__], DTYPES[dtype]
    names, state = names_in(network), network.state_dict()
    stored = {name: state[name].to(DTYPES[dtype]) if state[name].is_floating_point() else state[name] for name in names}
    split = split_torch_state_dict_into_shards(stored, max_shard_size=max_shard_size)  # by sizes; nothing is read yet
    size, written = split.metadata["total_size"], 0
    with _appearing(out, size) as folder, Progress(size, 0, f"exporting {checkpoint.path.name}") as progress:
        network.config.save_pretrained(folder)
        if network.can_generate():
            network.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for file, within in split.filename_to_tensors.items():
            with _readable(checkpoint.path):
                weights = checkpoint.weights(network)  # mapped anew, so that pages that were read are let go
                shard = {name: _converted(name, weights.read(names[name]), stored[name].dtype) for name in within}
            save_file(shard, folder / file, {"format": "pt"})
            shutil.copymode(folder / "config.json", folder / file)  # safetensors lets nobody else read it
            written += sum(tensor.nbytes for tensor in shard.values())
            del weights, shard
            progress.show(written, "bytes")
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            write_json(folder / "model.safetensors.index.json", index)
    count = sum(tensor.numel() for tensor in stored.values())
    return f"{out}: the weights of step {checkpoint.about.step}, {count} in {dtype}, {size / 1e9:.3g} GB."


class _Checkpoint(NamedTuple):
    """A complete checkpoint."""

    path: Path
    about: CheckpointFile

    def files(self) -> list[str]:
        """Return the names of the files that hold tensors."""
        return [name for name in self.about.files if name.endswith(".pt")]

    def weights(self, network: PreTrainedModel) -> Weights:
        """Map its files into memory."""
        return Weights(self.path, self.files(), self.about.layout.stage, trained_in(network))


def _found(source: Path) -> tuple[_Checkpoint, TrainedOptions]:
    """Return the checkpoint to export, and the options of its run.

    Raises:
        ConfigError: if there is none, or it is incomplete or another run's.
    """
    named = re.fullmatch(r"step-\d{7,}(-universal)?", source.name)
    out = source.parent.parent if named else source
    with _readable(source):
        begun = run_dir.begun(out)
        if begun is None:
            raise ConfigError(
                f"run is {source}, which is neither the folder of a run nor a checkpoint in one: "
                f"there is no {out / 'run.json'}."
            )
        complete = complete_checkpoints(out / "checkpoints")
        if named:
            require(not named[1], f"run is {source}, which is a copy for other ranks; give the one without -universal.")
            reason = why_incomplete(source) if source.is_dir() else "it does not exist"
            others = ", ".join(path.name for path in complete) or "none"
            require(not reason, f"run is {source}, which is no complete checkpoint: {reason}; complete are: {others}.")
            complete = [source]
        require(bool(complete), f"run is {source}, which has no complete checkpoint.")
        checkpoint = _Checkpoint(complete[-1], load_file(CheckpointFile, complete[-1] / MANIFEST))
        difference = run_dir.difference_from(
            checkpoint.about.run or begun.identity, begun.identity, checkpoint.about.step
        )
        require(not difference, f"{checkpoint.path} is a checkpoint of a run with {difference}; move it to that run.")
        check_text(checkpoint_info(checkpoint.path), begun.tokens)
    return checkpoint, load_file(TrainedRun, out / "run.json").identity


def _check_empty(out: Path) -> None:
    """Check that the folder does not exist or is empty.

    Raises:
        ConfigError: if it holds something or is a file.
    """
    try:
        held = next(out.iterdir(), None)
    except FileNotFoundError:
        return
    except NotADirectoryError:
        raise ConfigError(f"out is {out}, which is or lies in a file; give a folder.") from None
    except OSError as error:
        raise ConfigError(f"out is {out}, which can't be used: {error.strerror}.") from None
    require(held is None, f"out is {out}, which holds {held and held.name}; give a new or an empty folder.")


def _check_sums(checkpoint: _Checkpoint) -> None:
    """Check that every file that will be read is as it was written.

    Raises:
        ConfigError: if one isn't.
    """
    files = checkpoint.files()
    progress = Progress(len(files), 0, f"checking {checkpoint.path.name}")
    with _readable(checkpoint.path), progress, ThreadPoolExecutor() as pool:
        sums = pool.map(lambda name: checksum(checkpoint.path / name), files)
        for done, (name, summed) in enumerate(zip(files, sums, strict=True), 1):
            require(
                summed == checkpoint.about.files[name],
                f"{checkpoint.path} is damaged ({name} has changed since it was written); give another checkpoint.",
            )
            progress.show(done, "files")


def _configuration(options: TrainedOptions, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """Return the configuration of the run's model, for inference.

    Special tokens are the tokenizer's: a configuration by path names those of another one, whose ids mean nothing here.

    Raises:
        ConfigError: if it can't be loaded any more.
    """
    data = options.data
    folder = Path(options.model.init_from) if options.model.init_from else None
    given = Model(model=options.model.model, init_from=folder)
    config = model.configuration(given, len(tokenizer), data.sequence_length)
    config.use_cache = True
    config.bos_token_id, config.pad_token_id = tokenizer.bos_token_id, tokenizer.pad_token_id
    config.eos_token_id = tokenizer.eos_token_id if data.eos_id is None else data.eos_id
    return config


def _network(config: PretrainedConfig, options: TrainedOptions) -> PreTrainedModel:
    """Build the model on the meta device, where weights have shapes and no content.

    Raises:
        ConfigError: if transformers can't build it any more.
    """
    try:
        with torch.device("meta"):
            return model.empty(config)
    except Exception as error:  # of any class, depending on what is wrong with the configuration
        raise ConfigError(
            f"model is {shown(options.model.model)}, which transformers can't build any more: {first_line(error)}"
        ) from None


def _fitted(
    network: PreTrainedModel, checkpoint: _Checkpoint, options: TrainedOptions, vocabulary: int
) -> PreTrainedModel:
    """Return the model with as many embeddings as the checkpoint has. There may be more than the tokenizer has tokens.

    Raises:
        ConfigError: if the checkpoint is another model's, since configuration or tokenizer have changed.
    """
    with _readable(checkpoint.path):
        weights = checkpoint.weights(network)
    embedding: Any = network.get_input_embeddings().weight
    name = next(name for name, parameter in network.named_parameters() if parameter is embedding)
    rows = weights.shapes[name][0] if name in weights.shapes else len(embedding)
    require(
        rows >= vocabulary,
        f"tokenizer is {shown(options.data.tokenizer)}, which has changed since the run began: it has {vocabulary} "
        f"tokens, and the model embeds {rows}.",
    )
    if rows != len(embedding):
        network.config.vocab_size = rows
        network = _network(network.config, options)
    difference = _difference(network, weights)
    require(
        not difference,
        f"model is {shown(options.model.model)}, which has changed since the run began: {difference}.",
    )
    return network


def _difference(network: PreTrainedModel, weights: Weights) -> str:
    """Return the first difference of a model from a checkpoint's weights in names, shapes and ties; empty if none."""
    state = network.state_dict()
    if unknown := next((name for name in weights.shapes if name not in state), ""):
        return f"it has no {unknown}, which the checkpoint holds"
    for name, group in names_in(network).items():
        found = next((weights.shapes[each] for each in group if each in weights.shapes), None)
        if found != state[name].shape:
            held = "it is missing" if found is None else str(tuple(found))
            return f"{name} has the shape {tuple(state[name].shape)}, and in the checkpoint {held}"
        if len(apart := [each for each in group if each in weights.masters]) > 1:
            return f"{' and '.join(apart)} are one weight, and in the checkpoint several"
    trained = (name for name, parameter in network.named_parameters() if parameter.requires_grad)
    if weights.masters and (tied := next((name for name in trained if name not in weights.masters), "")):
        return f"{tied} is a weight of its own, and in the checkpoint it is not"
    return ""


def _converted(name: str, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a weight that is finite in another dtype.

    Raises:
        ConfigError: if a number in it is beyond the dtype's range.
    """
    converted = weight.to(dtype).contiguous()
    require(
        dtype == weight.dtype or bool(torch.isfinite(converted).all()),
        f"dtype is {str(dtype).removeprefix('torch.')}, and weight {name} has numbers beyond its range; give fp32.",
    )
    return converted


@contextmanager
def _readable(checkpoint: Path) -> Iterator[None]:
    """Turn whatever is raised while a checkpoint is read into one sentence.

    Raises:
        RetryError: if a file can't be read now.
        ConfigError: if its content is not as it should be.
    """
    try:
        yield
    except ConfigError:
        raise
    except OSError as error:
        raise RetryError(
            f"checkpoint {checkpoint} can't be read now ({first_line(error)}); start the same command again."
        ) from None
    except Exception as error:  # of any class, if a file is not what DeepSpeed writes
        raise ConfigError(f"checkpoint {checkpoint} can't be loaded: {first_line(error)}.") from None


@contextmanager
def _appearing(out: Path, size: int) -> Iterator[Path]:
    """Yield an empty folder, which becomes ``out`` at the end of the block, or is removed if the block fails.

    Args:
        out: the folder to make.
        size: bytes that it will hold.

    Raises:
        ConfigError: if it can't be written, the disk is too full, or another export is writing it.
    """
    make_folder(out.parent, "out")
    beside = out.with_name(f".{out.name}.exporting")
    folder = beside / "whole"
    lock = FileLock(beside / ".lock")
    try:
        beside.mkdir(exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(f"out is {out}, which another export is writing now; wait for it to end.") from None
    except OSError as error:
        raise ConfigError(f"out is {out}, which can't be written: {first_line(error)}.") from None
    try:
        shutil.rmtree(folder, ignore_errors=True)  # of an export that was killed
        folder.mkdir()
        free = shutil.disk_usage(folder).free
        require(
            free >= size,
            f"out is {out}, whose disk has {free / 1e9:.3g} GB free, and the export needs {size / 1e9:.3g} GB.",
        )
        yield folder
        for path in [*files_in(folder), folder]:
            sync(path)
        folder.rename(out)
        sync(out.parent)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"out is {out}, which can't be written: {first_line(error)}.") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        lock.release()
