"""The English of the shapes world: captions, their parser, and questions with answers.

Everything is lower case and without punctuation other than the question mark. `caption` without a
generator gives the canonical wording; with one it draws a paraphrase. `parse_caption` reads
both, and the digits 1 to 4.

`questions` asks only what the picture settles: an object is called "the red circle" only when
it is the only one, and a relation is asked about only where the dominant-axis rule of
`scenes.relation_between` decides. Answers are balanced where they could be guessed: yes and no
are equally likely, "no" is mostly a near miss (right colour, wrong shape), and counts are drawn by
answer first. Questions about a training scene never name an unseen (colour, shape) pair, not even
to deny it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, TypeVar

import numpy as np

from examples.showo2_shapes.world.scenes import (
    COLORS,
    MAX_OBJECTS,
    OPPOSITE,
    PAIRS,
    RELATIONS,
    SEEN_PAIRS,
    SHAPES,
    SIZES,
    UNSEEN_PAIRS,
    ObjectSpec,
    PromptSpec,
    Scene,
    SceneObject,
    relation_between,
)
from flashu_compile.errors import InputError

QuestionKind = Literal["colour", "shape", "count", "relation", "existence"]
QUESTION_KINDS: tuple[QuestionKind, ...] = ("colour", "shape", "count", "relation", "existence")
_T = TypeVar("_T")

NUMBERS: tuple[str, ...] = ("zero", "one", "two", "three", "four")
PLURALS: dict[str, str] = {
    "circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses",
}  # fmt: skip

# The first wording of each list is the canonical one.
_SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
_RELATION_WORDS = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
_TWO_WORDS = ("and", "with", "next to")
_PREFIXES_ONE = ("", "there is", "a picture of", "an image of", "a drawing of")
_PREFIXES_MANY = ("", "there are", "a picture of", "an image of", "a drawing of")
_CANONICAL_SHARE = 0.4

# How soon a count is asked about, by its answer: ones would otherwise be most of the answers.
_COUNT_WEIGHTS = (0.35, 0.6, 1.0, 1.6, 1.6)

_SINGULARS = {plural: shape for shape, plural in PLURALS.items()}
_SIZE_OF = {word: size for size, words in _SIZE_WORDS.items() for word in words}
_RELATION_OF = {word: rel for rel, words in _RELATION_WORDS.items() for word in words}
_COUNT_OF = {word: n for n in range(1, 5) for word in (NUMBERS[n], str(n))}


@dataclass(frozen=True)
class QA:
    """A question about a scene and its one right answer."""

    question: str
    answer: str
    kind: QuestionKind


def _choose(rng: np.random.Generator | None, options: Sequence[_T]) -> _T:
    return options[0] if rng is None else options[int(rng.integers(len(options)))]


def _thing(
    obj: ObjectSpec | SceneObject,
    size_word: str | None = None,
    plural: bool = False,
) -> str:
    noun = PLURALS[obj.shape] if plural else obj.shape
    return " ".join(word for word in (size_word, obj.color, noun) if word)


def caption(spec: PromptSpec, rng: np.random.Generator | None = None) -> str:
    """The prompt in words: the canonical wording, or with a generator a random paraphrase."""
    if rng is not None and rng.random() < _CANONICAL_SHARE:
        rng = None
    words = [_choose(rng, _SIZE_WORDS[o.size]) if o.size else None for o in spec.objects]
    if spec.kind == "count":
        plural = spec.count > 1
        text = f"{NUMBERS[spec.count]} {_thing(spec.objects[0], words[0], plural)}"
        prefix = _choose(rng, _PREFIXES_MANY if plural else _PREFIXES_ONE)
        return f"{prefix} {text}".strip()
    things = ["a " + _thing(o, w) for o, w in zip(spec.objects, words, strict=True)]
    joint = ""
    if spec.kind == "two":
        joint = f" {_choose(rng, _TWO_WORDS)} "
    elif spec.relation is not None:
        joint = f" {_choose(rng, _RELATION_WORDS[spec.relation])} "
    return f"{_choose(rng, _PREFIXES_ONE)} {joint.join(things)}".strip()


def _either(words: Sequence[str]) -> str:
    return "|".join(sorted(words, key=len, reverse=True))


_NOUN_PHRASE = (
    rf"(?P<{{0}}number>an?|the|{_either(list(_COUNT_OF))}) "
    rf"(?:(?P<{{0}}size>{_either(list(_SIZE_OF))}) )?"
    rf"(?P<{{0}}color>{_either(list(COLORS))}) (?P<{{0}}shape>{_either([*_SINGULARS, *SHAPES])})"
)
_JOINT = _either([*_RELATION_OF, *_TWO_WORDS])
_PREFIX = _either([p for p in {*_PREFIXES_ONE, *_PREFIXES_MANY} if p])
_CAPTION = re.compile(
    rf"(?:(?:{_PREFIX}) )?{_NOUN_PHRASE.format('a_')}"
    rf"(?: (?:(?:is|that is) )?(?P<joint>{_JOINT}) {_NOUN_PHRASE.format('b_')})?"
)


def parse_caption(text: str) -> PromptSpec:
    """The prompt a caption asks for: the inverse of `caption`, paraphrases included.

    Raises:
        InputError: the text is no caption of the shapes world.
    """
    match = _CAPTION.fullmatch(" ".join(text.lower().split()).rstrip(" ."))
    if match is None:
        raise InputError(
            f"cannot read {text!r} as a shapes caption; write for example 'a red circle', "
            f"'three small blue squares' or 'a red circle left of a blue square' "
            f"(colours: {', '.join(COLORS)}; shapes: {', '.join(SHAPES)})"
        )
    found = match.groupdict()

    def read(which: str) -> tuple[int | None, ObjectSpec]:
        number = _COUNT_OF.get(found[which + "number"])
        noun = found[which + "shape"]
        if (noun in _SINGULARS) != ((number or 1) > 1):
            raise InputError(
                f"cannot read {text!r}: {found[which + 'number']!r} and {noun!r} disagree in number"
            )
        size = found[which + "size"]
        shape = _SINGULARS.get(noun, noun)
        return number, ObjectSpec(found[which + "color"], shape, _SIZE_OF[size] if size else None)

    number, first = read("a_")
    joint = found["joint"]
    if joint is None:
        if number is None:
            return PromptSpec("single", (first,))
        return PromptSpec("count", (first,), count=number)
    other, second = read("b_")
    if (number or 1) > 1 or (other or 1) > 1:
        raise InputError(f"cannot read {text!r}: of two different objects, ask for one each")
    if joint in _RELATION_OF:
        return PromptSpec("relation", (first, second), relation=_RELATION_OF[joint])
    return PromptSpec("two", (first, second))


def _only(scene: Scene, **attributes: str) -> SceneObject | None:
    """The one object with these attributes, or None when there are none or several."""
    found = [o for o in scene.objects if all(getattr(o, k) == v for k, v in attributes.items())]
    return found[0] if len(found) == 1 else None


def _nameable(scene: Scene) -> list[SceneObject]:
    return [o for o in scene.objects if _only(scene, color=o.color, shape=o.shape)]


def _shuffled(items: list[_T], rng: np.random.Generator) -> list[_T]:
    return [items[i] for i in rng.permutation(len(items))]


def _known_pairs(scene: Scene) -> tuple[tuple[str, str], ...]:
    unseen_here = any((o.color, o.shape) in UNSEEN_PAIRS for o in scene.objects)
    return PAIRS if unseen_here else SEEN_PAIRS


def _color_deck(scene: Scene, rng: np.random.Generator) -> list[QA]:
    options = _shuffled([o for o in scene.objects if _only(scene, shape=o.shape)], rng)
    return [QA(f"what color is the {o.shape}?", o.color, "colour") for o in options]


def _shape_deck(scene: Scene, rng: np.random.Generator) -> list[QA]:
    options = _shuffled([o for o in scene.objects if _only(scene, color=o.color)], rng)
    return [QA(f"what shape is the {o.color} object?", o.shape, "shape") for o in options]


def _count_deck(scene: Scene, rng: np.random.Generator) -> list[QA]:
    counts = {"objects": len(scene.objects)}
    counts |= {PLURALS[s]: sum(o.shape == s for o in scene.objects) for s in SHAPES}
    counts |= {f"{c} objects": sum(o.color == c for o in scene.objects) for c in COLORS}
    absent = _choose(rng, [name for name, n in counts.items() if n == 0])
    counts = {name: n for name, n in counts.items() if n > 0 or name == absent}
    answers = list(counts.values())
    # A race of exponential clocks: the heavier an answer the sooner it is dealt (from the end),
    # however many questions share it.
    weights = [_COUNT_WEIGHTS[n] / answers.count(n) for n in answers]
    times = rng.exponential(size=len(answers)) / np.array(weights)
    names = [name for _, name in sorted(zip(times.tolist(), counts, strict=True), reverse=True)]
    return [QA(f"how many {name} are there?", NUMBERS[counts[name]], "count") for name in names]


def _relation_deck(scene: Scene, rng: np.random.Generator) -> list[QA]:
    deck = []
    nameable = _nameable(scene)
    for b in nameable:
        others = [o for o in scene.objects if o is not b]
        truths = [relation_between(o, b, scene.canvas) for o in others]
        for a, truth in zip(others, truths, strict=True):
            if truth is None or a not in nameable:
                continue
            across = [r for r in RELATIONS if r not in (truth, OPPOSITE[truth])]
            false = OPPOSITE[truth] if rng.random() < 0.6 else _choose(rng, across)
            for relation, answer in ((truth, "yes"), (false, "no")):
                text = f"is the {_thing(a)} {relation} the {_thing(b)}?"
                deck.append(QA(text, answer, "relation"))
        if None in truths:
            continue
        for relation in RELATIONS:
            if truths.count(relation) == 1:
                answer = f"a {_thing(others[truths.index(relation)])}"
                deck.append(QA(f"what is {relation} the {_thing(b)}?", answer, "relation"))
    return _shuffled(deck, rng)


def _existence_deck(scene: Scene, rng: np.random.Generator) -> list[QA]:
    present = sorted({(o.color, o.shape) for o in scene.objects})
    colors, shapes = {c for c, _ in present}, {s for _, s in present}
    absent = _shuffled([p for p in _known_pairs(scene) if p not in present], rng)
    denied: list[tuple[str, str]] = []
    for _ in present:
        left = [p for p in absent if p not in denied]
        crossed = [(c, s) for c, s in left if c in colors and s in shapes]
        near = [(c, s) for c, s in left if c in colors or s in shapes]
        draw = rng.random()
        denied.append(((crossed if draw < 0.5 else []) or (near if draw < 0.85 else []) or left)[0])
    deck = [QA(f"is there a {c} {s}?", "yes", "existence") for c, s in present]
    deck += [QA(f"is there a {c} {s}?", "no", "existence") for c, s in denied]
    return _shuffled(deck, rng)


_DECKS: dict[QuestionKind, Callable[[Scene, np.random.Generator], list[QA]]] = {
    "colour": _color_deck,
    "shape": _shape_deck,
    "count": _count_deck,
    "relation": _relation_deck,
    "existence": _existence_deck,
}


def questions(
    scene: Scene, rng: np.random.Generator, n: int, kinds: Sequence[QuestionKind] = QUESTION_KINDS
) -> list[QA]:
    """`n` questions about a scene, kinds equally likely where the scene allows them.

    No question comes twice before all that the scene allows have been asked. Fewer than `n` come
    back only when none of the `kinds` can be asked about this scene (then none does).
    """
    # Each kind is a deck with as many "yes" as "no" cards, dealt from the end: drawing afresh and
    # dropping repeats would tilt the answers to "no", of which there are more different ones.
    dealt: list[QA] = []
    decks: dict[QuestionKind, list[QA]] = {}
    open_kinds = list(kinds)
    while len(dealt) < n:
        if not open_kinds:
            if not dealt:
                break
            open_kinds, decks = list({qa.kind: None for qa in dealt}), {}
        kind = _choose(rng, open_kinds)
        if kind not in decks:
            decks[kind] = _DECKS[kind](scene, rng)
        if decks[kind]:
            dealt.append(decks[kind].pop())
        else:
            open_kinds.remove(kind)
    return dealt


def corpus() -> list[str]:
    """Sentences that together fill every template with every word, to train a tokenizer on."""
    pairs = list(PAIRS)
    sized = [(w, c, s) for w, (c, s) in product(["", *_SIZE_OF], pairs)]
    singles = [" ".join(f"{w} {c} {s}".split()) for w, c, s in sized]
    plurals = [" ".join(f"{w} {c} {PLURALS[s]}".split()) for w, c, s in sized]
    lines = [f"{p} a {t}".strip() for p, t in product(_PREFIXES_ONE, singles)]
    lines += [f"{p} one {t}".strip() for p, t in product(_PREFIXES_ONE, singles)]
    many = product(_PREFIXES_MANY, NUMBERS[2:], plurals)
    lines += [f"{p} {n} {t}".strip() for p, n, t in many]
    joints = [*_RELATION_OF, *_TWO_WORDS]
    for i, joint in enumerate(joints):
        for j, thing in enumerate(singles):
            # A fixed stride pairs every object with many different partners.
            other = singles[(j * 7 + i * 5 + 3) % len(singles)]
            prefix = _PREFIXES_ONE[(i + j) % len(_PREFIXES_ONE)]
            lines.append(f"{prefix} a {thing} {joint} a {other}".strip())
    lines += [f"what color is the {s}?" for s in SHAPES]
    lines += [f"what shape is the {c} object?" for c in COLORS]
    counted = ["objects", *PLURALS.values(), *(f"{c} objects" for c in COLORS)]
    lines += [f"how many {what} are there?" for what in counted]
    lines += [f"is there a {c} {s}?" for c, s in pairs]
    for relation, (c, s) in product(RELATIONS, pairs):
        lines.append(f"what is {relation} the {c} {s}?")
        lines += [f"is the {c} {s} {relation} the {d} {t}?" for d, t in pairs if (d, t) != (c, s)]
    lines += [*COLORS, *SHAPES, *NUMBERS, "yes", "no", *SIZES]
    lines += [str(n) for n in range(MAX_OBJECTS + 1)]
    return lines
