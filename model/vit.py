"""A vision transformer with timm's parameter names, and its sizes by name."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels import UserError
from model.backbone import TAPS, Backbone, FeatureMap, Level, Pairs, spaced
from model.rope import RoPE, Rotation, rotate


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of a ViT. With ``rope`` patches have rotary positions, as in DINOv3, and no learned ones."""

    width: int
    depth: int
    heads: int
    patch: int = 16
    registers: int = 0
    rope: bool = False
    eps: float = 1e-6  # of the layer norms


VITS = {
    "vit_micro": ViTConfig(width=96, depth=4, heads=3, patch=8),
    "vit_tiny": ViTConfig(width=192, depth=12, heads=3),
    "vit_small": ViTConfig(width=384, depth=12, heads=6),
    "vit_base": ViTConfig(width=768, depth=12, heads=12),
    "vit_large": ViTConfig(width=1024, depth=24, heads=16),
}


def resize_pos_embed(pos_embed: Tensor, grid: tuple[int, int]) -> Tensor:
    """(1, 1 + h*w, d) of a square grid -> (1, 1 + grid[0]*grid[1], d), bicubic; the class token's is kept."""
    class_token, patches = pos_embed[:, :1], pos_embed[:, 1:]
    side = round(patches.shape[1] ** 0.5)
    if (side, side) == grid:
        return pos_embed
    image = patches.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    image = F.interpolate(image, grid, mode="bicubic", antialias=True)
    return torch.cat([class_token, image.flatten(2).transpose(1, 2)], dim=1)


class PatchEmbed(nn.Module):
    """Image (B, 3, H, W) -> patch tokens (B, H/patch * W/patch, width)."""

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, stride=patch)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rotation: Rotation | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor, rotation: Rotation | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), rotation)
        return x + self.mlp(self.norm2(x))


class ViT(Backbone):
    """``embed`` makes tokens of images, ``encode`` runs the blocks over tokens. The embedding of its task is added to
    every token of a pair between the two.

    Positions are learned and added to the tokens (``pos_embed``), or rotate queries and keys (``rope``); the other one
    is None.
    """

    sites = {"ffn": "blocks.*.mlp", "fc1": "blocks.*.mlp.fc1", "fc2": "blocks.*.mlp.fc2"}
    lora_layers = {
        "qkv": ("blocks.*.attn.qkv",),
        "proj": ("blocks.*.attn.proj",),
        "fc1": ("blocks.*.mlp.fc1",),
        "fc2": ("blocks.*.mlp.fc2",),
    }

    def __init__(self, config: ViTConfig, image_size: int) -> None:
        super().__init__()
        if image_size % config.patch:
            raise UserError(f"image size {image_size} is not a multiple of the patch size {config.patch}")
        self.patch, self.width = config.patch, config.width
        self.levels = (Level(config.width, config.patch),) * TAPS
        side = image_size // config.patch
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.reg_token = nn.Parameter(torch.zeros(1, config.registers, config.width)) if config.registers else None
        self.pos_embed = None if config.rope else nn.Parameter(torch.zeros(1, 1 + side * side, config.width))
        self.rope = RoPE(config.width // config.heads) if config.rope else None
        self.patch_embed = PatchEmbed(config.patch, config.width)
        self.blocks = nn.ModuleList(Block(config.width, config.heads, config.eps) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=config.eps)
        self._init_weights()
        # What training steps call; see compile_training().
        self._encode: Callable[[Tensor, tuple[int, int]], Tensor] = self.encode
        self._taps: Callable[[Tensor, tuple[int, int]], tuple[Tensor, ...]] = self.taps

    def compile_training(self, last: bool) -> None:
        """Compile the blocks, into one graph, for training steps."""
        if last:
            self._encode = torch.compile(self.encode, fullgraph=True)
        else:
            self._taps = torch.compile(self.taps, fullgraph=True)

    def forward(self, images: Tensor, pairs: Pairs | None = None, last: bool = False) -> tuple[FeatureMap, ...]:
        """The maps; see :class:`Backbone`."""
        tokens, grid = self.embed(images), self.grid(images)
        if pairs is not None:
            tokens = torch.cat([tokens[rows] + e_t for rows, e_t in pairs])
        if last:
            outputs: tuple[Tensor, ...] = ((self._encode if self.training else self.encode)(tokens, grid),)
        else:
            outputs = (self._taps if self.training else self.taps)(tokens, grid)
        return tuple(FeatureMap(output, grid) for output in outputs)

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        if self.reg_token is not None:
            nn.init.normal_(self.reg_token, std=1e-6)

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of patches of images (B, 3, H, W)."""
        return images.shape[-2] // self.patch, images.shape[-1] // self.patch

    def embed(self, images: Tensor) -> Tensor:
        """(B, 3, H, W), normalised -> (B, 1 + registers + H*W/patch^2, width): class token, registers (which have no
        position), then patches row by row."""
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), self.patch_embed(images)], dim=1)
        if self.pos_embed is not None:
            tokens = tokens + resize_pos_embed(self.pos_embed, self.grid(images))
        if self.reg_token is None:
            return tokens
        registers = self.reg_token.expand(len(images), -1, -1)
        return torch.cat([tokens[:, :1], registers, tokens[:, 1:]], dim=1)

    def encode(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """(B, L, width) -> (B, L, width). A ViT with rotary positions needs to know the ``grid`` of its patches."""
        rotation = self._rotation(grid)
        for block in self.blocks:
            tokens = block(tokens, rotation)
        return self.norm(tokens)

    def taps(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> tuple[Tensor, ...]:
        """(B, L, width) -> TAPS times (B, L, width): after evenly spaced blocks, the last one through ``norm``.

        ``grid`` as in :meth:`encode`.
        """
        taps, rotation, read = [], self._rotation(grid), spaced(len(self.blocks))
        for i, block in enumerate(self.blocks):
            tokens = block(tokens, rotation)
            taps += [tokens] * read.count(i)  # of fewer blocks than TAPS some are read twice
        return *taps[:-1], self.norm(taps[-1])

    def _rotation(self, grid: tuple[int, int] | None) -> Rotation | None:
        if self.rope is None:
            return None
        if grid is None:
            raise ValueError("this ViT has rotary positions: pass the grid of patches, vit.grid(images)")
        return self.rope(grid)
