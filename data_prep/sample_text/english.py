"""English sample documents: stories, encyclopaedia entries, dialogues, news, reviews, recipes, exercises.

Every document keeps its own people, places and numbers from beginning to end (a biography's age follows
from its dates, a bill adds up), while names, verbs, things and turns of the story are open choices.
"""

import random
from collections.abc import Callable

from data_prep.sample_text import english_words as words
from data_prep.sample_text.english_rules import STORY_RULES, WORD_RULES
from data_prep.sample_text.grammar import Grammar, skewed_choice

VOCABULARY = {
    "adjective": words.ADJECTIVES,
    "animal_word": words.ANIMALS,
    "city": words.CITIES,
    "colour": words.COLOURS,
    "country": words.COUNTRIES,
    "feeling": words.FEELINGS,
    "food": words.FOODS,
    "job": words.JOBS,
    "material": words.MATERIALS,
    "month": words.MONTHS,
    "number": words.NUMBER_WORDS,
    "object": words.OBJECTS,
    "place": words.PLACES,
    "season": words.SEASONS,
    "subject": words.SUBJECTS,
    "surname": words.SURNAMES,
    "verb": words.PAST_VERBS,
    "weekday": words.WEEKDAYS,
}
GRAMMAR = Grammar({**VOCABULARY, **STORY_RULES, **WORD_RULES})
PARAGRAPH_CHANCE = 0.3

Generator = Callable[[random.Random], str]


def full_name(rng: random.Random) -> tuple[str, bool]:
    """A name and whether its bearer is a woman."""
    is_female = rng.random() < 0.5
    first = skewed_choice(rng, words.FEMALE_NAMES if is_female else words.MALE_NAMES)
    return f"{first} {skewed_choice(rng, words.SURNAMES)}", is_female


def pronouns(is_female: bool) -> dict[str, str]:
    """Bindings of the pronouns for one person."""
    return (
        {"he": "she", "his": "her", "him": "her"} if is_female else {"he": "he", "his": "his", "him": "him"}
    )


def town_name(rng: random.Random) -> str:
    """A town that is made up."""
    return skewed_choice(rng, words.TOWN_BEGINNINGS) + skewed_choice(rng, words.TOWN_ENDINGS)


def join_sentences(rng: random.Random, sentences: list[str]) -> str:
    """Put sentences into paragraphs."""
    text = sentences[0]
    for sentence in sentences[1:]:
        text += ("\n\n" if rng.random() < PARAGRAPH_CHANCE else " ") + sentence
    return text


def story(rng: random.Random) -> str:
    """A story of one to five chapters with the same people: wishes, problems, attempts, an ending."""
    hero, is_female = full_name(rng)
    bindings = {
        "hero": hero.split()[0],
        "friend": skewed_choice(rng, words.MALE_NAMES if is_female else words.FEMALE_NAMES),
        "animal": skewed_choice(rng, words.ANIMALS),
        "object": skewed_choice(rng, words.OBJECTS),
        "town": town_name(rng),
        "age": str(rng.randint(5, 70)),
        **pronouns(is_female),
    }
    chapters, chapter_count = [], skewed_choice(rng, range(1, 6))
    for number in range(1, chapter_count + 1):
        plan = ["opening", "wish"] if number == 1 else ["wish"]
        for _ in range(rng.randint(1, 3)):
            plan += [
                "problem",
                *rng.choices(["attempt", "speech", "feeling_line"], [3, 2, 1], k=rng.randint(2, 5)),
            ]
        plan += ["ending"] if number == chapter_count else []
        heading = f"Chapter {number}\n\n" if chapter_count > 1 else ""
        chapters.append(heading + join_sentences(rng, [GRAMMAR.expand(rule, rng, bindings) for rule in plan]))
    title = [GRAMMAR.expand("title", rng, bindings)] if chapter_count > 1 or rng.random() < 0.5 else []
    return "\n\n".join(title + chapters)


def town_entry(rng: random.Random) -> str:
    """An encyclopaedia entry of a town; its density follows from population and area."""
    name, country = town_name(rng), skewed_choice(rng, words.COUNTRIES)
    population, area_km2, founded = rng.randint(800, 90_000), rng.randint(4, 90), rng.randint(900, 1900)
    position, river = (
        rng.choice(["north", "south", "east", "west", "centre"]),
        skewed_choice(rng, words.RIVERS),
    )
    bindings = {"name": full_name(rng)[0]}
    facts = [
        f"{name} is a town in the {position} of {country}, on the river {river}.",
        f"It was founded in {founded} and has {population:,} inhabitants.",
        f"With an area of {area_km2} square kilometres, it has {population // area_km2} people per square "
        f"kilometre.",
        *GRAMMAR.expand_several("town_detail", rng.randint(2, 6), rng, bindings),
    ]
    if rng.random() < 0.4:
        year = rng.randint(founded + 20, 2020)
        facts.append(
            f"In {year}, {year - founded} years after its foundation, the town celebrated its history."
        )
    return f"{name}\n\n" + join_sentences(rng, facts)


