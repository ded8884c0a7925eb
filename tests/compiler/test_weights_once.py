"""A bundle of both tasks with pruned and whole engines stores every weight once."""

from __future__ import annotations

import json
import re

import numpy as np
import onnx
import pytest

import flashu_compile
from flashu_compile.bundle.manifest import REPORT, WEIGHTS
from flashu_compile.compiler.export import Bundle
from flashu_compile.models.showo2.modeling import Showo2
from flashu_compile.recipe.config import MMUConfig, T2IConfig
from flashu_compile.recipe.decisions import Decisions
from flashu_compile.recipe.recipe import Recipe
from tests.support.tiny import CONFIG, VAE, tiny_model, tokenizer

Places = dict[str, tuple[int, int]]


pytestmark = pytest.mark.slow  # a bundle with eight engines


def _kept(seed: int, stacks: dict[str, int]) -> dict[str, dict[int, np.ndarray]]:
    random = np.random.default_rng(seed)
    sizes = {"llm": CONFIG.llm, "semantic": CONFIG.semantic, "head": CONFIG.head}
    return {
        stack: {
            block: np.sort(random.permutation(sizes[stack].intermediate_size)[:width])
            for block in range(sizes[stack].num_hidden_layers)
        }
        for stack, width in stacks.items()
    }


RECIPE = Recipe(
    "both",
    T2IConfig(points=4, pruning={"llm": 0.4, "semantic": 0.3, "head": 0.5}, full_ffn=0.5),
    MMUConfig(pruning={"llm": 0.3, "semantic": 0.5}),
    {
        "t2i": Decisions(_kept(0, {"llm": 38, "semantic": 32, "head": 32})),
        "mmu": Decisions(_kept(1, {"llm": 44, "semantic": 24})),
    },
)


@pytest.fixture(scope="module")
def model() -> Showo2:
    """With an embedding that the logits reuse."""
    return tiny_model(llm=type(CONFIG.llm)(**{**vars(CONFIG.llm), "tie_word_embeddings": True}))


@pytest.fixture(scope="module")
def bundle(model: Showo2, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    output = tmp_path_factory.mktemp("both") / "bundle"
    return flashu_compile.export(
        model, ["t2i", "mmu"], recipe=RECIPE, output=output, vae=VAE, tokenizer=tokenizer()
    )


@pytest.fixture(scope="module")
def places(bundle: Bundle) -> dict[str, Places]:
    """By engine and initializer, offset and length in the store."""
    found: dict[str, Places] = {}
    for engine in bundle.manifest.engines:
        graph = onnx.load(bundle.path / engine.file, load_external_data=False).graph
        assert not [node for node in graph.node if node.op_type == "Slice" and "mlp" in node.name]
        entries = {i.name: {e.key: e.value for e in i.external_data} for i in graph.initializer}
        found[engine.name] = {n: (int(e["offset"]), int(e["length"])) for n, e in entries.items() if e}
    return found


def test_the_store_is_as_large_as_the_tensors_that_are_used(
    bundle: Bundle, model: Showo2, places: dict[str, Places]
) -> None:
    """Padding between tensors counts, at this geometry above all; so do tables that the compiler made."""
    names = {name.removeprefix("model.") for engine in places.values() for name in engine}
    used = {t.data_ptr(): t.nbytes for n, t in model.state_dict().items() if n in names}
    sizes = json.loads((bundle.path / REPORT).read_text())["sizes"]
    assert sizes["weights_bytes"] == (bundle.path / WEIGHTS).stat().st_size
    assert sizes["weights_bytes"] <= 1.02 * sum(used.values())
    assert sizes["graphs_bytes"] > 0
    assert sizes["references_bytes"] > 0


@pytest.mark.parametrize(
    ("whole", "pruned", "root", "layers", "widths"),
    [
        ("denoise", "denoise_pruned", "showo.model.layers", "gate_proj|up_proj|down_proj", (64, 38)),
        ("denoise", "language", "showo.model.layers", "gate_proj|up_proj|down_proj", (64, 44)),
        ("denoise", "denoise_pruned", "und_trans", "fc1|fc2", (48, 32)),
        ("denoise", "vision", "und_trans", "fc1|fc2", (48, 24)),
        ("denoise", "denoise_pruned", "diffusion_head", "gate_proj|up_proj|down_proj", (64, 32)),
    ],
)
def test_pruned_weights_are_ranges_of_the_whole_ones(
    places: dict[str, Places], whole: str, pruned: str, root: str, layers: str, widths: tuple[int, int]
) -> None:
    name = re.compile(rf".*{root}.*\.({layers})\.weight")
    found = {n for n in places[whole] if name.fullmatch(n)} & places[pruned].keys()
    assert found
    for weight in found:
        (start, length), (first, part) = places[whole][weight], places[pruned][weight]
        assert start <= first
        assert first + part <= start + length
        assert part * widths[0] == length * widths[1]


def test_a_tied_embedding_is_stored_once(bundle: Bundle, places: dict[str, Places]) -> None:
    table = CONFIG.llm.vocab_size * CONFIG.llm.hidden_size * 4
    tables = {place for engine in places.values() for place in engine.values() if place[1] == table}
    assert len(tables) == 1
    assert all(
        table in {length for _, length in places[n].values()} for n in ("denoise_prologue", "language")
    )
