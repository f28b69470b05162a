"""Train the pair of tiny checkpoints that the package ships, and write the prompts of its demo.

A small made-up world (people with jobs, homes, colours and pets; towns, things, numbers) is drawn from the seed and
talks in plain English. Out of it come two checkpoints of one Llama architecture and one tokenizer::

    OUT/pt             trained from random weights on plain text: profiles, town pages, stories, sums, and sheets of
                       questions and tasks one below the other
    OUT/it             OUT/pt trained further on the same kinds of questions, tasks and story openings, one at a time
                       with an answer in another style: whole sentences, a reason, an end. Loss on the answer only
    OUT/prompts.jsonl  64 raw prompts, 16 of each category, drawn with their own seed and not selected by any result

The amount of tuning was chosen so that the demo has a clear interaction: an example, not a finding. The prompts come
from the generator that the tuning data come from; some of them are in it.

Weights are saved as bfloat16, and OUT/it starts from the saved OUT/pt. Everything runs on one CPU thread in float32, so
the same torch build on the same kind of CPU gives the same bytes (two runs did).

Run::

    python scripts/train_demo_pair.py --out OUT

Progress goes to stderr; the last line of stdout is one JSON object with sizes, times, held-out losses (mean nats per
token) and how many prompts diverge.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import random
import string
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from actcache.capture.forward import Resident
from actcache.capture.residency import AllResident
from actcache.capture.search import Outcome, SearchLimits, propose
from actcache.errors import InputError
from actcache.models.backbone import Backbone
from actcache.models.lineup import Lineup
from actcache.prompts import Prompt

DEFAULT_OUT = Path(__file__).resolve().parent.parent / "actcache" / "demo"
EOS, UNKNOWN = "<|endoftext|>", "<|unknown|>"
MAX_POSITIONS = 256
VOCAB_SIZE = 640
ROW_TOKENS = 128
PROMPTS_PER_CATEGORY = 16
MAX_NEW = 48
MASKED = -100  # the label that the loss of transformers ignores

SHE = ("Mara", "Anna", "Nina", "Lucy", "Rosa", "Ella", "Cora", "Judy")
HE = ("Tom", "Ben", "Omar", "Paul", "Finn", "Hugo", "Carl", "Ravi")
WORKPLACE_OF_JOB = {
    "baker": "bakery",
    "farmer": "farm",
    "teacher": "school",
    "doctor": "hospital",
    "gardener": "garden",
    "painter": "studio",
    "smith": "forge",
    "sailor": "harbour",
}
LANDMARK_OF_TOWN = {
    "Oakdale": "an old forest",
    "Riverton": "a wide river",
    "Hillford": "a green hill",
    "Seabrook": "a long beach",
    "Millton": "a tall windmill",
    "Stonewick": "a grey castle",
}
COLOURS = ("red", "blue", "green", "yellow", "white", "black")
PETS = ("cat", "dog", "horse", "rabbit", "parrot", "goat")
FOODS = ("bread", "soup", "cheese", "rice", "fish", "cake")
THINGS = ("kite", "boat", "lamp", "hat", "cup", "ball", "book", "drum")
PLACES = ("market", "park", "bridge", "square", "station", "museum")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
TIMES = ("morning", "afternoon", "evening")
WEATHER = (
    ("It was raining", "an umbrella"),
    ("It was snowing", "a warm coat"),
    ("The sun was shining", "some cold water"),
    ("It was getting dark", "a small light"),
)
KINDS = {"colours": COLOURS, "animals": PETS, "towns": tuple(LANDMARK_OF_TOWN), "days": DAYS}


@dataclass(frozen=True)
class Person:
    """Someone of the world; every attribute is a fact that text about them keeps to."""

    name: str
    she: str
    her: str
    job: str
    town: str
    colour: str
    pet: str
    food: str
    friend: str

    @property
    def workplace(self) -> str:
        return WORKPLACE_OF_JOB[self.job]


@dataclass(frozen=True)
class Exchange:
    """A prompt with one continuation in the style of each checkpoint; both continuations begin with a space."""

    prompt: str
    plain: str
    tuned: str


class World:
    """Facts drawn from a seed, and the text that is told about them.

    Every method that makes text takes the generator that it draws from, so equal seeds give equal text.
    """

    def __init__(self, seed: int) -> None:
        rng = random.Random(f"{seed} world")
        names = [*SHE, *HE]
        friends = rng.sample(names, len(names))
        friend_of = dict(zip(friends, friends[1:] + friends[:1], strict=True))
        self.people = {
            name: Person(
                name=name,
                she="She" if name in SHE else "He",
                her="her" if name in SHE else "his",
                job=rng.choice(list(WORKPLACE_OF_JOB)),
                town=rng.choice(list(LANDMARK_OF_TOWN)),
                colour=rng.choice(COLOURS),
                pet=rng.choice(PETS),
                food=rng.choice(FOODS),
                friend=friend_of[name],
            )
            for name in names
        }
        self.market_day = {town: rng.choice(DAYS) for town in LANDMARK_OF_TOWN}
        self.categories: dict[str, Callable[[random.Random], Exchange]] = {
            "question": self.question,
            "arithmetic": self.arithmetic,
            "instruction": self.instruction,
            "story": self.story,
        }

    def document(self, rng: random.Random) -> str:
        """One document of the base model's plain text."""
        kind = rng.choices(
            ["profile", "town", "sums", "story", "question", "arithmetic", "instruction"], [5, 1, 1, 4, 5, 3, 3]
        )[0]
        if kind == "profile":
            return self.profile(self._person(rng), rng, n_facts=6)
        if kind == "town":
            return self.town_page(rng.choice(list(LANDMARK_OF_TOWN)), rng)
        if kind == "sums":
            return _line([_sum(rng) for _ in range(8)])
        exchanges = [self.categories[kind](rng) for _ in range(1 if kind == "story" else rng.randint(2, 5))]
        return "\n".join(exchange.prompt + exchange.plain for exchange in exchanges)

    def exchange(self, rng: random.Random) -> Exchange:
        """One exchange of any category."""
        return rng.choice(list(self.categories.values()))(rng)

    def profile(self, person: Person, rng: random.Random, n_facts: int) -> str:
        """Who someone is: the job first, then facts in any order."""
        she, her = person.she, person.her
        facts = [
            rng.choice([f"{she} lives in {person.town}.", f"{her.title()} home is in {person.town}."]),
            rng.choice(
                [f"{she} works in the {person.workplace}.", f"Every day {she.lower()} goes to the {person.workplace}."]
            ),
            rng.choice([f"{she} likes {person.colour} best.", f"{her.title()} favourite colour is {person.colour}."]),
            rng.choice([f"{she} has a {person.pet}.", f"{her.title()} pet is a {person.pet}."]),
            rng.choice([f"{she} likes to eat {person.food}.", f"{she} eats {person.food} every {rng.choice(DAYS)}."]),
            rng.choice([f"{her.title()} best friend is {person.friend}.", f"{she} often visits {person.friend}."]),
        ]
        return " ".join([f"{person.name} is a {person.job}.", *rng.sample(facts, n_facts)])

    def town_page(self, town: str, rng: random.Random) -> str:
        """What a town has, and who lives there."""
        lines = [f"{town} has {LANDMARK_OF_TOWN[town]}.", f"The market is on {self.market_day[town]}."]
        residents = [person for person in self.people.values() if person.town == town]
        if residents:
            person = rng.choice(residents)
            lines.append(f"{person.name} the {person.job} lives there.")
        return " ".join(lines)

    def question(self, rng: random.Random) -> Exchange:
        """A question about a fact, or about what was just said; the base answers in a word or in a sentence."""
        person = self._person(rng)
        name, she = person.name, person.she.lower()
        town = rng.choice(list(LANDMARK_OF_TOWN))
        other = rng.choice([person.town, town])
        right = other == person.town
        things, colours = rng.sample(THINGS, 2), rng.sample(COLOURS, 2)
        holder = rng.randrange(2)
        names = [name, person.friend]
        lives = f"{name} lives in {person.town}"
        question, word, sentence, rich = rng.choice(
            [
                (f"Where does {name} live?", f"In {person.town}", lives, f"{lives} where {she} is a {person.job}"),
                (
                    f"What is the job of {name}?",
                    person.job.title(),
                    f"{name} is a {person.job}",
                    f"{name} is a {person.job} so {she} works in the {person.workplace}",
                ),
                (
                    f"Where does {name} work?",
                    f"In the {person.workplace}",
                    f"{name} works in the {person.workplace}",
                    f"{name} works in the {person.workplace} because {she} is a {person.job}",
                ),
                (
                    f"Which colour does {name} like best?",
                    person.colour.title(),
                    f"{name} likes {person.colour} best",
                    f"{name} likes {person.colour} best of all colours",
                ),
                (
                    f"Which pet does {name} have?",
                    f"A {person.pet}",
                    f"{name} has a {person.pet}",
                    f"{name} has a {person.pet} and {she} likes it very much",
                ),
                (
                    f"What does {name} like to eat?",
                    person.food.title(),
                    f"{name} likes to eat {person.food}",
                    f"{name} likes to eat {person.food} with {person.friend}",
                ),
                (
                    f"What can you see in {town}?",
                    LANDMARK_OF_TOWN[town].capitalize(),
                    f"{town} has {LANDMARK_OF_TOWN[town]}",
                    f"{town} has {LANDMARK_OF_TOWN[town]} and its market is on {self.market_day[town]}",
                ),
                (
                    f"Does {name} live in {other}?",
                    "Yes" if right else "No",
                    f"Yes, {lives}" if right else f"No, {lives}",
                    f"Yes, {lives} where {she} is a {person.job}" if right else f"No, {lives} and not in {other}",
                ),
                (
                    f"{names[0]} has a {colours[0]} {things[0]} and {names[1]} has a {colours[1]} {things[1]}. "
                    f"Who has the {things[holder]}?",
                    names[holder],
                    f"{names[holder]} has the {things[holder]}",
                    f"{names[holder]} has the {things[holder]} and it is {colours[holder]}",
                ),
            ]
        )
        return _asked(question, rng.choices([word, sentence], [1, 2])[0], rich)

    def arithmetic(self, rng: random.Random) -> Exchange:
        """A sum, asked in numbers, in words or as a little problem, or a line of sums to go on with."""
        kind = rng.choice(["plus", "minus", "problem", "line"])
        a, b = rng.randint(2, 12), rng.randint(2, 9)
        if kind == "line":
            first, second, (asked, result), *following = (_sum(rng) for _ in range(5))
            prompt = f"{_line([first, second])} {asked}"
            return Exchange(prompt, f" {result}. {_line(following)}", f" {result}. So the answer is {result}.")
        if kind == "problem":
            person, thing = self._person(rng), rng.choice(THINGS)
            more = rng.random() < 0.5
            a = a if more else a + b
            total, sign = (a + b, "+") if more else (a - b, "-")
            change = f"finds {b} more" if more else f"gives {b} to {person.friend}"
            she = person.she.lower()
            question = f"{person.name} has {a} {thing}s and {change}. How many {thing}s does {she} have now?"
            sentence = f"{person.name} has {total} {thing}s"
            rich = f"{sentence} now because {a} {sign} {b} = {total}"
        else:
            a, total, sign = (a, a + b, "+") if kind == "plus" else (a + b, a, "-")
            question = f"What is {a} {kind} {b}?"
            sentence = f"{a} {kind} {b} is {total}"
            rich = f"{sentence} because {a} {sign} {b} = {total}"
        return _asked(question, rng.choices([str(total), sentence], [1, 2])[0], rich)

    def instruction(self, rng: random.Random) -> Exchange:
        """A task; the base does it shortly, the tuned model at more length and with an end."""
        person, town = self._person(rng), rng.choice(list(LANDMARK_OF_TOWN))
        kind = rng.choice(["person", "town", "list", "count", "story"])
        if kind == "person":
            task = f"Tell me about {person.name}."
            plain = self.profile(person, rng, n_facts=2)
            tuned = f"{self.profile(person, rng, n_facts=3)} That is all I know about {person.name}."
        elif kind == "town":
            task = f"Describe the town of {town}."
            plain = self.town_page(town, rng)
            tuned = f"{plain} {town} is a nice place to live."
        elif kind == "list":
            what = rng.choice(list(KINDS))
            x, y, z = rng.sample(KINDS[what], 3)
            task = f"List three {what}."
            plain = f"Three {what} are {x}, {y}, {z}."
            tuned = f"Three {what} are {x}, {y} and {z}, but there are more."
        elif kind == "count":
            first = rng.randint(1, 9)
            numbers = [str(first + i) for i in range(rng.randint(4, 6))]
            task = f"Count from {numbers[0]} to {numbers[-1]}."
            plain = f"{', '.join(numbers)}."
            tuned = f"{', '.join(numbers)}. That makes {len(numbers)} numbers."
        else:
            thing, colour = rng.choice(THINGS), rng.choice(COLOURS)
            task = f"Write a story about {person.name} and a {colour} {thing}."
            place = rng.choice(PLACES)
            opening = f"One {rng.choice(TIMES)}, {person.name} went to the {place} in {person.town}."
            plain, tuned = (f"{opening}{text}" for text in self._story_rest(person, colour, thing, "find", rng))
        return Exchange(f"Task: {task}\nText:", f" {plain}", f" {tuned}")

    def story(self, rng: random.Random) -> Exchange:
        """The first sentence of a story, and how it goes on."""
        person = self._person(rng)
        thing, colour = rng.choice(THINGS), rng.choice([person.colour, *COLOURS])
        place, when = rng.choice(PLACES), f"{rng.choice(DAYS)} {rng.choice(TIMES)}"
        kind = rng.choice(["find", "buy", "lose"])
        opening = {
            "find": f"On {when}, {person.name} the {person.job} walked to the {place} in {person.town}.",
            "buy": f"On {when}, {person.name} went to the market in {person.town} to buy a {colour} {thing}.",
            "lose": f"On {when}, {person.name} lost {person.her} {colour} {thing} on the way to the {place}.",
        }[kind]
        plain, tuned = self._story_rest(person, colour, thing, kind, rng)
        return Exchange(opening, plain, tuned)

    def _story_rest(self, person: Person, colour: str, thing: str, kind: str, rng: random.Random) -> tuple[str, str]:
        """What follows an opening, plain and tuned: the same events, told and ended differently."""
        she, her, friend = person.she, person.her, person.friend
        weather, taken = rng.choice(WEATHER)
        sky = rng.choice([f" {weather}, so {she.lower()} took {taken}.", ""])
        n_seen, n_coins = rng.randint(2, 9), rng.randint(2, 12)
        event = {
            "find": f" There {she.lower()} found a {colour} {thing} under a {rng.choice(['tree', 'chair', 'stone'])}.",
            "buy": f" {she} looked at {n_seen} {thing}s and took the {colour} one. It cost {n_coins} coins.",
            "lose": f" {she} looked for it in the {person.workplace}, and then in the {rng.choice(PLACES)}.",
        }[kind]
        plain_end = {
            "find": [f" {she} left it there.", f" {she} took it home and showed it to {her} {person.pet}."],
            "buy": [f" Then {she.lower()} went home to {her} {person.pet}.", f" {friend} wanted one too."],
            "lose": [f" {she} never found the {thing}.", f" The {person.pet} had the {thing} all the time."],
        }[kind]
        tuned_end = {
            "find": f" {she} showed it to {friend}, and they asked who had lost the {colour} {thing}.",
            "buy": f" {she} gave the {colour} {thing} to {friend}, who said thank you.",
            "lose": f" Then {friend} came to help, and together they found the {colour} {thing}.",
        }[kind]
        return f"{sky}{event}{rng.choice(plain_end)}", f"{sky}{event}{tuned_end} Everyone was happy. The end."

    def _person(self, rng: random.Random) -> Person:
        return rng.choice(list(self.people.values()))


