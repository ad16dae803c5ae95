"""The training of a model on labelled clips, alone or mixed with images."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from edgetube import interrupts
from edgetube.errors import BackendError, EdgetubeError, InputError
from edgetube.model.checkpoints import Checkpoint
from edgetube.progress import Progress, silent
from edgetube.runtimes.torch import normalise
from edgetube.train import augment, data, recipe, state
from edgetube.train.data import Clips
from edgetube.train.ranks import Ranks
from edgetube.train.recipe import Recipe
from edgetube.train.state import State

SAVE_S = 300.0
"""Seconds between two saves within an epoch."""

Report = Callable[[Mapping[str, Any]], None]
"""Called with the row of each epoch."""


@dataclass(frozen=True)
class Task:
    """What is trained on what.

    Attributes:
        start: the model, with the classifiers `head` and `image_head`.
        clips, held_out: of the classifier `head`.
        images: of the classifier `image_head`; None trains on clips alone.
    """

    start: Checkpoint
    head: str
    clips: Clips
    held_out: Clips
    image_head: str = ""
    images: Clips | None = None

    @property
    def heads(self) -> set[str]:
        return {self.head, self.image_head} - {""}

    @property
    def sets(self) -> dict[str, Clips]:
        """The clips by what they are for."""
        found = {"clips": self.clips, "held_out": self.held_out}
        return found if self.images is None else {**found, "images": self.images}

    def key(self, options: Recipe, ranks: int) -> str:
        """Of all that the trained weights depend on, see `state.key_of`."""
        start = self.start
        model = start.digest, dict(start.options), start.spec.to_json(), start.contract.to_json()
        listed = [[(item.name, item.label, item.version) for item in one.items] for one in self.sets.values()]
        labels = [list(one.labels) for one in self.sets.values()]
        return state.key_of(options.to_json(), *model, self.head, self.image_head, labels, listed, ranks)


class Pair(nn.Module):
    """Logits of clips and of images in one call, as processes that average their gradients need it."""

    def __init__(self, model: nn.Module, head: str, image_head: str) -> None:
        super().__init__()
        self.model, self.head, self.image_head = model, head, image_head

    def forward(self, clips: Tensor, images: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.model(clips, self.head), None if images is None else self.model(images, self.image_head)


class Training:
    """One run: `fit` goes from the state in `folder`, if there is any, to the last epoch."""

    def __init__(self, task: Task, options: Recipe, folder: Path, ranks: Ranks) -> None:
        if options.batch % (ranks.count * options.accumulate):
            raise InputError(
                f"--batch {options.batch} is not divisible by {ranks.count} processes times --accumulate "
                f"{options.accumulate}"
            )
        self.task, self.options, self.folder, self.ranks = task, options, folder, ranks
        self.model = task.start.model.to(ranks.device)
        self.parameters = recipe.trained(self.model, options, task.heads)
        self.optimizer = torch.optim.AdamW(
            recipe.groups(self.parameters, self.model.spec, options), lr=options.lr, betas=recipe.BETAS
        )
        self.pair = ranks.wrap(Pair(self.model, task.head, task.image_head))
        self.epoch_steps = math.ceil(len(task.clips) / options.batch)
        self.steps = options.epochs * self.epoch_steps
        self.state = State(task.key(options, ranks.count))
        self.averages = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._resume()

    def _resume(self) -> None:
        found = state.load(self.folder, self.state.key)
        if found is None:
            return
        self.state = found
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(found.weights[name])
                self.averages[name].copy_(found.averages[name])
        self.optimizer.load_state_dict(found.optimizer)

    @property
    def unread(self) -> dict[str, dict[str, str]]:
        """Clips that could not be read, and why, by set: also in earlier runs of the training."""
        before = self.state.unread
        return {name: before.get(name, {}) | one.unread for name, one in self.task.sets.items()}

    @property
    def precision(self) -> AbstractContextManager[Any]:
        device = self.ranks.device.type
        wanted = device == "cuda" if self.options.bf16 is None else self.options.bf16
        return torch.autocast(device, torch.bfloat16) if wanted else nullcontext()

    def fit(self, report: Report | None = None, progress: Progress = silent) -> State:
        """Train to the last epoch; after an interruption, run it again to go on.

        Raises:
            BackendError: the loss is no number; names the clips. What is on disk is the state before.
            InputError: too many clips cannot be read. On disk is the state before.
        """
        saved = time.monotonic()
        try:
            while True:
                if self.state.step == self.epoch_steps * (len(self.state.rows) + 1):
                    self._end_epoch(report, progress)
                    saved = time.monotonic()
                if self.state.step == self.steps:
                    return self.state
                self._step()
                progress("train", self.state.step, self.steps)
                if time.monotonic() - saved > SAVE_S:
                    self.save()
                    saved = time.monotonic()
        except (KeyboardInterrupt, EdgetubeError):
            self.save()
            raise

    def save(self) -> None:
        """Write the state, from the first process."""
        if not self.ranks.leads:
            return
        self.state.weights = {name: p.detach().cpu() for name, p in self.parameters.items()}
        self.state.averages = {name: value.cpu() for name, value in self.averages.items()}
        self.state.optimizer = self.optimizer.state_dict()
        self.state.unread = self.unread
        state.save(self.folder, self.state)

    def _step(self) -> None:
        """One step of the optimizer: a signal comes before its weights change, or after the state has them."""
        step, options, ranks = self.state.step, self.options, self.ranks
        for group in self.optimizer.param_groups:
            group["lr"] = options.rate(step, self.steps) * group["scale"]
        mine = data.share_of(range(options.batch), ranks.rank, ranks.count)
        size = len(mine) // options.accumulate
        self.optimizer.zero_grad(set_to_none=True)
        names: list[str] = []
        loss_sum, right = 0.0, 0
        for part in range(options.accumulate):
            last = part == options.accumulate - 1
            unsynced = getattr(self.pair, "no_sync", nullcontext)
            with nullcontext() if last else unsynced():
                loss, hits, read = self._part(step, part, mine[part * size : (part + 1) * size])
                torch.autograd.backward(loss / options.accumulate)
            loss_sum, right, names = loss_sum + float(loss.detach()), right + hits, [*names, *read]
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), recipe.CLIP)
        if not bool(torch.isfinite(norm)) or not math.isfinite(loss_sum):
            raise BackendError(
                f"step {step + 1}: the loss is {loss_sum / options.accumulate:g} and its gradient {float(norm):g}; the "
                f"clips were {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}; the state before is in "
                f"{self.folder / state.STATE}: try a lower --lr, and another --out"
            )
        with interrupts.held():
            self.optimizer.step()
            self._average(step)
            before = self.state.seen
            self.state.seen = (
                before[0] + loss_sum / options.accumulate * len(mine),
                before[1] + right,
                before[2] + len(mine),
            )
            self.state.step = step + 1

    def _part(self, step: int, part: int, mine: Sequence[int]) -> tuple[Tensor, int, list[str]]:
        """Loss of some of the clips of a step (and as many images), how many were right, and their names.

        Args:
            mine: their numbers in the batch.
        """
        task, options, ranks = self.task, self.options, self.ranks
        generator = torch.Generator().manual_seed(hash_of(options.seed, step, part, ranks.rank))
        epoch, within = divmod(step, self.epoch_steps)
        order = data.order_of(len(task.clips), options.seed, epoch)
        places = data.places_of(within, options.batch, len(task.clips))
        clips, labels, names = self._batch(task.clips, order, [places[i] for i in mine], generator)
        images, answers = None, None
        if task.images is not None:
            order, places = data.passes_of(step * options.batch, options.batch, len(task.images), options.seed)
            images, answers, _ = self._batch(task.images, order, [places[i] for i in mine], generator)
        with self.precision:
            logits, others = self.pair(clips, images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=options.smoothing)
        if others is not None and answers is not None:
            loss = loss + F.cross_entropy(others.float(), answers, label_smoothing=options.smoothing)
        return loss, int((logits.argmax(dim=1) == labels).sum()), names

    def _batch(
        self, clips: Clips, order: Sequence[int], places: Sequence[int], generator: torch.Generator
    ) -> tuple[Tensor, Tensor, list[str]]:
        """Clips as the model takes them and labels, both changed at random, and names; see `Clips.batch`."""
        frames, labels, names = clips.batch(order, places)
        mirrors = clips.mirrors if self.options.mirror else None
        frames, labels = augment.augment(frames, labels, mirrors, self.options.jitter, generator)
        return self._normalised(clips, frames), labels.to(self.ranks.device), names

    def _normalised(self, clips: Clips, frames: Tensor) -> Tensor:
        return normalise(frames.to(self.ranks.device), clips.contract)

    @torch.no_grad()
    def _average(self, step: int) -> None:
        keep = min(self.options.average, (step + 1) / (step + 10))
        for name, parameter in self.parameters.items():
            self.averages[name].lerp_(parameter, 1 - keep)

    @torch.no_grad()
    def _end_epoch(self, report: Report | None, progress: Progress) -> None:
        """Judge by the clips held out, keep the best, and write the state."""
        loss, right, seen = (sum(values) for values in zip(*self.ranks.gathered(self.state.seen), strict=True))
        judged: Mapping[str, Tensor] = self.averages if self.options.average else self.parameters
        top1, count = self.evaluate(judged, progress)
        for unread in self.ranks.gathered(self.unread):
            self.state.unread = {name: self.state.unread.get(name, {}) | found for name, found in unread.items()}
        best = top1 > self.state.best[0]
        epoch = self.state.step // self.epoch_steps
        row = {
            "epoch": epoch, "epochs": self.options.epochs, "step": self.state.step, "loss": loss / seen,
            "train_top1": right / seen, "held_out_top1": top1, "held_out_clips": count, "best": best,
        }  # fmt: skip
        with interrupts.held():
            if self.ranks.leads:
                for name in [state.LAST, *([state.BEST] if best else [])]:
                    state.save_model(self.task.start, judged, self.folder / name)
            self.state.rows.append(row)
            self.state.best = (top1, epoch) if best else self.state.best
            self.state.seen = (0.0, 0, 0)
            self.save()
        if report is not None and self.ranks.leads:
            report(row)

    @torch.no_grad()
    def evaluate(self, weights: Mapping[str, Tensor], progress: Progress = silent) -> tuple[float, int]:
        """Share of the clips held out that the model with these weights answers rightly, and their number."""
        clips, head = self.task.held_out, self.task.head
        mine = range(len(clips))[self.ranks.rank :: self.ranks.count]
        right, count = 0, 0
        for done, index in enumerate(mine):
            if (frames := clips.read(index)) is not None:
                x = self._normalised(clips, torch.from_numpy(frames)[None])
                logits = functional_call(self.model, dict(weights), (x, head))
                right, count = right + (int(logits.argmax()) == clips.label(index)), count + 1
            progress("judge", done + 1, len(mine))
        found = self.ranks.gathered((right, count))
        total = sum(one[1] for one in found)
        return sum(one[0] for one in found) / max(1, total), total


def hash_of(*numbers: int) -> int:
    """A seed that depends on all of the numbers."""
    return int(state.key_of(*numbers)[:15], 16)
