"""Programs whose rows are some of a prompt and some of a picture, and inputs of many sizes for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, fx, nn

from flashu_compile.passes.analysis.dependence import depends_on
from flashu_compile.passes.editing import module_path
from flashu_compile.program.program import Input, Program, Role
from flashu_compile.program.trace import CaptureSpec, capture_program
from tests.support.tiny import CONFIG

WIDTH, PICTURE = 6, 4
CHANGING = frozenset({"picture"})
Rows = Callable[[Tensor], Tensor]


class Mixed(nn.Module):
    """`read` of rows [b, prompt + 4, 6]: a linear layer of a prompt, then of a picture that the batch shares."""

    def __init__(self, read: Rows) -> None:
        super().__init__()
        self.read, self.enter = read, nn.Linear(WIDTH, WIDTH)

    def forward(self, prompt: Tensor, picture: Tensor) -> tuple[Tensor]:
        both = [self.enter(prompt), self.enter(picture).expand(prompt.shape[0], -1, -1)]
        return (self.read(torch.cat(both, dim=1)),)


def reading(read: Rows) -> Mixed:
    torch.manual_seed(0)
    return Mixed(read).double().eval()


def mixed(read: Rows) -> Program:
    inputs = (Input("prompt", ("batch", "prompt", None)), Input("picture", (None, None, None)))
    return capture_program(
        CaptureSpec("mixed", "none", reading(read), inputs, ("y",), {}, mixed_inputs(3, 5))
    )


def mixed_inputs(batch: int, prompt: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch + 10 * prompt)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return {"prompt": draw(batch, prompt, WIDTH), "picture": draw(1, PICTURE, WIDTH)}


def step_inputs(batch: int, prompt: int, tail: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Of the tiny model's generation step. Prompts are ragged; every second one is as short as they come."""
    generator = torch.Generator().manual_seed(batch + 10 * prompt + 100 * tail)
    ids = torch.randint(CONFIG.llm.vocab_size, (batch, prompt + tail), generator=generator)
    mask = torch.ones(batch, prompt, dtype=torch.bool)
    for row in range(batch):
        mask[row, : prompt - 2 if row % 2 else min(row, prompt - 2)] = False
    return {
        Role.PROMPT_IDS: ids[:, :prompt].contiguous(),
        Role.PROMPT_MASK: mask,
        Role.TAIL_IDS: ids[:, prompt:].contiguous(),
        Role.LATENTS: torch.randn(1, *CONFIG.latent_shape, generator=generator, dtype=dtype),
        Role.TIMESTEP: torch.rand(1, generator=generator, dtype=dtype),
    }


def working(program: Program, *targets: str) -> Iterator[fx.Node]:
    """Linear layers, convolutions and attention, or nodes of the given targets, that an output depends on."""
    wanted = targets or ("linear", "conv2d", "scaled_dot_product_attention")
    for node in program.exported.graph.nodes:
        packet = getattr(node.target, "overloadpacket", None)
        if node.users and packet is not None and packet.__name__ in wanted:
            yield node


def shape(node: fx.Node) -> list[str]:
    return [str(size) for size in node.meta["val"].shape]


def placeholder_shape(program: Program, role: str) -> list[str]:
    names = dict(zip(program.input_roles, program.exported.graph_signature.user_inputs, strict=True))
    return shape(next(node for node in program.exported.graph.nodes if node.name == names[role]))


def strided_inputs(program: Program) -> list[str]:
    """Inputs that the graph takes to lie in memory otherwise than they do."""
    values = {n.name: n.meta["val"] for n in program.exported.graph.find_nodes(op="placeholder")}
    users = zip(program.input_roles, program.exported.graph_signature.user_inputs, strict=True)
    return [role for role, name in users if not values[name].is_contiguous()]


def paths(program: Program) -> set[str]:
    """Modules of everything that works."""
    return {module_path(node) for node in working(program)}


def dependent(program: Program, role: str) -> list[fx.Node]:
    """Working nodes whose values depend on an input."""
    found = depends_on(program)
    return [node for node in working(program) if role in found[node]]