def biography(rng: random.Random) -> str:
    """An encyclopaedia entry of a person; the age at death follows from the dates."""
    name, is_female = full_name(rng)
    born, age = rng.randint(1650, 1940), rng.randint(31, 94)
    birthday, death_day = rng.randint(1, 14), rng.randint(15, 28)
    month, job = rng.choice(words.MONTHS), skewed_choice(rng, words.JOBS)
    bindings = pronouns(is_female)
    city, country = skewed_choice(rng, words.CITIES), skewed_choice(rng, words.COUNTRIES)
    study_age = rng.randint(16, 26)
    facts = [
        f"{name} ({birthday} {month} {born} - {death_day} {month} {born + age}) was "
        f"{'an' if job[0] in 'aeiou' else 'a'} {job} from {country}.",
        f"{bindings['he'].capitalize()} was born in {city} and studied {skewed_choice(rng, words.SUBJECTS)} "
        f"from {born + study_age}, when {bindings['he']} was {study_age}.",
        *GRAMMAR.expand_several("biography_detail", rng.randint(2, 7), rng, bindings),
        f"{name.split()[1]} died in {skewed_choice(rng, words.CITIES)} at the age of {age}.",
    ]
    return f"{name}\n\n" + join_sentences(rng, facts)


def species(rng: random.Random) -> str:
    """An encyclopaedia entry of an animal or plant that is made up."""
    group, colour = skewed_choice(rng, words.SPECIES_GROUPS), skewed_choice(rng, words.COLOURS)
    genus = skewed_choice(rng, words.LATIN_BEGINNINGS) + skewed_choice(rng, words.LATIN_ENDINGS)
    epithet, low_mm = skewed_choice(rng, words.LATIN_EPITHETS), rng.randint(3, 400)
    facts = [
        f"{genus} {epithet}, the {colour} {group}, is a species of {group} found in "
        f"{skewed_choice(rng, words.COUNTRIES)} and {skewed_choice(rng, words.COUNTRIES)}.",
        f"Adults reach {low_mm} to {low_mm + rng.randint(2, 90)} mm.",
        f"It was first described by {skewed_choice(rng, words.SURNAMES)} in {rng.randint(1758, 1990)}.",
        *GRAMMAR.expand_several("species_detail", rng.randint(2, 6), rng, {}),
    ]
    return f"{genus} {epithet}\n\n" + join_sentences(rng, facts)


