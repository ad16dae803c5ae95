"""Train and evaluate the built-in camera-motion model; a script of the repository, not needed to use the package."""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing as mp
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn import functional as F

from edgetube import demo, video
from edgetube.contract import InputContract
from edgetube.demo.moves import DIRECTIONS, LABELS, Move
from edgetube.demo.render import TEXTURE, Photo, generator, render_clip, texture
from edgetube.files import atomic_write, replacing
from edgetube.model import checkpoints, positions
from edgetube.model.reduction import TokenState
from edgetube.model.transformer import VideoTransformer
from edgetube.spec import ModelSpec, TubeSpec
from edgetube.video import Clip

SOURCES_HELP = """
Training pictures are never shipped. Any folders of photographs will do; these were used:
  pip download --no-deps foolbox==3.3.4 scikit-learn==1.9.1      (unzip the wheels; their sample images are used)
  apt-get download mate-backgrounds lomiri-wallpapers-16.04 lomiri-wallpapers-20.04 ukui-wallpapers \\
      gnome-backgrounds plasma-workspace-wallpapers opencv-doc
      (Debian 12; unpack each with dpkg -x FILE.deb FOLDER; of opencv-doc use usr/share/doc/opencv-doc/examples)
then
  python bench/studies/train_demo.py --sources FOLDER... --work RUN    train; run it again to go on after a stop
  python bench/studies/train_demo.py --sources FOLDER... --evaluate    write docs/demo-model.json
"""

CONTRACT = InputContract(frames=16, height=64, width=64, fps=15.0)
SPEC = ModelSpec(
    tubes=(
        TubeSpec((8, 8, 8), (8, 12, 12), (0, 4, 4)),
        TubeSpec((16, 4, 4), (16, 16, 16), (0, 2, 2), (1, 2, 2)),
        TubeSpec((4, 12, 12), (8, 16, 16), (2, 2, 2)),
        TubeSpec((1, 16, 16), (16, 16, 16)),
    ),
    frames=16,
    size=(64, 64),
    width=144,
    depth=4,
    heads=3,
    classifiers=(("motion", len(LABELS)),),
)
Image = npt.NDArray[np.float32]
"""(height, width, 3), 0..255."""

HELD_OUT = 8  # one picture in so many is never trained on
LONGEST = 768  # pixels of a picture's long side in memory
PER_PICTURE = 6  # clips rendered over one made-up picture


# Sources


@dataclass(frozen=True)
class Source:
    """One training picture: `digest` is the sha256 of its file, `look` its perceptual hash (64 bits)."""

    digest: str
    look: int
    pixels: npt.NDArray[np.uint8]

    @property
    def held_out(self) -> bool:
        return int(self.digest, 16) % HELD_OUT == 0


def look(pixels: npt.NDArray[np.uint8]) -> int:
    """Difference hash: 64 bits, which of two neighbours is brighter on a 9x8 thumbnail."""
    grey = pixels.astype(np.float32).mean(axis=-1)
    rows, columns = (np.linspace(0, n, k + 1).astype(int) for n, k in zip(grey.shape, (8, 9), strict=True))
    sums = np.add.reduceat(np.add.reduceat(grey, rows[:-1], axis=0), columns[:-1], axis=1)
    thumb = sums / np.outer(np.diff(rows), np.diff(columns))
    return int("".join("01"[int(bit)] for bit in (thumb[:, 1:] > thumb[:, :-1]).ravel()), 2)


def plain(pixels: npt.NDArray[np.uint8]) -> bool:
    """Whether most of a picture is so flat that no camera move over it could be seen."""
    side = min(pixels.shape[:2])
    y, x = ((n - side) // 2 for n in pixels.shape[:2])
    return texture(resize(pixels[y : y + side, x : x + side].astype(np.float32), 64)) < TEXTURE


def alike(a: int, b: int) -> bool:
    return (a ^ b).bit_count() <= 6


def load_sources(folders: Iterable[Path]) -> list[Source]:
    """Every distinct picture under `folders` that is at least 160 pixels high and wide and is not a shipped one."""
    shipped = [look(Photo.read(path).pixels) for path in demo.photo_files()]
    found: list[Source] = []
    files = sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())
    for path in files:
        if path.suffix.lower() not in {".jpg", ".jpeg", ".png", ".webp"}:
            continue
        pixels = _read(path)
        if pixels is None or min(pixels.shape[:2]) < 160 or plain(pixels):
            continue
        source = Source(hashlib.sha256(path.read_bytes()).hexdigest(), look(pixels), pixels)
        if not any(alike(source.look, other) for other in [*shipped, *(s.look for s in found)]):
            found.append(source)
    return found


