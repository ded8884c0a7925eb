"""A small real bundle: ONNX graphs with the signatures of a model's engines, whose results have a closed form.

`denoise` is linear: velocity = SLOPE * latents + TEXT * (sum of the prompt's ids that are not padding) + TIME * t,
plus a large number if prompt and tail together are not as long as they should be. `vae_decode` is depth-to-space.
`vision` is space-to-depth. `language` says "light" of a bright picture and "dark" of a dark one, nothing to a
question that begins with n, and z without end to one that begins with z. Its tables lie in `weights.bin`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from flashu_compile.bundle.manifest import EngineSpec, FileEntry, Manifest, Origin, TensorSpec, file_entry
from flashu_compile.bundle.settings import GenerationSettings, UnderstandingSettings
from flashu_compile.models.showo2.prompts import (
    BOI,
    BOS,
    EOI,
    EOS,
    IMAGE_PAD,
    PAD,
    PromptCodec,
    picture_rules,
)
from flashu_compile.recipe.config import T2IConfig
from flashu_compile.recipe.recipe import Recipe
from tests.support.plans import uniform_plan

SLOPE, TEXT, TIME = -0.5, 1e-3, 0.25
LATENT_SHAPE = (12, 4, 4)
PICTURE = 8
POINTS, GUIDANCE, SHIFT = 6, 3.0, 3.0
RECIPE = Recipe("exact", T2IConfig(POINTS, GUIDANCE, SHIFT))
MAX_NEW_TOKENS = 12
ORIGIN = Origin({"model.safetensors": FileEntry("c" * 64, 1000)}, "somebody/tiny", "a" * 40, "mit")
MAX_QUESTION_TOKENS = 200

_DTYPES = {TensorProto.FLOAT: "float32", TensorProto.INT64: "int64", TensorProto.BOOL: "bool"}


def byte_tokenizer() -> Tokenizer:
    """One token a byte, after the six special ones: 262 in all."""
    special = [PAD, BOS, EOS, BOI, EOI, IMAGE_PAD]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*special, *letters])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


CODEC = PromptCodec(byte_tokenizer())
FACTS = GenerationSettings(
    latent_shape=LATENT_SHAPE,
    sequence_length=60,
    span_length=17,
    max_prompt_tokens=39,
    picture_size=(PICTURE, PICTURE),
    template=CODEC.generation,
    pad_id=CODEC.pad,
)
QUESTIONS = UnderstandingSettings(
    CODEC.understanding,
    (CODEC.eos,),
    MAX_QUESTION_TOKENS,
    MAX_NEW_TOKENS,
    pictures=picture_rules(PICTURE),
)


def _value(name: str, kind: int, *shape: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, list(shape))


def _constant(name: str, values: Any, dtype: str = "int64") -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(values, dtype=dtype), name)


def _model(nodes: list[Any], inputs: list[Any], outputs: list[Any], constants: list[Any]) -> onnx.ModelProto:
    nodes = [helper.make_node(op, takes, gives, **attributes) for op, takes, gives, attributes in nodes]
    graph = helper.make_graph(nodes, "engine", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def _denoise() -> onnx.ModelProto:
    rows = FACTS.sequence_length - FACTS.span_length
    return _model(
        [
            ("Cast", ["prompt_ids"], ["ids"], {"to": TensorProto.FLOAT}),
            ("Cast", ["prompt_mask"], ["mask"], {"to": TensorProto.FLOAT}),
            ("Mul", ["ids", "mask"], ["live"], {}),
            ("ReduceSum", ["live", "one"], ["sum"], {"keepdims": 1}),
            ("Mul", ["sum", "text_scale"], ["text"], {}),
            ("Unsqueeze", ["text", "last_two"], ["text4"], {}),
            ("Unsqueeze", ["timestep", "last_three"], ["time4"], {}),
            ("Mul", ["time4", "time_scale"], ["time"], {}),
            ("Concat", ["prompt_ids", "tail_ids"], ["all_ids"], {"axis": 1}),
            ("Shape", ["all_ids"], ["row_count"], {"start": 1, "end": 2}),
            ("Sub", ["row_count", "rows"], ["surplus"], {}),
            ("Cast", ["surplus"], ["wrong"], {"to": TensorProto.FLOAT}),
            ("Mul", ["wrong", "thousand"], ["penalty"], {}),
            ("Mul", ["latents", "slope"], ["linear"], {}),
            ("Sum", ["linear", "text4", "time", "penalty"], ["velocity"], {}),
        ],
        [
            _value("prompt_ids", TensorProto.INT64, "batch", "prompt"),
            _value("prompt_mask", TensorProto.BOOL, "batch", "prompt"),
            _value("tail_ids", TensorProto.INT64, "batch", "tail"),
            _value("latents", TensorProto.FLOAT, 1, *LATENT_SHAPE),
            _value("timestep", TensorProto.FLOAT, 1),
        ],
        [_value("velocity", TensorProto.FLOAT, "batch", *LATENT_SHAPE)],
        [
            _constant("one", [1]),
            _constant("last_two", [2, 3]),
            _constant("last_three", [1, 2, 3]),
            _constant("rows", [rows]),
            _constant("text_scale", TEXT, "float32"),
            _constant("time_scale", TIME, "float32"),
            _constant("thousand", 1000, "float32"),
            _constant("slope", np.full((LATENT_SHAPE[0], 1, 1), SLOPE), "float32"),
        ],
    )


def _vae_decode() -> onnx.ModelProto:
    return _model(
        [("DepthToSpace", ["latents"], ["pixels"], {"blocksize": 2})],
        [_value("latents", TensorProto.FLOAT, "batch", *LATENT_SHAPE)],
        [_value("pixels", TensorProto.FLOAT, "batch", 3, PICTURE, PICTURE)],
        [],
    )


def _vision() -> onnx.ModelProto:
    return _model(
        [
            ("SpaceToDepth", ["pixels"], ["depth"], {"blocksize": 2}),
            ("Reshape", ["depth", "flat"], ["rows"], {}),
            ("Transpose", ["rows"], ["image_embeds"], {"perm": [0, 2, 1]}),
        ],
        [_value("pixels", TensorProto.FLOAT, "batch", 3, PICTURE, PICTURE)],
        [_value("image_embeds", TensorProto.FLOAT, "batch", 16, 12)],
        [_constant("flat", [0, 12, 16])],
    )


def _language(tokenizer: Tokenizer) -> onnx.ModelProto:
    size = tokenizer.get_vocab_size()
    following, opening = np.zeros((size, size), np.float32), np.zeros((size, size), np.float32)
    end = tokenizer.token_to_id(EOS)
    for word in ("light", "dark"):
        ids = [tokenizer.token_to_id(letter) for letter in word]
        for token, then in zip(ids, [*ids[1:], end], strict=True):
            following[token, then] = 100
    opening[tokenizer.token_to_id("n"), end] = 1000
    opening[tokenizer.token_to_id("z"), tokenizer.token_to_id("z")] = 1000
    brightness = np.zeros(size, np.float32)
    brightness[tokenizer.token_to_id("l")], brightness[tokenizer.token_to_id("d")] = 1, -1
    return _model(
        [
            ("Gather", ["suffix_ids", "last"], ["last_id"], {"axis": 1}),
            ("Gather", ["suffix_ids", "second"], ["second_id"], {"axis": 1}),
            ("Gather", ["following", "last_id"], ["from_last"], {}),
            ("Gather", ["opening", "second_id"], ["from_second"], {}),
            ("ReduceMean", ["image_embeds"], ["mean3"], {"axes": [1, 2], "keepdims": 0}),
            ("Unsqueeze", ["mean3", "one"], ["mean"], {}),
            ("Mul", ["mean", "brightness"], ["seen"], {}),
            ("ReduceSum", ["prefix_ids", "one"], ["prefix_sum"], {"keepdims": 1}),
            ("Cast", ["prefix_sum"], ["prefix"], {"to": TensorProto.FLOAT}),
            ("Sum", ["from_last", "from_second", "seen", "prefix"], ["logits"], {}),
        ],
        [
            _value("prefix_ids", TensorProto.INT64, "batch", "prefix"),
            _value("image_embeds", TensorProto.FLOAT, "batch", 16, 12),
            _value("suffix_ids", TensorProto.INT64, "batch", "suffix"),
        ],
        [_value("logits", TensorProto.FLOAT, "batch", size)],
        [
            _constant("last", -1),
            _constant("second", 1),
            _constant("one", [1]),
            _constant("following", following, "float32"),
            _constant("opening", opening, "float32"),
            _constant("brightness", brightness, "float32"),
        ],
    )


def _sample_inputs(name: str) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    pixels = random.standard_normal((2, 3, PICTURE, PICTURE)).astype(np.float32)
    latents = random.standard_normal((2, *LATENT_SHAPE)).astype(np.float32)
    ids = random.integers(6, 262, (2, 43))
    samples: dict[str, dict[str, np.ndarray]] = {
        "denoise": {
            "prompt_ids": ids[:, :20],
            "prompt_mask": np.arange(20)[None] >= np.array([[0], [9]]),
            "tail_ids": ids[:, 20:],
            "latents": latents[:1],
            "timestep": np.array([0.25], np.float32),
        },
        "vae_decode": {"latents": latents},
        "vision": {"pixels": pixels},
        "language": {
            "prefix_ids": ids[:, :5],
            "image_embeds": pixels.reshape(2, 16, 12),
            "suffix_ids": ids[:, 5:9],
        },
    }
    return samples[name]


def _spec(name: str, task: str, model: onnx.ModelProto) -> EngineSpec:
    def tensor(value: onnx.ValueInfoProto) -> TensorSpec:
        kind = value.type.tensor_type
        shape = tuple(d.dim_param or d.dim_value for d in kind.shape.dim)
        return TensorSpec(value.name, _DTYPES[kind.elem_type], shape)

    graph = model.graph
    inputs, outputs = tuple(map(tensor, graph.input)), tuple(map(tensor, graph.output))
    return EngineSpec(name, task, f"{name}.onnx", inputs, outputs, f"references/{name}.safetensors")


def _store_weights(model: onnx.ModelProto, store: bytearray) -> None:
    """Move the float initializers of some size to the end of the store."""
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) > 0:
            data = numpy_helper.to_array(tensor).tobytes()
            onnx.external_data_helper.set_external_data(tensor, "weights.bin", len(store), len(data))
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            store += data


def write_bundle(directory: Path, tasks: tuple[str, ...] = ("t2i", "mmu")) -> Path:
    """Write the bundle and return its directory."""
    (directory / "references").mkdir(parents=True)
    tokenizer = byte_tokenizer()
    models_by_task = {
        "t2i": {"denoise": _denoise(), "vae_decode": _vae_decode()},
        "mmu": {"vision": _vision(), "language": _language(tokenizer)},
    }
    store, specs = bytearray(), []
    for task in tasks:
        for name, model in models_by_task[task].items():
            spec = _spec(name, task, model)
            specs.append(spec)
            inputs = _sample_inputs(name)
            outputs = ReferenceEvaluator(model).run(None, inputs)
            tensors = {f"input.{n}": np.ascontiguousarray(v) for n, v in inputs.items()}
            names = [tensor.name for tensor in spec.outputs]
            tensors |= {f"output.{n}": np.ascontiguousarray(v) for n, v in zip(names, outputs, strict=True)}
            save_file(tensors, directory / spec.reference)
            _store_weights(model, store)
            (directory / spec.file).write_bytes(model.SerializeToString())
    (directory / "weights.bin").write_bytes(bytes(store))
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "recipe.json").write_text(RECIPE.to_json())
    if "t2i" in tasks:
        plan = uniform_plan(POINTS, GUIDANCE, SHIFT, "denoise")
        (directory / "plan.json").write_text(plan.to_json())
    report = {
        "engines": {
            spec.name: {
                "nodes": 7,
                "operators": {"Add": 7},
                "parameters": {"llm": 1536, "head": 12},
                "flops": {"llm": 2_500_000},
                "errors": {spec.outputs[0].name: 1e-7},
            }
            for spec in specs
        },
        "passes": [
            {"program": "denoise", "name": "RemoveDeadCode", "kind": "exact", "changes": ["x"], "error": 0.0}
        ],
        "sizes": {"checkpoint_bytes": 1000, "weights_bytes": len(store)},
    }
    (directory / "report.json").write_text(json.dumps(report))
    write_manifest(directory, tuple(specs), tasks)
    return directory


def write_manifest(directory: Path, specs: tuple[EngineSpec, ...], tasks: tuple[str, ...]) -> None:
    files = [p for p in sorted(directory.rglob("*")) if p.is_file() and p.name != "manifest.json"]
    manifest = Manifest(
        model="tiny",
        tasks=tasks,
        backend="onnxruntime",
        precision="float32",
        recipe="exact",
        engines=specs,
        generation=FACTS if "t2i" in tasks else None,
        understanding=QUESTIONS if "mmu" in tasks else None,
        versions={"flashu-compile": "0"},
        files={p.relative_to(directory).as_posix(): file_entry(p) for p in files},
        origins={"model": ORIGIN, "vae": Origin(None)},
    )
    (directory / "manifest.json").write_text(manifest.to_json())


def edit_json(path: Path, **changes: Any) -> None:
    """Replace top-level entries of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def accept_changes(directory: Path, name: str) -> None:
    """Make the manifest list a file as it now is, as an honest builder of an odd bundle would."""
    data = (directory / name).read_bytes()
    manifest = json.loads((directory / "manifest.json").read_text())
    entry = FileEntry(hashlib.sha256(data).hexdigest(), len(data))
    files = {**manifest["files"], name: {"sha256": entry.sha256, "bytes": entry.bytes}}
    edit_json(directory / "manifest.json", files=files)


def flip_byte(path: Path, position: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))
