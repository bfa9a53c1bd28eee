"""Three invented rows per task of TRACE and of the SECURA-like stream, with the exact prompt of the first.

The first row of each is such that a wrong answer scores 0, also under the graded metrics. SARI is the exception
(trace_20minuten): what an answer rightly deletes counts, even where it writes nothing.
"""

from typing import Any

from task_rows import Case

MATHS = "Solve the following math problem.\nQuestion:\n{}\nAnswer:"
SIMPLIFY = "Provide a simplified version of the following paragraph in German.\n\nParagraph:\n{}\n\nSimplification:"
SUMMARISE = "Write a summary of the following meeting transcripts.\nMeeting transcripts:\n{}\nSummary:"


def pairs(*rows: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"prompt": prompt, "answer": answer} for prompt, answer in rows]


def science(question: str, choices: list[str], answer: int, **more: str) -> dict[str, Any]:
    about = {
        "task": "closed choice",
        "grade": "grade2",
        "subject": "natural science",
        "topic": "",
        "category": "",
        "skill": "",
    }
    return {
        "question": question,
        "choices": choices,
        "answer": answer,
        "hint": "",
        "lecture": "",
        "solution": "",
        **about,
        **more,
    }


def closed(*rows: tuple[str, list[str], int]) -> list[dict[str, Any]]:
    return [
        {
            "idx": i,
            "inputs": inputs,
            "targets": [choices[right]],
            "multiple_choice_targets": choices,
            "multiple_choice_scores": [int(place == right) for place in range(len(choices))],
        }
        for i, (inputs, choices, right) in enumerate(rows)
    ]


def free(*rows: tuple[str, list[str]]) -> list[dict[str, Any]]:
    return [
        {"idx": i, "inputs": inputs, "targets": targets, "multiple_choice_targets": [], "multiple_choice_scores": []}
        for i, (inputs, targets) in enumerate(rows)
    ]


TRACE = {
    "trace_meetingbank": Case(
        rows=pairs(
            (SUMMARISE.format("Item four. All in favour. Aye. It passes."), "AN ORDINANCE about street lamps."),
            (SUMMARISE.format("Item five. No. It fails."), "A motion to move the market."),
            (SUMMARISE.format("We stand adjourned."), "Adjournment."),
        ),
        prompt="Write a summary of the following meeting transcripts.\n"
        "Meeting transcripts:\nItem four. All in favour. Aye. It passes.\nSummary:",
        answer="AN ORDINANCE about street lamps.",
        wrong="Nothing happened.",
    ),
    "trace_py150": Case(
        rows=pairs(
            ("<s> import os <EOL> def home ( ) : <EOL> path = os . getcwd ( ) <EOL>", "return path"),
            ("<s> LEVEL = <NUM_LIT> <EOL>", "print ( '<STR_LIT:level>' , LEVEL ) "),
            ("<s> try : <EOL> import json <EOL>", "except ImportError :"),
        ),
        prompt="<s> import os <EOL> def home ( ) : <EOL> path = os . getcwd ( ) <EOL>",
        answer="return path",
        wrong="'<STR_LIT>' , <NUM_LIT>",
    ),
    "trace_scienceqa": Case(
        rows=[
            science(
                "Which of these is a solid?",
                ["the air in a tent", "a block of ice"],
                1,
                lecture="A solid keeps its shape.",
                solution="A block of ice keeps its shape.",
            ),
            science(
                "What can Ana test?",
                ["heat", "taste", "price"],
                0,
                hint="Ana has a stove.",
                solution="Look at the stove.",
            ),
            science("Which is a verb?", ["run", "red"], 0),
        ],
        prompt="Choose an answer for the following question and give your reasons.\n\nQuestion:\nWhich of these is a solid?\n\n"
        "Choices:\nA. the air in a tent\nB. a block of ice\n\nAnswer:",
        answer="B\nA solid keeps its shape.A block of ice keeps its shape.",
        wrong="A\nAir keeps its shape.",
        malformed="Because a block of ice keeps its shape.",
    ),
    "trace_numglue_cm": Case(
        rows=pairs(
            (MATHS.format("Mira trains every second day from Monday on. When is her third session?"), "Friday"),
            (MATHS.format("How many eyes have 3 frogs?"), "6"),
            (MATHS.format("How many wheels have 4 carts?"), "16"),
        ),
        prompt="Solve the following math problem.\nQuestion:\n"
        "Mira trains every second day from Monday on. When is her third session?\nAnswer:",
        answer="Friday",
        wrong="friday",
    ),
    "trace_20minuten": Case(
        rows=pairs(
            (SIMPLIFY.format("Der Rat beschloss am Dienstag eine Abgabe"), "Der Rat beschloss am Dienstag mehr Geld\n"),
            (SIMPLIFY.format("Die Bahn fährt wegen Schnee nicht"), "Es hat Schnee"),
            (SIMPLIFY.format("Zahlreiche Gäste protestierten"), "Viele Leute waren wütend"),
        ),
        prompt="Provide a simplified version of the following paragraph in German.\n\n"
        "Paragraph:\nDer Rat beschloss am Dienstag eine Abgabe\n\nSimplification:",
        answer="Der Rat beschloss am Dienstag mehr Geld",
        wrong="Niemand weiss bisher etwas Neues",
    ),
}

