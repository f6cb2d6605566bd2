"""Vision transformer (Dosovitskiy et al., "An Image is Worth 16x16 Words") at CIFAR size."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import Residual
from .registry import register_model


class ViT(nn.Module):
    """Linear embedding of patches, ``depth`` blocks of attention and MLP, each after a LayerNorm
    and inside a residual, then LayerNorm and classifier on the class token.

    PEMN gives dim and depth; its code for this network was never released. The other defaults are
    those of the public CIFAR-10 ViT whose training settings PEMN's equal. Every Linear can be
    masked; class token, position embedding and norms are ordinary parameters.

    Args:
        dim: of a token.
        depth: blocks.
        heads: of attention.
        dim_head: of one head; queries, keys and values have ``heads * dim_head`` features,
            whatever ``dim`` is.
        mlp_dim: hidden features of the MLP.
        image_size: side of the square images; a multiple of ``patch_size``.
        patch_size: side of a patch.
        dropout: of the embedding, and of what attention and each layer of the MLP put out.
        num_classes, in_channels: of the task.
    """

    def __init__(
        self,
        *,
        dim: int = 256,
        depth: int = 6,
        heads: int = 8,
        dim_head: int = 64,
        mlp_dim: int = 512,
        image_size: int = 32,
        patch_size: int = 4,
        dropout: float = 0.1,
        num_classes: int = 10,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ValueError(
                f"image_size: got {image_size}, expected a multiple of patch_size={patch_size}"
            )
        tokens = (image_size // patch_size) ** 2 + 1
        self.stem = nn.Sequential(Patches(patch_size), nn.Linear(in_channels * patch_size**2, dim))
        self.class_token = nn.Parameter(torch.randn(1, 1, dim))
        self.position = nn.Parameter(torch.randn(1, tokens, dim))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(
            *(ViTBlock(dim, heads, dim_head, mlp_dim, dropout) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, in_channels, image_size, image_size]`` to logits ``[B, num_classes]``."""
        patches = self.stem(x)
        tokens = torch.cat([self.class_token.expand(patches.shape[0], -1, -1), patches], dim=1)
        tokens = self.blocks(self.dropout(tokens + self.position))
        logits: Tensor = self.head(self.norm(tokens[:, 0]))
        return logits


class Patches(nn.Module):
    """``[B, C, H, W]`` to ``[B, H/size * W/size, size * size * C]``: the pixels of each patch, the
    channels of a pixel together.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        rows, columns = height // self.size, width // self.size
        grid = x.reshape(batch, channels, rows, self.size, columns, self.size)
        return grid.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, -1)

    def extra_repr(self) -> str:
        return str(self.size)


class ViTBlock(nn.Sequential):
    """``[B, tokens, dim]`` to the same: residual attention, then a residual MLP."""

    def __init__(self, dim: int, heads: int, dim_head: int, mlp_dim: int, dropout: float) -> None:
        super().__init__()
        self.attention = Residual(
            nn.LayerNorm(dim), Attention(dim, heads, dim_head), nn.Dropout(dropout)
        )
        self.mlp = Residual(
            nn.LayerNorm(dim),
            nn.Linear(dim, mlp_dim),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(mlp_dim, dim),
            nn.Dropout(dropout),
        )


class Attention(nn.Module):
    """``[B, tokens, dim]`` to the same: self-attention, its three inputs one product."""

    def __init__(self, dim: int, heads: int, dim_head: int) -> None:
        super().__init__()
        self.heads, self.dim_head = heads, dim_head
        self.qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.out = nn.Linear(heads * dim_head, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, self.dim_head).transpose(1, 3)
        query, key, value = qkv.unbind(2)  # [B, heads, tokens, dim_head] each
        mixed = F.scaled_dot_product_attention(query, key, value)
        result: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return result


register_model(ViT, "vit")
for dim in (256, 512):
    for depth in (6, 8):
        register_model(ViT, f"vit_{dim}_{depth}", dim=dim, depth=depth)
