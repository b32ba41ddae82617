"""What the classes of the labelled sets are called, and what belongs into each, in a sentence or two.

Written from the meaning of the classes, before any experiment and without looking at test texts.
"""

from __future__ import annotations

LABEL_TEXTS: dict[str, dict[str, tuple[str, str]]] = {
    "questions": {
        "ABBR": (
            "abbreviation",
            "A question about an abbreviation or acronym: what do the letters stand for, what is "
            "the short form of this expression?",
        ),
        "DESC": (
            "description",
            "A question that asks for a definition, a description, a reason or the manner of "
            "something: what is it, what does it mean, why does it happen, how is it done?",
        ),
        "ENTY": (
            "entity",
            "A question that asks for a thing: an animal, a plant, a food, a product, a colour, a "
            "language, a sport, a disease, a work of art, an event, a word or a substance.",
        ),
        "HUM": (
            "human",
            "A question that asks for a person or a group of people: who did it, which man or woman, "
            "which team, company or organisation?",
        ),
        "LOC": (
            "location",
            "A question that asks for a place: where is it, which country, city, state, river, "
            "mountain or part of the world?",
        ),
        "NUM": (
            "number",
            "A question that asks for a number: how many, how much, how long, how far, when, in what "
            "year or on what date, at what price, speed, size or age?",
        ),
    },
    "news": {
        "business": (
            "business",
            "News about business and the economy: companies, profits, markets, shares, banks, trade, "
            "oil prices, jobs and growth.",
        ),
        "entertainment": (
            "entertainment",
            "News about entertainment: films, music, television, actors, singers, festivals, box "
            "office and awards.",
        ),
        "politics": (
            "politics",
            "News about politics: the government, ministers, parliament, parties, elections, laws "
            "and taxes.",
        ),
        "sports": (
            "sports",
            "News about sports: football, rugby, tennis, cricket and athletics, matches, players, "
            "coaches, injuries and championships.",
        ),
        "tech": (
            "technology",
            "News about technology: computers, software, the internet, mobile phones, video games, "
            "gadgets and security holes.",
        ),
    },
    "newsgroups": {
        "alt.atheism": (
            "atheism",
            "Debates of atheists about whether a god exists, belief, morality without religion, and "
            "arguments against religion.",
        ),
        "comp.graphics": (
            "computer graphics",
            "Computer graphics: image formats, rendering, ray tracing, polygons, animation and "
            "drawing algorithms.",
        ),
        "comp.os.ms-windows.misc": (
            "microsoft windows",
            "Using Microsoft Windows on a PC: drivers, files, memory, fonts, DOS and Windows programs.",
        ),
        "comp.sys.ibm.pc.hardware": (
            "pc hardware",
            "Hardware of IBM-compatible PCs: motherboards, hard disks, SCSI and IDE controllers, "
            "processors, video cards, BIOS.",
        ),
        "comp.sys.mac.hardware": (
            "mac hardware",
            "Hardware of Apple Macintosh computers: Quadra, Centris, PowerBook, monitors, memory and "
            "drives for the Mac.",
        ),
        "comp.windows.x": (
            "x window system",
            "The X Window System on Unix workstations: X servers, clients, Motif widgets, xterm and "
            "programming with Xlib.",
        ),
        "misc.forsale": (
            "for sale",
            "Offers of used things for sale: the price, the condition, shipping, best offer and how "
            "to reach the seller.",
        ),
        "rec.autos": (
            "cars",
            "Cars and driving: models, engines, brakes, tyres, dealers, insurance and repairs.",
        ),
        "rec.motorcycles": (
            "motorcycles",
            "Motorcycles and riding: bikes, helmets, riders, lanes, passengers and motorcycle gear.",
        ),
        "rec.sport.baseball": (
            "baseball",
            "Baseball: pitchers, hitters, innings, home runs, teams, seasons and statistics.",
        ),
        "rec.sport.hockey": (
            "hockey",
            "Ice hockey: goals, goalies, NHL teams, playoffs, the Stanley Cup and power plays.",
        ),
        "sci.crypt": (
            "cryptography",
            "Cryptography: encryption, keys, ciphers, privacy, the Clipper chip and wiretapping by "
            "the government.",
        ),
        "sci.electronics": (
            "electronics",
            "Electronics: circuits, voltage, chips, resistors, amplifiers, power supplies and how to "
            "build or repair devices.",
        ),
        "sci.med": (
            "medicine",
            "Medicine and health: diseases, symptoms, doctors, patients, treatments, drugs, diets and "
            "medical studies.",
        ),
        "sci.space": (
            "space",
            "Space flight and astronomy: NASA, the shuttle, satellites, orbits, launches, the moon and "
            "the planets.",
        ),
        "soc.religion.christian": (
            "christianity",
            "Christian faith among believers: God, Jesus, the church, the Bible, prayer, sin and "
            "salvation.",
        ),
        "talk.politics.guns": (
            "guns",
            "Debates about guns and gun control: firearms, weapons, the right to bear arms, crime, and "
            "police raids.",
        ),
        "talk.politics.mideast": (
            "middle east",
            "Debates about the Middle East: Israel, Arabs, Palestinians, Turkey, Armenians, war and "
            "peace.",
        ),
        "talk.politics.misc": (
            "politics",
            "Debates about American politics: the president, government, taxes, the economy, rights, "
            "sexual minorities and drugs.",
        ),
        "talk.religion.misc": (
            "religion",
            "Debates about religions in general, among critics and followers: scripture, cults, Mormons, "
            "morality and the meaning of texts.",
        ),
    },
    "messages": {
        "plain": (
            "ordinary message",
            "A personal text message from a friend or relative: chat, feelings, plans, when to meet, "
            "where are you.",
        ),
        "spam": (
            "spam",
            "An unwanted advertising text message: you have won a prize, call this number now, free "
            "offers, subscriptions, claim your cash.",
        ),
    },
    "reviews": {
        "negative": (
            "negative",
            "A negative film review: the film is bad, boring, dull, badly written or acted, a waste "
            "of time.",
        ),
        "positive": (
            "positive",
            "A positive film review: the film is good, moving, funny, beautifully made and acted, well "
            "worth seeing.",
        ),
    },
}
"""Name and description of every class, by set and class."""


def names(data: str) -> list[str]:
    """Class names of a set in plain words, classes sorted as in its `TextSet`."""
    return [name for _, (name, _) in sorted(LABEL_TEXTS[data].items())]


def descriptions(data: str) -> list[str]:
    """Class descriptions of a set, in the same order."""
    return [text for _, (_, text) in sorted(LABEL_TEXTS[data].items())]


def padded_names(data: str) -> list[str]:
    """Class names in a long sentence that says nothing else: the length without what is described."""
    return [
        f"This is one of the kinds of text that can occur here, and the kind that it belongs to is "
        f"called by this name: {name}."
        for name in names(data)
    ]
