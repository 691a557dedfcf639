"""What :mod:`bench.outer_defaults` trains: three small tasks on data that installed packages ship.

Many models of one task are trained at once, as slices of stacked tensors: which settings, seeds and workers
they belong to is nothing that a task knows. Batches are drawn at random from the training part, images with
noise that is drawn anew, so that they cannot be learnt by heart and losses stay away from zero, where ratios
of them say little.
"""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from sklearn.datasets import load_digits, load_sample_image
from torch import Tensor, nn
from torch.func import functional_call, vmap

Batch = Mapping[str, Tensor]
#: parameter -> [models, *shape]
Stack = dict[str, Tensor]


class Loss(Protocol):
    """Of one model on one batch."""

    def __call__(self, model: nn.Module, parameters: Stack, batch: Batch) -> Tensor: ...


@dataclass(frozen=True)
class Task:
    """``draw(generator, rows)`` gives that many rows of the training part; ``held_out`` is one batch, of rows
    that are never trained on; ``loss`` is that of one model on one batch.
    """

    name: str
    build: Callable[[], nn.Module]
    draw: Callable[[torch.Generator, int], Batch]
    held_out: Batch
    loss: Loss
    #: of AdamW
    learning_rate: float
    batch_size: int
    #: of how many seeds the mean is taken
    seeds: int = 3


def initial(task: Task, seed: int) -> dict[str, Tensor]:
    """The parameters of a fresh model."""
    torch.manual_seed(seed)
    return {name: value.detach().clone() for name, value in task.build().named_parameters()}


def losses(task: Task, model: nn.Module, stack: Stack, batches: Batch) -> Tensor:
    """Of each model of ``stack`` on its own batch, in one pass; differentiable."""
    return vmap(partial(task.loss, model))(stack, dict(batches))


def held_out_losses(task: Task, model: nn.Module, stack: Stack) -> Tensor:
    """Of each model of ``stack`` on the rows that are held out."""
    one = partial(task.loss, model, batch=task.held_out)
    with torch.no_grad():
        # a few at once: all of them together would need gigabytes
        return vmap(one, chunk_size=8)(stack)


# --- a language model of Python's own documentation ---------------------------------------------------

_LENGTH = 16


def text() -> Task:
    """A GPT-2 that predicts the next byte of the pages that ``help()`` shows."""
    from transformers import GPT2Config, GPT2LMHeadModel

    pages = "\n".join(page for _, page in sorted(pydoc_data.topics.topics.items()))
    found = torch.tensor(list(pages.encode("ascii", "replace")))
    cut = len(found) * 9 // 10
    train, rest = found[:cut], found[cut:]
    held_out = rest[: len(rest) // _LENGTH * _LENGTH].view(-1, _LENGTH)[::4]
    options = GPT2Config(
        vocab_size=128,
        n_positions=_LENGTH,
        n_embd=16,
        n_layer=1,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        activation_function="relu",
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",
    )

    def draw(generator: torch.Generator, rows: int) -> Batch:
        at = torch.randint(0, cut - _LENGTH, (rows, 1), generator=generator)
        return {"input_ids": train[at + torch.arange(_LENGTH)]}

    def loss(model: nn.Module, parameters: Stack, batch: Batch) -> Tensor:
        logits = functional_call(model, parameters, kwargs={"input_ids": batch["input_ids"]}).logits
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())

    return Task("text", lambda: GPT2LMHeadModel(options), draw, {"input_ids": held_out}, loss, 1e-3, 4)


# --- handwritten digits, seen through noise -----------------------------------------------------------

_NOISE = 0.35


def digits() -> Task:
    """A ViT that says which digit a noisy image of eight by eight pixels shows."""
    from transformers import ViTConfig, ViTForImageClassification

    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16.0 - 0.5
    classes = torch.tensor(labels)
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(0))
    train, rest = order[600:], order[:600]
    noise = torch.Generator().manual_seed(1)
    held_out = {
        "pixel_values": pixels[rest] + _NOISE * torch.randn(600, 1, 8, 8, generator=noise),
        "labels": classes[rest],
    }
    options = ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=10,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        hidden_act="relu",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="eager",
    )

    def draw(generator: torch.Generator, rows: int) -> Batch:
        chosen = train[torch.randint(0, len(train), (rows,), generator=generator)]
        fresh = torch.randn(rows, 1, 8, 8, generator=generator)
        return {"pixel_values": pixels[chosen] + _NOISE * fresh, "labels": classes[chosen]}

    def loss(model: nn.Module, parameters: Stack, batch: Batch) -> Tensor:
        logits = functional_call(model, parameters, kwargs={"pixel_values": batch["pixel_values"]}).logits
        return nn.functional.cross_entropy(logits, batch["labels"])

    # its losses vary more from seed to seed than those of the others
    return Task("digits", lambda: ViTForImageClassification(options), draw, held_out, loss, 1e-3, 8, seeds=6)


# --- photographs without their noise ------------------------------------------------------------------

_EDGE = 8


def photographs() -> Task:
    """A perceptron that takes the noise away from pieces of two photographs, judged by their right edges."""

    def pieces(left: float, right: float) -> Tensor:
        found = []
        for name in ("china.jpg", "flower.jpg"):
            grey = torch.tensor(load_sample_image(name), dtype=torch.float32).mean(-1) / 255.0
            part = grey[:, int(left * grey.shape[1]) : int(right * grey.shape[1])]
            found.append(part.unfold(0, _EDGE, 4).unfold(1, _EDGE, 4).reshape(-1, _EDGE * _EDGE))
        return torch.cat([cut - cut.mean(-1, keepdim=True) for cut in found])

    clean, others = pieces(0.0, 0.8), pieces(0.8, 1.0)[::4]
    noise = torch.Generator().manual_seed(1)
    held_out = {"x": others + 0.1 * torch.randn(others.shape, generator=noise), "y": others}

    def build() -> nn.Module:
        width = 64
        return nn.Sequential(
            nn.Linear(_EDGE * _EDGE, width),
            nn.GELU(),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, _EDGE * _EDGE),
        )

    def draw(generator: torch.Generator, rows: int) -> Batch:
        chosen = clean[torch.randint(0, len(clean), (rows,), generator=generator)]
        return {"x": chosen + 0.1 * torch.randn(chosen.shape, generator=generator), "y": chosen}

    def loss(model: nn.Module, parameters: Stack, batch: Batch) -> Tensor:
        return nn.functional.mse_loss(functional_call(model, parameters, (batch["x"],)), batch["y"]) * 1000

    return Task("photographs", build, draw, held_out, loss, 1e-3, 16)


TASKS: dict[str, Callable[[], Task]] = {"text": text, "digits": digits, "photographs": photographs}
