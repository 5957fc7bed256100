"""transformers around adapted models: default patterns, Trainer and its files, checkpointing, generation, bf16."""

import warnings

import pytest
import torch
import transformers as hf
from accelerate import Accelerator

from fastmoe_lora import LoRALinear, LoRAMoE, adapt, load_adapters, merge, remove, save_adapters
from kernels import UserError

MOE = "4/2/1/2"
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = SMALL | {"image_size": 16, "patch_size": 8}
TEXT = SMALL | {"vocab_size": 31, "max_position_embeddings": 32, "pad_token_id": 0}
T5 = {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 2, "num_heads": 2, "vocab_size": 31}
WHISPER = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 31, "num_mel_bins": 8, "max_source_positions": 8,
    "max_target_positions": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
SWIN = {"image_size": 16, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2}
CONVNEXT = {"image_size": 16, "hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}
PIXELS, TOKENS = {"pixel_values": torch.rand(2, 3, 16, 16)}, {"input_ids": torch.tensor([[5, 7, 11, 2], [3, 1, 4, 1]])}
# (model, configuration, its values, input, name of the first adapted layer, its LoRA layers of attention or an error)
KINDS = {
    "vit": (hf.ViTModel, hf.ViTConfig, VISION, PIXELS, "layers.0.mlp", 8),
    "dinov2": (hf.Dinov2Model, hf.Dinov2Config, VISION | {"mlp_ratio": 2}, PIXELS, "encoder.layer.0.mlp", 8),
    "bert": (hf.BertModel, hf.BertConfig, TEXT, TOKENS, "encoder.layer.0.intermediate.dense", 8),
    "t5": (
        hf.T5Model, hf.T5Config, T5, TOKENS | {"decoder_input_ids": TOKENS["input_ids"]},
        "encoder.block.0.layer.1.DenseReluDense", 16,
    ),
    "whisper": (
        hf.WhisperModel, hf.WhisperConfig, WHISPER,
        {"input_features": torch.rand(2, 8, 16), "decoder_input_ids": TOKENS["input_ids"]}, "encoder.layers.0.fc1", 8,
    ),
    "gpt-neox": (hf.GPTNeoXModel, hf.GPTNeoXConfig, TEXT, TOKENS, "layers.0.mlp", 4),
    "swinv2": (
        hf.Swinv2Model, hf.Swinv2Config, SWIN, PIXELS, "encoder.layers.0.blocks.0.intermediate.dense", 8
    ),
    "convnextv2": (
        hf.ConvNextV2Model, hf.ConvNextV2Config, CONVNEXT, PIXELS, "encoder.stages.0.layers.0.pwconv1", None
    ),
    "llama": (hf.LlamaModel, hf.LlamaConfig, TEXT, TOKENS, "layers.0.mlp", 8),
}  # fmt: skip


def spread(model):
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("lora_B", "routers")):
                parameter.normal_()
    return model


def count(model, kind):
    return sum(isinstance(module, kind) for module in model.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_default_patterns_find_the_layers_of(kind):
    make, config, values, inputs, first, loras = KINDS[kind]
    torch.manual_seed(0)
    model = make(config(**values)).eval()
    with torch.no_grad():
        before = model(**inputs)[0]
    if loras is None:
        with pytest.raises(UserError, match="lora_where=.*matches no module"):
            adapt(model, MOE, lora_rank=2)
    adapt(model, MOE, lora_rank=2 if loras else 0)
    names = [name for name, module in model.named_modules() if isinstance(module, LoRAMoE)]
    assert names[0] == first
    assert count(model, LoRALinear) == (loras or 0)
    y = model(**inputs)[0]
    torch.testing.assert_close(y, before, rtol=1e-5, atol=1e-5)
    spread(model)(**inputs)[0].square().mean().backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert missing == []
    remove(model)
    assert torch.equal(model(**inputs)[0], before)


class TestRefused:
    def test_gpt2_is_made_of_conv1d(self):
        model = hf.GPT2Model(hf.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=31))
        with pytest.raises(
            UserError, match="matches h.0.mlp, a GPT2MLP, made of Conv1D as GPT-2 is: only linear layers"
        ):
            adapt(model, MOE)
        assert all(p.requires_grad for p in model.parameters())

    def test_a_block_that_is_a_mixture_of_experts_already(self):
        values = TEXT | {"num_local_experts": 2, "num_key_value_heads": 2, "num_experts_per_tok": 1}
        model = hf.MixtralModel(hf.MixtralConfig(**values))
        with pytest.raises(UserError, match="layers.0.mlp, a .*which is a mixture of experts already"):
            adapt(model, MOE)
        adapt(model, MOE, where="*.q_proj", lora_rank=2, lora_where="*.o_proj")
        model(**TOKENS)