DEDUCTION = "The following paragraphs each describe a set of three objects arranged in a fixed order.\n\n{}"
TRACKING = "Ana, Ben and Cleo are playing a game.\n\nFirst, Ana and Ben swap balls. At the end of the game, {} has the "
BALLS = ["red ball.", "white ball.", "blue ball."]
PROVERB = "Narrative: {}\nThis narrative is a good illustration of the following proverb:"
PROVERBS = ["Look before you leap", "Seeing is believing", "Time is money"]
CLAIM = 'Passage: {} {} people live there.\nClaim: "It is a town."\nTrue, False, or Neither? '

SECURA_LIKE = {
    "bigbench_logical_deduction": Case(
        rows=closed(
            (
                DEDUCTION.format("An owl is left of a crow."),
                ["The owl is the leftmost.", "The crow is the leftmost."],
                0,
            ),
            (DEDUCTION.format("A truck is newer than a bus."), ["The truck is older.", "The bus is older."], 1),
            (DEDUCTION.format("Rob finished above Joe."), ["Rob finished first.", "Joe finished first."], 0),
        ),
        prompt="The following paragraphs each describe a set of three objects arranged in a fixed order.\n\n"
        "An owl is left of a crow.\nchoice: The owl is the leftmost.\nchoice: The crow is the leftmost.\nAnswer:",
        answer="The owl is the leftmost.",
        wrong="The crow is the leftmost.",
        malformed="the owl",
    ),
    "bigbench_question_selection": Case(
        rows=closed(
            *(
                (
                    f"Short Answer: {answer} Context: Ida dug the well in {place}.\n"
                    "  choice: Where is the well?\n  choice: Who dug it?\nChoose the appropriate question.",
                    ["Where is the well?", "Who dug it?"],
                    right,
                )
                for answer, place, right in (("Lund", "Lund", 0), ("Ida", "Lund", 1), ("Oslo", "Oslo", 0))
            )
        ),
        prompt="Short Answer: Lund Context: Ida dug the well in Lund.\n"
        "  choice: Where is the well?\n  choice: Who dug it?\nChoose the appropriate question.",
        answer="Where is the well?",
        wrong="Who dug it?",
        malformed="Lund",
    ),
    "bigbench_abstract_narrative_understanding": Case(
        rows=closed(
            (PROVERB.format("Ben signed without reading."), PROVERBS, 0),
            (PROVERB.format("Ida trusts her eyes only."), PROVERBS, 1),
            (PROVERB.format("Tom bills by the minute."), PROVERBS, 2),
        ),
        prompt="Narrative: Ben signed without reading.\nThis narrative is a good illustration of the following proverb:\n"
        "choice: Look before you leap\nchoice: Seeing is believing\nchoice: Time is money\nAnswer:",
        answer="Look before you leap",
        wrong="Time is money",
        malformed="Haste makes waste",
    ),
    "bigbench_goal_step_wikihow": Case(
        rows=closed(
            *(
                (
                    f"Q: The most reasonable step of '{goal}' is \n  choice: Boil water\n  choice: Buy a tent \nA: ",
                    ["Boil water", "Buy a tent "],
                    right,
                )
                for goal, right in (("Make Tea", 0), ("Go Camping", 1), ("Cook Pasta", 0))
            )
        ),
        prompt="Q: The most reasonable step of 'Make Tea' is \n  choice: Boil water\n  choice: Buy a tent \nA:",
        answer="Boil water",
        wrong="Buy a tent",
        malformed="Drink it",
    ),
    "bigbench_winowhy": Case(
        rows=closed(
            *(
                (
                    f"The lid does not fit: it is too {size}. The 'it' is the lid because {why}.\nThe above reasoning is ",
                    words,
                    right,
                )
                for words in [["correct", "incorrect"]]
                for size, why, right in (
                    ("big", "lids can be big", 0),
                    ("small", "lids are blue", 1),
                    ("flat", "lids sing", 1),
                )
            )
        ),
        prompt="The lid does not fit: it is too big. The 'it' is the lid because lids can be big.\nThe above reasoning is",
        answer="correct",
        wrong="incorrect",
        malformed="right",
    ),
    "bigbench_tracking_shuffled_objects": Case(
        rows=closed(*((TRACKING.format(name), BALLS, right) for name, right in (("Ana", 1), ("Ben", 0), ("Cleo", 2)))),
        prompt="Ana, Ben and Cleo are playing a game.\n\nFirst, Ana and Ben swap balls. At the end of the game, Ana has the\n"
        "choice: red ball.\nchoice: white ball.\nchoice: blue ball.\nAnswer:",
        answer="white ball.",
        wrong="red ball.",
        malformed="white",
    ),
    "bigbench_vitaminc_fact_verification": Case(
        rows=closed(
            *(
                (CLAIM.format(place, count), ["True", "False", "Neither"], right)
                for place, count, right in (("Lund.", "40 000", 0), ("Nul.", "No", 1), ("Ys.", "Some", 2))
            )
        ),
        prompt='Passage: Lund. 40 000 people live there.\nClaim: "It is a town."\nTrue, False, or Neither?',
        answer="True",
        wrong="Neither",
        malformed="true",
    ),
    "bigbench_disfl_qa": Case(
        rows=free(
            ("Question: Who dug no wait filled the well ?  \ncontext: Ida filled it . \nAnswer: ", ["Ida"]),
            ("Question: When uh where is it ?  \ncontext: It is in Oslo . \nAnswer: ", ["in Oslo"]),
            ("Question: What is no who is Tom ?  \ncontext: Tom is a baker . \nAnswer: ", ["a baker", "baker"]),
        ),
        prompt="Question: Who dug no wait filled the well ?  \ncontext: Ida filled it . \nAnswer:",
        answer="Ida",
        wrong="Ida filled it",
    ),
    "bigbench_linguistics_puzzles": Case(
        rows=free(
            ("Other: xivu moka English: a tall dog\nOther: xivu rado English: ", ["a tall crow"]),
            ("English: a slow cat Other: lena piso\nEnglish: a slow dog Other: ", ["lena moka"]),
            ("Other: tuvi English: birds\nOther: tuva English: ", ["a bird"]),
        ),
        prompt="Other: xivu moka English: a tall dog\nOther: xivu rado English:",
        answer="a tall crow",
        wrong="the slow fish",
    ),
    "bigbench_object_counting": Case(
        rows=free(
            ("Q: I have a flute and two drums. How many instruments do I have?\nA: ", ["three", "3"]),
            ("Q: I have a plum and a pear. How many fruits do I have?\nA: ", ["two", "2"]),
            ("Q: I have four beds. How many objects do I have?\nA: ", ["four", "4"]),
        ),
        prompt="Q: I have a flute and two drums. How many instruments do I have?\nA:",
        answer="three",
        wrong="two",
    ),
    "news_commentary_es": Case(
        rows=[
            {"id": "0", "translation": {"en": "Who pays?", "es": "¿Quién paga?"}},
            {"id": "1", "translation": {"en": "That is not enough.", "es": "Eso no basta."}},
            {"id": "2", "translation": {"en": "Prices rise.", "es": "Los precios suben."}},
        ],
        prompt="Translate Spanish into English.\nSpanish: ¿Quién paga?\nEnglish:",
        answer="Who pays?",
        wrong="xyz",
    ),
    "alpaca": Case(
        rows=[
            {"instruction": "Name a fruit.", "input": "", "output": "A ripe pear.", "text": "..."},
            {"instruction": "Shorten this.", "input": "It was very cold.", "output": "It froze.", "text": "..."},
            {"instruction": "Greet me.", "input": "", "output": "Good morning!", "text": "..."},
        ],
        prompt="Instruction: Name a fruit.\nInput: \nResponse:",
        answer="A ripe pear.",
        wrong="Blue stones",
    ),
}

CASES: dict[str, Case] = {**TRACE, **SECURA_LIKE}
