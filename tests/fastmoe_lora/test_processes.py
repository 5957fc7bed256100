"""Two processes around one adapted model: DistributedDataParallel, and files that both write."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastmoe_lora import adapt, load_adapters, routing_of, save_adapters

pytestmark = pytest.mark.usefixtures("own_processes")

WIDTH, SAVES = 16, 20
IMAGES = [(2, 0), (1, 3)]  # of each task, in each process: the first has none of the second task


def make():
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(WIDTH, 24), nn.GELU(), nn.Linear(24, WIDTH)) for _ in range(2)])
    routing = adapt(model, "8/2/1/4", 2, "?.0", lora_rank=2, lora_where="?.2")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("lora_B", "routers")):
                parameter.normal_(std=0.3)
    return model, routing


def images():
    """Those of both processes, each (images of the first task, images of the second)."""
    chance = torch.Generator().manual_seed(1)
    return [tuple(torch.randn(n, 5, WIDTH, generator=chance) for n in counts) for counts in IMAGES]


def work(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model, routing = make()
    parallel = DistributedDataParallel(model)
    assert routing_of(parallel) is routing
    x = torch.cat(images()[rank])
    with routing.batch(IMAGES[rank]) as batch:
        y = parallel(x)
        loss = y.square().sum() + batch.mi_loss()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    torch.save((loss.item(), gradients), f"{folder}/{rank}.pt")
    for _ in range(SAVES):
        save_adapters(parallel, f"{folder}/adapters/a.safetensors")
    dist.destroy_process_group()


def test_have_the_gradients_of_one_and_write_one_file(tmp_path):
    (tmp_path / "adapters").mkdir()
    mp.spawn(work, args=(str(tmp_path),), nprocs=2)
    (first, gradients), (second, theirs) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(gradients[name], theirs[name]) for name in gradients)

    model, routing = make()
    whole = images()
    x = torch.cat([images for task in (0, 1) for images in (process[task] for process in whole)])
    with routing.batch([sum(counts) for counts in zip(*IMAGES, strict=True)]) as batch:
        y = model(x)
        mi_loss = batch.mi_loss()
    torch.testing.assert_close(first + second, (y.square().sum() + 2 * mi_loss).item(), rtol=1e-5, atol=0)
    (y.square().sum() / 2 + mi_loss).backward()  # DistributedDataParallel divides by the number of processes
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)

    assert [path.name for path in (tmp_path / "adapters").iterdir()] == ["a.safetensors"]
    load_adapters(model, tmp_path / "adapters" / "a.safetensors")