class TestOtherFFNs:
    def test_three_matrices(self):
        class SwiGLU(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.w1, self.w2, self.w3 = (torch.nn.Linear(*shape) for shape in ((16, 24), (24, 16), (16, 24)))

            def forward(self, x):
                return self.w2(torch.nn.functional.silu(self.w1(x)) * self.w3(x))

        self.check(SwiGLU(), lambda model, x: model["mlp"](x))

    def test_that_take_more_than_tokens(self):
        class MixFFN(torch.nn.Module):
            """As PVT and SegFormer have: a convolution over the grid."""

            def __init__(self):
                super().__init__()
                self.dense1, self.dense2 = torch.nn.Linear(16, 24), torch.nn.Linear(24, 16)
                self.dwconv = torch.nn.Conv2d(24, 24, 3, 1, 1, groups=24)

            def forward(self, x, h, w):
                x = self.dense1(x)
                grid = self.dwconv(x.transpose(1, 2).unflatten(2, (h, w))).flatten(2).transpose(1, 2)
                return self.dense2(torch.nn.functional.gelu(grid))

        self.check(MixFFN(), lambda model, x: model["mlp"](x, 2, w=3))

    def check(self, ffn, run):
        model, x = torch.nn.ModuleDict({"mlp": ffn}), torch.randn(2, 6, 16)
        right = run(model, x)
        routing = adapt(model, MOE, 2, where="mlp")
        with routing.batch([1, 1]):
            assert torch.equal(run(model, x), right)
            y = run(spread(model), x)
        y.square().mean().backward()
        assert not torch.equal(y, right) and model["mlp"].lora_A.grad.any()


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    return hf.ViTForImageClassification(hf.ViTConfig(**VISION, num_labels=3))


PIXELS = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
DATA = [{"pixel_values": image, "labels": i % 3} for i, image in enumerate(PIXELS)]


def batch():
    return {"pixel_values": torch.stack([item["pixel_values"] for item in DATA])}


class TestTrainer:
    @pytest.mark.parametrize("recomputes", [False, True])
    def test_trains_and_its_files_are_read_with_the_model_s_own_ffns(self, recomputes, classifier, tmp_path):
        frozen = {name: value.clone() for name, value in classifier.state_dict().items()}
        adapt(classifier, MOE, lora_rank=2, modules_to_save="classifier")
        arguments = hf.TrainingArguments(
            tmp_path / "run", max_steps=2, per_device_train_batch_size=2, learning_rate=0.1, report_to=[], use_cpu=True,
            save_strategy="no", disable_tqdm=True, gradient_checkpointing=recomputes, logging_strategy="no",
        )  # fmt: skip
        trainer = hf.Trainer(classifier, arguments, train_dataset=DATA)
        trainer.train()
        moved = [
            n for n, p in classifier.named_parameters() if p.requires_grad and n in frozen and not p.equal(frozen[n])
        ]
        assert moved == ["classifier.weight", "classifier.bias"]
        assert all(p.any() for n, p in classifier.named_parameters() if n.endswith("lora_B"))
        trainer.save_model(tmp_path / "model")
        save_adapters(classifier, tmp_path / "adapters.safetensors")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            twin = hf.ViTForImageClassification.from_pretrained(tmp_path / "model").eval()
        theirs = twin.state_dict()
        assert all(torch.equal(theirs[n], v) for n, v in frozen.items() if not n.startswith("classifier"))
        load_adapters(twin, tmp_path / "adapters.safetensors")
        with torch.no_grad():
            assert torch.equal(twin(**batch()).logits, classifier.eval()(**batch()).logits)

    def test_accelerate_saves_and_loads_a_state(self, classifier, tmp_path):
        adapt(classifier, MOE, lora_rank=2)
        accelerator = Accelerator(cpu=True)
        optimizer = torch.optim.AdamW([p for p in classifier.parameters() if p.requires_grad], 0.1)
        model, optimizer = accelerator.prepare(classifier, optimizer)
        accelerator.backward(model(**batch()).logits.square().mean())
        optimizer.step()
        accelerator.save_state(tmp_path / "state")
        right = {name: value.clone() for name, value in model.state_dict().items()}
        spread(model)
        accelerator.load_state(tmp_path / "state")
        assert all(torch.equal(value, right[name]) for name, value in model.state_dict().items())

    def test_save_pretrained_keeps_names(self, classifier, tmp_path):
        y = classifier.eval()(**batch()).logits
        adapt(classifier, MOE)
        spread(classifier).save_pretrained(tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            twin = hf.ViTForImageClassification.from_pretrained(tmp_path).eval()
        assert torch.equal(twin(**batch()).logits, y)


def test_gradient_checkpointing_has_the_same_gradients(classifier):
    adapt(classifier, MOE, lora_rank=2)
    spread(classifier).train()
    found = []
    for recomputes in (False, True):
        if recomputes:
            classifier.gradient_checkpointing_enable()
        classifier.zero_grad()
        classifier(**batch()).logits.square().mean().backward()
        found.append([p.grad.clone() for p in classifier.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


class TestGeneration:
    OPTIONS = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    IDS = torch.tensor([[5, 7, 11, 2], [0, 0, 4, 1]])  # padded on the left, as decoders are
    MASK = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])

    @pytest.fixture
    def llama(self):
        torch.manual_seed(0)
        return hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT)).eval()

    def test_of_two_tasks_with_a_mask_and_a_cache_is_that_of_each_alone(self, llama):
        routing = adapt(llama, MOE, 2, where="*.mlp")
        with torch.no_grad():  # random weights of transformers are small
            for name, parameter in spread(llama).named_parameters():
                if name.endswith("routers"):
                    parameter.mul_(10)
        with routing.batch([1, 1], self.MASK):
            together = llama.generate(self.IDS, attention_mask=self.MASK, **self.OPTIONS)
        for task, images in enumerate(([1, 0], [0, 1])):
            ids, mask = self.IDS[task : task + 1], self.MASK[task : task + 1]
            with routing.batch(images, mask):
                alone = llama.generate(ids, attention_mask=mask, **self.OPTIONS)
            assert torch.equal(alone[0], together[task])
        with routing.batch([2, 0], self.MASK):
            assert not torch.equal(llama.generate(self.IDS, attention_mask=self.MASK, **self.OPTIONS), together)

    def test_without_a_cache_cannot_know_the_padding_and_says_so(self, llama):
        routing = adapt(llama, MOE, 2, where="*.down_proj")
        with routing.batch([1, 1], self.MASK), pytest.raises(UserError, match="the batch was opened for 8"):
            llama.generate(self.IDS, attention_mask=self.MASK, use_cache=False, **self.OPTIONS)

    def test_of_one_task_needs_no_batch(self, llama):
        adapt(llama, MOE, where="*.mlp", lora_rank=2)
        ids = torch.tensor([[5, 7, 11, 2]])
        spread(llama)
        cached = llama.generate(ids, **self.OPTIONS)
        assert torch.equal(llama.generate(ids, use_cache=False, **self.OPTIONS), cached)


def test_bf16_trains_on_a_cpu(classifier):
    classifier.to(torch.bfloat16)
    adapt(classifier, MOE, lora_rank=2)
    trained = [p for p in classifier.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    optimizer = torch.optim.AdamW(trained, 0.05)
    losses = []
    images = {"pixel_values": batch()["pixel_values"].bfloat16()}
    for _ in range(20):
        loss = torch.nn.functional.cross_entropy(classifier(**images).logits.float(), torch.tensor([0, 1, 2, 0]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_merged_lora_is_a_plain_model_of_transformers(classifier, tmp_path):
    adapt(classifier, None, lora_rank=2)
    y = spread(classifier.eval())(**batch()).logits
    merge(classifier)
    classifier.save_pretrained(tmp_path)
    twin = hf.ViTForImageClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(twin(**batch()).logits, y, rtol=1e-4, atol=1e-5)
