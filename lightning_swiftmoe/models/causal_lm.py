"""``CausalLMModule``: the LightningModule around a model of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_swiftmoe.data.packing import IGNORED
from lightning_swiftmoe.models.folder_model import FolderModel
from lightning_swiftmoe.models.language_module import LanguageModule, OptimizerFactory
from lightning_swiftmoe.strategy import SwiftMoEStrategy

Batch = Tensor | dict[str, Tensor]


class CausalLMModule(LanguageModule):
    """Continued pre-training and instruction tuning of a causal language model in a folder.

    A batch is ``[B, T + 1]`` tokens of any integer dtype, or ``input_ids``, ``labels`` and ``position_ids``, ``[B, T]``
    int64 each. Labels stand at their own tokens, -100 where nobody is trained; positions begin again with every
    conversation, and none sees another.

    The loss is the mean over the trained tokens of a batch of **all** ranks, however many of them each rank has: N
    ranks compute what one process computes. Accumulated batches count alike, as everywhere in Lightning. The model's
    auxiliary loss is added to it with its factor; of ranks it is the mean of theirs, each of its own tokens, as in all
    data parallelism, and filling counts as tokens. ``train/loss`` and ``val/loss`` are without it.

    Args:
        model: which, a ``FolderModel`` or its fields.
        optimizer, warmup_steps, min_lr_ratio, seed: as for ``LanguageModule``; the seed matters to random weights.
        on_meta: build it on the meta device, so that no rank ever holds all experts; ``strategy="swiftmoe"`` then reads
            or draws the weights. None: wherever that is the strategy. The same seed draws other weights there.
        save_pretrained: folder for the trained model, its configuration and tokenizer in the layout of the hub, written
            when training ends; None: none. Rank 0 has all weights in host memory for that.

    Raises:
        ValueError: ``save_pretrained`` is the folder that the model came from.
    """

    config_class = FolderModel  # of `model` on the command line

    def __init__(
        self,
        model: FolderModel | dict[str, Any],
        optimizer: OptimizerFactory | None = None,
        warmup_steps: int = 20,
        min_lr_ratio: float = 0.1,
        seed: int = 0,
        on_meta: bool | None = None,
        save_pretrained: str | Path | None = None,
    ) -> None:
        super().__init__(optimizer, warmup_steps, min_lr_ratio, seed)
        self.config = model if isinstance(model, FolderModel) else FolderModel(**model)
        if save_pretrained is not None and Path(save_pretrained).resolve() == Path(self.config.path).resolve():
            raise ValueError(f"save_pretrained = {save_pretrained} is where the model comes from: choose another")
        self.on_meta, self.save_pretrained = on_meta, save_pretrained
        self.model: Any = None
        self.aux_loss_coef = 0.0

    def configure_model(self) -> None:
        """Once the strategy is known; in the dtype that its precision makes the default."""
        if self.model is None:
            on_meta = self.on_meta if self.on_meta is not None else self._has_our_strategy()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.meta_seed)
                self.model, self.aux_loss_coef = self.config.build(on_meta=on_meta)

    def forward(self, batch: Batch) -> Tensor:
        """Logits ``[B, T, V]``."""
        return self._run(batch)[0].logits

    def training_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """With and without the auxiliary loss. Collective where ranks may have different numbers of trained tokens."""
        output, targets = self._run(batch)
        total, count = _cross_entropy(output.logits, targets)
        if isinstance(batch, Tensor):
            loss = total / count
        else:
            everywhere = self.trainer.strategy.reduce(count.clone(), reduce_op="sum")
            loss = total * self.trainer.world_size / everywhere.clamp_min(1)  # ranks' gradients are averaged
        return loss + self.aux_loss_coef * output.aux_loss if self.aux_loss_coef else loss, loss

    def evaluation_loss(self, batch: Batch) -> tuple[Tensor, int]:
        """Mean cross-entropy of the trained tokens, and their number."""
        output, targets = self._run(batch)
        total, count = _cross_entropy(output.logits, targets)
        return total / count.clamp_min(1), int(count)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The likeliest next token at every position, ``[B, T]``."""
        return self(batch).argmax(dim=-1)

    def on_train_end(self) -> None:
        """Save the trained model. Collective."""
        super().on_train_end()
        if self.save_pretrained is None:
            return
        strategy = self.trainer.strategy
        if isinstance(strategy, SwiftMoEStrategy):
            state = strategy.full_state_dict()
        else:
            state = strategy.lightning_module_state_dict()
        if self.trainer.is_global_zero:
            from lightning_swiftmoe.hf.causal_lm import save_model

            own = {name.removeprefix("model."): tensor for name, tensor in state.items()}
            save_model(own, self.config.path, self.save_pretrained)
        strategy.barrier()

    def _has_our_strategy(self) -> bool:
        try:
            return isinstance(self.trainer.strategy, SwiftMoEStrategy)
        except RuntimeError:  # without a Trainer, as in load_from_checkpoint
            return False

    def _run(self, batch: Batch) -> tuple[Any, Tensor]:
        """The model's output, and ``[B, T]`` int64 targets of its logits."""
        if isinstance(batch, Tensor):
            inputs, targets, positions = batch[:, :-1].long(), batch[:, 1:].long(), None
        else:
            inputs, positions = batch["input_ids"], batch["position_ids"]
            targets = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
        return self.model(input_ids=inputs, position_ids=positions, use_cache=False), targets


def _cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over trained tokens, in at least fp32, and their number."""
    wide = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(wide, targets.flatten(), ignore_index=IGNORED, reduction="sum")
    return total, (targets != IGNORED).sum()
