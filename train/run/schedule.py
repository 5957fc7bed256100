"""How long a run is, and its learning rate."""

import math

from train.config.settings import Settings


def total_steps(settings: Settings, images: int) -> int:
    return settings.steps or settings.epochs * steps_per_epoch(settings, images)


def steps_per_epoch(settings: Settings, images: int) -> int:
    return math.ceil(images / settings.batch_size)


def learning_rate(settings: Settings, step: int, total: int) -> float:
    """Linear warm-up, then lr * (1 - progress)^0.9; a schedule-free optimiser keeps lr."""
    warmup = math.ceil(settings.warmup * total)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    if settings.optimizer == "schedule-free":
        return settings.lr
    return settings.lr * (1 - (step - warmup) / (total - warmup)) ** 0.9
