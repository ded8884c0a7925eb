"""Everything that reads files, each with files that it takes."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch._export.serde.serialize import serialize

from examples.showo2_shapes.saving import save_model, save_wan
from flashu_compile.bundle.files import BundleFiles
from flashu_compile.bundle.images import read_picture
from flashu_compile.bundle.manifest import EngineSpec, FileEntry, TensorSpec, read_manifest
from flashu_compile.bundle.profiles import InputShapes
from flashu_compile.cli.looking import _inspect_bundle
from flashu_compile.compiler.cache import EngineCache
from flashu_compile.compiler.captured import BuiltEngines, CapturedModel
from flashu_compile.compiler.kept_engines import EngineShelf
from flashu_compile.compiler.progress import ProgressReporter
from flashu_compile.errors import FlashuError
from flashu_compile.evaluation.data import read_data
from flashu_compile.exporters.backends import find_backend
from flashu_compile.exporters.engine_build import EngineBuild
from flashu_compile.exporters.torch_programs import TorchModel
from flashu_compile.looking.bundle_diff import diff
from flashu_compile.measure.samples import calibration_samples
from flashu_compile.models.loading import LoadedModel, load_model
from flashu_compile.models.showo2.adapter import Showo2Adapter
from flashu_compile.models.showo2.config import SemanticConfig
from flashu_compile.models.wan_vae import WanVAE
from flashu_compile.models.weights import read_weight_file
from flashu_compile.passes.manager import PassRecord
from flashu_compile.recipe.decisions import Decisions, Phase
from flashu_compile.recipe.presets import preset
from flashu_compile.recipe.recipe import Recipe
from flashu_compile.runtime import load
from flashu_compile.runtime.backends.torch import read_program
from flashu_compile.runtime.backends.torch_tensorrt import BuiltFor, Target, built_text, read_built
from flashu_compile.runtime.checked_graph import read_graph
from flashu_compile.runtime.choice import Choice, read_choice
from flashu_compile.runtime.packed_weights import RECORD, PackedRecord, read_record
from flashu_compile.runtime.tensorrt_engine import (
    BuildOptions,
    BuiltEngine,
    PlannedEngine,
    TensorRTPlan,
    read_plan,
)
from flashu_compile.runtime.verify import verify
from tests.runtime.tiny_bundle import write_bundle, write_manifest
from tests.support import tiny_emu3, tiny_lm, tiny_picture_lm
from tests.support.tiny import CONFIG, VAE, tiny_model, tokenizer

Read = Callable[[Random], object]


@dataclasses.dataclass(frozen=True)
class Reader:
    """`read` reads all of `files`, of which one is damaged at a time; those listed twice are twice as often."""

    files: list[Path]
    read: Read


def _unchecked(folder: Path) -> BundleFiles:
    return BundleFiles(folder, read_manifest(folder), verify_hashes=False)


def _loading(folder: Path) -> Reader:
    """`verify` refuses whatever `load` refuses."""
    write_bundle(folder)
    names = ("manifest.json", "plan.json", "recipe.json", "tokenizer.json")

    def read(rng: Random) -> None:
        checked = rng.random() < 0.1
        try:
            load(folder, threads=1, verify_hashes=False).plan_for(5)
        except FlashuError:
            assert not checked or not verify(folder, threads=1).ok
            raise
        if checked:
            verify(folder, threads=1)

    return Reader([folder / name for name in names for _ in range(1 + (name == "manifest.json"))], read)


def _references(folder: Path) -> Reader:
    write_bundle(folder)
    return Reader(sorted((folder / "references").iterdir()), lambda _: verify(folder, threads=1))


def _looking(folder: Path) -> Reader:
    write_bundle(folder / "one")
    write_bundle(folder / "two")
    manifest = json.loads((folder / "one" / "manifest.json").read_text())

    def read(rng: Random) -> None:
        as_json = rng.random() < 0.5
        path = folder / "one" / "report.json"
        if path.is_file() and not path.is_symlink() and path.stat().st_size < 1 << 20:
            _relist(folder / "one", manifest)
        with contextlib.redirect_stdout(io.StringIO()):
            _inspect_bundle(folder / "one", plan=False, as_json=as_json)
            diff(folder / "one", folder / "two")

    return Reader([folder / "one" / "report.json"], read)


def _relist(folder: Path, manifest: dict[str, Any]) -> None:
    """Make the manifest list the report as it now is, as who made it so would."""
    data = (folder / "report.json").read_bytes()
    entry = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    changed = {**manifest, "files": {**manifest["files"], "report.json": entry}}
    (folder / "manifest.json").write_text(json.dumps(changed))


def _recipes(folder: Path) -> Reader:
    kept = {"llm": {0: np.arange(8), 1: np.array([1, 5])}}
    phases = (Phase(0.0, {"llm": (1,)}), Phase(0.5, {"llm": ()}))
    recipe = Recipe(
        "fuzzed", preset("flashu").t2i, decisions={"t2i": Decisions(kept, phases), "mmu": Decisions(kept)}
    )
    recipe.save(folder)

    def read(_: Random) -> None:
        found = Recipe.load(folder)
        assert Recipe.from_json(found.to_json()).to_json() == found.to_json()

    return Reader([folder / "recipe.json", folder / "recipe.json", folder / "recipe.safetensors"], read)


def _own_models(folder: Path) -> Reader:
    save_model(folder, tiny_model(), tokenizer(), VAE)
    names = ("config.json", "config.json", "config.json", "model.safetensors", "tokenizer.json")
    return Reader([folder / name for name in names], lambda _: load_model(folder))


def _published_models(folder: Path) -> Reader:
    network = tiny_model(semantic=SemanticConfig(
        hidden_size=768, intermediate_size=16, num_hidden_layers=1, num_attention_heads=12
    ))  # fmt: skip
    llm = folder / "llm"
    llm.mkdir(parents=True)
    tokenizer().save(str(llm / "tokenizer.json"))
    sizes = dataclasses.asdict(CONFIG.llm)
    facts = {"model_type": "qwen2", "hidden_act": "silu", "use_sliding_window": False, **sizes,
             "rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}  # fmt: skip
    (llm / "config.json").write_text(json.dumps(facts))
    settings = {"_class_name": "Showo2Qwen2_5", "hidden_size": 32, "image_latent_dim": 12, "patch_size": 2,
                "clip_latent_dim": 768, "num_diffusion_layers": 2, "image_latent_height": 3, "image_latent_width": 3,
                "add_time_embeds": True, "llm_model_path": str(llm), "license": "apache-2.0"}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings))
    state = network.state_dict()
    placed = {name: f"part-{index % 2}.safetensors" for index, name in enumerate(sorted(state))}
    for part in set(placed.values()):
        save_file({n: state[n].clone() for n, at in placed.items() if at == part}, folder / part)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": placed}))
    files = [folder / "config.json", folder / "config.json", llm / "config.json", llm / "config.json", index]
    return Reader(files, lambda _: load_model(folder))


def _samples(folder: Path) -> Reader:
    folder.mkdir()
    path = folder / "calibration.json"
    told = {"prompts": ["a", "b"], "questions": [{"image": "a.png", "question": "what?"}, ["b.png", "why?"]]}
    path.write_text(json.dumps(told))
    return Reader([path], lambda _: calibration_samples(path))


class _Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("shift", torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.shift


def _torch_programs(folder: Path) -> Reader:
    folder.mkdir()
    exported = torch.export.export(_Two(), (torch.ones(2, 3),))
    tensors = dict(exported.state_dict)
    keys = {"two": {name: name for name in tensors}}
    save_file(tensors, folder / "weights.safetensors", metadata={"engines": json.dumps(keys)})
    (folder / "two.json").write_bytes(serialize(exported).exported_program)
    spec = EngineSpec(
        "two", "t2i", "two.json", (TensorSpec("x", "float32", (2, 3)),),
        (TensorSpec("y", "float32", (2, 3)),), "none",
    )  # fmt: skip
    write_manifest(folder, (spec,), ())
    files = [folder / "weights.safetensors", folder / "two.json"]
    return Reader(files, lambda _: read_program(_unchecked(folder), spec))


def _tensorrt(folder: Path) -> Reader:
    folder.mkdir()
    profile = (InputShapes("x", (1, 2), (1, 4), (2, 8)),)
    built = BuiltEngine("a.engine", "11.0", "a device", "9.0")
    plan = TensorRTPlan(BuildOptions(), {"a": PlannedEngine("a.tensorrt.onnx", profile, built)})
    (folder / "tensorrt.json").write_text(plan.to_json())
    target = Target("a device", "9.0", "2.13", "11.0")
    (folder / "torch_tensorrt.json").write_text(built_text({"a": BuiltFor(target, profile)}))
    write_manifest(folder, (), ())
    files = [folder / "tensorrt.json", folder / "torch_tensorrt.json"]

    def read(_: Random) -> None:
        unchecked = _unchecked(folder)
        if read_plan(unchecked).carries_code:
            pass
        read_built(unchecked)

    return Reader(files, read)


def _kept_engines(folder: Path) -> Reader:
    """Damaged entries are built anew, with a warning."""
    model = LoadedModel("tiny", tiny_model(), VAE, tokenizer(), adapter=Showo2Adapter())
    source = CapturedModel.from_loaded(model, ["mmu"], ProgressReporter(None))
    (captured, *_) = source.programs.values()
    folder.mkdir()
    shelf = EngineShelf(source, find_backend("torch"), EngineCache(folder))
    weight = captured.spec.module.state_dict()
    name = next(iter(weight))
    packed = TorchModel((TensorSpec("x", "int64", ("batch", 2)),), (), b"{}", {"w": weight[name]})
    engine = EngineBuild("vision", "mmu", packed, {"x": torch.ones(2)}, {"y": torch.ones(3)})
    record = PassRecord("vision", "RemoveDeadCode", "exact", ("x",), 0.0)
    made = BuiltEngines((engine,), {"vision": {"nodes": 3}}, (record,))
    shelf._made(captured, "key", lambda: made)
    (entry,) = folder.iterdir()
    inner = folder / "entry.safetensors"
    inner.write_bytes(entry.read_bytes()[32:])
    assert shelf._from_disk(captured, "key") is not None

    def read(rng: Random) -> None:
        if inner.is_file() and not inner.is_symlink() and inner.stat().st_size < 1 << 20:
            data = inner.read_bytes()
            entry.write_bytes(hashlib.sha256(data).digest() + data)
        found = shelf._from_disk(captured, "key")
        assert found is None or len(found.engines) <= 1

    return Reader([inner], read)


def _pictures(folder: Path) -> Reader:
    folder.mkdir()
    picture = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    paths = [folder / f"a.{suffix}" for suffix in ("png", "jpg", "webp", "bmp", "gif", "tiff", "ppm")]
    for path in paths:
        picture.save(path)

    def read(_: Random) -> None:
        for path in paths:
            read_picture(path)

    return Reader(paths, read)


def _graphs(folder: Path) -> Reader:
    write_bundle(folder)
    specs = read_manifest(folder).engines

    def read(_: Random) -> None:
        files = _unchecked(folder)
        for spec in specs:
            read_graph(files, spec)

    return Reader([folder / spec.file for spec in specs], read)


def _wan_vaes(folder: Path) -> Reader:
    autoencoder: Any = diffusers.AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    save_wan(folder, WanVAE(autoencoder))
    return Reader([folder / "config.json"], lambda _: WanVAE.load(folder))


def _pickles(folder: Path) -> Reader:
    folder.mkdir()
    torch.save({"a": torch.ones(3), "b": torch.zeros(2, 2)}, folder / "weights.bin")
    return Reader([folder / "weights.bin"], lambda _: read_weight_file(folder / "weights.bin", None))


def _kept_records(folder: Path) -> Reader:
    """What is kept in the user's cache for bundles: choices of a backend, and records of packed weights."""
    folder.mkdir()
    choice = Choice(
        "onnxruntime", {"onnxruntime": {"t2i": 1.5}}, {"openvino": "It does not work here. " * 20}
    )
    packed = PackedRecord("/a/bundle", "a" * 64, {"weights.bin": FileEntry("b" * 64, 1 << 30)}, 1)
    paths = [folder / "choice.json", folder / RECORD]
    paths[0].write_text(json.dumps(dataclasses.asdict(choice)))
    paths[1].write_text(json.dumps(dataclasses.asdict(packed)))

    def read(_: Random) -> None:
        read_choice(paths[0])
        read_record(paths[1])

    return Reader(paths, read)


