"""A frozen encoder and its decoder: what runs how often, what trains, what a state dict holds."""

import copy

import pytest
import torch

from fastmoe_lora import adapt
from kernels import UserError
from model import EncoderDecoder, FGConfig, FGMoE, MultiTaskViT, ViT, ViTConfig

CONFIG = ViTConfig(width=24, depth=8, heads=3, patch=8)
CHANNELS = {"seg": 5, "sal": 2, "edge": 1}
SOME = {"seg": torch.tensor([0, 2]), "edge": torch.tensor([1])}


def random_vit(seed=0):
    torch.manual_seed(seed)
    vit = ViT(CONFIG, 32)
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return vit


def with_decoder(encoder):
    torch.manual_seed(1)
    return EncoderDecoder(encoder, CHANNELS, (4, 4), lambda frame: FGMoE(frame, FGConfig.parse("2/1/2/1")))


def run_of(vit):
    """A finished run: an adapted ViT whose tasks stand in another order."""
    torch.manual_seed(2)
    routing = adapt(vit, "8/2/1/4", 3, freeze=False)
    return MultiTaskViT(vit, dict(reversed(CHANNELS.items())), "light", routing)


@pytest.fixture
def images():
    return torch.randint(0, 256, (3, 3, 32, 32), generator=torch.Generator().manual_seed(3)).float()


def test_taps_are_evenly_spaced_and_the_last_one_is_the_output(images):
    vit = random_vit()
    tokens, outputs = vit.embed(images), []
    for block in vit.blocks:
        block.register_forward_hook(lambda _, __, out: outputs.append(out))
    taps = vit.taps(tokens)
    assert [torch.equal(tap, outputs[i]) for tap, i in zip(taps[:3], (1, 3, 5), strict=True)] == [True] * 3
    assert torch.equal(taps[3], vit.encode(tokens))


@pytest.mark.parametrize("make", [random_vit, lambda: run_of(random_vit())], ids=["vit", "run"])
def test_training_changes_the_decoder_and_no_bit_of_the_encoder(make, images):
    model = with_decoder(make())
    model.train()
    assert not any(module.training for module in model.encoder.modules()) and model.decoder.training
    before = copy.deepcopy(model.encoder.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == {f"decoder.{name}" for name, _ in model.decoder.named_parameters()}
    old = copy.deepcopy(model.decoder.state_dict())
    for _ in range(2):
        sum(y.square().mean() for y in model(images).values()).backward()
        optimizer.step()
    assert all(p.grad is None for p in model.encoder.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.encoder.state_dict().items())
    assert all(not torch.equal(p, old[name]) for name, p in model.decoder.named_parameters())


def test_the_encoder_runs_once_per_image(images):
    model, seen = with_decoder(random_vit()), []
    model.encoder.blocks[0].register_forward_hook(lambda _, args, out: seen.append((len(args[0]), out.requires_grad)))
    assert {task: y.shape for task, y in model(images, SOME).items()} == {"seg": (2, 5, 32, 32), "edge": (1, 1, 32, 32)}
    assert seen == [(3, False)]


def test_the_encoder_of_a_run_runs_once_per_labelled_pair_with_its_tasks_features(images):
    run = run_of(random_vit())
    model, seen = with_decoder(run).eval(), []
    run.vit.blocks[0].register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    some = model(images, SOME)
    whole = model(images)
    assert seen == [3, 9]
    for task, rows in SOME.items():
        torch.testing.assert_close(some[task], whole[task][rows], rtol=1e-4, atol=1e-5)
    alone = run.maps(images, {"edge": torch.tensor([1])})  # what the run itself computes for this pair
    last = alone[-1].tokens[:, -16:]
    features = model._encode(images, SOME)
    read = features.maps[3][features.index["edge"]].flatten(2).transpose(1, 2)
    torch.testing.assert_close(read, last, rtol=1e-4, atol=1e-5)


def test_a_run_without_the_task_is_refused():
    run = MultiTaskViT(random_vit(), {"seg": 5}, "light")
    with pytest.raises(UserError, match="the encoder has no task sal, edge: choose --tasks among seg"):
        with_decoder(run)


def test_a_state_dict_holds_the_decoder_and_fits_its_encoder_alone(images):
    model = with_decoder(random_vit()).eval()
    state = model.state_dict()
    assert not [name for name in state if name.startswith("encoder.")] and state["encoder_sha256"].shape == (32,)
    again = with_decoder(random_vit()).eval()
    for parameter in again.decoder.parameters():
        torch.nn.init.zeros_(parameter)
    again.load_state_dict(state)
    assert all(torch.equal(y, again(images)[task]) for task, y in model(images).items())
    one_bit = random_vit()
    with torch.no_grad():
        one_bit.blocks[3].mlp.fc1.bias[7] += 1e-6
    with pytest.raises(UserError, match=r"an encoder whose weights have sha256 \w{12}\.\.\., not \w{12}\.\.\.: give"):
        with_decoder(one_bit).load_state_dict(state)


def test_a_state_dict_that_lacks_a_part_is_refused():
    model = with_decoder(random_vit())
    state = model.state_dict()
    del state["decoder.routers"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"decoder.routers\""):
        model.load_state_dict(state)
