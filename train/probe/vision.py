"""Two small image classifiers on the digits of scikit-learn, so that train.response can measure more than language."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from balanced_adam import BalancedAdam
from train.common.errors import ConfigError

BATCH, CLASSES, LR = 64, 10, 1e-3


class Classifier:
    """A model, its data and its optimizer.

    Args:
        name: ``"vit"`` (0.14 M parameters) or ``"resnet"`` (0.11 M).
        seed: decides the weights and the order of the data.

    Raises:
        ConfigError: if scikit-learn isn't installed.
    """

    def __init__(self, name: str, seed: int = 0) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise ConfigError(
                f"task is {name!r}, but the package scikit-learn is missing: pip install scikit-learn."
            ) from None
        images, labels = load_digits(return_X_y=True)
        self.images = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8.0 - 1.0
        self.labels = torch.tensor(labels, dtype=torch.int64)
        torch.manual_seed(seed)
        self.order = torch.Generator().manual_seed(seed)
        self.model = _vit() if name == "vit" else _resnet()
        self.optimizer = BalancedAdam(self.model.parameters(), lr=LR, weight_decay=0.1)

    def train_step(self, see: Callable[[], None]) -> float:
        """Take one step on a random batch and return the loss. ``see`` is called once the gradients are computed."""
        index = torch.randint(len(self.labels), (BATCH,), generator=self.order)
        loss: Tensor = nn.functional.cross_entropy(
            self.model(pixel_values=self.images[index]).logits, self.labels[index]
        )
        loss.backward()
        see()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss)


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
    )
    config.num_labels = CLASSES
    return ViTForImageClassification(config)


def _resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        num_channels=1, embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 1], layer_type="basic"
    )
    config.num_labels = CLASSES
    return ResNetForImageClassification(config)