def _evaluation_data(folder: Path) -> Reader:
    folder.mkdir()
    Image.new("RGB", (4, 4)).save(folder / "a.png")
    records = [
        {"prompt": "a", "kind": "x", "key": "y"},
        {"image": "a.png", "question": "what?", "answer": "a"},
    ]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    (folder / "data.json").write_text(json.dumps({"prompts": ["a", records[0]], "questions": records[1:]}))
    paths = [folder / "data.jsonl", folder / "data.json"]

    def read(_: Random) -> None:
        for path in paths:
            read_data(path)

    return Reader(paths, read)


def _language_models(folder: Path) -> Reader:
    tiny_lm.save(folder, tiny_lm.language_model(), tiny_lm.tokenizer())
    names = ("config.json", "config.json", "generation_config.json", "generation_config.json")
    others = ("tokenizer_config.json", "tokenizer.json", "chat_template.jinja")
    paths = [folder / name for name in (*names, *others) if (folder / name).is_file()]
    return Reader(paths, lambda _: load_model(folder))


def _picture_models(folder: Path) -> Reader:
    tiny_picture_lm.save(folder, tiny_picture_lm.janus(), apart=True)
    names = ("preprocessor_config.json", "preprocessor_config.json", "config.json", "tokenizer_config.json")
    paths = [folder / name for name in (*names, "chat_template.jinja")]
    return Reader(paths, lambda _: load_model(folder))


def _emu3_models(folder: Path) -> Reader:
    tiny_picture_lm.save(folder, tiny_emu3.emu3(), apart=True)
    names = ("preprocessor_config.json", "preprocessor_config.json", "config.json", "tokenizer_config.json")
    return Reader([folder / name for name in names], lambda _: load_model(folder))


#: Each with the number of its cases among 50.
READERS: dict[str, tuple[int, Callable[[Path], Reader]]] = {
    "load": (7, _loading),
    "references": (1, _references),
    "reports": (4, _looking),
    "recipes": (5, _recipes),
    "models of ours": (2, _own_models),
    "published models": (2, _published_models),
    "samples": (3, _samples),
    "torch programs": (2, _torch_programs),
    "tensorrt": (4, _tensorrt),
    "kept engines": (2, _kept_engines),
    "pictures": (3, _pictures),
    "graphs": (3, _graphs),
    "Wan VAEs": (1, _wan_vaes),
    "pickles": (2, _pickles),
    "evaluation data": (2, _evaluation_data),
    "records of the cache": (2, _kept_records),
    "language models": (2, _language_models),
    "models that read pictures": (2, _picture_models),
    "models of pictures of any size": (1, _emu3_models),
}