def dialogue(rng: random.Random) -> str:
    """A conversation at a shop counter or a ticket desk; the bill is right."""
    seller, buyer = full_name(rng)[0].split()[0], full_name(rng)[0].split()[1]
    lines = [f"{seller}: Good {rng.choice(['morning', 'afternoon', 'evening'])}, how can I help you?"]
    total = 0
    for _ in range(rng.randint(1, 5)):
        item = skewed_choice(rng, rng.choice([words.FOODS, words.OBJECTS]))
        count, price = rng.randint(2, 9), rng.randint(1, 20)
        total += count * price
        wish = rng.choice(["I would like", "Can I have", "I need", "Do you have"])
        close = rng.choice([", please.", ".", " if possible.", f" for {rng.choice(words.WEEKDAYS)}."])
        reply = rng.choice(["Of course.", "Certainly.", "Yes.", "Here you are."])
        more = rng.choice([".", ". Anything else?", f", so {total} in all."])
        lines += [
            f"{buyer}: {wish} the {item}, {count} of them{close}",
            f"{seller}: {reply} At {price} euros each, that makes {count * price} euros{more}",
        ]
    paid = (total // 10 + rng.randint(1, 3)) * 10 + 5
    lines += [
        f"{buyer}: That is all. Here are {paid} euros.",
        f"{seller}: Thank you. {paid} minus {total} is {paid - total}, here is your change. "
        + rng.choice(["Have a nice day!", "See you soon!", "Goodbye.", "Say hello to your family."]),
    ]
    return "\n".join(lines)


def word_problems(rng: random.Random) -> str:
    """A page of exercises in words with their solutions."""
    blocks = []
    for number in range(1, rng.randint(3, 7)):
        name = skewed_choice(rng, words.FEMALE_NAMES + words.MALE_NAMES)
        thing, more, less = skewed_choice(rng, words.FOODS), rng.randint(2, 40), rng.randint(2, 12)
        start, groups, each = rng.randint(13, 60), rng.randint(2, 12), rng.randint(2, 12)
        kind = rng.randrange(3)
        if kind == 0:
            text = (
                f"{name} has {start} bags of {thing}, buys {more} and gives {less} away. How many are left?"
            )
            answer = (
                f"{start} + {more} = {start + more}, and {start + more} - {less} = {start + more - less}."
            )
        elif kind == 1:
            packed = rng.choice(["balls", "cards", "books", "stones", "plates"])
            text = f"{name} packs {groups} boxes with {each} {packed} each. How many {packed} are that?"
            answer = f"{groups} * {each} = {groups * each}."
        else:
            text = f"{name} walks {groups * each} km in {groups} hours. How fast is that?"
            answer = f"{groups * each} / {groups} = {each} km per hour."
        blocks.append(f"Problem {number}. {text}\nSolution. {answer}")
    return "\n\n".join(blocks)


def news(rng: random.Random) -> str:
    """A short local news report."""
    town, day, place = town_name(rng), rng.choice(words.WEEKDAYS), skewed_choice(rng, words.PLACES)
    event = rng.choice(
        ["reopened", "was closed", "was sold", "won a prize", "caught fire", "celebrated its birthday"]
    )
    bindings = {"name": full_name(rng)[0], "thousands": str(rng.randint(2, 400)), "place": place}
    bindings["work"] = rng.choice(["work", "restoration", "search", "planning"])
    date = f"{rng.choice(words.MONTHS)} {rng.randint(1, 28)}"
    facts = [
        f"{town.upper()}, {date} - The {place} of {town} {event} on {day}.",
        *GRAMMAR.expand_several("news_detail", rng.randint(3, 8), rng, bindings),
    ]
    return join_sentences(rng, facts)


def review(rng: random.Random) -> str:
    """A product review with pros, cons and stars."""
    product, stars = skewed_choice(rng, words.PRODUCTS), rng.randint(1, 5)
    title = rng.choice(["Good", "Fine", "Excellent", "Disappointing", "Not bad", "Overpriced"])
    facts = [
        f"I bought this {skewed_choice(rng, words.COLOURS)} {product} in {rng.choice(words.MONTHS)} for my "
        f"{rng.choice(['daughter', 'office', 'kitchen', 'holidays', 'new flat', 'father'])}.",
        *GRAMMAR.expand_several("praise", max(0, stars - 1), rng, {}),
        *GRAMMAR.expand_several("complaint", max(0, 5 - stars), rng, {}),
        f"{stars} {'star' if stars == 1 else 'stars'} from me.",
    ]
    return f"{title} {product}\n\n" + " ".join(facts)


def recipe(rng: random.Random) -> str:
    """A recipe: ingredients with amounts, then numbered steps."""
    main, side = rng.sample(words.FOODS, 2)
    amounts = [f"- {rng.randint(1, 20) * 50} g {main}", f"- {rng.randint(2, 9)} spoons of {side}"]
    amounts += [f"- {skewed_choice(rng, ['salt', 'butter', 'flour', 'milk', 'pepper', 'oil', 'two eggs'])}"]
    steps = GRAMMAR.expand_several("recipe_step", rng.randint(4, 8), rng, {"food": main})
    numbered = [f"{number}. {step}" for number, step in enumerate(steps, 1)]
    effort = f"Serves {rng.randint(1, 8)}, takes {rng.randint(2, 18) * 5} minutes."
    return "\n".join([f"{main.capitalize()} with {side}", "", effort, "", *amounts, "", *numbered])


def question_and_answers(rng: random.Random) -> str:
    """A question of everyday life with answers of other people."""
    thing, place = skewed_choice(rng, words.OBJECTS), skewed_choice(rng, words.PLACES)
    verb = rng.choice(["repair", "clean", "sell", "move", "store", "paint", "recognise"])
    answers = [
        f"A: {' '.join(GRAMMAR.expand_several('advice', rng.randint(1, 4), rng, {'object': thing}))}"
        for _ in range(rng.randint(1, 4))
    ]
    detail = GRAMMAR.expand("feeling", rng, {})
    question = f"Q: How do I {verb} an old {thing} that stood in the {place} for {rng.randint(2, 40)} years?"
    return "\n\n".join([f"{question} I am {detail} that I might break it.", *answers])


# What SlimPajama calls the set a row comes from, and which generators stand for it here.
SETS: dict[str, tuple[Generator, ...]] = {
    "RedPajamaCommonCrawl": (story, news, review, recipe),
    "RedPajamaC4": (story, dialogue, review, news),
    "RedPajamaBook": (story,),
    "RedPajamaWikipedia": (town_entry, biography, species),
    "RedPajamaStackExchange": (question_and_answers, word_problems),
}
