"""Rows go in segments: the numbers stay, and no segment reads one that its mask hides."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flashu_compile.errors import PassError
from flashu_compile.models.showo2.adapter import capture_specs
from flashu_compile.passes.analysis.dependence import depends_on
from flashu_compile.passes.gather_tokens import GatherTokens
from flashu_compile.passes.group_heads import GroupHeads
from flashu_compile.passes.keep_outputs import KeepOutputs
from flashu_compile.passes.manager import PassManager, check_graph, relative_error
from flashu_compile.passes.pipelines import understand as understand_passes
from flashu_compile.passes.split_rows import SplitRows
from flashu_compile.passes.token_scorers import SCORERS
from flashu_compile.program.program import Program, Role
from flashu_compile.program.trace import capture_program
from tests.support.programs import only
from tests.support.row_programs import (
    CHANGING,
    PICTURE,
    WIDTH,
    Rows,
    dependent,
    mixed,
    mixed_inputs,
    placeholder_shape,
    reading,
    shape,
    step_inputs,
    working,
)
from tests.support.tiny import CONFIG, VAE, tiny_model

STEP = frozenset({Role.LATENTS, Role.TIMESTEP})
SUFFIX = frozenset({Role.SUFFIX_IDS})
#: (batch, prompt); a prompt as long as the picture and as wide as a row are the hard ones.
SIZES = [(1, 2), (2, PICTURE), (3, WIDTH), (4, 11)]

# As long as sequences may be.
TABLE = torch.arange(2**17, dtype=torch.float64)[:, None].sin()


def attend(rows: Tensor, mask: Tensor | None = None, **options: bool) -> Tensor:
    heads = rows.unflatten(-1, (2, 3)).transpose(1, 2)
    return F.scaled_dot_product_attention(heads, heads * 2, heads + 1, attn_mask=mask, **options)


def causal(rows: Tensor) -> Tensor:
    index = torch.arange(rows.shape[1])
    return index[:, None] >= index


def additive(rows: Tensor) -> Tensor:
    hidden = torch.full((rows.shape[1],) * 2, -math.inf, dtype=rows.dtype)
    return torch.where(causal(rows), torch.zeros_like(hidden), hidden)


def picked(rows: Tensor) -> Tensor:
    """A gather by an index that counts backwards across segments."""
    count = rows.shape[1]
    index = (count - 1 - torch.arange(count))[None, :, None].expand(rows.shape[0], -1, rows.shape[2])
    return rows.gather(1, index)


READS: dict[str, Rows] = {
    "sum over the batch": lambda x: x.sum(0),
    "sum over the shared picture": lambda x: x[:, -PICTURE:].sum(0),
    "mean over rows": lambda x: x.mean(1),
    "sum of all": lambda x: x.sum(),
    "softmax over rows": lambda x: x.softmax(1),
    "softmax over the width": lambda x: x.softmax(-1) + x.amax(-1, keepdim=True),
    "norm of everything": lambda x: F.layer_norm(x, (WIDTH,)) / x.norm(),
    "batch twice": lambda x: torch.cat([x, x * 2], 0),
    "shared picture twice": lambda x: torch.cat([x[:, -PICTURE:], x[:1, -PICTURE:] * 2], 0),
    "rows twice": lambda x: torch.cat([x, x[:, 1:]], 1),
    "rows beside one another": lambda x: torch.cat([x, x.flip(1)], 2),
    "rows in another order": lambda x: torch.cat([x[:, 3:], x[:, :3]], 1) * x,
    "rows first": lambda x: x.transpose(0, 1).relu() @ x.new_ones(WIDTH, 2),
    "picture first": lambda x: x[:, -PICTURE:].transpose(0, 1) * 2,
    "width first": lambda x: x.permute(2, 0, 1).cumsum(0),
    "one row after another": lambda x: x.flatten(0, 1).cumsum(0),
    "rows in a line": lambda x: x.reshape(x.shape[0], -1) * 2,
    "picture in a line": lambda x: x[:, -PICTURE:].reshape(-1, 2 * WIDTH),
    "a picture of one of the batch": lambda x: x[:, -PICTURE:][-1] + x[0, -PICTURE:],
    "pictures of some of the batch": lambda x: x[:, -PICTURE:][1:],
    "first and last": lambda x: x[:, 0] - x[:, -1] + x[:, 1],
    "from the end": lambda x: x[:, -3:] + x[:, -2:-1],
    "from the start": lambda x: x[:, 1:2] * x[:, :1],
    "across": lambda x: x[:, 1:-1],
    "every second": lambda x: x[:, ::2].sum(1) + x[..., ::2].sum((1, 2), keepdim=True)[:, 0],
    "nothing": lambda x: x[:, 2:1].sum(1) + x[:, :1].sum(1),
    "sums so far": lambda x: x.cumsum(1),
    "counted as another type": lambda x: (x > 0).cumsum(1, dtype=torch.int32) * 1.5,
    "a table of positions": lambda x: x + TABLE[: x.shape[1]] * TABLE[None, : x.shape[1]],
    "a table read at places": lambda x: x + F.embedding(torch.arange(x.shape[1]), TABLE),
    "numbered": lambda x: x * torch.arange(x.shape[1], dtype=x.dtype)[:, None],
    "numbered in two parts": lambda x: (
        x * torch.cat([torch.arange(3), torch.arange(x.shape[1] - 3)]).to(x.dtype)[None, :, None]
    ),
    "numbered and clamped": lambda x: x * torch.arange(x.shape[1]).clamp(min=4, max=6)[:, None].to(x.dtype),
    "clamped below all": lambda x: torch.where(torch.arange(x.shape[1]).clamp(max=1)[:, None] > 1, x, -x),
    "sum of truths": lambda x: torch.where(((causal(x) + causal(x)).long() > 1)[None, :, :1], x, -x),
    "number of the batch": lambda x: x[:, -PICTURE:] * x[:, -PICTURE:].shape[0],
    "chosen by place": lambda x: torch.where(
        torch.arange(x.shape[1])[:, None] < x.shape[1] - PICTURE, x, 0.5
    ),
    "picked": picked,
    "in pieces": lambda x: torch.stack([*x.chunk(2, -1), *x.split([3, 3], dim=-1)], dim=1),
    "stacked batch": lambda x: torch.stack([x[:, -PICTURE:], x[:, -PICTURE:] * 2]).sum(1),
    "products of rows": lambda x: x @ x.transpose(1, 2),
    "no mask": attend,
    "causal": lambda x: attend(x, causal(x)),
    "causal by batch": lambda x: attend(x, (causal(x) & (x.sum(-1)[:, None] < 9))[:, None]),
    "causal by flag": lambda x: attend(x, is_causal=True),
    "added": lambda x: attend(x, additive(x)),
    "added zeros": lambda x: attend(x, torch.zeros(x.shape[1], x.shape[1], dtype=x.dtype)),
    "added ones and zeros": lambda x: attend(x, causal(x).to(x.dtype)),
    "one mask for all queries": lambda x: attend(x, (torch.arange(x.shape[1]) < x.shape[1] - 1)[None]),
    "one head": lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=causal(x)),
    "the picture alone": lambda x: attend(x[:, -PICTURE:]),
    "an expanded width": lambda x: x[:, :, :1].expand(-1, -1, 3).sum(-1) * 2,
    "rows by rows": lambda x: x.sum(-1, keepdim=True).expand(-1, -1, x.shape[1]) * causal(x),
}


@pytest.mark.parametrize("name", READS)
def test_any_reading_of_the_rows_gives_the_same(name: str) -> None:
    program = mixed(READS[name])
    (after,), (record,) = PassManager((SplitRows(CHANGING),)).run(program)
    assert record.changes[0].startswith("rows in segments prompt | ")
    for size in SIZES:
        values = mixed_inputs(*size)
        with torch.no_grad():  # eager: what export guards of its own accord is not in question
            (truth,) = reading(READS[name])(**values)
        found = after.run(values)["y"]
        assert found.shape == truth.shape
        assert found.dtype == truth.dtype
        assert relative_error(found, truth) < 1e-12


@pytest.mark.parametrize(
    ("name", "rows", "reads_picture"),
    [
        ("causal", 2, False),
        ("causal by batch", 2, False),
        ("no mask", 2, True),
        ("added", 2, True),
        ("added zeros", 2, True),
        ("added ones and zeros", 2, True),
        ("causal by flag", 2, True),
        ("numbered", 1, False),
        ("a table of positions", 1, False),
        ("sums so far", 1, False),
        ("softmax over rows", 1, True),
    ],
)
def test_prompt_rows_read_the_picture_where_no_mask_of_truth_values_forbids_it(
    name: str, rows: int, reads_picture: bool
) -> None:
    program = mixed(lambda x: READS[name](x).select(rows, 0))
    after = only(SplitRows(CHANGING).call(program))
    assert (after.input_roles == ("prompt", "picture")) == reads_picture


def test_a_program_without_the_concatenation_is_left_alone() -> None:
    program = mixed(lambda x: x[:, :2])
    nowhere = SplitRows(frozenset({"prompt", "picture"})).call(program)
    assert only(nowhere) is program
    assert nowhere.changes == ()
    assert nowhere.reasons[0].startswith("no concatenation in program 'mixed' joins rows that depend")


def test_unknown_inputs_are_refused(denoise: Program) -> None:
    with pytest.raises(PassError, match="program 'denoise' has no input noise"):
        PassManager((SplitRows(frozenset({"noise"})),)).run(denoise)


# --- the generation step ---


@pytest.fixture(scope="module", params=[torch.float64, pytest.param(torch.float32, marks=pytest.mark.slow)])
def step(request: pytest.FixtureRequest) -> Program:
    program = capture_program(capture_specs("t2i", tiny_model(request.param), VAE)[0])
    return only(KeepOutputs((Role.VELOCITY, Role.HEAD_FEATURES)).call(program))


@pytest.fixture(scope="module")
def split(step: Program) -> Program:
    (program,), _ = PassManager((GroupHeads(), SplitRows(STEP))).run(step)
    return program


@pytest.mark.parametrize("sizes", [(1, 2, 2), (2, 10, 3), (3, 6, 9), (4, 23, 2)])
def test_the_step_gives_the_same_for_ragged_prompts(
    step: Program, split: Program, sizes: tuple[int, int, int]
) -> None:
    dtype = step.sample[Role.LATENTS].dtype
    values = step_inputs(*sizes, dtype)
    found, truth = split.run(values), step.run(values)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    assert all(relative_error(found[role], truth[role]) < tolerance for role in truth)


def test_nothing_behind_the_image_is_computed(split: Program) -> None:
    assert split.input_roles == (Role.PROMPT_IDS, Role.PROMPT_MASK, Role.LATENTS, Role.TIMESTEP)
    check_graph(split)


def test_the_prompt_reads_neither_latents_nor_time(split: Program) -> None:
    found = depends_on(split)
    rows = placeholder_shape(split, Role.PROMPT_IDS)[1]
    on_prompt = [node for node in working(split) if shape(node)[-2] == rows]
    assert len(on_prompt) > 20
    assert not any(found[node] & STEP for node in on_prompt)


# --- the understanding forward ---


def language_of(gather: GatherTokens | None = None) -> Program:
    """The language part of a model whose image does not see the question."""
    program = capture_program(
        capture_specs("mmu", tiny_model(torch.float64, understanding_span_start="time"), VAE)[0]
    )
    programs, _ = PassManager(understand_passes(gather=gather)).run(program)
    return programs[1]


def ask(batch: int, prefix: int, suffix: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch + 10 * prefix + 100 * suffix)
    image = torch.randn(
        batch, CONFIG.image_tokens, CONFIG.llm.hidden_size, generator=generator, dtype=torch.float64
    )
    ids = torch.randint(CONFIG.llm.vocab_size, (batch, prefix + suffix), generator=generator)
    return {
        Role.IMAGE_EMBEDS: image,
        Role.PREFIX_IDS: ids[:, :prefix].contiguous(),
        Role.SUFFIX_IDS: ids[:, prefix:].contiguous(),
    }


@pytest.mark.slow
@pytest.mark.parametrize("scorer", [None, *SCORERS])
def test_understanding_keeps_the_context_apart_from_the_question(scorer: str | None) -> None:
    gather = None if scorer is None else GatherTokens(0, 0.5, scorer)
    language = language_of(gather)
    (after,), (record,) = PassManager((SplitRows(SUFFIX),)).run(language)
    assert record.changes == ("rows in segments prefix + 10 | suffix",)
    for sizes in [(1, 2, 2), (3, 9, 3), (2, 5, 15)]:
        values = ask(*sizes)
        assert relative_error(after.run(values)[Role.LOGITS], language.run(values)[Role.LOGITS]) < 1e-12
    suffix = placeholder_shape(after, Role.SUFFIX_IDS)[1]
    for node in dependent(after, Role.SUFFIX_IDS):
        assert suffix == shape(node)[-2] or len(shape(node)) == 2, node
    kept = {shape(node)[-2] for node in working(after, "linear")} - {suffix}
    assert len(kept) == (1 if scorer is None else 2)


def test_an_image_that_sees_the_first_row_of_the_question_reads_it(understand: Program) -> None:
    """The published mask begins the image's span one row late, and so ends it: then nothing is hidden."""
    (_, language), _ = PassManager(understand_passes()).run(understand)
    (after,), _ = PassManager((SplitRows(SUFFIX),)).run(language)
    assert any("+" in shape(node)[-2] for node in dependent(after, Role.SUFFIX_IDS))
    values = {role: v.float() if v.is_floating_point() else v for role, v in ask(2, 3, 5).items()}
    assert relative_error(after.run(values)[Role.LOGITS], language.run(values)[Role.LOGITS]) < 1e-5