def _sum(rng: random.Random) -> tuple[str, int]:
    a, b = rng.randint(2, 12), rng.randint(2, 9)
    return rng.choice([(f"{a} + {b} =", a + b), (f"{a + b} - {b} =", a)])


def _line(sums: Sequence[tuple[str, int]]) -> str:
    return " ".join(f"{asked} {result}." for asked, result in sums)


def _asked(question: str, plain: str, tuned: str) -> Exchange:
    return Exchange(f"Question: {question}\nAnswer:", f" {plain}.", f" {tuned}.")


@dataclass(frozen=True)
class Size:
    """How much is trained: steps of each stage, and rows of ROW_TOKENS in a step."""

    pt_steps: int
    it_steps: int
    rows: int
    held_out_rows: int
    tokenizer_documents: int


PT_PEAK_LR, IT_PEAK_LR = 3e-3, 1e-3
FULL = Size(pt_steps=900, it_steps=240, rows=12, held_out_rows=48, tokenizer_documents=4000)
SMOKE = Size(pt_steps=4, it_steps=2, rows=2, held_out_rows=2, tokenizer_documents=400)


def main(argv: Sequence[str] | None = None) -> int:
    """Make the pair and the prompts. Returns 0, or 2 after one line on stderr when an argument is unusable."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder to make (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the world, its text and the weights (%(default)s)")
    parser.add_argument("--smoke", action="store_true", help="a few steps only: files that load, and learnt nothing")
    args = parser.parse_args(argv)
    transformers_logging.disable_progress_bar()
    try:
        summary = make_pair(args.out, args.seed, SMOKE if args.smoke else FULL)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(summary))
    return 0


def make_pair(out: Path, seed: int, size: Size) -> dict[str, Any]:
    """Write the folder ``out``; return the figures that the last line of stdout shows.

    Raises:
        InputError: ``out`` is already there.
    """
    if out.exists():
        raise InputError(f"{out} is already there; remove it or give another --out")
    # One thread and one order of summation, so that a second run gives the same bits.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(seed)
    start = time.perf_counter()
    world = World(seed)
    tokenizer = train_tokenizer(world, seed, size.tokenizer_documents)
    model = new_model(tokenizer)

    held_out_text = one_batch(text_rows(world, tokenizer, f"{seed} held-out text"), size.held_out_rows)
    held_out_answers = one_batch(answer_rows(world, tokenizer, f"{seed} held-out answers"), size.held_out_rows)
    losses: dict[str, float] = {}

    def measure(when: str) -> None:
        for what, batch in (("text", held_out_text), ("answers", held_out_answers)):
            losses[f"{what}_{when}"] = round(held_out_loss(model, batch), 4)
            print(f"held-out loss on {what}, {when}: {losses[f'{what}_{when}']}", file=sys.stderr)

    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside OUT, so that the last step is one rename: OUT is there whole, or not at all.
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        pair = Path(scratch) / "pair"
        measure("at_start")
        train(model, text_rows(world, tokenizer, f"{seed} text"), size.pt_steps, size.rows, PT_PEAK_LR, "pt")
        save(model, tokenizer, pair / "pt")
        measure("pt")
        train(model, answer_rows(world, tokenizer, f"{seed} answers"), size.it_steps, size.rows, IT_PEAK_LR, "it")
        save(model, tokenizer, pair / "it")
        measure("it")
        prompts = make_prompts(world, f"{seed} prompts", PROMPTS_PER_CATEGORY)
        write_prompts(pair / "prompts.jsonl", prompts)
        divergence = count_divergences(pair / "pt", pair / "it", prompts)
        pair.rename(out)
    n_bytes = {name: sum(file.stat().st_size for file in (out / name).iterdir()) for name in ("pt", "it")}
    return {
        "out": str(out),
        "seed": seed,
        "dtype": "bfloat16",
        "n_parameters": model.num_parameters(),
        "vocab_size": len(tokenizer),
        "pt_bytes": n_bytes["pt"],
        "it_bytes": n_bytes["it"],
        "pt_tokens": size.pt_steps * size.rows * ROW_TOKENS,
        "it_tokens": size.it_steps * size.rows * ROW_TOKENS,
        "held_out_loss": losses,
        **divergence,
        "elapsed_s": round(time.perf_counter() - start, 1),
    }


def train_tokenizer(world: World, seed: int, n_documents: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose every token is printable ASCII text, so that each decodes and encodes back to itself.

    Digits stay single. Any other character becomes the unknown token.
    """
    rng = random.Random(f"{seed} tokenizer")
    exchanges = (world.exchange(rng) for _ in range(n_documents))
    documents = (world.document(rng) for _ in range(n_documents))
    text = itertools.chain(documents, (exchange.prompt + exchange.tuned for exchange in exchanges))
    bpe = Tokenizer(models.BPE(unk_token=UNKNOWN, fuse_unk=True))
    words = pre_tokenizers.Split(Regex(r" ?[0-9]| ?[A-Za-z]+| ?[^\sA-Za-z0-9]+|\s"), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    bpe.decoder = decoders.ByteLevel()
    ascii_text = "".join(sorted({*string.digits, *string.ascii_letters, *string.punctuation, " ", "\n"}))
    alphabet = [piece for character in ascii_text for piece, _ in to_bytes.pre_tokenize_str(character)]
    bpe.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE, special_tokens=[EOS, UNKNOWN], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=EOS,
        pad_token=EOS,
        unk_token=UNKNOWN,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of eight blocks and width 96 with random weights from torch's generator."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model


@dataclass(frozen=True)
class Batch:
    """Token ids and the labels of the loss, both int64 [rows, ROW_TOKENS]."""

    ids: torch.Tensor
    labels: torch.Tensor


Row = tuple[list[int], list[int]]


def text_rows(world: World, tokenizer: PreTrainedTokenizerFast, seed: str) -> Iterator[Row]:
    """Endless rows of the base model's documents, each ended by the end token; every token counts in the loss."""
    rng = random.Random(seed)

    def pieces() -> Iterator[Row]:
        while True:
            ids = [*tokenizer(world.document(rng))["input_ids"], tokenizer.eos_token_id]
            yield ids, ids

    return pack(pieces())


def answer_rows(world: World, tokenizer: PreTrainedTokenizerFast, seed: str) -> Iterator[Row]:
    """Endless rows of exchanges in the tuned style; only answers and their end tokens count in the loss."""
    rng = random.Random(seed)

    def pieces() -> Iterator[Row]:
        while True:
            exchange = world.exchange(rng)
            prompt = tokenizer(exchange.prompt)["input_ids"]
            answer = [*tokenizer(exchange.tuned)["input_ids"], tokenizer.eos_token_id]
            yield [*prompt, *answer], [*[MASKED] * len(prompt), *answer]

    return pack(pieces())


def pack(pieces: Iterator[Row]) -> Iterator[Row]:
    """Fill rows of ROW_TOKENS with pieces one after the other.

    The last piece of a row is cut off and the next row begins with a new one: a row begins as a prompt does, with the
    first token of a text at position 0.
    """
    while True:
        ids: list[int] = []
        labels: list[int] = []
        while len(ids) < ROW_TOKENS:
            piece_ids, piece_labels = next(pieces)
            ids += piece_ids
            labels += piece_labels
        yield ids[:ROW_TOKENS], labels[:ROW_TOKENS]


def one_batch(rows: Iterator[Row], n_rows: int) -> Batch:
    """The next ``n_rows`` rows."""
    ids, labels = zip(*itertools.islice(rows, n_rows), strict=True)
    return Batch(torch.tensor(ids), torch.tensor(labels))


def train(model: LlamaForCausalLM, rows: Iterator[Row], n_steps: int, n_rows: int, peak_lr: float, name: str) -> None:
    """Lower the loss of ``n_rows`` rows per step, in place."""

    def loss() -> torch.Tensor:
        batch = one_batch(rows, n_rows)
        return model(input_ids=batch.ids, labels=batch.labels, use_cache=False).loss

    optimise(model, loss, n_steps, peak_lr, name)


def optimise(
    model: LlamaForCausalLM, next_loss: Callable[[], torch.Tensor], n_steps: int, peak_lr: float, name: str
) -> None:
    """AdamW in place, one loss per step: linear warm-up over a twentieth of the steps, then a cosine to zero."""
    n_warmup = max(1, n_steps // 20)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, betas=(0.9, 0.95), weight_decay=0.05)
    model.train()
    start = time.perf_counter()
    for step in range(1, n_steps + 1):
        done = max(0, step - n_warmup) / max(1, n_steps - n_warmup)
        lr = peak_lr * min(step / n_warmup, 0.5 + 0.5 * math.cos(math.pi * done))
        optimizer.param_groups[0]["lr"] = lr
        loss = next_loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == n_steps:
            per_step_s = (time.perf_counter() - start) / step
            print(
                f"{name} step {step}/{n_steps}  loss {loss.item():.3f}  lr {lr:.1e}  {per_step_s:.2f} s per step  "
                f"ETA {per_step_s * (n_steps - step):.0f} s",
                file=sys.stderr,
            )
    model.eval()


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, batch: Batch) -> float:
    """Mean loss over the counted tokens of ``batch``, in nats per token."""
    model.eval()
    return model(input_ids=batch.ids, labels=batch.labels, use_cache=False).loss.item()


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a model folder in bfloat16, and round ``model`` to what was written."""
    rounded = copy.deepcopy(model).to(torch.bfloat16)  # type: ignore[arg-type]
    rounded.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)  # written as private files, but packaged for everyone
    tokenizer.save_pretrained(folder)
    model.load_state_dict(rounded.state_dict())


def make_prompts(world: World, seed: str, per_category: int) -> list[dict[str, str]]:
    """As many different prompts of every category."""
    rng = random.Random(seed)
    prompts: list[dict[str, str]] = []
    for category, draw in world.categories.items():
        texts: dict[str, None] = {}  # a set that keeps the order
        while len(texts) < per_category:
            texts[draw(rng).prompt] = None
        for index, text in enumerate(texts):
            prompts.append({"id": f"{category}-{index:02d}", "prompt": text, "category": category})
    return prompts


def write_prompts(path: Path, prompts: Sequence[dict[str, str]]) -> None:
    """One JSON object per line."""
    path.write_text("".join(f"{json.dumps(prompt)}\n" for prompt in prompts))


def count_divergences(pt: Path, it: Path, prompts: Sequence[dict[str, str]]) -> dict[str, Any]:
    """Search every prompt for its first divergence with two saved folders in float32, as a capture does.

    Returns:
        Counts by category, the histogram of the steps at which the continuations part, and of the reasons where not.
    """
    lineup = Lineup.open({"pt": pt, "it": it})
    readers = {label: Resident(Backbone(of.load(torch.float32))) for label, of in lineup.checkpoints.items()}
    ids = lineup.encode([Prompt(prompt["id"], prompt["prompt"]) for prompt in prompts])
    limits = SearchLimits(MAX_NEW, lineup.end_ids, lineup.max_positions)
    found = propose(AllResident(readers), lineup.pair, ids, [0] * len(ids), limits)
    diverged = [proposal.outcome is Outcome.DIVERGED for proposal in found]
    steps = Counter(len(proposal.shared) for proposal, yes in zip(found, diverged, strict=True) if yes)
    by_category = Counter(prompt["category"] for prompt, yes in zip(prompts, diverged, strict=True) if yes)
    print(f"{sum(diverged)} of {len(prompts)} prompts diverge within {MAX_NEW} tokens", file=sys.stderr)
    return {
        "n_prompts": len(prompts),
        "prompt_tokens": {"min": min(map(len, ids)), "max": max(map(len, ids))},
        "n_diverged": sum(diverged),
        "diverged_by_category": dict(by_category),
        "diverged_at_step": dict(sorted(steps.items())),
        "not_diverged": dict(Counter(str(p.outcome) for p, yes in zip(found, diverged, strict=True) if not yes)),
    }


if __name__ == "__main__":
    sys.exit(main())
