"""Small real networks with the structures of the big ones, captured once for all tests of this folder."""

from __future__ import annotations

import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn

from flashu_compile.exporters.onnx import emit_onnx
from flashu_compile.program.program import Input, Program
from flashu_compile.program.trace import trace

WIDTH, HEADS, GROUPS, HIDDEN, VOCABULARY, LAYERS = 32, 4, 2, 48, 64, 2


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Layer(nn.Module):
    """Attention with grouped heads and a gated feed-forward network."""

    def __init__(self) -> None:
        super().__init__()
        size = WIDTH // HEADS
        self.norm, self.mlp_norm = RMSNorm(WIDTH), RMSNorm(WIDTH)
        self.q, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.k, self.v = nn.Linear(WIDTH, GROUPS * size), nn.Linear(WIDTH, GROUPS * size)
        self.gate, self.up = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (f(y).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for f in (self.q, self.k, self.v))
        b, groups, rows, size = k.shape
        k, v = (t[:, :, None].expand(b, groups, HEADS // groups, rows, size).flatten(1, 2) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        y = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Network(nn.Module):
    """A language model over a prompt, one row for the time, and a tail; its output layer is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.time = nn.Linear(3, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def features(self, prompt: Tensor, visible: Tensor, time: Tensor, tail: Tensor) -> Tensor:
        x = torch.cat([self.embed(prompt), self.time(time)[:, None], self.embed(tail)], dim=1)
        seen = torch.cat([visible, torch.ones_like(time[:, :1], dtype=torch.bool), tail >= 0], dim=1)
        index = torch.arange(x.shape[1])
        mask = (index[:, None] >= index) & seen[:, None, None] | (index[:, None] == index)
        for layer in self.layers:
            x = layer(x, mask)
        return self.norm(x)


class Step(nn.Module):
    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, prompt: Tensor, visible: Tensor, time: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
        features = self.network.features(prompt, visible, time, tail)
        return self.network.head(features), features[:, -1]


class Scores(nn.Module):
    """A second program over the same weights: features in, logits out."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, features: Tensor) -> tuple[Tensor]:
        return (self.network.head(self.network.layers[0].mlp_norm(features)),)


def sample(batch: int, prompt: int, tail: int) -> dict[str, Tensor]:
    """Inputs of `Step`; the first token of every prompt is hidden."""
    generator = torch.Generator().manual_seed(batch + 10 * prompt + 100 * tail)
    visible = torch.ones(batch, prompt, dtype=torch.bool)
    visible[:, 0] = False
    return {
        "prompt": torch.randint(VOCABULARY, (batch, prompt), generator=generator),
        "visible": visible,
        "time": torch.rand(batch, 3, generator=generator),
        "tail": torch.randint(VOCABULARY, (batch, tail), generator=generator),
    }


def program(
    name: str,
    module: nn.Module,
    inputs: tuple[Input, ...],
    outputs: tuple[str, ...],
    sample: dict[str, Tensor],
    stacks: dict[str, str] | None = None,
) -> Program:
    module = module.eval()
    return Program(name, "t2i", trace(module, inputs, sample), inputs, outputs, stacks or {}, sample)


def unary(name: str, module: nn.Module, x: Tensor, axes: tuple[str | None, ...] | None = None) -> Program:
    """A program from `x` to `y`."""
    return program(name, module, (Input("x", axes or (None,) * x.ndim),), ("y",), {"x": x})


def step_programs() -> tuple[Program, Program]:
    """`step` and `scores` over one network, the same at every call."""
    torch.manual_seed(0)
    network = Network()
    with torch.no_grad():
        for layer in network.layers:
            layer.k.bias.zero_()
            layer.v.bias.zero_()
    inputs = (
        Input("prompt", ("batch", "prompt")),
        Input("visible", ("batch", "prompt")),
        Input("time", ("batch", None)),
        Input("tail", ("batch", "tail")),
    )
    stacks = {"llm": "network.layers"}
    step = program("step", Step(network), inputs, ("logits", "last"), sample(2, 5, 3), stacks)
    rows = {"features": torch.randn(2, 4, WIDTH)}
    axes = (Input("features", ("batch", "rows", None)),)
    return step, program("scores", Scores(network), axes, ("logits",), rows, stacks)


@pytest.fixture(scope="session")
def programs() -> tuple[Program, Program]:
    return step_programs()


@pytest.fixture(scope="session")
def step(programs: tuple[Program, Program]) -> Program:
    return programs[0]


@pytest.fixture(scope="session")
def step_model(step: Program) -> ir.Model:
    """The emitted step. Tests must leave it as it is."""
    return emit_onnx(step)


@pytest.fixture(scope="session")
def scores_model(programs: tuple[Program, Program]) -> ir.Model:
    return emit_onnx(programs[1])


def word_tokenizer() -> Tokenizer:
    return Tokenizer(WordLevel({"a": 0, "circle": 1, "[UNK]": 2}, unk_token="[UNK]"))


@pytest.fixture
def tokenizer() -> Tokenizer:
    return word_tokenizer()