def _read(path: Path) -> npt.NDArray[np.uint8] | None:
    try:
        with av.open(str(path)) as container:
            frame = next(container.decode(video=0))
            shrink = min(1.0, LONGEST / max(frame.width, frame.height))
            width, height = round(frame.width * shrink), round(frame.height * shrink)
            pixels: npt.NDArray[np.uint8] = frame.reformat(width, height, "rgb24", interpolation="AREA").to_ndarray()
            return pixels
    except (av.FFmpegError, StopIteration, ValueError):
        return None


# Pictures that no source has: crops, mixtures, textures


def picture(sources: list[Source], rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """One made-up training picture, 160 to 480 pixels a side."""
    side = int(rng.integers(160, 480))
    kind = rng.uniform()
    base = crop(sources, side, rng) if kind < 0.72 else procedural(side, rng)
    if rng.uniform() < 0.3:
        other = crop(sources, side, rng) if rng.uniform() < 0.6 else procedural(side, rng)
        share = rng.uniform(0.2, 0.5)
        base = base + share * (other - base) if rng.uniform() < 0.5 else collage(base, other, rng)
    made = recolour(base, rng)
    return picture(sources, rng) if plain(made) else made


def crop(sources: list[Source], side: int, rng: np.random.Generator) -> Image:
    """A square part of a random source, resampled to `side` pixels by nearest neighbour of a mean-shrunk copy."""
    pixels = sources[rng.integers(len(sources))].pixels
    h, w = pixels.shape[:2]
    part = int(rng.uniform(max(0.35, min(1, 140 / min(h, w))), 1.0) * min(h, w))
    y, x = rng.integers(h - part + 1), rng.integers(w - part + 1)
    cut = pixels[y : y + part, x : x + part].astype(np.float32)
    return resize(cut, side)


def resize(cut: Image, side: int) -> Image:
    tensor = torch.from_numpy(np.ascontiguousarray(cut.transpose(2, 0, 1)))[None]
    out = F.interpolate(tensor, size=(side, side), mode="bilinear", antialias=cut.shape[0] > side)
    image: Image = out[0].numpy().transpose(1, 2, 0)
    return image


def procedural(side: int, rng: np.random.Generator) -> Image:
    """A procedural picture: fractal noise, Voronoi cells, shapes on a ground, or crossed gratings."""
    kinds: list[Callable[[int, np.random.Generator], Image]] = [fractal, cells, shapes, gratings]
    return kinds[rng.choice(4, p=[0.35, 0.2, 0.3, 0.15])](side, rng)


def fractal(side: int, rng: np.random.Generator) -> Image:
    n = 256
    frequency = np.hypot(np.fft.fftfreq(n)[:, None], np.fft.rfftfreq(n)[None])
    frequency[0, 0] = 1
    planes = rng.standard_normal((3, n, n)) + rng.uniform(0, 2) * rng.standard_normal((1, n, n))
    noise = np.fft.irfft2(np.fft.rfft2(planes) * frequency ** -rng.uniform(0.8, 1.8), s=(n, n))
    noise = 128 + rng.uniform(25, 60) * noise / noise.std()
    return resize(np.clip(noise, 0, 255).transpose(1, 2, 0).astype(np.float32), side)


def cells(side: int, rng: np.random.Generator) -> Image:
    count = int(rng.integers(12, 150))
    seeds, colours = rng.uniform(0, 128, (count, 2)), rng.uniform(0, 255, (count, 3))
    y, x = np.mgrid[:128, :128]
    nearest = ((y[..., None] - seeds[:, 0]) ** 2 + (x[..., None] - seeds[:, 1]) ** 2).argmin(axis=-1)
    return resize(colours[nearest].astype(np.float32), side)


def shapes(side: int, rng: np.random.Generator) -> Image:
    ground = fractal(side, rng) if rng.uniform() < 0.5 else np.full((side, side, 3), rng.uniform(0, 255, 3), np.float32)
    y, x = np.mgrid[:side, :side].astype(np.float32)
    for _ in range(rng.integers(15, 60)):
        cy, cx, angle = rng.uniform(0, side), rng.uniform(0, side), rng.uniform(0, np.pi)
        a, b = rng.uniform(0.02, 0.15, 2) * side
        u = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)
        v = (y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)
        inside = (u / a) ** 2 + (v / b) ** 2 < 1 if rng.uniform() < 0.5 else (np.abs(u) < a) & (np.abs(v) < b)
        ground[inside] = rng.uniform(0, 255, 3)
    return ground


