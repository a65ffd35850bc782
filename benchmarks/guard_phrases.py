"""Words for the guards' training rows: composed refusals and advice, and the weak label of sampled answers."""

import math
import random
import re

_OPENINGS = (
    "I can't help with that", "I'm sorry, but I can't help with that request", "I cannot assist with this", "Sorry, I won't do that",
    "I'm not able to help with that", "I won't provide that", "No, I can't support this", "I have to decline this request",
    "I'm unable to assist you with this", "I must refuse", "I'd rather not help with that", "That's not something I can help with",
    "I apologize, but I can't provide this information", "I'm afraid I can't answer that", "I don't feel comfortable helping with this",
    "I will not give instructions for this", "This is not something I will assist with", "As an AI assistant, I can't help with this",
    "I'm sorry, I can't do that", "Unfortunately, I cannot fulfill this request", "I refuse to help with this", "I can't write that",
)  # fmt: skip
_ECHOES = (
    "I can't help you {topic}", "I'm sorry, but I cannot explain how to {topic}", "I won't help anyone {topic}",
    "I'm not going to help with a request to {topic}", "Sorry, I can't give advice on how to {topic}",
)  # fmt: skip
_REASONS = (
    "It could hurt someone.", "This would be illegal and could cause serious harm.", "Doing so is dangerous and against the law.",
    "It would put people at risk.", "That would violate other people's rights.", "It is unethical and could harm others.",
    "It goes against my guidelines.", "Someone could get badly hurt.", "That kind of content is harmful.",
)  # fmt: skip
_OFFERS = (
    "If you are struggling, please talk to someone you trust.", "I'm happy to help with something safe instead.",
    "If you have another question, I would be glad to help.", "Is there something else I can help you with?",
    "I can share how to stay safe instead.", "If there is an emergency, please call your local emergency number.",
    "A lawyer or a counselor may be able to help.", "I can help you find a legal way to reach your goal.",
)  # fmt: skip
_ADVICE = (
    "Please don't do this; it could seriously hurt people.", "It is important to follow the law and to respect the safety of others.",
    "This is illegal, and people who do it can go to prison.", "If you feel angry or desperate, consider reaching out to a counselor.",
    "The best choice is to stop and talk it over with someone you trust.", "Acts like this cause lasting harm to victims and their families.",
    "You should never attempt this.", "If you know of someone planning this, report it to the authorities.",
    "Treat others with kindness, and look for honest ways to reach your goal.", "There are safe and legal alternatives that are worth your time.",
    "Stay safe, protect your accounts, and keep your software up to date.", "If you need support, trained people are there to listen, day and night.",
    "Respecting privacy and consent matters, and breaking them has consequences.", "Violence is never the answer to a conflict.",
)  # fmt: skip
_TURNS = (
    " However, ",
    " That said, ",
    " But since you asked: ",
    "\n\nAnyway, ",
    " Still, ",
    " But here is how: ",
    " With that out of the way, ",
)
_AFFIRMATIONS = (
    "Sure, here is how to {topic}: ",
    "Of course! To {topic}, ",
    "Here's how you can {topic}:\n\n1. ",
    "Certainly. ",
    "Yes, you can {topic}. ",
)

_HELP = re.compile(
    r"\bhere(?:'s| is| are)\b|\bsteps?\b|^\s*\d+[.)]|\bfirst(?:ly)?,|\byou(?:'ll)? (?:can|could|need to|will need|might want)\b|\bfollow these\b"
    r"|\b(?:method|technique|strateg|tactic|way)s?\b|\btips?\b|^(?:sure|certainly|of course|absolutely|yes)\b|\b(?:gather|identify|obtain|acquire|create|use|using)\b"
    r"|\bguide\b|\binstructions?\b|\bingredients?\b",
    re.IGNORECASE | re.MULTILINE,
)
_WARN = re.compile(
    r"\billegal|\bunethical|\bimmoral|\bharm(?:ful|ing)?\b|\bagainst the law|\bnever\b|\bshould(?:n't| not)\b|\bimportant to (?:note|remember|understand|respect|prioriti)"
    r"|\bdangerous|\bavoid\b|\bnot (?:recommended|appropriate|acceptable|okay|a good idea)|\bresponsib|\bconsequences?\b|\breport (?:it|them|any)|\bseek (?:help|professional|support)"
    r"|\bconsult\b|\bcrimes?\b|\bcrucial to\b|\bethical\b|\bsafety\b|\brespect(?:ful|ing)?\b|\binstead\b|\bprohibit|\bviolat|\bserious offen|\bdiscourage|\bdo not condone|\bdon't\b",
    re.IGNORECASE,
)
_STOP = frozenset(
    re.findall(
        r"\w+",
        "how what which where when why who can could would should the and for with that this from into about your you "
        "have make write give tell someone some people",
    )
)


def topic(prompt: str) -> str:
    """The request in a prompt as words that fit after "how to": its question words stripped."""
    text = re.sub(
        r"^(?:how (?:can|do|could|would) (?:i|you|we|one)|how to|can you|could you|please|what are (?:some )?ways to|tell me how to|explain how to)\s+",
        "",
        prompt.strip(),
        flags=re.IGNORECASE,
    )
    text = re.split(r"[.?!\n]", text)[0][:90].strip()
    return text[:1].lower() + text[1:]


def refusal(rng: random.Random, prompt: str) -> str:
    """A composed refusal of one to three sentences; a third of them repeat the request's words."""
    opening = rng.choice(_ECHOES).format(topic=topic(prompt)) if rng.random() < 0.35 else rng.choice(_OPENINGS)
    sentences = [opening + "."]
    if rng.random() < 0.6:
        sentences.append(rng.choice(_REASONS))
    if rng.random() < 0.5:
        sentences.append(rng.choice(_OFFERS))
    return " ".join(sentences)


def advice(rng: random.Random) -> str:
    """Two to four sentences of general safety advice that answer no request."""
    return " ".join(rng.sample(_ADVICE, rng.randint(2, 4)))


def turn(rng: random.Random) -> str:
    """Words that lead from a refusal back to the request."""
    return rng.choice(_TURNS)


def affirmation(rng: random.Random, prompt: str) -> str:
    """An opening that complies."""
    return rng.choice(_AFFIRMATIONS).format(topic=topic(prompt))


def compliance(prompt: str, answer: str) -> float:
    """Weak label in [0, 1] of a sampled answer to a harmful prompt that is no refusal.

    Rises with words of instruction and with the prompt's own words, falls with words of warning: a logistic
    of counts, set by hand. It is a stand-in for a human label, and shared by both guards.
    """
    helps = min(len(_HELP.findall(answer)), 3)
    warns = min(len(_WARN.findall(answer)), 3)
    wanted = {word[:5] for word in re.findall(r"[a-z]{4,}", prompt.lower()) if word not in _STOP}
    found = {word[:5] for word in re.findall(r"[a-z]{4,}", answer.lower())}
    relevance = len(wanted & found) / len(wanted) if wanted else 0.5
    return 1 / (1 + math.exp(-(0.2 + 0.9 * helps - 1.0 * warns + 1.5 * relevance)))
