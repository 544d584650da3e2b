"""Chinese sample documents in the manner of WuDao, each with a title: news, entries, stories, exercises."""

import random
from collections.abc import Callable

from data_prep.sample_text import chinese_words as words
from data_prep.sample_text.grammar import Grammar, skewed_choice

TitledGenerator = Callable[[random.Random], tuple[str, str]]

GRAMMAR = Grammar(
    {
        "animal": words.ANIMALS,
        "city": words.CITIES,
        "colour": words.COLOURS,
        "digit": words.DIGITS,
        "feeling": words.FEELINGS,
        "food": words.FOODS,
        "industry": words.INDUSTRIES,
        "job": words.JOBS,
        "percent": [str(percent) for percent in range(1, 30)],
        "place": words.PLACES,
        "province": words.PROVINCES,
        "quality": words.QUALITIES,
        "season": words.SEASONS,
        "subject": words.SUBJECTS,
        "surname": words.SURNAMES,
        "thing": words.THINGS,
        "verb": words.VERBS,
        "weekday": words.WEEKDAYS,
        **words.RULES,
    }
)


def full_name(rng: random.Random) -> str:
    """Family name and given name."""
    return skewed_choice(rng, words.SURNAMES) + skewed_choice(rng, words.GIVEN_NAMES)


def pronoun(rng: random.Random) -> str:
    """He or she."""
    return rng.choice("他她")


def news(rng: random.Random) -> tuple[str, str]:
    """A local report of two to four paragraphs."""
    city, place = skewed_choice(rng, words.CITIES), skewed_choice(rng, words.PLACES)
    event = rng.choice(["重新开放", "正式开工", "举行庆祝活动", "获得全国奖励", "暂时关闭"])
    year, month, day = rng.randint(1998, 2023), rng.randint(1, 12), rng.randint(1, 28)
    bindings = {"name": full_name(rng)}
    paragraphs = [f"{year}年{month}月{day}日，{city}的{place}{event}。"]
    for _ in range(rng.randint(1, 3)):
        paragraphs.append("".join(GRAMMAR.expand_several("news_detail", rng.randint(2, 4), rng, bindings)))
    return f"{city}{place}{event}", "\n".join(paragraphs)


def county(rng: random.Random) -> tuple[str, str]:
    """An entry of a county; its density follows from population and area."""
    name = rng.choice("安平清明长新永宁东西南北") + rng.choice("山水川阳河州城江原海") + "县"
    province, river = skewed_choice(rng, words.PROVINCES), skewed_choice(rng, words.RIVERS)
    population, area_km2 = rng.randint(20, 900) * 1000, rng.randint(100, 900)
    facts = [
        f"{name}位于{province}{rng.choice(['东部', '西部', '南部', '北部', '中部'])}，在{river}旁边。",
        f"全县面积{area_km2}平方公里，人口{population}，每平方公里{population // area_km2}人。",
        *GRAMMAR.expand_several("town_detail", rng.randint(3, 7), rng, {"name": full_name(rng)}),
    ]
    return name, "".join(facts)


def life(rng: random.Random) -> tuple[str, str]:
    """A short biography; the age follows from the dates."""
    name, he, born, age = full_name(rng), pronoun(rng), rng.randint(1700, 1950), rng.randint(35, 95)
    job, city = skewed_choice(rng, words.JOBS), skewed_choice(rng, words.CITIES)
    facts = [
        f"{name}（{born}年－{born + age}年），{skewed_choice(rng, words.PROVINCES)}人，{job}。",
        f"{he}{born}年出生在{city}。",
        *GRAMMAR.expand_several("life_detail", rng.randint(3, 6), rng, {"he": he, "name": full_name(rng)}),
        f"{born + age}年，{he}在{skewed_choice(rng, words.CITIES)}去世，活了{age}岁。",
    ]
    return name, "".join(facts)


def story(rng: random.Random) -> tuple[str, str]:
    """A story about two people, a thing and an animal."""
    bindings = {
        "hero": full_name(rng),
        "friend": "小" + rng.choice(words.GIVEN_NAMES)[-1],
        "animal": skewed_choice(rng, words.ANIMALS),
        "thing": skewed_choice(rng, words.THINGS),
        "he": pronoun(rng),
    }
    paragraphs = [GRAMMAR.expand("story_opening", rng, bindings)]
    for _ in range(rng.randint(2, 5)):
        paragraphs.append("".join(GRAMMAR.expand_several("story_middle", rng.randint(2, 5), rng, bindings)))
    paragraphs.append(GRAMMAR.expand("story_ending", rng, bindings))
    return f"{bindings['hero']}和{bindings['animal']}", "\n".join(paragraphs)


def exercises(rng: random.Random) -> tuple[str, str]:
    """Arithmetic in words with right answers."""
    blocks = []
    for number in range(1, rng.randint(4, 8)):
        name, food = full_name(rng), skewed_choice(rng, words.FOODS)
        first, second = rng.randint(2, 30), rng.randint(2, 20)
        if rng.random() < 0.5:
            question = f"{name}买了{first}斤{food}，每斤{second}元，一共要付多少元？"
            answer = f"{first}乘以{second}等于{first * second}，所以一共要付{first * second}元。"
        else:
            question = f"{name}有{first + second}斤{food}，吃了{second}斤，还剩多少斤？"
            answer = f"{first + second}减去{second}等于{first}，所以还剩{first}斤。"
        blocks.append(f"第{number}题：{question}\n答：{answer}")
    return "数学练习", "\n".join(blocks)


GENERATORS: tuple[TitledGenerator, ...] = (news, county, life, story, exercises)
