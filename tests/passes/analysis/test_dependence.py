"""What depends on which input."""

from __future__ import annotations

import torch

from flashu_compile.passes.analysis.attention import attention_sites
from flashu_compile.passes.analysis.blocks import residual_blocks
from flashu_compile.passes.analysis.dependence import depends_on, needed_beside
from flashu_compile.program.program import Program, Role


def test_dependence_of_the_generation_step(denoise: Program) -> None:
    roles = depends_on(denoise)
    assert set(roles) == set(denoise.exported.graph.nodes)
    (semantic,) = residual_blocks(denoise, "semantic")
    assert roles[semantic.exit] == {Role.LATENTS}
    assert roles[residual_blocks(denoise, "llm")[0].entry] == {
        Role.PROMPT_IDS,
        Role.LATENTS,
        Role.TIMESTEP,
        Role.TAIL_IDS,
    }
    # Positions and mask come from the prompt's mask; of the tail only the length matters.
    site = attention_sites(denoise, "llm")[0]
    assert {roles[node] for node in (site.mask, *site.rotary) if node is not None} == {
        frozenset({Role.PROMPT_MASK})
    }


def test_dependence_holds_by_experiment(understand: Program) -> None:
    """Changing an input changes no value that is said not to depend on it."""
    roles = depends_on(understand)
    nodes = [n for n in understand.exported.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)]

    def values(sample: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = {}

        class Record(torch.fx.Interpreter):
            def run_node(self, n: torch.fx.Node) -> object:
                found[n.name] = super().run_node(n)
                return found[n.name]

        exported = understand.exported
        stored = {**exported.state_dict, **exported.constants}
        targets = [spec.target for spec in exported.graph_signature.input_specs]
        inputs = [stored[t] for t in targets if t is not None]
        with torch.no_grad():
            Record(exported.graph_module).run(*inputs, *(sample[role] for role in understand.input_roles))
        return found

    before = values(dict(understand.sample))
    ids = understand.sample[Role.SUFFIX_IDS]
    after = values(dict(understand.sample) | {Role.SUFFIX_IDS: (ids + 1) % 512})
    changed = {n for n in nodes if not torch.equal(before[n.name], after[n.name])}
    assert changed
    assert all(Role.SUFFIX_IDS in roles[n] for n in changed)
    assert any(Role.SUFFIX_IDS not in roles[n] for n in nodes if n.op == "call_function")


def test_a_size_is_needed_where_no_given_input_has_it(denoise: Program) -> None:
    (features,) = (
        n
        for n in denoise.exported.graph.nodes
        if n.name in denoise.exported.graph_signature.user_outputs[1:2]
    )
    everything = frozenset(denoise.input_roles)
    # The span's rows depend on no value of the tail, but the text has as many rows as it has.
    assert Role.TAIL_IDS in needed_beside(denoise, everything - {Role.TAIL_IDS})[features]
    assert needed_beside(denoise, everything)[features] == frozenset()
    batch = next(n for n in denoise.exported.graph.nodes if n.target is torch.ops.aten.sym_size.int)
    # Every input has the batch's size, but for the picture and the time.
    assert needed_beside(denoise, {Role.TAIL_IDS})[batch] == frozenset()
    assert needed_beside(denoise, {Role.LATENTS})[batch] != frozenset()