def gratings(side: int, rng: np.random.Generator) -> Image:
    """Several gratings of different directions: one alone would hide the motion along its bars."""
    y, x = np.mgrid[:side, :side] / side
    out = np.zeros((side, side, 3))
    for _ in range(rng.integers(4, 12)):
        angle, cycles, phase = rng.uniform(0, np.pi), rng.uniform(2, 25), rng.uniform(0, 2 * np.pi)
        wave = np.sin(2 * np.pi * cycles * (x * np.cos(angle) + y * np.sin(angle)) + phase)
        out += wave[..., None] * rng.uniform(-1, 1, 3)
    image: Image = np.clip(128 + 45 * out / out.std(), 0, 255).astype(np.float32)
    return image


def collage(base: Image, other: Image, rng: np.random.Generator) -> Image:
    """`base` with rectangles of `other` pasted in."""
    side = len(base)
    out: Image = base.copy()
    for _ in range(rng.integers(2, 10)):
        h, w = (rng.uniform(0.08, 0.4, 2) * side).astype(int)
        y, x, v, u = rng.integers(side - h), rng.integers(side - w), rng.integers(side - h), rng.integers(side - w)
        out[y : y + h, x : x + w] = other[v : v + h, u : u + w]
    return out


def recolour(base: Image, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Random gamma, contrast, tint, grey or inverted colours."""
    out = np.clip(base, 0, 255) / 255
    out = out ** np.exp(rng.uniform(-0.5, 0.5))
    if rng.uniform() < 0.2:
        out = np.repeat(out.mean(axis=-1, keepdims=True), 3, axis=-1)
    if rng.uniform() < 0.05:
        out = 1 - out
    if rng.uniform() < 0.3:
        out = out[..., rng.permutation(3)]
    out = (out - 0.5) * rng.uniform(0.6, 1.3, 3) + 0.5 + rng.uniform(-0.1, 0.1, 3)
    return (np.clip(out, 0, 1) * 255).astype(np.uint8)


# Clips rendered ahead


class Pool:
    """Clips on disk that workers keep replacing: `clips` (N, T, H, W, 3) uint8, `travel` (N, 4), `label` (N,)."""

    def __init__(self, folder: Path, size: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.clips = _memmap(folder / "clips.u8", np.uint8, (size, *CONTRACT.shape))
        self.travel = _memmap(folder / "travel.f32", np.float32, (size, 4))
        self.label = _memmap(folder / "label.i64", np.int64, (size,), fill=-1)

    def ready(self) -> npt.NDArray[np.int64]:
        return np.flatnonzero(self.label >= 0)


def _memmap(path: Path, dtype: type, shape: tuple[int, ...], fill: int = 0) -> np.memmap:
    fresh = not path.exists() or path.stat().st_size != np.dtype(dtype).itemsize * int(np.prod(shape))
    array = np.memmap(path, dtype, "w+" if fresh else "r+", shape=shape)
    if fresh and fill:
        array[:] = fill
    return array


def fill(folder: Path, size: int, sources: list[Source], worker: int, workers: int, rate: float) -> None:
    """Render into every `workers`-th slot for ever; `rate` clips a second once the pool is full."""
    os.nice(5)
    torch.set_num_threads(1)
    parent = os.getppid()
    pool, slot, made = Pool(folder, size), worker, 0
    rng = np.random.default_rng([os.getpid(), time.time_ns()])
    while os.getppid() == parent:
        photo = Photo("made-up", picture(sources, rng))
        start, full = time.monotonic(), pool.label[slot] >= 0
        for _ in range(PER_PICTURE):
            label = int(rng.integers(len(LABELS)))
            move = Move.draw(LABELS[label], rng)
            frames = render_clip(photo, move, CONTRACT.frames, (CONTRACT.height, CONTRACT.width), rng)
            path = move.path(CONTRACT.frames)
            pool.clips[slot], pool.travel[slot], pool.label[slot] = frames, path[-1] - path[0], label
            slot, made = (slot + workers) % size, made + 1
        if full:
            time.sleep(max(0.0, PER_PICTURE / rate - (time.monotonic() - start)))


# Exact augmentation: what a symmetry of the clip does to the camera's travel

SYMMETRIES: dict[str, tuple[Callable[[Tensor], Tensor], npt.NDArray[np.int64]]] = {
    "mirror": (lambda clips: clips.flip(3), np.diag([-1, 1, 1, -1])),
    "upside-down": (lambda clips: clips.flip(2), np.diag([1, -1, 1, -1])),
    "reverse": (lambda clips: clips.flip(1), np.diag([-1, -1, -1, -1])),
    "transpose": (
        lambda clips: clips.transpose(2, 3),
        np.array([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, -1]]),
    ),
}
"""name -> what happens to clips (B, T, H, W, 3), and the matrix that takes the old travel to the new one."""


def relabel(matrix: npt.NDArray[np.int64]) -> list[int]:
    """Index of the label that each of `LABELS` becomes when travel is multiplied by `matrix` (4, 4)."""
    names: dict[tuple[int, ...], str] = {direction: name for name, direction in DIRECTIONS.items()}
    return [LABELS.index(names[tuple(int(v) for v in matrix @ DIRECTIONS[name])]) for name in LABELS]


def augment(clips: Tensor, travel: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Random ones of the 16 symmetries: clips (B, T, H, W, 3) uint8, travel (B, 4), label (B,)."""
    for change, matrix in SYMMETRIES.values():
        chosen = torch.rand(len(clips)) < 0.5
        clips = torch.where(chosen[:, None, None, None, None], change(clips), clips)
        travel = torch.where(chosen[:, None], travel @ torch.tensor(matrix, dtype=travel.dtype).T, travel)
        label = torch.where(chosen, torch.tensor(relabel(matrix))[label], label)
    return clips, travel, label


def occlude(clips: Tensor) -> Tensor:
    """Paste a window of another clip over a third of the clips (B, T, H, W, 3): something that moves by itself."""
    height, width = clips.shape[2:4]
    for i in range(len(clips) // 3):
        h, w = (int(n * (0.1 + 0.25 * torch.rand(()))) for n in (height, width))
        y, x = int(torch.randint(height - h, ())), int(torch.randint(width - w, ()))
        clips[i, :, y : y + h, x : x + w] = clips[-1 - i, :, y : y + h, x : x + w]
    return clips


def photometric(x: Tensor) -> Tensor:
    """Gain, offset, tint, blur and noise on clips (B, 3, T, H, W) in -1..1, in place."""
    b, n = len(x), len(x) // 5
    gain = (1 + 0.25 * (2 * torch.rand(b, 1) - 1)) * (1 + 0.1 * (2 * torch.rand(b, 3) - 1))
    offset = 0.2 * (2 * torch.rand(b, 3) - 1)
    x[:n] = F.avg_pool3d(x[:n], (1, 3, 3), 1, (0, 1, 1), count_include_pad=False)
    x.mul_(gain[:, :, None, None, None]).add_(offset[:, :, None, None, None])
    x[b - n :] += 0.06 * torch.rand(n, 1, 1, 1, 1) * torch.randn_like(x[b - n :])
    return x.clamp_(-1, 1)


# Training

TRAVEL_SCALE = torch.tensor([0.25, 0.25, 0.3, 0.35])


def gabors(filters: int, colours: int, *kernel: int) -> Tensor:
    """Moving gratings under a Gaussian window, in quadrature pairs: (filters, colours, *kernel), for a fast start.

    Each pair has a random spatial frequency and a random velocity; pairs are what motion energy is made of
    (Adelson and Bergen, 1985).
    """
    t, y, x = torch.meshgrid(*(torch.arange(k) - (k - 1) / 2 for k in kernel), indexing="ij")
    distance = torch.stack([a / (0.35 * k) for a, k in zip((t, y, x), kernel, strict=True)])
    window = torch.exp(-0.5 * distance.square().sum(dim=0))
    weight = torch.empty(filters, colours, *kernel)
    for i in range(0, filters, 2):
        angle, cycles = 2 * torch.pi * torch.rand(()), (0.25 + 1.25 * torch.rand(())) / kernel[1]
        speed = 1.2 * torch.randn(())
        along = x * angle.cos() + y * angle.sin() - speed * t
        tint = 1 + 0.3 * torch.randn(colours, 1, 1, 1)
        for j, phase in enumerate((0.0, torch.pi / 2)):
            wave = window * torch.cos(2 * torch.pi * cycles * along + phase)
            wave = tint * (wave - wave.mean())
            weight[i + j] = 2.5 * wave / wave.norm()
    return weight


class Trainee(nn.Module):
    """The model and two linear probes that only help it to learn: travel of the clip, flow of the picture at a tube."""

    def __init__(self) -> None:
        super().__init__()
        self.model = VideoTransformer(SPEC)
        for tube, weight in zip(SPEC.tubes, self.model.tubes.weights, strict=True):
            if not tube.is_2d:
                weight.data = gabors(*weight.shape)
        self.travel = nn.Linear(SPEC.width, 4)
        self.flow = nn.Linear(SPEC.width, 2)
        centres = [positions.centres(SPEC.tubes[i], grid) for i, grid in zip(SPEC.active, SPEC.grids, strict=True)]
        yx = np.concatenate(centres)[:, 1:] / (np.array(SPEC.size) - 1) - 0.5
        self.at = nn.Buffer(torch.tensor(yx[:, ::-1].copy(), dtype=torch.float32))  # (N, 2) as (x, y)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (B, classes), travel (B, 4), flow (B, N, 2) of normalised clips (B, 3, T, H, W)."""
        model = self.model
        z0 = model.tubes(x)
        z, state = z0 + model.positions, TokenState(z0=z0)
        for i, block in enumerate(model.blocks):
            z = block(z, state)
            if i == SPEC.depth // 2 - 1:
                flow = self.flow(F.layer_norm(z, z.shape[-1:]))
        pooled = model.pool(model.norm(z))
        return model.classifiers["motion"](pooled), self.travel(pooled), flow

    def true_flow(self, travel: Tensor) -> Tensor:
        """How far the picture moves at each tube over the clip, in frames: (B, N, 2) from travel (B, 4)."""
        shift, zoom, roll = travel[:, None, :2], travel[:, None, 2:3], travel[:, None, 3:]
        across = torch.stack([-self.at[:, 1], self.at[:, 0]], dim=-1)
        return zoom * self.at - shift - roll * across

    def loss(self, clips: Tensor, travel: Tensor, label: Tensor) -> tuple[Tensor, float, float]:
        """Loss, cross entropy and accuracy on uint8 clips (B, T, H, W, 3)."""
        x = photometric(normalise(occlude(clips)))
        with torch.autocast("cpu", torch.bfloat16):
            logits, guess, flow = self(x)
        entropy = F.cross_entropy(logits.float(), label, label_smoothing=0.03)
        by_travel = F.smooth_l1_loss(guess.float(), travel / TRAVEL_SCALE, beta=0.2)
        by_flow = F.smooth_l1_loss(flow.float(), self.true_flow(travel) / 0.15, beta=0.2)
        accuracy = (logits.argmax(-1) == label).float().mean()
        return entropy + by_travel + by_flow, float(entropy.detach()), float(accuracy)


def normalise(clips: Tensor) -> Tensor:
    """uint8 (B, T, H, W, 3) to float (B, 3, T, H, W), as the contract's mean and std 0.5 say."""
    return clips.permute(0, 4, 1, 2, 3).contiguous().float().mul_(1 / 127.5).sub_(1)


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)  # one thread a process: on a busy machine, threads that wait for each other lose
    sources = [source for source in load_sources(args.sources) if not source.held_out]
    print(f"{len(sources)} training pictures", flush=True)
    args.work.mkdir(parents=True, exist_ok=True)
    (args.work / "rendezvous").unlink(missing_ok=True)
    workers = [
        mp.Process(target=fill, args=(args.work, args.pool, sources, i, args.workers, args.rate), daemon=True)
        for i in range(args.workers)
    ]
    trainers = [mp.Process(target=_train, args=(args, rank), daemon=True) for rank in range(1, args.trainers)]
    for process in [*workers, *trainers]:
        process.start()
    try:
        _train(args, 0)
    finally:
        for process in [*workers, *trainers]:
            process.terminate()


def _train(args: argparse.Namespace, rank: int) -> None:
    """One of `args.trainers` equal processes that average their gradients; rank 0 also reports and saves."""
    where = f"file://{(args.work / 'rendezvous').absolute()}"
    torch.distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=args.trainers)
    torch.manual_seed(args.seed)
    trainee, ema = Trainee(), Trainee()
    ema.load_state_dict(trainee.state_dict())
    decayed = [p for p in trainee.parameters() if p.ndim > 1]
    plain = [p for p in trainee.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98))
    start = _resume(args, trainee, ema, optimizer)
    torch.distributed.barrier()  # nobody saves before everybody has read
    pool, rng = Pool(args.work, args.pool), np.random.default_rng([args.seed, start, rank])
    torch.manual_seed(int(rng.integers(2**40)))
    while len(pool.ready()) < min(args.pool, 2048):
        time.sleep(1)
    check = list(demo.evaluation(CONTRACT, 216))
    begun, recent, last_saved = time.monotonic(), [], time.monotonic()
    for step in range(start + 1, args.steps + 1):
        index = np.sort(rng.choice(pool.ready(), args.batch // args.trainers))
        batch = (torch.from_numpy(array[index]) for array in (pool.clips, pool.travel, pool.label))
        optimizer.zero_grad()
        loss, entropy, accuracy = trainee.loss(*augment(*batch))
        torch.autograd.backward(loss)
        share_gradients(trainee)
        norm = nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * schedule(step, args.steps)
        optimizer.step()
        average(ema, trainee, min(0.998, (step + 1) / (step + 10)))
        recent.append((float(loss.detach()), entropy, accuracy))
        if rank == 0 and step % 25 == 0:
            mean, recent = np.mean(recent, axis=0), []
            print(
                f"step {step} loss {mean[0]:.3f} entropy {mean[1]:.3f} accuracy {mean[2]:.3f} norm {float(norm):.2f} "
                f"lr {optimizer.param_groups[0]['lr']:.1e} {time.monotonic() - begun:.0f} s",
                flush=True,
            )
        if rank == 0 and (time.monotonic() - last_saved > args.save_every or step == args.steps):
            _save(args, trainee, ema, optimizer, step)
            print(f"step {step} evaluation {top1(ema.model, check):.4f} of {len(check)}", flush=True)
            last_saved = time.monotonic()
    torch.distributed.destroy_process_group()


def share_gradients(trainee: nn.Module) -> None:
    """Replace every gradient by its mean over the trainers."""
    grads = [p.grad for p in trainee.parameters() if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    for grad, mean in zip(grads, torch.split(flat, [grad.numel() for grad in grads]), strict=True):
        grad.copy_(mean.view_as(grad))


def _resume(args: argparse.Namespace, trainee: Trainee, ema: Trainee, optimizer: torch.optim.Optimizer) -> int:
    """Restore what an earlier run saved; returns its step, 0 when there is none."""
    state = args.work / "state.pt"
    if not state.exists():
        return 0
    saved = torch.load(state, weights_only=True)
    trainee.load_state_dict(saved["trainee"])
    ema.load_state_dict(saved["ema"])
    optimizer.load_state_dict(saved["optimizer"])
    print(f"goes on after step {saved['step']}", flush=True)
    return int(saved["step"])


def schedule(step: int, steps: int) -> float:
    """Warm-up over 200 steps, constant, then linear to zero over the last 40 %."""
    return min(1.0, (step + 1) / 200, max(0.0, (steps - step) / (0.4 * steps)))


@torch.no_grad()
def average(ema: nn.Module, trainee: nn.Module, keep: float) -> None:
    for slow, fast in zip(ema.parameters(), trainee.parameters(), strict=True):
        slow.lerp_(fast, 1 - keep)


def _save(
    args: argparse.Namespace, trainee: Trainee, ema: Trainee, optimizer: torch.optim.Optimizer, step: int
) -> None:
    saved = {
        "trainee": trainee.state_dict(),
        "ema": ema.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
    }
    with replacing(args.work / "state.pt") as part:
        torch.save(saved, part)
    model = VideoTransformer(SPEC)
    model.load_state_dict(ema.model.state_dict())
    checkpoints.save(checkpoints.Checkpoint("motion", model, CONTRACT, LABELS, ""), args.work / "motion.safetensors")


# Evaluation


@torch.no_grad()
def predict(model: nn.Module, clips: Iterable[Clip], change: Callable[[Tensor], Tensor] = lambda x: x) -> list[str]:
    """The most probable label of each clip, after `change` of its (T, H, W, 3) frames."""
    model.eval()
    frames = [change(torch.from_numpy(clip.frames)) for clip in clips]
    logits = [model(normalise(torch.stack(frames[i : i + 64]))) for i in range(0, len(frames), 64)]
    return [LABELS[i] for i in torch.cat(logits).argmax(-1).tolist()]


def top1(model: nn.Module, clips: list[Clip]) -> float:
    return float(np.mean([guess == clip.label for guess, clip in zip(predict(model, clips), clips, strict=True)]))


def held_out(sources: list[Source], count: int) -> Iterator[Clip]:
    """Labelled clips over the held-out pictures as they are: no colour changes, no mixing."""
    photos = [Photo(source.digest[:12], source.pixels) for source in sources if source.held_out]
    yield from demo.clips("held-out", photos, CONTRACT, count)


def report(model: nn.Module, clips: list[Clip]) -> dict[str, object]:
    """Accuracy, accuracy and confusion per class, and the controls."""
    truth = [str(clip.label) for clip in clips]
    guesses = predict(model, clips)
    confusion = {name: dict.fromkeys(LABELS, 0) for name in LABELS}
    for label, guess in zip(truth, guesses, strict=True):
        confusion[label][guess] += 1
    order = torch.from_numpy(generator("shuffle", 0).permutation(CONTRACT.frames))
    opposite = relabel(SYMMETRIES["reverse"][1])

    def share(labels: Iterable[str], change: Callable[[Tensor], Tensor]) -> float:
        return float(np.mean([a == b for a, b in zip(predict(model, clips, change), labels, strict=True)]))

    return {
        "clips": len(clips),
        "pictures": len({clip.name.split("/")[1] for clip in clips}),
        "top1": float(np.mean([a == b for a, b in zip(guesses, truth, strict=True)])),
        "per_class": {name: row[name] / sum(row.values()) for name, row in confusion.items()},
        "confusion": confusion,
        "controls": {
            "frames_shuffled": share(truth, lambda x: x[order]),
            "one_frame_repeated": share(truth, lambda x: x[8:9].expand_as(x)),
            "reversed_gives_opposite": share((LABELS[opposite[LABELS.index(t)]] for t in truth), lambda x: x.flip(0)),
        },
    }


def evaluate(args: argparse.Namespace) -> None:
    checkpoint = checkpoints.load(args.weights)
    result: dict[str, object] = {
        "weights_sha256": checkpoint.digest,
        "parameters": sum(p.numel() for p in checkpoint.model.parameters()),
        "tokens": checkpoint.spec.tokens,
        "macs": checkpoint.spec.macs(),
        "machine": machine(),
        "shipped_photos": report(checkpoint.model, list(demo.evaluation(CONTRACT, args.count))),
    }
    if args.sources:
        sources = load_sources(args.sources)
        result["training_pictures"] = sum(not source.held_out for source in sources)
        result["held_out_pictures"] = report(checkpoint.model, list(held_out(sources, args.count)))
    text = json.dumps(result, indent=1)
    print(text)
    args.json.parent.mkdir(exist_ok=True)
    atomic_write(args.json, text + "\n")


# Videos


VIDEOS = {
    "pan-left": ("astronaut", (-0.6, 0.0, 0.0, 0.0)),
    "tilt-up": ("camera", (0.0, -0.6, 0.0, 0.0)),
    "zoom-in": ("hubble", (0.0, 0.0, 0.8, 0.0)),
    "roll-cw": ("chelsea", (0.0, 0.0, 0.0, 0.8)),
}
"""label -> photo and travel of the shipped videos, over 64 frames: every second of them is a whole move."""


def write_videos(folder: Path) -> None:
    """Render the shipped videos: 64 frames of 320x240 at 30 a second."""
    folder.mkdir(parents=True, exist_ok=True)
    for label, (name, travel) in VIDEOS.items():
        rng = generator("videos", LABELS.index(label))
        drawn = Move.draw(label, rng)
        move = replace(drawn, travel=travel, window=(0.0, 1.0), power=1.0, blur=0.0, noise=1.5, exposure=0.0)
        photo = Photo.read(next(path for path in demo.photo_files() if path.stem == name))
        video.write(folder / f"{label}.mp4", render_clip(photo, move, 64, (240, 320), rng), 30)


def write_picture(path: Path) -> None:
    """One clip a class of the evaluation set, six of its frames from left to right, as a PNG."""
    rows = [clip.frames[::3] for clip in demo.evaluation(CONTRACT.with_clip(size=(72, 72)), len(LABELS))]
    pixels = np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
    with av.open(str(path), "w", format="image2") as container:
        stream = container.add_stream("png", rate=1, options={"compression_level": "9", "pred": "mixed"})
        stream.height, stream.width, stream.pix_fmt = *pixels.shape[:2], "rgb24"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def machine() -> dict[str, str]:
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "av": av.__version__,
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=SOURCES_HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sources", type=Path, nargs="*", default=[], help="folders of training pictures")
    parser.add_argument("--work", type=Path, help="folder of this run: state, clips rendered ahead, weights")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pool", type=int, default=12288, help="clips on disk (197 kB each)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rate", type=float, default=8.0, help="clips a second and worker, once the pool is full")
    parser.add_argument("--trainers", type=int, default=2, help="processes that share each batch")
    parser.add_argument("--save-every", type=float, default=180, help="seconds")
    parser.add_argument("--evaluate", action="store_true", help="measure --weights instead of training")
    parser.add_argument("--weights", default="demo", help="demo or a .safetensors file")
    parser.add_argument("--count", type=int, default=1008, help="clips per evaluation set")
    parser.add_argument("--json", type=Path, default=Path("docs/demo-model.json"))
    parser.add_argument("--videos", type=Path, help="only write the short example videos into this folder")
    parser.add_argument("--picture", type=Path, help="only draw one clip of each class into this PNG")
    args = parser.parse_args()
    if args.videos:
        write_videos(args.videos)
    elif args.picture:
        write_picture(args.picture)
    elif args.evaluate:
        evaluate(args)
    elif not args.sources or not args.work:
        parser.error("training needs --sources and --work")
    else:
        train(args)


if __name__ == "__main__":
    main()
