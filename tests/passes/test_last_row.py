"""What is read of the last row alone is computed for it alone."""

from __future__ import annotations

import torch
from torch import Tensor

from flashu_compile.passes.last_row import LastRow
from flashu_compile.passes.manager import PassManager, check_graph, relative_error
from flashu_compile.passes.pipelines import understand as passes
from flashu_compile.program.program import Program, Role
from tests.support.tiny import CONFIG


def language_of(understand: Program) -> Program:
    return PassManager(passes()).run(understand)[0][1]


def linears(program: Program) -> dict[str, int | torch.SymInt]:
    """Rows of each linear layer, by its weight's name."""
    found = {}
    for node in program.exported.graph.nodes:
        if node.target is torch.ops.aten.linear.default:
            found[node.args[1].name] = node.meta["val"].shape[1]
    return found


def test_of_the_last_layer_only_keys_and_values_have_all_rows(understand: Program) -> None:
    language = language_of(understand)
    (after,) = LastRow().call(language).programs
    check_graph(after)
    rows = linears(after)
    last = f"layers_{CONFIG.llm.num_hidden_layers - 1}_"
    narrowed = {name for name, count in rows.items() if count == 1}
    whole = {name for name in rows if last in name} - narrowed
    assert all("k_proj" in name or "v_proj" in name for name in whole)
    assert len(whole) == 2
    assert any("lm_head" in name for name in narrowed)
    assert all(last in name or "lm_head" in name for name in narrowed)


def test_the_outputs_are_the_same(understand: Program) -> None:
    language = language_of(understand)
    (after,) = LastRow().call(language).programs
    for suffix in (1, 2, 9):
        ids = torch.randint(
            CONFIG.llm.vocab_size, (2, 4 + suffix), generator=torch.Generator().manual_seed(suffix)
        )
        embeds: Tensor = language.sample[Role.IMAGE_EMBEDS]
        inputs = {Role.PREFIX_IDS: ids[:, :4], Role.SUFFIX_IDS: ids[:, 4:], Role.IMAGE_EMBEDS: embeds}
        assert relative_error(after.run(inputs)[Role.LOGITS], language.run(inputs)[Role.LOGITS]) < 1e-6


def test_programs_that_read_all_rows_are_left_alone(denoise: Program) -> None:
    assert LastRow().call(denoise).programs == (denoise,)
