"""What a cell needs of PyTorch, with the names of `jax_ops`: torch's own fused kernels where it has them."""

# pyright: reportMissingImports=false

import torch
import torch.nn.functional as F

tanh, einsum = torch.tanh, torch.einsum


def gelu(x):
    return F.gelu(x, approximate="tanh")


def softmax(x):
    return torch.softmax(x, -1)


def layer_norm(x, scale):
    return F.layer_norm(x, x.shape[-1:], weight=scale, eps=1e-5)


def group_norm(x, scale, groups):
    return F.group_norm(x.movedim(-1, 1), groups, weight=scale, eps=1e-5).movedim(1, -1)


def conv3(x, kernel):
    return F.conv2d(x.movedim(-1, 1), kernel.permute(3, 2, 0, 1), padding=1).movedim(1, -1)


def take(table, tokens):
    return F.embedding(tokens, table)


def cross_entropy(logits, labels):
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


def total(x):
    return x.sum()


def causal(length):
    return torch.tril(torch.ones(length, length, dtype=torch.bool))


def where(condition, x, otherwise):
    return torch.where(condition, x, torch.full_like(x, otherwise))
