"""One training step of the default job, all five tasks."""

import torch

from train import loop
from train.data.batches import collate
from train.settings import resolve


def bench_training_step(benchmark, kernel: str, tmp_path) -> None:
    settings = resolve({"scenes": 16, "val_scenes": 1, "kernel": kernel, "out": str(tmp_path)})
    run = loop.set_up(settings, fresh=True)
    batch = collate([run.data[0][i, 0] for i in range(settings.batch_size)], settings.task_names).to(run.device)
    benchmark.extra_info["images"] = len(batch.images)

    def step():
        loop.training_step(run, batch)
        if run.device.type == "cuda":
            torch.cuda.synchronize()

    benchmark(step)
