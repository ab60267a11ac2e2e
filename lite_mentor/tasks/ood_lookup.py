"""Out of domain: questions about an invented country, answered with one unseen tool, `search`.

No model can know the answers: towns, rivers, people, companies and novels come from a random generator with a fixed
seed. A question of level 2 needs two searches, for the first one finds the name that the second one asks about.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import bm25s

from lite_mentor.calculators import ToolError
from lite_mentor.errors import UserError
from lite_mentor.tasks import Split, make_example, split_of
from lite_mentor.tasks.templates import PEOPLE, draw_thought
from lite_mentor.tools import tool_spec
from lite_mentor.types import Example, ToolSpec

LEVELS = (1, 2)
Facts = dict[str, str]


@dataclass(frozen=True)
class World:
    """The invented country: facts by kind and name, and one short document about each."""

    facts: dict[str, dict[str, Facts]]
    documents: tuple[str, ...]


_TEXTS = {
    "town": "{name} is a town on the river {river}. It has {inhabitants} inhabitants and its mayor is {mayor}.",
    "river": "The {name} is a river of {length} kilometres. It rises near {source} and flows into the {sea} Sea.",
    "person": "{name} is a {job}, born in {year} in {birthplace}.",
    "company": "{name} is a company that makes {product}. It is based in {base} and was founded by {founder}.",
    "novel": "{name} is a novel about {topic}, published in {published} by {author}.",
}

_SAY = {"year": "year of birth", "job": "profession", "base": "home town", "published": "year of publication"}
"""How a thought speaks of an attribute whose name says too little."""

# (template, kind, question, hops): a hop is (query, attribute), and "{0}" is what the hop before it found.
_QUESTIONS = (
    ("inhabitants", "town", "How many inhabitants does {name} have?", ("inhabitants of {0}", "inhabitants")),
    ("mayor", "town", "Who is the mayor of {name}?", ("mayor of {0}", "mayor")),
    ("river", "town", "On which river is {name}?", ("town {0} river", "river")),
    ("length", "river", "How many kilometres long is the river {name}?", ("length of the river {0}", "length")),
    ("source", "river", "Near which town does the {name} rise?", ("river {0} rises near", "source")),
    ("sea", "river", "Which sea does the {name} flow into?", ("river {0} flows into sea", "sea")),
    ("born", "person", "In which year was {name} born?", ("{0} born", "year")),
    ("birthplace", "person", "In which town was {name} born?", ("{0} born in", "birthplace")),
    ("job", "person", "What is the profession of {name}?", ("{0} profession", "job")),
    ("product", "company", "What does the company {name} make?", ("company {0} makes", "product")),
    ("base", "company", "In which town is the company {name} based?", ("company {0} based in", "base")),
    ("founder", "company", "Who founded {name}?", ("{0} founded by", "founder")),
    ("author", "novel", "Who wrote the novel {name}?", ("novel {0}", "author")),
    ("published", "novel", "In which year was {name} published?", ("novel {0} published", "published")),
    ("mayor_born", "town", "In which year was the mayor of {name} born?",
     ("mayor of {0}", "mayor"), ("{0} born", "year")),
    ("mayor_job", "town", "What is the profession of the mayor of {name}?",
     ("mayor of {0}", "mayor"), ("{0} profession", "job")),
    ("river_length", "town", "How many kilometres long is the river on which {name} lies?",
     ("town {0} river", "river"), ("length of the river {0}", "length")),
    ("river_sea", "town", "Into which sea does the river of {name} flow?",
     ("town {0} river", "river"), ("river {0} flows into sea", "sea")),
    ("source_mayor", "river", "Who is the mayor of the town near which the {name} rises?",
     ("river {0} rises near", "source"), ("mayor of {0}", "mayor")),
    ("founder_birthplace", "company", "In which town was the founder of {name} born?",
     ("{0} founded by", "founder"), ("{0} born in", "birthplace")),
    ("founder_job", "company", "What was the profession of the person who founded {name}?",
     ("{0} founded by", "founder"), ("{0} profession", "job")),
    ("base_inhabitants", "company", "How many inhabitants does the home town of the company {name} have?",
     ("company {0} based in", "base"), ("inhabitants of {0}", "inhabitants")),
    ("base_mayor", "company", "Who is the mayor of the town where {name} is based?",
     ("company {0} based in", "base"), ("mayor of {0}", "mayor")),
    ("author_birthplace", "novel", "Where was the author of the novel {name} born?",
     ("novel {0}", "author"), ("{0} born in", "birthplace")),
    ("author_born", "novel", "In which year was the author of {name} born?",
     ("novel {0}", "author"), ("{0} born", "year")),
    ("author_job", "novel", "What is the profession of the author of the novel {name}?",
     ("novel {0}", "author"), ("{0} profession", "job")),
    ("birthplace_mayor", "person", "Who is the mayor of the town where {name} was born?",
     ("{0} born in", "birthplace"), ("mayor of {0}", "mayor")),
    ("birthplace_river", "person", "Which river flows through the birthplace of {name}?",
     ("{0} born in", "birthplace"), ("town {0} river", "river")),
    ("birthplace_inhabitants", "person", "How many inhabitants does the birthplace of {name} have?",
     ("{0} born in", "birthplace"), ("inhabitants of {0}", "inhabitants")),
)  # fmt: skip


@functools.cache
def world() -> World:
    """The country with its 300 documents, the same in every run."""
    random = Random("the invented country")
    stems = ("vel", "tar", "kor", "bras", "ulm", "hed", "sol", "mir", "dag", "fen", "lor", "nes", "pal", "rov", "zan")
    taken: set[str] = set()

    def invent(endings: Sequence[str]) -> str:
        while True:
            name = (random.choice(stems) + random.choice(stems) + random.choice(endings)).capitalize()
            if name not in taken:
                taken.add(name)
                return name

    towns = [invent(("a", "burg", "ford", "stad")) for _ in range(70)]
    rivers = [invent(("e", "in", "ach")) for _ in range(40)]
    people = [f"{random.choice(PEOPLE)} {invent(('sen', 'ov', 'ini'))}" for _ in range(90)]
    companies = [invent(("ex", "tec", "ona")) for _ in range(60)]
    adjectives = ("Silent", "Golden", "Broken", "Hidden", "Last", "Distant", "Frozen", "Crooked")
    nouns = ("Lantern", "Orchard", "Bridge", "Mirror", "Harbour", "Letter", "Winter", "Garden")
    titles = [f"The {adjective} {noun}" for adjective in adjectives for noun in nouns]
    seas = [invent(("ian", "ic")) for _ in range(6)]
    jobs = ("botanist", "painter", "surgeon", "pilot", "lawyer", "sculptor", "chemist", "baker", "judge", "violinist")
    products = ("clocks", "bicycles", "paper", "glass", "tractors", "pianos", "umbrellas", "cheese", "boots", "lenses")
    topics = ("a lost ship", "two brothers", "a long war", "a village doctor", "an old debt", "a strange guest")
    pick = random.choice
    facts = {
        "town": {
            name: {"river": pick(rivers), "inhabitants": str(random.randint(1213, 98765)), "mayor": pick(people)}
            for name in towns
        },
        "river": {
            name: {"length": str(random.randint(112, 987)), "source": pick(towns), "sea": pick(seas)} for name in rivers
        },
        "person": {
            name: {"job": pick(jobs), "year": str(random.randint(1921, 1989)), "birthplace": pick(towns)}
            for name in people
        },
        "company": {
            name: {"product": pick(products), "base": pick(towns), "founder": pick(people)} for name in companies
        },
        "novel": {
            name: {"topic": pick(topics), "published": str(random.randint(1990, 2019)), "author": pick(people)}
            for name in random.sample(titles, 40)
        },
    }
    documents = [_TEXTS[kind].format(name=name, **about) for kind in facts for name, about in facts[kind].items()]
    return World(facts, tuple(random.sample(documents, len(documents))))


@functools.cache
def _index() -> bm25s.BM25:
    index = bm25s.BM25()
    index.index(bm25s.tokenize(list(world().documents), stopwords="en", show_progress=False), show_progress=False)
    return index


def search(query: str) -> str:
    """search an encyclopedia, returns the best entry"""
    (words,) = bm25s.tokenize([query], stopwords="en", show_progress=False, return_ids=False)
    if not words:
        raise ToolError("the query has no words to search for")
    scores = _index().get_scores(words)
    best = int(scores.argmax())
    if scores[best] <= 0:
        raise ToolError("nothing was found")
    return world().documents[best]  # one entry: results count against the student's tokens


@functools.cache
def lookup_tools() -> tuple[ToolSpec, ...]:
    """The one tool of this suite."""
    return (tool_spec(search),)


def generate(split: Split, *, size: int, seed: int, levels: Sequence[int]) -> list[Example]:
    """Questions whose known solution was checked to find its answer."""
    pool = [
        (template, name, question, hops)
        for template, kind, question, *hops in _QUESTIONS
        for name in world().facts[kind]
        if len(hops) in levels and split_of(template, [name]) == split
    ]
    if len(pool) < size:
        raise UserError(
            f"Suite ood_lookup has {len(pool)} {split} examples of levels {tuple(levels)}, not {size}; ask for fewer."
        )
    random = Random(f"ood_lookup/{split}/{seed}")
    return [_example(random, *item) for item in random.sample(pool, size)]


def _example(random: Random, template: str, name: str, question: str, hops: Sequence[tuple[str, str]]) -> Example:
    steps, found = [], name
    for index, (query, attribute) in enumerate(hops):
        arguments = {"query": query.format(found)}
        thought = draw_thought(random, "search", f"the {_SAY.get(attribute, attribute)} of {found}", index, len(hops))
        found = _fact(found, attribute)
        if found not in search(**arguments):
            raise RuntimeError(f"the search for {arguments['query']!r} does not find {found}")
        steps.append({"thought": thought, "tool": "search", "arguments": arguments})
    return make_example(
        question.format(name=name),
        [found],
        lookup_tools(),
        suite="ood_lookup",
        checker="text",
        level=len(hops),
        template=template,
        steps=tuple(steps),
        final="The answer is {answer}.",
    )


def _fact(name: str, attribute: str) -> str:
    return next(about[name][attribute] for about in world().facts.values() if name in about)
